"""A workdir as a run leaves it before its first checkpoint: a recipe, a tokenizer, a model from the recipe's seed."""

from pathlib import Path

from mmjax import config

QUESTIONS = config.Source(kind="digits", options={"size": 48})
MODEL = config.Model(
    llm=config.Part(
        config=dict(
            model_type="llama",
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
        )
    ),
    vision=config.Part(
        config=dict(
            model_type="siglip_vision_model",
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=16,
        )
    ),
    feature_layers=(-1,),
    image=config.Image(aspect="squash"),
    template="v1",
    system="",
    adapters={"see": config.Adapter(rank=2)},
)
RECIPE = config.Recipe(
    name="small",
    model=MODEL,
    stages={"instruct": config.Stage(sources={"questions": QUESTIONS}, steps=2)},
    run=("instruct",),
    evaluations={
        "scenes": config.Evaluation(
            source=config.Source(kind="digits", options={"split": "held_out", "size": 12}),
            metrics=("accuracy", "bleu", "cider"),
            blind=True,
            max_new_tokens=4,
            batch=8,
            report_apart=("sum",),
        )
    },
)


def write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config.write_recipe(RECIPE, folder)
    return folder
