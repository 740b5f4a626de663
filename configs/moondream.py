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

PHI = Part(
    "microsoft/phi-1_5",
    {
        "model_type": "phi",
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
)
SIGLIP = Part(
    "google/siglip-so400m-patch14-384",
    {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
)


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"tiny": False})
    pretrain = Stage(
        trainable=("connector/**",),
        sources={"captions": Source(path="data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", images="data/LLaVA-Pretrain/images")},
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
        sources={"mixture": Source(path="data/llava_v1_5_mix665k.json", images="data/llava_v1_5_images")},
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
            llm=PHI,
            vision=SIGLIP,
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
