"""BLIP-2 (Li et al., arXiv 2301.12597): a Q-Former between a frozen encoder and a frozen language model, in two stages.

    python -m mmjax.main --config=configs/blip2.py                      # both stages, OPT-2.7B
    python -m mmjax.main --config=configs/blip2.py:opt_6.7b             # or flan_t5_xl, flan_t5_xxl
    python -m mmjax.main --config=configs/blip2.py:tiny                 # the same path in a minute, on drawn data
    python -m mmjax.main --config=configs/blip2.py --job=plan           # parameters, bytes and FLOPs, without any weights

What it is     EVA-CLIP's ViT-g/14 at 224 pixels without its last block, all 257 states through a trained norm; a BERT-base whose 32
               queries read them in every second layer; a Linear into OPT or FlanT5.
Stages         represent   the Q-Former without any language model: contrastive, matching and language losses on pairs of picture and
                           caption; 250,000 steps of 1,680 pairs
               generate    the Q-Former and its Linear into the frozen language model, on the same pairs; 80,000 steps of 1,920 (OPT) or
                           1,520 (FlanT5, whose encoder is told the beginning of the caption and whose decoder writes the rest)
               AdamW (betas 0.9 and 0.98, weight decay 0.05), 1e-4 with 2,000 steps of warm-up and a cosine (in the second stage to 5e-5).
Trained        represent 186,705,470 (with the Linear 188,671,294; the paper says 188M of the Q-Former); generate 107,133,696 (OPT-2.7B) and
               106,739,968 (FlanT5-XL) parameters.
Cost (as published)   less than 6 days and less than 3 days on 16 A100 (ViT-g, FlanT5-XXL).
Results (as published)   zero-shot VQAv2 65.0 (ViT-g, FlanT5-XXL), NoCaps CIDEr 121.6.

Templates      "blip2": the picture, the start token, what is said as it is ("a photo of"), the answer and a newline. For questions
               --config.model.template=blip2_vqa ("Question: {} Answer:") or blip2_t5_vqa ("Question: {} Short answer:"), with beams of 5.
Needs Salesforce/blip2-opt-2.7b (for its encoder), google-bert/bert-base-uncased, and the language model (in the local Hugging Face cache,
or --config.model.vision.path=DIR and so on), and pairs as rows {"image", "caption"} at data/blip2.
Differs from the authors': the norm behind the encoder begins as their trained one, where the encoder comes from their model; the language
model is in memory also while it is not used; pictures are only mirrored, not cropped at random; the captions' cleaning and ranking
(CapFilt) are the data's matter.
In `:tiny` the language model's tokenizer stands in for BERT's.
"""

from mmjax.catalogue import EVA_G, FLAN_T5, OPT
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

LLM = {"opt_2.7b": OPT["2.7b"], "opt_6.7b": OPT["6.7b"], "flan_t5_xl": FLAN_T5["xl"], "flan_t5_xxl": FLAN_T5["xxl"]}
CAPTION = 32  # tokens of a caption
QUERIES = 32


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"llm": tuple(LLM), "tiny": False})
    t5 = chosen.llm.startswith("flan_t5")
    represent = Stage(
        objective="contrastive",
        trainable=("connector/{queries,embed/**,layers/**,cross/**,heads/**}", "vision/post_norm/**"),
        sources={"pairs": _pairs()},
        steps=250_000,
        rows=1680,
        length=CAPTION,
        packing=False,
        augment=("flip",),
        optimizer=_adamw(warmup_steps=2000),
        dtype="bfloat16",
        remat="full",
    )
    generate = Stage(
        # the text's part of the Q-Former and the heads of the first stage are not used any more
        trainable=(
            "connector/{queries,embed/norm/**,cross/**,project_out/**}",
            "connector/layers/{attention,attention_norm,mlp,mlp_norm}/**",
            "vision/post_norm/**",
        ),
        sources={"pairs": _pairs(prefix=True) if t5 else _pairs(prompt="")},
        steps=80_000,
        rows=1520 if t5 else 1920,
        length=QUERIES + CAPTION + 2,
        answer_length=CAPTION + 1 if t5 else 0,
        packing=False,
        augment=("flip",),
        optimizer=_adamw(warmup_steps=2000, end_factor=0.5),
        dtype="bfloat16",
        remat="full",
    )
    recipe = Recipe(
        name=f"blip2_{chosen.llm}",
        model=Model(
            llm=LLM[chosen.llm],
            vision=EVA_G,
            connector=Connector(
                kind="qformer",
                depth=12,
                hidden_width=768,
                latents=QUERIES,
                heads=12,
                text_vocab=30523,  # BERT's words and [DEC]
                contrast_width=256,
                tokenizer="google-bert/bert-base-uncased",
                bert="google-bert/bert-base-uncased",
            ),
            feature_layers=(-1,),
            keep_class_token=True,
            post_norm=True,
            image=Image(aspect="squash"),
            template="blip2",
            dtype="bfloat16",
        ),
        stages={"represent": represent, "generate": generate},
        run=("represent", "generate"),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)


def _pairs(**options) -> Source:
    return Source(kind="captions", path="data/blip2/captions.jsonl", images="data/blip2/images-*.tar", options=options)


def _adamw(**settings) -> Optimizer:
    return Optimizer(learning_rate=1e-4, b2=0.98, weight_decay=0.05, **settings)
