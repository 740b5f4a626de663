"""LLaVA (Liu et al., Visual Instruction Tuning, arXiv 2304.08485), 13B and 7B.

    python -m mmjax.main --config=configs/llava_v1.py         # pretrain, then finetuning, 13B
    python -m mmjax.main --config=configs/llava_v1.py:7b      # with Vicuna 7B
    python -m mmjax.main --config=configs/llava_v1.py:tiny    # the same path in a minute, on drawn data

What it is     CLIP ViT-L/14 at 224 pixels, its last block but one without the class token (256 tokens), one Linear, Vicuna v1.3.
Stages         pretrain        Linear alone on CC3M-595K captions; learning rate 2e-3, 128 samples a step, 1 epoch
               finetune        Linear and LLM on LLaVA-Instruct-158K; 2e-5, 32 samples a step, 3 epochs
               AdamW without weight decay, 3 % warm-up, cosine to 0, bfloat16 activations.
Trained (13B)  5,248,000 (pretrain); the LLM's 13,015,864,320 beside them (finetune).
Cost           the authors pretrained in about 4 hours (13B) or 2 hours (7B) on 8 A100s.
Results (13B, as published)   85.1 % of text-only GPT-4 on LLaVA-Bench (COCO), 67.3 % in the wild; ScienceQA 90.92 (7B: 1.08 less).

Needs lmsys/vicuna-13b-v1.3 and openai/clip-vit-large-patch14 (in the local Hugging Face cache, or --config.model.llm.path=DIR and
--config.model.vision.path=DIR), and the data of the LLaVA repository below data/.
Differs from the authors' scripts: finetuning packs samples into rows of 2,048 tokens, counting on about 500 for each.
"""

from mmjax.config import (
    Connector,
    Image,
    Mesh,
    Model,
    Optimizer,
    Part,
    Recipe,
    Source,
    Stage,
    parse_arguments,
    to_config_dict,
)
from mmjax.tiny import tiny

VICUNA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLM = {
    "13b": Part("lmsys/vicuna-13b-v1.3", VICUNA),
    "7b": Part(
        "lmsys/vicuna-7b-v1.3",
        {
            **VICUNA,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
}
CLIP = Part(
    "openai/clip-vit-large-patch14",
    {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
)


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"size": ("13b", "7b"), "tiny": False})
    pretrain = Stage(
        trainable=("connector/**",),
        sources={"captions": Source(path="data/LLaVA-CC3M-Pretrain-595K/chat.json", images="data/LLaVA-CC3M-Pretrain-595K/images")},
        epochs=1.0,
        rows=128,
        length=320,  # 256 for the picture, the rest for its caption
        packing=False,
        template="plain",
        optimizer=Optimizer(learning_rate=2e-3),
        dtype="bfloat16",
        remat="full",
    )
    finetune = Stage(
        trainable=("llm/**", "connector/**"),
        sources={"instruct": Source(path="data/llava_instruct_158k.json", images="data/coco/train2014")},
        epochs=3.0,
        rows=8,
        length=2048,
        tiles=6,
        optimizer=Optimizer(learning_rate=2e-5),
        dtype="bfloat16",
        remat="full",
    )
    recipe = Recipe(
        name=f"llava_v1_{chosen.size}",
        model=Model(
            llm=LLM[chosen.size],
            vision=CLIP,
            connector=Connector(kind="linear"),
            feature_layers=(-2,),
            image=Image(aspect="crop"),
            template="llava_v1",
            dtype="bfloat16",
        ),
        stages={"pretrain": pretrain, "finetune": finetune},
        run=("pretrain", "finetune"),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
