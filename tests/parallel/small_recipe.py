"""As little as one recipe can be that reads pictures and keeps their features, drops out, validates, shows examples before its
questions, and exports: for runs of several processes (`python -m tests.processes FOLDER --config=tests/parallel/small_recipe.py`)."""

import dataclasses

from mmjax import config
from tests import small_workdir


def get_config(argument: str = ""):
    recipe = config.Recipe(
        name="small",
        model=dataclasses.replace(
            small_workdir.MODEL,
            tokenizer=config.Tokenizer(kind="word"),
            adapters={"see": config.Adapter(rank=4, dropout=0.1)},
        ),
        stages={
            "see": config.Stage(
                trainable=("connector/**", "llm/**/lora_*"),
                sources={"scenes": _source("train")},
                steps=8,
                rows=8,
                length=64,
                tiles=2,
                cache_features=True,
                augment=("flip",),
                optimizer=config.Optimizer(learning_rate=1e-2),
                validation=config.Validation(sources={"scenes": _source("held_out")}, every=4, batches=1),
            )
        },
        run=("see",),
        evaluations={
            "scenes": config.Evaluation(source=_source("held_out"), limit=8, batch=8, max_new_tokens=4, samples=2, blind=True),
            "examples": config.Evaluation(
                source=_source("held_out"),
                limit=8,
                batch=8,
                max_new_tokens=4,
                samples=2,
                few_shot=config.FewShot(shots=2, choose="similar", source=_source("train")),
            ),
        },
        mesh=config.Mesh(cpu_devices=1),
        checkpoint=config.Checkpoint(every=2),
        logging=config.Logging(every=1, tensorboard=False),
        export=config.Export(after_training=True),
    )
    return config.to_config_dict(recipe)


def _source(split: str) -> config.Source:
    return config.Source(kind="digits", options={"split": split, "task": "questions", "size": 32})
