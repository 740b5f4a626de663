"""The small language model and the small encoder on which every recipe's `:tiny` is tried (see tests/gallery.py).

    python -m mmjax.main --config=configs/gallery_base.py
    python -m mmjax.main --config=configs/gallery_base.py:data=DIR

DIR of `data` holds Flickr8k as configs/flickr8k.py describes it.

What it is     a Llama of three layers that has only ever read, and a CLIP-like ViT at 84 pixels that has learnt to see by describing
               photographs to that Llama through LLaVA's two-layer MLP.
Stages         chat, language  the Llama alone, on 30,000 captions as answers of a chat and bare
               see             ViT and MLP, on the photographs of these captions; the Llama frozen
At the end both are exported, in Hugging Face's LLaVA layout, to WORKDIR/export: recipes read them as
--config.model.llm.path=WORKDIR/export and --config.model.vision.path=WORKDIR/export.
"""

from mmjax.config import (
    Checkpoint,
    Connector,
    Evaluation,
    Export,
    Image,
    Logging,
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

LLAMA = Part(
    config={
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
)
VIT = Part(
    config={
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 84,
        "patch_size": 14,
        "projection_dim": 128,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
)


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"data": "../shared/data/flickr8k", "tiny": False})

    def captions(part: str, split: str, **options) -> Source:
        images = "images_train-*.tar" if part == "train" else f"images_{part}.tar"
        options = {"split": split, "prompt": "", **options}
        return Source(kind="captions", path=f"{chosen.data}/captions_{part}.jsonl.gz", images=f"{chosen.data}/{images}", options=options)

    def read(**more) -> Stage:
        return Stage(
            trainable=("llm/**",),
            rows=16,
            length=256,
            tiles=0,
            optimizer=_muon("llm/embed/**"),
            dropout=0.1,
            unroll=3,
            **more,
        )

    chat = read(
        sources={"captions": captions("train", "train", shown=False, prompt="Describe the image.")},
        template="v1",
        epochs=1.0,
    )
    language = read(sources={"captions": captions("train", "train", shown=False)}, epochs=4.0)
    see = Stage(
        trainable=("vision/**", "connector/**"),
        sources={"captions": captions("train", "train")},
        epochs=3.0,
        rows=8,
        length=256,
        tiles=6,
        optimizer=_muon("vision/{class_embedding,positions}"),
        augment=("flip",),
        label_smoothing=0.1,
        unroll=3,
    )
    recipe = Recipe(
        name="gallery_base",
        model=Model(
            llm=LLAMA,
            vision=VIT,
            connector=Connector(kind="mlp2x_gelu"),
            feature_layers=(-1,),
            image=Image(aspect="squash"),
            tokenizer=Tokenizer(kind="bpe", vocab_size=2048),
            template="plain",
            system="",
        ),
        stages={"chat": chat, "language": language, "see": see},
        run=("chat", "language", "see"),
        evaluations={
            "val": Evaluation(
                source=captions("val", "eval"),
                metrics=("bleu", "cider"),
                blind=True,
                max_new_tokens=24,
                batch=200,
            )
        },
        mesh=Mesh(cpu_devices=2),
        checkpoint=Checkpoint(every=0),
        logging=Logging(every=50),
        export=Export(after_training=True),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)


def _muon(tables: str) -> Optimizer:
    return Optimizer(
        name="muon",
        learning_rate=0.02,
        multipliers={tables: 0.1, "**/{scale,bias}": 0.1},
        warmup_ratio=0.05,
        b1=0.95,
        b2=0.98,
        weight_decay=0.01,
        clip_norm=1.0,
    )
