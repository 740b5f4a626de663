"""LLaVA-NeXT, that is LLaVA-1.6 (Liu et al., https://llava-vl.github.io/blog/2024-01-30-llava-next), around Vicuna 7B and 13B and Mistral 7B.

    python -m mmjax.main --config=configs/llava_next.py                 # both stages, Vicuna 7B
    python -m mmjax.main --config=configs/llava_next.py:13b             # Vicuna 13B
    python -m mmjax.main --config=configs/llava_next.py:mistral         # Mistral 7B Instruct
    python -m mmjax.main --config=configs/llava_next.py:tiny            # the same path in a minute, on drawn data
    python -m mmjax.main --config=configs/llava_next.py --job=plan      # parameters, bytes and FLOPs, without any weights

What it is     LLaVA-1.5 with pictures in tiles: each is fitted into one of five grids of up to 4 tiles of 336 pixels, beside an overview
               of the whole. The tiles' features become one map, less its black borders, with a learned newline behind every row:
               up to 2,928 tokens a picture.
Stages         pretrain   MLP alone on 558K captions, one tile a picture, as LLaVA-1.5; 1e-3, 256 samples a step, 1 epoch
               finetune   encoder, MLP, newline and LLM on about 760K instructions; 1e-5, the encoder 2e-6, 1 epoch
               AdamW without weight decay, 3 % warm-up, cosine to 0, bfloat16 activations.
Trained        20,979,712 and 7,062,906,880 parameters with Vicuna 7B; 31,467,520 and 13,350,844,416 with 13B; 20,979,712 and
               7,566,223,360 with Mistral.
Cost           17.4 and 179 TFLOP a sample of a large square picture (Vicuna 7B); the authors' 34B model took about a day on 32 A100s.
Results (Vicuna 7B / 13B / Mistral 7B, as published)   VQAv2 81.8 / 82.8 / 82.2, GQA 64.2 / 65.4 / 64.8, TextVQA 64.9 / 67.1 / 65.7,
               POPE 86.5 / 86.2 / 86.7, MMBench 67.4 / 70.0 / 68.7, MMMU 35.8 / 36.2 / 35.3.

Needs the language model (lmsys/vicuna-7b-v1.5, lmsys/vicuna-13b-v1.5 or mistralai/Mistral-7B-Instruct-v0.2) and
openai/clip-vit-large-patch14-336 (in the local Hugging Face cache, or --config.model.llm.path=DIR and --config.model.vision.path=DIR), the
captions of LLaVA-1.5 and a mixture of instructions in LLaVA's format below data/.
Differs from the authors' scripts: the rates are those of their later script for Llama-3 and Qwen; 128 rows of 4,096 tokens are ours.
Rows are packed where they pad; pretraining pads pictures to a square where they crop; a picture's tokens are counted as transformers
counts them, not as LLaVA's own code does, which for a few sizes keeps two rows less.
"""

from mmjax.catalogue import CLIP_L_336, LCS_558K, VICUNA_V15
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

MISTRAL = Part(
    "mistralai/Mistral-7B-Instruct-v0.2",
    {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
LLM = {**VICUNA_V15, "mistral": MISTRAL}


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"llm": ("7b", "13b", "mistral"), "tiny": False})
    pretrain = Stage(
        trainable=("connector/layers_*/**",),
        sources={"captions": LCS_558K},
        epochs=1.0,
        rows=256,
        length=640,  # 576 for the picture, the rest for its caption
        packing=False,
        tiled=False,
        template="plain",
        optimizer=Optimizer(learning_rate=1e-3),
        dtype="bfloat16",
        remat="full",
    )
    finetune = Stage(
        trainable=("vision/**", "llm/**", "connector/**"),
        sources={"mixture": Source(path="data/llava_next_760k.json", images="data/llava_next_images")},
        epochs=1.0,
        rows=128,
        length=4096,
        tiles=5,
        optimizer=Optimizer(learning_rate=1e-5, multipliers={"vision/**": 0.2}),
        dtype="bfloat16",
        remat="full",
    )
    recipe = Recipe(
        name=f"llava_next_{chosen.llm}",
        model=Model(
            llm=LLM[chosen.llm],
            vision=CLIP_L_336,
            connector=Connector(kind="mlp2x_gelu", merge="spatial_unpad"),
            feature_layers=(-2,),
            image=Image(tiling="anyres"),
            template="mistral_instruct" if chosen.llm == "mistral" else "v1",
            dtype="bfloat16",
        ),
        stages={"pretrain": pretrain, "finetune": finetune},
        run=("pretrain", "finetune"),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
