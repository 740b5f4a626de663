"""InstructBLIP (Dai et al., arXiv 2305.06500): BLIP-2's Q-Former reads the instruction beside the picture.

    python -m mmjax.main --config=configs/instructblip.py                    # Vicuna v1.1 7B
    python -m mmjax.main --config=configs/instructblip.py:vicuna_13b         # or flan_t5_xl, flan_t5_xxl
    python -m mmjax.main --config=configs/instructblip.py:tiny               # the same path in a minute, on drawn data
    python -m mmjax.main --config=configs/instructblip.py --job=plan         # parameters, bytes and FLOPs, without any weights

What it is     BLIP-2's encoder and Q-Former; what the user says goes into the Q-Former (BERT's words, of a long text the end) and into the
               frozen language model. In training, chat and evaluation alike it is the text of the turn that shows the picture.
Stages         instruct   the Q-Former, its text branch included, and its Linear, on instructions made of question-answering and caption
                          sets by templates, of which each sample draws one
Trained        188,834,560 parameters (Vicuna 7B), the Linear's 3,149,824 among them.
Results        (7B / 13B, as VILA reports them, arXiv 2312.07533)   GQA 49.2 / 49.5, VizWiz 34.5 / 33.4, SQA 60.5 / 63.1,
               TextVQA 50.1 / 50.7.

Not published, so chosen here: the stage's settings (its repository has no training config): BLIP-2's optimiser at a tenth of its rate.
Answers        --config.evaluations.NAME.num_beams=5; the authors also penalise repetition (1.5) when they generate.
Needs Salesforce/blip2-opt-2.7b (for its encoder), Salesforce/blip2-flan-t5-xl or -xxl (for its Q-Former; another, also a file in LAVIS's
layout: --config.model.connector.path=FILE), google-bert/bert-base-uncased (words, and the start of the text branch), and the language
model (in the local Hugging Face cache, or --config.model.llm.path=DIR and so on); the data as rows {"image", "text_input",
"text_output"} at data/instructblip.
Differs from the authors': around Vicuna the Q-Former begins as that of BLIP-2 around FlanT5-XXL; the templates are a few of theirs.
In `:tiny` the language model's tokenizer stands in for BERT's.
"""

from mmjax.catalogue import EVA_G, FLAN_T5, VICUNA_V11
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
    "vicuna_7b": VICUNA_V11["7b"],
    "vicuna_13b": VICUNA_V11["13b"],
    "flan_t5_xl": FLAN_T5["xl"],
    "flan_t5_xxl": FLAN_T5["xxl"],
}
BERT = "google-bert/bert-base-uncased"
QUESTIONS = (
    "{}",
    "Q: {} A:",
    "Question: {} Answer:",
    "Given the photo, what is the answer to the question {}?",
)
CAPTIONS = ("A short image caption.", "A short image caption:", "A photo of")
QUERIES, ASKED, ANSWERED = 32, 128, 256  # tokens


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"llm": tuple(LLM), "tiny": False})
    t5 = chosen.llm.startswith("flan_t5")
    instruct = Stage(
        trainable=("connector/**",),
        sources={
            "questions": _pairs("questions", question="text_input", answer="text_output", prompts=QUESTIONS),
            "captions": _pairs("captions", answer="text_output", prompts=CAPTIONS),
        },
        epochs=1.0,
        rows=128,
        length=QUERIES + ASKED + (0 if t5 else ANSWERED),
        answer_length=ANSWERED if t5 else 0,
        packing=False,
        augment=("flip",),
        optimizer=Optimizer(learning_rate=1e-5, b2=0.98, weight_decay=0.05, warmup_steps=1000),
        dtype="bfloat16",
        remat="full",
    )
    recipe = Recipe(
        name=f"instructblip_{chosen.llm}",
        model=Model(
            llm=LLM[chosen.llm],
            vision=EVA_G,
            connector=Connector(
                kind="qformer",
                depth=12,
                hidden_width=768,
                latents=QUERIES,
                heads=12,
                text_vocab=30523,
                text_length=ASKED,
                tokenizer=BERT,
                bert=BERT,
                path="Salesforce/blip2-flan-t5-xl" if chosen.llm == "flan_t5_xl" else "Salesforce/blip2-flan-t5-xxl",
                projection=t5,
            ),
            feature_layers=(-1,),
            keep_class_token=True,
            post_norm=True,
            image=Image(aspect="squash"),
            template="instructblip",
            dtype="bfloat16",
        ),
        stages={"instruct": instruct},
        run=("instruct",),
        mesh=Mesh(data=1, fsdp=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)


def _pairs(name: str, **options) -> Source:
    return Source(kind="pairs", path=f"data/instructblip/{name}.jsonl", images="data/instructblip/images", options=options)
