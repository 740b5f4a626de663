"""doubutsu-2b (qtnx and yeswondwerr, 2024; github.com/qrsch/doubutsu): a small model one adapts with a LoRA of one's own.

    python -m mmjax.main --config=configs/doubutsu.py            # as released: every patch through a two-layer MLP (729 tokens)
    python -m mmjax.main --config=configs/doubutsu.py:concat     # 9 neighbouring patches put together (81 tokens)
    python -m mmjax.main --config=configs/doubutsu.py:pooled     # the mean patch through an MLP that makes 8 tokens
    python -m mmjax.main --config=configs/doubutsu.py:tiles      # doubutsu-next: the picture and up to 4 tiles of it (at most 3,645 tokens)
    python -m mmjax.main --config=configs/doubutsu.py:token      # what SigLIP itself makes of a picture, one token
    python -m mmjax.main --config=configs/doubutsu.py:tiny       # the same path in a minute, on drawn data

What it is     SigLIP-so400m at 378 pixels, its last block but one (27 x 27 patches), an MLP, Qwen2-1.5B-Instruct; the picture stands in
               front of everything.
Stages         pretrain  MLP alone on CC3M-595K captions
               adapt     LoRA (rank 128, alpha 256, every Linear of the LLM) on descriptions or questions of one's own; learning
                         rate 2e-4, 10 % warm-up, cosine to 0, 32 samples a step, 3 epochs. Everything else stays frozen, so that
                         --job=export --config.export.format=peft gives the small adapter one ships.
Trained        4,131,840 (pretrain, as released); 147,718,144 (adapt).
Cost           the authors adapted it on a single RTX 3090.
Results        none were published.

Not published, so chosen here: the pretraining's settings (LLaVA's), the number of patches put together and of pooled tokens.
Differs from the authors' code: the adapter is tuned on the prompt that answers are asked with (theirs: on other role names and the
tokenizer's own system text); AdamW keeps its moments in bfloat16 (theirs: in 8 bits).
Needs Qwen/Qwen2-1.5B-Instruct and google/siglip-so400m-patch14-384 (in the local Hugging Face cache, or --config.model.llm.path=DIR
and --config.model.vision.path=DIR); data below data/.
"""

from mmjax.catalogue import CC3M_595K, QWEN2_1_5B_INSTRUCT, SIGLIP_SO400M_384
from mmjax.config import (
    Adapter,
    Connector,
    Image,
    Model,
    Optimizer,
    Recipe,
    Source,
    Stage,
    parse_arguments,
    to_config_dict,
)
from mmjax.tiny import tiny

CONNECTORS = {
    "patches": Connector(kind="mlp2x_gelu"),
    "concat": Connector(kind="concat", group=9),
    "pooled": Connector(kind="pooled_mlp", pooled_tokens=8),
    "tiles": Connector(kind="mlp2x_gelu"),
    "token": Connector(kind="mlp2x_gelu"),
}
GRIDS = ("2x2", "1x2", "1x3", "1x4", "2x1", "3x1", "4x1")


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"connector": tuple(CONNECTORS), "tiny": False})
    media = {"patches": 729, "concat": 81, "pooled": 8, "tiles": 5 * 729, "token": 1}[chosen.connector]
    cut = Image(aspect="squash", size=378, tiling="anyres", grids=GRIDS)
    pretrain = Stage(
        trainable=("connector/**",),
        sources={"captions": CC3M_595K},
        epochs=1.0,
        rows=128,
        length=media + 71,  # the picture, and its caption
        packing=False,
        tiles=5 if chosen.connector == "tiles" else 1,
        template="plain",
        optimizer=Optimizer(learning_rate=1e-3),
        dtype="bfloat16",
    )
    adapt = Stage(
        trainable=("llm/**/lora_*",),
        sources={"descriptions": Source(kind="messages", path="data/docci/train.jsonl", images="data/docci/images")},
        epochs=3.0,
        rows=32,
        length=media + 295,  # the picture, and a DOCCI description
        packing=False,
        tiles=5 if chosen.connector == "tiles" else 1,
        accumulate=16,
        optimizer=Optimizer(learning_rate=2e-4, warmup_ratio=0.1, moment_dtype="bfloat16"),
        dtype="bfloat16",
    )
    recipe = Recipe(
        name=f"doubutsu_{chosen.connector}",
        model=Model(
            llm=QWEN2_1_5B_INSTRUCT,
            vision=SIGLIP_SO400M_384,
            connector=CONNECTORS[chosen.connector],
            feature_layers=(-1,) if chosen.connector == "token" else (-2,),
            pooled=chosen.connector == "token",
            image=cut if chosen.connector == "tiles" else Image(aspect="squash", size=378),
            template="doubutsu",
            adapters={"default": Adapter(rank=128, alpha=256.0, targets=("llm/layers/**",))},
            dtype="bfloat16",
        ),
        stages={"pretrain": pretrain, "adapt": adapt},
        run=("pretrain", "adapt"),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
