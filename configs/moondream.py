"""moondream 1 (vikhyat, January 2024; github.com/vikhyat/moondream): 1.6 billion parameters that see.

    python -m mmjax.main --config=configs/moondream.py          # pretrain the connector, then connector and LLM
    python -m mmjax.main --config=configs/moondream.py:tiny     # the same path in a minute, on drawn data

What it is     SigLIP-so400m with its final norm (27 x 27 patches, all become tokens), a residual MLP (1152 -> 8192 -> 2048, norm,
               then x + MLP(x) through 8192), Phi-1.5. `<image>` and `</image>` stand as text around the picture.
Stages         pretrain   connector alone on 558K captions
               finetune   connector and LLM on the LLaVA-1.5 mixture
Trained        59,793,408 (pretrain); the LLM's 1,418,270,720 beside them (finetune).
Results (as published)   VQAv2 74.3, GQA 56.3, VizWiz 30.3, TextVQA 39.8.

Not published, so chosen here: the stages and their settings, which are LLaVA-1.5's (it was trained on LLaVA's data).
Needs microsoft/phi-1_5 and google/siglip-so400m-patch14-384 (in the local Hugging Face cache, or --config.model.llm.path=DIR and
--config.model.vision.path=DIR), and the data of the LLaVA-1.5 repository below data/.
"""

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
    chosen = parse_arguments(argument, {"tiny": False})
    pretrain = Stage(
        trainable=("connector/**",),
        sources={"captions": LCS_558K},
        epochs=1.0,
        rows=256,
        length=800,  # 729 for the picture, the rest for its caption
        packing=False,
        template="plain",
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
        tiles=2,
        optimizer=Optimizer(learning_rate=2e-5),
        dtype="bfloat16",
        remat="full",
    )
    recipe = Recipe(
        name="moondream",
        model=Model(
            llm=PHI_1_5,
            vision=SIGLIP_SO400M_384,
            connector=Connector(kind="residual_mlp", hidden_width=8192),
            feature_layers=(-1,),
            post_norm=True,
            image=Image(aspect="squash"),
            template="moondream",
            image_start="<image>",
            image_end="</image>",
            dtype="bfloat16",
        ),
        stages={"pretrain": pretrain, "finetune": finetune},
        run=("pretrain", "finetune"),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
