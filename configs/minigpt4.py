"""MiniGPT-4 (Zhu et al., arXiv 2304.10592): one Linear makes Vicuna see what BLIP-2's Q-Former sees.

    python -m mmjax.main --config=configs/minigpt4.py                # pretrain, then align; Vicuna v0 7B
    python -m mmjax.main --config=configs/minigpt4.py:vicuna_13b     # or llama2_7b
    python -m mmjax.main --config=configs/minigpt4.py:tiny           # the same path in a minute, on drawn data
    python -m mmjax.main --config=configs/minigpt4.py --job=plan     # parameters, bytes and FLOPs, without any weights

What it is     BLIP-2's encoder and Q-Former (that of FlanT5-XXL), both frozen as the language model is, and a Linear from the 32 queries to
               Vicuna. The Llama-2 variant has no Q-Former: four neighbouring states side by side, 256 become 64, and a Linear.
Stages         pretrain   captions of LAION, CC and SBU without any prompt; 20,000 steps of 256 pairs, 1e-4 to 8e-5, 5,000 steps of warm-up
               align      3,500 long descriptions under one of four requests; 1,000 steps of 12, 3e-5 to 1e-5, 200 steps of warm-up
               AdamW (weight decay 0.05), cosine. Only the answer and what ends it are learned.
Trained        3,149,824 (7B), 3,937,280 (13B), 23,072,768 (Llama-2 7B) parameters, in both stages.
Cost (as published)   about 10 hours on 4 A100, then 7 minutes on one.

Chat           --config.model.system="Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide
               it to you. Please answer my questions." puts the authors' words for a chat in front.
Needs Vicuna v0 in transformers' layout (its authors give deltas to Llama) at vicuna-7b-v0 or --config.model.llm.path=DIR,
Salesforce/blip2-opt-2.7b (for its encoder) and Salesforce/blip2-flan-t5-xxl (for its Q-Former), in the local Hugging Face cache; a
file of MiniGPT-4's own with the Linear goes to --config.model.connector.path with --config.model.connector.projection=true. Data:
webdataset files at data/minigpt4/pretrain and the authors' cc_sbu_align at data/minigpt4/cc_sbu_align.
Differs from the authors': warm-up begins at 0, theirs at 1e-6; pictures are only mirrored, not cropped at random.
"""

import dataclasses

from mmjax.catalogue import EVA_G, LLAMA2_CHAT, VICUNA_V11
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
from mmjax.tiny import tiny

LLM = {
    "vicuna_7b": dataclasses.replace(VICUNA_V11["7b"], path="vicuna-7b-v0"),
    "vicuna_13b": dataclasses.replace(VICUNA_V11["13b"], path="vicuna-13b-v0"),
    "llama2_7b": LLAMA2_CHAT["7b"],
}
REQUESTS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"llm": tuple(LLM), "tiny": False})
    llama2 = chosen.llm == "llama2_7b"
    tokens, trainable = (64, ("connector/**",)) if llama2 else (32, ("connector/project_out/**",))
    pretrain = Stage(
        trainable=trainable,
        sources={"captions": Source(kind="pairs", path="data/minigpt4/pretrain/*.tar")},
        steps=20_000,
        rows=256,
        length=tokens + 34,  # a caption of 32 tokens
        packing=False,
        template="plain",
        augment=("flip",),
        optimizer=Optimizer(learning_rate=1e-4, end_factor=0.8, warmup_steps=5000, weight_decay=0.05),
        dtype="bfloat16",
        remat="full",
    )
    aligned = {"within": "annotations", "image": "image_id", "pattern": "{}.jpg", "prompts": REQUESTS}
    align = Stage(
        trainable=trainable,
        sources={
            "descriptions": Source(
                kind="pairs",
                path="data/minigpt4/cc_sbu_align/filter_cap.json",
                images="data/minigpt4/cc_sbu_align/image",
                options=aligned,
            )
        },
        steps=1000,
        rows=12,
        length=tokens + 200,  # a description of 160 tokens
        packing=False,
        augment=("flip",),
        optimizer=Optimizer(learning_rate=3e-5, end_factor=1 / 3, warmup_steps=200, weight_decay=0.05),
        dtype="bfloat16",
        remat="full",
    )
    qformer = Connector(
        kind="qformer",
        depth=12,
        hidden_width=768,
        latents=32,
        heads=12,
        path="Salesforce/blip2-flan-t5-xxl",
        projection=False,
    )
    recipe = Recipe(
        name=f"minigpt4_{chosen.llm}",
        model=Model(
            llm=LLM[chosen.llm],
            vision=EVA_G,
            connector=Connector(kind="concat", group=4, depth=1) if llama2 else qformer,
            feature_layers=(-1,),
            keep_class_token=not llama2,
            post_norm=True,
            image=Image(aspect="squash"),
            template="minigpt4_llama_2" if llama2 else "minigpt4",
            dtype="bfloat16",
        ),
        stages={"pretrain": pretrain, "align": align},
        run=("pretrain", "align"),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
