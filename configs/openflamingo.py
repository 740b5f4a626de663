"""OpenFlamingo (Awadalla et al., arXiv 2308.01390), 3B, 4B and 9B: Flamingo with open parts and open data.

    python -m mmjax.main --config=configs/openflamingo.py          # 9B, on MPT-7B
    python -m mmjax.main --config=configs/openflamingo.py:4b       # on RedPajama-3B; also 3b, on MPT-1B
    python -m mmjax.main --config=configs/openflamingo.py:tiny     # the same path in a minute, on drawn data
    python -m mmjax.main --config=configs/openflamingo.py --job=plan      # parameters, bytes and FLOPs, without any weights

What it is     CLIP ViT-L/14 at 224 pixels, its patches before the last norm (256), a perceiver resampler (64 latents, 6 layers, 8 heads
               of 64, GELU), gated cross-attention (8 heads of 64) before every 4th (4b: 2nd, 3b: every) block of the LLM, the 4th
               being the first. A text sees the last picture before it.
Stages         train   resampler, gated blocks and the embeddings of <image> and <|endofchunk|> (4b: these stay as they were drawn) on 60M
                       documents of MMC4 (6 pictures at most, similarity 0.24 and more) and 120M pairs of LAION, whose loss counts 0.2;
                       AdamW, weight decay 0.1 on the gated blocks alone, learning rate 1e-4 after 1,875 steps of warm-up, clipped at 1
Trained (9b / 4b / 3b)   1,178,843,152; 960,763,936; 944,023,600 parameters.
Cost           64 GPUs.
Results (9b / 4b / 3b, as published, with 0 and 32 examples)   COCO CIDEr 79.5, 99.5 / 76.7, 95.1 / 74.9, 93.0;
               VQAv2 52.7, 53.3 / 45.1, 43.0 / 44.6, 47.0.

Needs openai/clip-vit-large-patch14, a language model in transformers' layout, whose vocabulary the two tokens join (in the local Hugging
Face cache, or --config.model.llm.path=DIR and --config.model.vision.path=DIR), and MMC4 and LAION-2B below data/.
Not published in numbers, so chosen here: rows of a step. Differs from the authors' code: their two losses are means over the documents
and over the pairs, ours is one mean in which a pair's tokens count 0.2; pairs are packed into rows of 256 tokens.
A checkpoint.pt of theirs is loaded by mmjax.load (see mmjax.families.open_flamingo); --job=export --config.export.format=original
writes their layout.
"""

from mmjax.catalogue import CLIP_L_224, MPT_7B
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

MPT_1B = Part("anas-awadalla/mpt-1b-redpajama-200b", {**MPT_7B.config, "d_model": 2048, "n_heads": 16, "n_layers": 24})
REDPAJAMA_3B = Part(
    "togethercomputer/RedPajama-INCITE-Base-3B-v1",
    {
        "model_type": "gpt_neox",
        "vocab_size": 50432,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rotary_pct": 1.0,
        "rotary_emb_base": 10000,
        "use_parallel_residual": False,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
)
LLM = {"9b": (MPT_7B, 4), "4b": (REDPAJAMA_3B, 2), "3b": (MPT_1B, 1)}
MMC4 = Source(
    kind="mmc4",
    path="data/mmc4/*.tar",
    weight=1.0,
    options={
        "by": "assignment",
        "min_similarity": 0.24,
        "min_bytes": 10_000,
        "max_images": 6,
        "drop_single": 0.5,
        "labels": "after_image",
    },
)
LAION = Source(kind="pairs", path="data/laion2b/*.tar", weight=2.0, loss_weight=0.2)


def stage(trainable: tuple[str, ...]) -> Stage:
    """The one stage of training."""
    return Stage(
        trainable=trainable,
        sources={"mmc4": MMC4, "laion": LAION},
        epochs=1.0,
        rows=1024,
        length=256,
        tiles=6,
        template="openflamingo",
        optimizer=Optimizer(
            learning_rate=1e-4,
            schedule="constant",
            warmup_steps=1875,
            weight_decay=0.1,
            decay=("llm/plugs/**",),
            clip_norm=1.0,
        ),
        augment=("flip",),
        dtype="bfloat16",
        remat="full",
    )


def model(llm: Part, every: int, new_tokens: tuple[str, ...] = ("<|endofchunk|>", "<image>")) -> Model:
    return Model(
        llm=llm,
        vision=CLIP_L_224,
        connector=Connector(kind="perceiver", depth=6, latents=64, heads=8, head_dim=64, bias=False),
        cross_attention=CrossAttention(every=every, first=every - 1, heads=8, head_dim=64),
        feature_layers=(-1,),
        image=Image(aspect="crop"),
        template="openflamingo",
        new_tokens=new_tokens,
        new_rows_start="normal",
        dtype="bfloat16",
    )


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"size": ("9b", "4b", "3b"), "tiny": False})
    llm, every = LLM[chosen.size]
    rows = () if chosen.size == "4b" else ("llm/embed/new_rows",)
    recipe = Recipe(
        name=f"openflamingo_{chosen.size}",
        model=model(llm, every),
        stages={"train": stage(("connector/**", "llm/plugs/**", *rows))},
        run=("train",),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
