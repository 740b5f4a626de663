"""GIT (Wang et al., A Generative Image-to-text Transformer for Vision and Language, arXiv 2205.14100), base and large.

    python -m mmjax.main --config=configs/git.py           # base: pretrain on image-text pairs, then learn to caption
    python -m mmjax.main --config=configs/git.py:large
    python -m mmjax.main --config=configs/git.py:tiny      # the same path in a minute, on drawn data

What it is     CLIP ViT-B/16 or L/14 at 224 pixels, all of its tokens behind the last norm; one Linear and a layer norm; 6 blocks of BERT's
               kind, 768 wide, fresh, tied to their embeddings. The picture's tokens stand first and see each other, the text is
               causal and sees them: `[CLS] caption [SEP]`. A question is text without loss (template git_vqa).
Stages         pretrain   everything, on image-text pairs, label smoothing 0.1, dropout 0.1, captions up to 40 tokens
               finetune   everything, on the captions of one task
Released by the authors: base, on 10M pairs; large, on 14M and 20M. The paper's own, of 0.7 billion parameters on 0.8 billion pairs,
was not. Answers are searched with 4 beams and a length penalty of 0.6.

Not in the authors' code, so chosen here: learning rates, sizes of steps and their number. Smoothing shares its 0.1 among all words; the
authors give none of it to the right one. Published results and costs are left out: none could be checked here.
Needs openai/clip-vit-base-patch16 or openai/clip-vit-large-patch14, the tokenizer of google-bert/bert-base-uncased (in the local Hugging
Face cache, or --config.model.vision.path=DIR and --config.model.tokenizer.path=DIR), and captions as JSONL below data/:
{"image": "a.jpg", "captions": ["A cat."]} a line. Published weights: mmjax.load("microsoft/git-base").
"""

from mmjax.catalogue import CLIP_B_16, CLIP_L_224
from mmjax.config import (
    Connector,
    Evaluation,
    Image,
    Mesh,
    Model,
    Optimizer,
    Part,
    Recipe,
    Source,
    Stage,
    Tokenizer,
    parse_arguments,
    to_config_dict,
)
from mmjax.tiny import tiny

DECODER = Part(
    config={
        "model_type": "git_text",
        "vocab_size": 30522,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "max_position_embeddings": 1024,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-8,
        "tie_word_embeddings": True,
    }
)


def _stage(source: Source, rows: int, epochs: float, rate: float, tokens: int) -> Stage:
    return Stage(
        trainable=("vision/**", "connector/**", "llm/**"),
        sources={"captions": source},
        epochs=epochs,
        rows=rows,
        length=tokens + 40,
        packing=False,
        optimizer=Optimizer(learning_rate=rate, weight_decay=0.05, multipliers={"vision/**": 0.2}, clip_norm=1.0),
        label_smoothing=0.1,
        dropout=0.1,
        dtype="bfloat16",
        remat="dots",
    )


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"size": ("base", "large"), "tiny": False})
    large = chosen.size == "large"
    tokens = 257 if large else 197  # of a picture
    pairs = Source(kind="captions", path="data/pairs/captions.jsonl", images="data/pairs/images")
    task = Source(kind="captions", path="data/coco/captions_train.jsonl", images="data/coco")
    held_out = Source(kind="captions", path="data/coco/captions_test.jsonl", images="data/coco", options={"split": "test"})
    recipe = Recipe(
        name=f"git_{chosen.size}",
        model=Model(
            llm=DECODER,
            vision=CLIP_L_224 if large else CLIP_B_16,
            connector=Connector(kind="linear", output_norm=True),
            feature_layers=(-1,),
            keep_class_token=True,
            post_norm=True,
            image=Image(aspect="crop"),
            tokenizer=Tokenizer(path="google-bert/bert-base-uncased"),
            mask="media",
            template="git",
        ),
        stages={"pretrain": _stage(pairs, 1024, 2.0, 1e-4, tokens), "finetune": _stage(task, 512, 10.0, 2e-5, tokens)},
        run=("pretrain", "finetune"),
        evaluations={"captions": Evaluation(source=held_out, metrics=("cider",), num_beams=4, length_penalty=0.6, max_new_tokens=40)},
        mesh=Mesh(data=-1),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
