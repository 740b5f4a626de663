"""PaliGemma (Beyer et al., A versatile 3B VLM for transfer, arXiv 2407.07726): a comparison model, tuned further.

    python -m mmjax.main --config=configs/paligemma.py          # from the published weights, on one task
    python -m mmjax.main --config=configs/paligemma.py:tiny     # the same path in a minute, on drawn data

What it is     SigLIP-so400m/14 at 224 pixels, its last states behind the norm (256 tokens), one Linear, Gemma 2B. Prompts are seen both
               ways, picture and question alike, answers are causal: `<image> <bos>question\\n` and then `answer<eos>`.
Stages         finetune   connector and LLM on question and answer; the tower stays as it is

The settings of the stage are chosen here: the model is published for transfer, and each task has its own. Published results and costs
are left out: none could be checked here.
Needs google/paligemma-3b-pt-224, of which all three parts are read (in the local Hugging Face cache, or --config.model.llm.path=DIR,
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

PUBLISHED = "google/paligemma-3b-pt-224"
GEMMA_2B = Part(
    PUBLISHED,
    {
        "model_type": "gemma",
        "vocab_size": 257216,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
)
TOWER = dataclasses.replace(
    SIGLIP_SO400M_384, path=PUBLISHED, config={**SIGLIP_SO400M_384.config, "image_size": 224, "vision_use_head": False}
)


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"tiny": False})
    finetune = Stage(
        trainable=("connector/**", "llm/**"),
        sources={"mixture": MIX_665K},
        epochs=1.0,
        rows=128,
        length=1024,
        tiles=2,
        optimizer=Optimizer(learning_rate=1e-5, clip_norm=1.0),
        dtype="bfloat16",
        remat="full",
    )
    recipe = Recipe(
        name="paligemma",
        model=Model(
            llm=GEMMA_2B,
            vision=TOWER,
            connector=Connector(kind="linear", path=PUBLISHED),
            feature_layers=(-1,),
            post_norm=True,
            image=Image(aspect="squash"),
            mask="prefix",
            template="paligemma",
            dtype="bfloat16",
        ),
        stages={"finetune": finetune},
        run=("finetune",),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
