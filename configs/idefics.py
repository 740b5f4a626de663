"""IDEFICS (Laurençon et al., OBELICS, arXiv 2306.16527), 9B and 80B: Flamingo on LLaMA and OpenCLIP, then tuned on instructions.

    python -m mmjax.main --config=configs/idefics.py                        # 9B: base, then instruct
    python -m mmjax.main --config=configs/idefics.py:80b                    # 80B
    python -m mmjax.main --config=configs/idefics.py:80b --config.run=base  # the first stage alone
    python -m mmjax.main --config=configs/idefics.py:tiny                   # the same path in a minute, on drawn data

What it is     OpenCLIP ViT-H/14 at 224 pixels, all 257 positions before the last norm; a perceiver resampler (64 latents, 6 layers, 16 heads
               of 96, ReLU, norms of queries and keys); before every 4th block of LLaMA, beginning with the first, a gated block like LLaMA's
               own (RMS norms, SwiGLU) whose attention to the last picture norms queries and keys.
               A picture is <fake_token_around_image><image><fake_token_around_image> in the text.
Stages         base       resampler, gated blocks and new tokens on OBELICS, Wikipedia, LAION and PMD; AdamW (0.9, 0.999), weight decay
                          0.1, clipped at 1, 2,000 steps of warm-up, linear: 1e-5 to 6e-6 in 65,000 steps of 1.31M tokens (9b), 5e-5 to
                          3e-5 in 37,500 steps of 3.67M (80b)
               instruct   everything, the encoder too, on instructions, dialogues and OBELICS; 1e-5, 205K tokens a step (9b), 3e-6,
                          613K (80b), rows of 2,048
Trained (9b / 80b)   1,560,506,128 and 14,051,433,256 (base); 8,929,687,824 and 79,967,860,008 (instruct) parameters.
Cost (9b / 80b)      128 A100 for 350 hours / 512 for 28 days; instruct 128 for 70 hours / 384 for 72.
Results (9b / 80b, as published, with 0 and 32 examples)   VQAv2 50.9, 57.9 / 60.0, 65.9; COCO CIDEr 46.0, 98.0 / 91.8, 116.6;
               80b-instruct with 32: 68.8, 123.2.

Needs LLaMA 1 and laion/CLIP-ViT-H-14-laion2B-s32B-b79K (in the local Hugging Face cache, or --config.model.llm.path=DIR and
--config.model.vision.path=DIR), and the data sets below data/.
Differs from the authors' training: shares of the mixture are of samples (theirs: of tokens), no z-loss; steps of instruct, pictures in
a row and the shares of further instruction sets were not published and are chosen here.
"""

from mmjax.catalogue import CLIP_H_224, LLAMA1
from mmjax.config import (
    Connector,
    CrossAttention,
    Image,
    Mesh,
    Model,
    Optimizer,
    Recipe,
    Source,
    Stage,
    parse_arguments,
    to_config_dict,
)
from mmjax.tiny import tiny

# size: steps, rows and learning rate of base; rows and learning rate of instruct
SETTINGS = {"9b": (65_000, 1280, 1e-5, 100, 1e-5), "80b": (37_500, 3584, 5e-5, 300, 3e-6)}


def documents(path: str, weight: float) -> Source:
    return Source(kind="obelics", path=path, images="data/obelics/images", weight=weight)


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"size": ("9b", "80b"), "tiny": False})
    steps, rows, rate, instruct_rows, instruct_rate = SETTINGS[chosen.size]
    base = Stage(
        trainable=("connector/**", "llm/plugs/**", "llm/**/new_rows"),
        sources={
            "obelics": documents("data/obelics/*.parquet", 73.85),
            "wikipedia": documents("data/wikipedia/*.parquet", 6.15),
            "laion": Source(kind="pairs", path="data/laion2b/*.tar", weight=17.18),
            "pmd": Source(kind="pairs", path="data/pmd/*.tar", weight=2.82),
        },
        steps=steps,
        rows=rows,
        length=1024,
        tiles=16,
        optimizer=Optimizer(
            learning_rate=rate,
            schedule="linear",
            warmup_steps=2000,
            end_factor=0.6,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        dtype="bfloat16",
        remat="full",
    )
    instruct = Stage(
        trainable=("llm/**", "vision/**", "connector/**"),
        sources={
            "m3it": Source(path="data/m3it.json", images="data/m3it", weight=7.7),
            "llava": Source(path="data/llava_instruct_158k.json", images="data/coco/train2014", weight=5.9),
            "svit": Source(path="data/svit.json", images="data/visual_genome", weight=11.4),
            "ultrachat": Source(kind="messages", path="data/ultrachat.jsonl", weight=29.1),
            "obelics": documents("data/obelics/*.parquet", 30.7),
        },
        steps=10_000,
        rows=instruct_rows,
        length=2048,
        tiles=16,
        optimizer=Optimizer(learning_rate=instruct_rate, schedule="constant", clip_norm=1.0),
        dtype="bfloat16",
        remat="full",
    )
    recipe = Recipe(
        name=f"idefics_{chosen.size}",
        model=Model(
            llm=LLAMA1[{"9b": "7b", "80b": "65b"}[chosen.size]],
            vision=CLIP_H_224,
            connector=Connector(
                kind="perceiver",
                depth=6,
                latents=64,
                heads=16,
                head_dim=96,
                bias=False,
                activation="relu",
                qk_norm=True,
            ),
            cross_attention=CrossAttention(every=4, block="llm", qk_norm=True),
            feature_layers=(-1,),
            keep_class_token=True,
            image=Image(aspect="squash"),
            template="idefics",
            new_tokens=("<fake_token_around_image>", "<image>", "<end_of_utterance>"),
            new_rows_start="normal",
            dtype="bfloat16",
        ),
        stages={"base": base, "instruct": instruct},
        run=("base", "instruct"),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
