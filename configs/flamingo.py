"""Flamingo (Alayrac et al., arXiv 2204.14198), 3B, 9B and 80B, on open parts of the same or the nearest shape.

    python -m mmjax.main --config=configs/flamingo.py           # 3B
    python -m mmjax.main --config=configs/flamingo.py:9b        # also 80b
    python -m mmjax.main --config=configs/flamingo.py:tiny      # the same path in a minute, on drawn data

What it is     a frozen encoder; a perceiver resampler (64 latents, 6 layers 1,536 wide, 16 heads of 96, squared ReLU); gated cross-attention
               before every (3b), every 4th (9b), every 7th (80b) block of the frozen LLM, beginning with the first. A text sees the
               last picture before it.
Stages         train   resampler, gated blocks and new tokens, on documents (windows of 256 tokens, 5 pictures at most) and pairs, 1 to 0.4;
                       in half of the documents a text belongs to the picture behind it. AdamW, weight decay 0.1 but not on the
                       resampler, learning rate 1e-4 after 5,000 steps of warm-up, clipped at 1, 500,000 steps
Trained (3b / 9b / 80b)   1,329,431,600; 1,614,586,896; 8,527,078,424 parameters.
Cost (80b)     1,536 TPU v4 for 15 days.
Results (9b / 80b, as published, with 0 and 32 examples)   COCO CIDEr 79.4, 106.3 / 84.3, 113.8; VQAv2 51.8, 60.4 / 56.3, 67.6.
               Ablations (3b, mean of tasks with 4 examples): no documents -17, no pairs -9.8, no gates -4.2, every 4th block -1.9
               and 66 % faster, CLIP ViT-L in the encoder's place -5.8, LLM trained as well -8.0.

Differs from the paper, whose encoder (NFNet-F6), LLMs (Chinchilla) and data (M3W, ALIGN, LTIP, VTP) are not public: CLIP ViT-L/14 at 336
pixels, Pythia-1.4B (as many blocks, as wide) and Llama-2 7B (32 blocks for 40) and 70B (as many, as wide; keys shared by heads),
MMC4 and LAION; no videos. Not published, so chosen here: rows of a step. Pictures are padded to a square, but neither flipped nor
changed in colour.
Needs these parts (in the local Hugging Face cache, or --config.model.llm.path=DIR and --config.model.vision.path=DIR) and data below data/.
"""

from mmjax.catalogue import CLIP_L_336, LLAMA2
from mmjax.config import (
    Connector,
    CrossAttention,
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

PYTHIA_1_4B = Part(
    "EleutherAI/pythia-1.4b",
    {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
)
# the LLM, every how many blocks, and the heads of the gated attention, each 128 channels wide
SIZES = {"3b": (PYTHIA_1_4B, 1, 16), "9b": (LLAMA2["7b"], 4, 32), "80b": (LLAMA2["70b"], 7, 64)}


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"size": ("3b", "9b", "80b"), "tiny": False})
    llm, every, heads = SIZES[chosen.size]
    train = Stage(
        trainable=("connector/**", "llm/plugs/**", "llm/**/new_rows"),
        sources={
            "documents": Source(
                kind="mmc4",
                path="data/mmc4/*.tar",
                weight=1.0,
                options={"max_images": 5, "labels": "after_image", "next_image": 0.5},
            ),
            "pairs": Source(kind="pairs", path="data/laion2b/*.tar", weight=0.4),
        },
        steps=500_000,
        rows=1024,
        length=256,
        tiles=5,
        optimizer=Optimizer(
            learning_rate=1e-4,
            schedule="constant",
            warmup_steps=5000,
            weight_decay=0.1,
            decay=("llm/plugs/**", "llm/**/new_rows"),
            clip_norm=1.0,
        ),
        dtype="bfloat16",
        remat="full",
    )
    recipe = Recipe(
        name=f"flamingo_{chosen.size}",
        model=Model(
            llm=llm,
            vision=CLIP_L_336,
            connector=Connector(
                kind="perceiver",
                depth=6,
                hidden_width=1536,
                latents=64,
                heads=16,
                head_dim=96,
                bias=False,
                activation="squared_relu",
            ),
            cross_attention=CrossAttention(every=every, heads=heads, head_dim=128, activation="squared_relu"),
            feature_layers=(-1,),
            image=Image(aspect="pad"),
            template="flamingo",
            new_tokens=("<EOC>", "<image>"),
            new_rows_start="normal",
            dtype="bfloat16",
        ),
        stages={"train": train},
        run=("train",),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
