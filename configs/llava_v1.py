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

from mmjax.catalogue import CC3M_595K, CLIP_L_224, INSTRUCT_158K, VICUNA_V13
from mmjax.config import (
    Connector,
    Image,
    Mesh,
    Model,
    Optimizer,
    Recipe,
    Stage,
    parse_arguments,
    to_config_dict,
)
from mmjax.tiny import tiny


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"size": ("13b", "7b"), "tiny": False})
    pretrain = Stage(
        trainable=("connector/**",),
        sources={"captions": CC3M_595K},
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
        sources={"instruct": INSTRUCT_158K},
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
            llm=VICUNA_V13[chosen.size],
            vision=CLIP_L_224,
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
