"""The small language model on which every recipe's `:tiny` is tried (see tests/gallery.py).

    python -m mmjax.main --config=configs/gallery_base.py
    python -m mmjax.main --config=configs/gallery_base.py:data=DIR

DIR of `data` holds Flickr8k as configs/flickr8k.py describes it.

What it is     a Llama of three layers that has only ever read: 30,000 captions, without the photographs.
Stages         plain     captions alone
               chat      a caption told, another one of the same photograph asked for
               language  one caption behind another
So it has learnt that what stands before a caption may tell of the same scene, which is what a connector's tokens are to do.
At the end it is exported, in Hugging Face's layout, to WORKDIR/export: recipes read it as --config.model.llm.path=WORKDIR/export.
"""

from mmjax.config import (
    Checkpoint,
    Export,
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


def get_config(argument: str = ""):
    chosen = parse_arguments(argument, {"data": "../shared/data/flickr8k", "tiny": False})

    def read(template: str, shown: str, prompt: str, epochs: float) -> Stage:
        options = {"split": "train", "shown": shown, "prompt": prompt}
        return Stage(
            trainable=("llm/**",),
            sources={"captions": Source(kind="captions", path=f"{chosen.data}/captions_train.jsonl.gz", options=options)},
            template=template,
            epochs=epochs,
            rows=16,
            length=256,
            tiles=0,
            optimizer=Optimizer(
                name="muon",
                learning_rate=0.02,
                multipliers={"llm/embed/**": 0.1, "**/scale": 0.1},
                warmup_ratio=0.05,
                b1=0.95,
                b2=0.98,
                weight_decay=0.01,
                clip_norm=1.0,
            ),
            dropout=0.1,
            unroll=3,
        )

    recipe = Recipe(
        name="gallery_base",
        model=Model(llm=LLAMA, tokenizer=Tokenizer(kind="bpe", vocab_size=2048), template="plain", system=""),
        stages={
            "plain": read("plain", "nothing", "", 1.0),
            "chat": read("v1", "words", "Describe the image.", 1.0),
            "language": read("interleaved", "words", "", 2.0),
        },
        run=("plain", "chat", "language"),
        mesh=Mesh(cpu_devices=2),
        checkpoint=Checkpoint(every=0),
        logging=Logging(every=50),
        export=Export(after_training=True),
    )
    return to_config_dict(tiny(recipe) if chosen.tiny else recipe)
