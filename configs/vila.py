"""VILA (Lin et al., VILA: On Pre-training for Visual Language Models, arXiv 2312.07533): interleaved pretraining of all of the LLM.

    python -m mmjax.main --config=configs/vila.py            # VILA-7B: align, interleaved pretraining, instruction tuning with text
    python -m mmjax.main --config=configs/vila.py:8b         # VILA-1.5; also 3b and 40b (13b is VILA-13B)
    python -m mmjax.main --config=configs/vila.py:3b,s2      # pictures at 384 and 768 pixels, joined on channels
    python -m mmjax.main --config=configs/vila.py:frozen     # ablation: the LLM stays as it is in pretraining
    python -m mmjax.main --config=configs/vila.py:visual     # ablation: no text-only data in instruction tuning
    python -m mmjax.main --config=configs/vila.py:tiny       # the same path in a minute, on drawn data

What it is     7b, 13b   CLIP ViT-L/14 at 336 pixels, its last block but one (576 tokens), one Linear, Llama 2.
               3b, 8b    SigLIP-so400m at 384 pixels, its last block but one (27 x 27 patches), 2 x 2 of which become a token (196),
                         norm and two-layer MLP; Sheared-LLaMA-2.7B, Llama-3-8B-Instruct.
               40b       the same over InternViT-6B's last block (256 tokens), Nous-Hermes-2-Yi-34B.
Stages         align     connector alone on CC3M-595K captions; learning rate 1e-3, 256 samples a step, 1 epoch
               pretrain  connector and LLM on MMC4-core's documents, COYO-25M's pairs and ShareGPT4V's captions, all text learned;
                         5e-5, 1,024 samples a step, 1 epoch
               sft       everything, the encoder too, on visual instructions and, jointly, FLAN's text without a system text; 1e-4
                         (40b: 2e-5, weight decay 0.05), 256 samples a step (40b: 128), 1 epoch
               AdamW, no weight decay otherwise, 3 % warm-up, cosine to 0, bfloat16 activations, rows of 4,096 tokens.
Trained (7B)   4,198,400; 6,742,614,016; 7,046,121,472 parameters.
Cost (7B)      the authors trained for 4, 30 and 6 hours on 128 A100s: 5.1 thousand GPU hours.
Results (7B / 13B / 1.5-3B / 1.5-8B / 1.5-40B, as published)   VQAv2 79.9 / 80.8 / 80.4 / 80.9 / 84.3, GQA 62.3 / 63.3 / 61.5 / 61.9 / 64.6,
               TextVQA 64.4 / 66.6 / 60.4 / 66.3 / 73.6, POPE 85.5 / 84.2 / 85.9 / 84.4 / 87.3, MMBench 68.9 / 70.3 / 63.4 / 72.3 / 82.4.
               The ablations, at 224 pixels, mean of four tasks with 0 / 4 shots: LLM frozen in both 13.4 / 37.5, in pretraining only
               66.8 / 57.6, never 68.7 / 70.9; with COYO 69.0 / 71.3, with joint text 72.3 / 73.6.

Needs the parts named in mmjax/catalogue.py (in the local Hugging Face cache, or --config.model.llm.path=DIR and
--config.model.vision.path=DIR; InternViT in transformers' layout, whose model_type is internvl_vision) and the data sets below data/.
Differs from the authors' scripts: the settings above are those of VILA-1.5's, for 7b and 13b as well, whose own were not published; their
sets of videos are left out; rows are packed, counting on about 900 (7b, 13b) or 400 tokens for a sample of pretraining and 1,000 or
600 for one of instruction tuning; COYO is taken as filtered.
"""

from typing import Any

from mmjax.catalogue import (
    CC3M_595K,
    CLIP_L_336,
    HERMES_2_YI_34B,
    INTERNVIT_6B_448,
    LLAMA2,
    LLAMA3_8B_INSTRUCT,
    SHEARED_LLAMA_2_7B,
    SIGLIP_SO400M_384,
)
from mmjax.config import (
    Connector,
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
from mmjax.errors import UserError
from mmjax.tiny import tiny

LLM = {**LLAMA2, "3b": SHEARED_LLAMA_2_7B, "8b": LLAMA3_8B_INSTRUCT, "40b": HERMES_2_YI_34B}
TEMPLATES = {"8b": "llama_3", "40b": "hermes-2"}
SHARE_GPT_4V = Source(path="data/vila/sharegpt4v_pretrain.json", images="data/vila/images")
INSTRUCTIONS = (
    "sharegpt4v_gpt4_100k",
    "llava_instruct",
    "sharegpt4v_sft",
    "dvqa",
    "chartqa",
    "ai2d",
    "docvqa",
    "geoqa",
    "synthdog_en",
    "scienceqa",
    "wit_subset",
    "math",
    "sherlock",
)


def get_config(argument: str = ""):
    known: dict[str, Any] = {
        "size": ("7b", "13b", "3b", "8b", "40b"),
        "llm": ("updated", "frozen"),
        "sft": ("joint", "visual"),
        "s2": False,
        "tiny": False,
    }
    chosen = parse_arguments(argument, known)
    first = chosen.size in ("7b", "13b")
    if chosen.s2 and chosen.size != "3b":
        raise UserError(f"configs/vila.py: s2 was published for 3b, not for {chosen.size}")
    vision = CLIP_L_336 if first else INTERNVIT_6B_448 if chosen.size == "40b" else SIGLIP_SO400M_384
    tokens = 576 if first else 256 if chosen.size == "40b" else 196
    common: dict[str, Any] = {"epochs": 1.0, "dtype": "bfloat16", "remat": "full"}
    align = Stage(
        trainable=("connector/**",),
        sources={"captions": CC3M_595K},
        rows=256,
        length=tokens + 64,  # a picture and its caption
        packing=False,
        template="plain",
        optimizer=Optimizer(learning_rate=1e-3),
        **common,
    )
    pretrain = Stage(
        trainable=("connector/**",) if chosen.llm == "frozen" else ("connector/**", "llm/**"),
        sources={
            "mmc4": Source(kind="mmc4", path="data/mmc4_core/*.tar", options={"max_images": 6}),
            "coyo": Source(kind="pairs", path="data/coyo_25m/*.tar"),
            "sharegpt4v": SHARE_GPT_4V,
        },
        rows=224 if first else 96,
        length=4096,
        tiles=8 if first else 20,
        template="interleaved",
        optimizer=Optimizer(learning_rate=5e-5),
        **common,
    )
    pictures = {name: Source(path=f"data/vila/{name}.json", images="data/vila/images") for name in INSTRUCTIONS}
    text = {"flan": Source(path="data/vila/flan_1m.json", options={"system": ""})}
    large = chosen.size == "40b"
    sft = Stage(
        trainable=("vision/**", "connector/**", "llm/**"),
        sources={**pictures, **(text if chosen.sft == "joint" else {})},
        rows=64 if first else 24 if large else 40,
        length=4096,
        tiles=8 if first else 20,
        optimizer=Optimizer(learning_rate=2e-5, weight_decay=0.05) if large else Optimizer(learning_rate=1e-4),
        **common,
    )
    connector = Connector(kind="space_to_depth", group=2, input_norm=True, token_order="columns")
    words = ["s2"] * chosen.s2 + [
        word for word, usual in ((chosen.llm, "updated"), (chosen.sft, "joint")) if word != usual
    ]
    recipe = Recipe(
        name="_".join(["vila" if first else "vila15", chosen.size, *words]),
        model=Model(
            llm=LLM[chosen.size],
            vision=vision,
            connector=Connector(kind="linear") if first else connector,
            feature_layers=(-1,) if large else (-2,),
            scales=(1, 2) if chosen.s2 else (1,),
            image=Image(aspect="squash"),
            template=TEMPLATES.get(chosen.size, "vicuna_v1"),
            dtype="bfloat16",
        ),
        stages={"align": align, "pretrain": pretrain, "sft": sft},
        run=("align", "pretrain", "sft"),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
