"""Gemma 3 (Gemma Team, arXiv 2503.19786), 4B: a comparison model, tuned further.

    python -m mmjax.main --config=configs/gemma3.py          # from the published weights
    python -m mmjax.main --config=configs/gemma3.py:tiny     # the same path in a minute, on drawn data

What it is     SigLIP at 896 pixels, its last states behind the norm, averaged from 64 x 64 to 16 x 16; an RMS norm and a bias-free Linear
               (256 tokens a picture), between `<start_of_image>` and `<end_of_image>`. The text is causal; the tokens of a picture see
               each other. Five of six layers see 1,024 tokens, and have a rotary embedding of their own.
Stages         finetune   connector and LLM on the LLaVA-1.5 mixture; the tower stays as it is

The settings of the stage are chosen here: those of the authors' training are not published in full. Published results and costs are left
out: none could be checked here. Pictures are resized to one square; pan-and-scan's crops are not made.
Needs google/gemma-3-4b-it, of which all three parts are read (in the local Hugging Face cache, or --config.model.llm.path=DIR,
--config.model.vision.path=DIR and --config.model.connector.path=DIR), and the data of the LLaVA-1.5 repository below data/.
"""

import dataclasses

from mmjax.catalogue import MIX_665K, SIGLIP_SO400M_384
from mmjax.config import (
    Connector,
    Image,
    Mesh,
    Model,
    Optimizer,
    Part,
    Recipe,
    Stage,
    parse_arguments,
    to_config_dict,
)
from mmjax.tiny import tiny

PUBLISHED = "google/gemma-3-4b-it"
GEMMA_4B = Part(
    PUBLISHED,
    {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
)
TOWER = dataclasses.replace(
    SIGLIP_SO400M_384, path=PUBLISHED, config={**SIGLIP_SO400M_384.config, "image_size": 896, "vision_use_head": False}
)


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"tiny": False})
    finetune = Stage(
        trainable=("connector/**", "llm/**"),
        sources={"mixture": MIX_665K},
        epochs=1.0,
        rows=64,
        length=2048,
        tiles=4,
        optimizer=Optimizer(learning_rate=1e-5, clip_norm=1.0),
        dtype="bfloat16",
        remat="full",
    )
    recipe = Recipe(
        name="gemma3",
        model=Model(
            llm=GEMMA_4B,
            vision=TOWER,
            connector=Connector(
                kind="linear", bias=False, grid=16, input_norm=True, norm="rms_plus_one", norm_eps=1e-6, path=PUBLISHED
            ),
            feature_layers=(-1,),
            post_norm=True,
            image=Image(aspect="squash"),
            mask="media",
            template="gemma3",
            image_start="\n\n<start_of_image>",
            image_end="<end_of_image>\n\n",
            dtype="bfloat16",
        ),
        stages={"finetune": finetune},
        run=("finetune",),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
