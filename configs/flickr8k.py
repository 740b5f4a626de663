"""A small language model learns to describe real photographs, through an encoder that was really trained on ImageNet.

    python -m mmjax.main --config=configs/flickr8k.py
    python -m mmjax.main --config=configs/flickr8k.py:data=DIR,vision=DIR

DIR of `data` holds Flickr8k (Hodosh et al., 2013) as captions_{train,val}.jsonl.gz, rows {"id", "image", "en": [five captions]}, and
images_train-*.tar, images_val.tar; DIR of `vision` is a MobileNetV2 in transformers' layout. Another file of the same layout is
scored from the workdir alone:

    python -m mmjax.main --workdir=workdirs/flickr8k --job=evaluate \
        --config.evaluations.val.source.path=captions_test.jsonl.gz --config.evaluations.val.source.images=images_test.tar

What it is     MobileNetV2 (ImageNet, 7 x 7 positions of 1,280 channels), frozen; its map averaged to 3 x 3; a two-layer MLP; a Llama of
               three layers over lower-cased words, from nothing.
Stages         captions  MLP and Llama on 30,000 captions of 6,000 photos, also mirrored. The encoder sees each photo once: its features
               are kept in WORKDIR/features.
Results        WORKDIR/README.md and results.json: BLEU-1 to -4 and CIDEr-D of beam search on the 1,000 validation photos, and of
               the same model with the photos shuffled and withheld (the blind twin). Seen with seed 0: BLEU-4 17.5, CIDEr-D 0.424
               (shuffled: 4.7, 0.063). Beams and their length penalty were chosen on these same photos.
"""

from mmjax.config import (
    Checkpoint,
    Connector,
    Evaluation,
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
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
)
MOBILENET = {"model_type": "mobilenet_v2", "image_size": 224, "depth_multiplier": 1.0}


def get_config(argument: str = ""):
    places = {"data": "../shared/data/flickr8k", "vision": "../shared/data/weights/mobilenet_v2_hf"}
    chosen = parse_arguments(argument, {**places, "tiny": False})
    captions = Stage(
        trainable=("connector/**", "llm/**"),
        sources={"train": _photos(chosen.data, "train", "images_train-*.tar", "train")},
        epochs=3.7,
        rows=48,
        length=64,
        tiles=4,
        optimizer=Optimizer(
            name="muon",
            learning_rate=0.02,
            multipliers={"llm/embed/**": 0.075, "**/{scale,bias}": 0.075},
            warmup_ratio=0.05,
            b1=0.95,
            b2=0.98,
            weight_decay=0.004,
            clip_norm=1.0,
        ),
        cache_features=True,
        augment=("flip",),
        label_smoothing=0.1,
        dropout=0.1,
        unroll=3,
    )
    recipe = Recipe(
        name="flickr8k",
        model=Model(
            llm=LLAMA,
            vision=Part(path=chosen.vision, config=MOBILENET),
            connector=Connector(kind="mlp2x_gelu", grid=3),
            feature_layers=(-1,),
            image=Image(aspect="squash"),
            tokenizer=Tokenizer(kind="word", vocab_size=4000, min_frequency=5),
            template="plain",
        ),
        stages={"captions": captions},
        run=("captions",),
        evaluations={
            "val": Evaluation(
                source=_photos(chosen.data, "val", "images_val.tar", "eval"),
                metrics=("bleu", "cider"),
                blind=True,
                max_new_tokens=20,
                num_beams=3,
                length_penalty=0.3,
                batch=200,
            )
        },
        mesh=Mesh(cpu_devices=2),
        checkpoint=Checkpoint(every=0),
        logging=Logging(every=50),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)


def _photos(data: str, part: str, images: str, split: str) -> Source:
    options = {"split": split, "prompt": ""}
    return Source(kind="captions", path=f"{data}/captions_{part}.jsonl.gz", images=f"{data}/{images}", options=options)
