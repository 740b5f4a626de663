"""LaVIN (Luo et al., Cheap and Quick, arXiv 2305.15023), 7B and 13B: adapters that are routed by the modality, in LLaMA and in CLIP

    python -m mmjax.main --config=configs/lavin.py                # ScienceQA, LLaMA 7B
    python -m mmjax.main --config=configs/lavin.py:13b            # LLaMA 13B
    python -m mmjax.main --config=configs/lavin.py:chat           # a chatbot: Alpaca-52K and LLaVA-158K
    python -m mmjax.main --config=configs/lavin.py:tiny           # the same path in a minute, on drawn data
    python -m mmjax.main --config=configs/lavin.py --job=plan     # parameters, bytes and FLOPs, without any weights

What it is     CLIP ViT-L/14 at 224 pixels, whose class token behind blocks 4, 8, ..., 24 becomes one token each, through Linear(1024, 128),
               SiLU and Linear; LLaMA. In front of every attention of both, behind its norm, stands an adapter of two branches (8 channels,
               2 groups), weighed by a router: in LLaMA it reads one of two modality tokens (text alone, text with a picture).
Stages         finetune   adapters, modality tokens and connector on ScienceQA (QCM-ALE); 20 epochs of 32 samples a step, learning rate
                          9e-3 * 32 / 256, 2 epochs of warm-up, cosine to 0; AdamW (0.9, 0.95; weight decay 0.02), dropout 0.1 in adapters
               chat       the same for 15 epochs on single turns
Temperature    10 (7B) and 5 (13B), of the routers.
Trained        3,781,296 (7B: 3.8M), 5,390,080 (13B: 5.4M) parameters.
Cost (as published)   1.4 hours on 8 A100 for 7B; chat 75 GPU hours.
Results (as published)   ScienceQA, average: 89.41 (7B), 90.83 (13B).

Released or mended   The authors' code routes every picture of a batch by the batch's first one, so that losses and answers depend on how
               pictures are batched. That is what released weights are made for, and the default, and is said when training begins;
               --config.model.adapters.mma.visual_router=per_sample_cls routes each by its own class token.
Needs huggyllama/llama-7b and openai/clip-vit-large-patch14 (in the local Hugging Face cache, or --config.model.llm.path=DIR and
--config.model.vision.path=DIR), and ScienceQA below data/science_qa: problems.json, pid_splits.json, images/{train,val,test}/ID/image.png.
The Alpaca and LLaVA conversations of `chat` are LLaVA's files, below data/.
Differs from the authors': adapters of the released code stay in float16, these are float32 leaves beside a bfloat16 base.
"""

from mmjax.catalogue import CLIP_L_224, INSTRUCT_158K, LLAMA1
from mmjax.config import (
    Adapter,
    Connector,
    Evaluation,
    Export,
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
from mmjax.families.lavin import MEAN, STD, taps
from mmjax.tiny import tiny

QUESTIONS = "data/science_qa/problems.json"


def science_qa(split: str) -> Source:
    return Source(kind="science_qa", path=QUESTIONS, images="data/science_qa/images", options={"split": split})


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"size": ("7b", "13b"), "task": ("science_qa", "chat"), "tiny": False})
    chat = chosen.task == "chat"
    alpaca = Source(kind="llava", path="data/alpaca_52k.json")
    finetune = Stage(
        trainable=("llm/plugs/**", "llm/prompts/**", "vision/plugs/**", "connector/**"),
        sources={"alpaca": alpaca, "instruct": INSTRUCT_158K} if chat else {"questions": science_qa("train")},
        epochs=15.0 if chat else 20.0,
        rows=32,
        length=512,
        packing=False,
        optimizer=Optimizer(learning_rate=9e-3 * 32 / 256, warmup_ratio=2 / 15 if chat else 2 / 20, b2=0.95, weight_decay=0.02),
        dtype="bfloat16",
        remat="full",
    )
    mixture = Adapter(
        kind="modality_mixture",
        width=8,
        groups=2,
        temperature=5.0 if chosen.size == "13b" else 10.0,
        scale=1.0,
        dropout=0.1,
        places=("attention",),
        parts=("llm", "vision"),
    )
    stage = "chat" if chat else "finetune"
    recipe = Recipe(
        name=f"lavin_{chosen.size}" + ("_chat" if chat else ""),
        model=Model(
            llm=LLAMA1[chosen.size],
            vision=CLIP_L_224,
            connector=Connector(kind="mlp", depth=2, hidden_width=128, activation="silu"),
            feature_layers=taps(24),
            class_tokens=True,
            image=Image(aspect="squash", mean=MEAN, std=STD),
            template="lavin",
            adapters={"mma": mixture},
            dtype="bfloat16",
        ),
        stages={stage: finetune},
        run=(stage,),
        evaluations={}
        if chat
        else {"test": Evaluation(source=science_qa("test"), metrics=("letter",), max_new_tokens=16)},
        mesh=Mesh(data=1, fsdp=-1),
        export=Export(format="original"),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
