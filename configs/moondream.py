"""moondream 1 and 2 (vikhyat, from January 2024 on; github.com/vikhyat/moondream): 1.6 billion parameters that see.

    python -m mmjax.main --config=configs/moondream.py          # moondream 1: pretrain the connector, then connector and LLM
    python -m mmjax.main --config=configs/moondream.py:v2       # moondream 2, as its code has been since 2025
    python -m mmjax.main --config=configs/moondream.py:tiny     # the same path in a minute, on drawn data

What it is     SigLIP-so400m with its final norm (27 x 27 patches, all become tokens), Phi-1.5.
               v1  a residual MLP (1152 -> 8192 -> 2048, norm, then x + MLP(x) through 8192); `<image>` and `</image>` stand as text
                   around the picture.
               v2  a picture is an overview and at most 12 tiles that overlap by 4 patches on each side; the map of all tiles is averaged
                   to 27 x 27 and joined to the overview's on channels; an MLP (2304 -> 8192 -> 2048); start token and picture see each
                   other both ways.
Stages         pretrain   connector alone on 558K captions
               finetune   connector and LLM on the LLaVA-1.5 mixture
Trained        v1 59,793,408, v2 35,661,824 (pretrain); the LLM's 1,418,270,720 beside them (finetune).
Results (as published)   v1: VQAv2 74.3, GQA 56.3, VizWiz 30.3, TextVQA 39.8. v2 (August 2024): VQAv2 80.3, GQA 64.3, TextVQA 65.2,
               DocVQA 70.5.

Not published, so chosen here: the stages and their settings, which are LLaVA-1.5's (moondream 1 was trained on LLaVA's data).
Needs microsoft/phi-1_5 and google/siglip-so400m-patch14-384 (in the local Hugging Face cache, or --config.model.llm.path=DIR and
--config.model.vision.path=DIR), and the data of the LLaVA-1.5 repository below data/.
"""

import dataclasses

from mmjax.catalogue import LCS_558K, MIX_665K, PHI_1_5, SIGLIP_SO400M_384
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
    chosen = parse_arguments(argument, {"version": ("v1", "v2"), "tiny": False})
    second = chosen.version == "v2"
    pretrain = Stage(
        trainable=("connector/**",),
        sources={"captions": LCS_558K},
        epochs=1.0,
        rows=256,
        length=800,  # 729 for the picture, the rest for its caption
        packing=False,
        template="plain",
        tiles=13 if second else 1,
        optimizer=Optimizer(learning_rate=1e-3),
        dtype="bfloat16",
        remat="full",
    )
    finetune = Stage(
        trainable=("llm/**", "connector/**"),
        sources={"mixture": MIX_665K},
        epochs=1.0,
        rows=64,
        length=2048,
        tiles=26 if second else 2,
        optimizer=Optimizer(learning_rate=2e-5),
        dtype="bfloat16",
        remat="full",
    )
    model = Model(
        llm=PHI_1_5,
        vision=SIGLIP_SO400M_384,
        connector=Connector(kind="residual_mlp", hidden_width=8192),
        feature_layers=(-1,),
        post_norm=True,
        image=Image(aspect="squash", size=378),
        template="moondream",
        image_start="<image>",
        image_end="</image>",
        dtype="bfloat16",
    )
    if second:
        model = dataclasses.replace(
            model,
            connector=Connector(kind="mlp2x_gelu", hidden_width=8192, activation="gelu_tanh"),
            stitching="area",
            image=Image(aspect="squash", size=378, tiling="overlapping", most_tiles=12, overlap=56),
            mask="opening",
            image_start="<|endoftext|>",
            image_end="",
        )
    recipe = Recipe(
        name="moondream2" if second else "moondream",
        model=model,
        stages={"pretrain": pretrain, "finetune": finetune},
        run=("pretrain", "finetune"),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
