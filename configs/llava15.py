"""LLaVA-1.5 (Liu et al., Improved Baselines with Visual Instruction Tuning, arXiv 2310.03744), 7B and 13B.

    python -m mmjax.main --config=configs/llava15.py                 # pretrain, then full finetuning, 7B
    python -m mmjax.main --config=configs/llava15.py:13b,peft=lora   # pretrain, then LoRA, 13B
    python -m mmjax.main --config=configs/llava15.py:tiny            # the same path in a minute, on drawn data
    python -m mmjax.main --config=configs/llava15.py --job=plan      # parameters, bytes and FLOPs, without any weights

What it is     CLIP ViT-L/14 at 336 pixels, its last block but one without the class token (576 tokens), a two-layer MLP, Vicuna v1.5.
Stages         pretrain        MLP alone on 558K captions; learning rate 1e-3, 256 samples a step, 1 epoch
               finetune        MLP and LLM on the 665K instruction mixture; 2e-5, 128 samples a step, 1 epoch
               finetune_lora   LoRA (rank 128, alpha 256, dropout 0.05, every Linear of the LLM but the head) at 2e-4, MLP at 2e-5
               AdamW without weight decay, 3 % warm-up, cosine to 0, bfloat16 activations.
Trained (7B)   20,979,712; 6,759,395,328; 340,795,392 parameters.
Cost (7B)      16.6, 34.7 and 25.1 TFLOP a sample; the authors took 3.5 and 10 hours on 8 A100s.
Results (7B / 13B, as published)   VQAv2 78.5 / 80.0, GQA 62.0 / 63.3, TextVQA 58.2 / 61.3, POPE 85.9 / 85.9, MMBench 64.3 / 67.7;
               with LoRA 79.1 / 80.0, 63.0 / 63.3, 58.2 / 60.2, 86.4 / 86.7, 66.1 / 68.5.

Needs lmsys/vicuna-7b-v1.5 and openai/clip-vit-large-patch14-336 (in the local Hugging Face cache, or --config.model.llm.path=DIR and
--config.model.vision.path=DIR), and the data of the LLaVA-1.5 repository below data/.
Differs from the authors' scripts: finetuning packs samples into rows of 2,048 tokens (56 rows hold about 128 samples) where they pad;
pretraining pads pictures to a square as finetuning does, where they crop.
"""

from mmjax.config import (
    Connector,
    Lora,
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
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLM = {
    "7b": Part("lmsys/vicuna-7b-v1.5", VICUNA),
    "13b": Part(
        "lmsys/vicuna-13b-v1.5",
        {
            **VICUNA,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
        },
    ),
}
CLIP = Part(
    "openai/clip-vit-large-patch14-336",
    {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
)


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"size": ("7b", "13b"), "peft": ("full", "lora"), "tiny": False})
    lora = chosen.peft == "lora"
    pretrain = Stage(
        trainable=("connector/**",),
        sources={"captions": Source(path="data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", images="data/LLaVA-Pretrain/images")},
        epochs=1.0,
        rows=256,
        length=640,  # 576 for the picture, the rest for its caption
        packing=False,
        template="plain",
        optimizer=Optimizer(learning_rate=1e-3),
        dtype="bfloat16",
        remat="full",
    )
    finetune = Stage(
        trainable=("llm/**", "connector/**"),
        sources={"mixture": Source(path="data/llava_v1_5_mix665k.json", images="data/llava_v1_5_images")},
        epochs=1.0,
        rows=56,
        length=2048,
        tiles=3,
        optimizer=Optimizer(learning_rate=2e-5),
        dtype="bfloat16",
        remat="full",
    )
    finetune_lora = Stage(
        trainable=("llm/**/lora_*", "connector/**"),
        sources=finetune.sources,
        epochs=1.0,
        rows=56,
        length=2048,
        tiles=3,
        optimizer=Optimizer(learning_rate=2e-4, multipliers={"connector/**": 0.1}),
        dtype="bfloat16",
        remat="full",
    )
    recipe = Recipe(
        name=f"llava15_{chosen.size}" + ("_lora" if lora else ""),
        model=Model(
            llm=LLM[chosen.size],
            vision=CLIP,
            connector=Connector(kind="mlp2x_gelu"),
            feature_layers=(-2,),
            template="v1",
            adapters={"default": Lora(rank=128, alpha=256.0, dropout=0.05, targets=("llm/layers/**",))} if lora else {},
            dtype="bfloat16",
        ),
        stages={"pretrain": pretrain, **({"finetune_lora": finetune_lora} if lora else {"finetune": finetune})},
        run=("pretrain", "finetune_lora" if lora else "finetune"),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
