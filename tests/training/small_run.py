"""A whole run of two stages on a tiny language model, without files of data: `python -m tests.training.small_run WORKDIR`.

The tests kill it and start it again."""

import dataclasses
import os
import sys
import types
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from mmjax import config
from mmjax.checkpoints.store import Store
from mmjax.models.config import ModelConfig
from mmjax.parallel.mesh import make_mesh
from mmjax.training.loop import Run, train
from mmjax.training.termination import noting_sigterm
from tests.training import tiny

MODEL = ModelConfig(
    llm=dataclasses.replace(tiny.LLM, layers=1), adapters=(dataclasses.replace(tiny.CONFIG.adapters[0], dropout=0.1),)
)
RECIPE = config.Recipe(
    stages={
        "read": config.Stage(
            trainable=("llm/embed/**", "llm/layers/**/kernel"),
            steps=12,
            optimizer=config.Optimizer(learning_rate=1e-2, moment_dtype="bfloat16", weight_decay=0.1),
        ),
        "tune": config.Stage(
            trainable=("llm/**/lora_*", "llm/layers[0:1]/**/scale"),
            steps=12,
            optimizer=config.Optimizer(learning_rate=1e-2, clip_norm=1.0),
            validation=config.Validation(every=4, batches=1),
        ),
    },
    run=("read", "tune"),
    checkpoint=config.Checkpoint(every=3, keep=2),
    logging=config.Logging(every=1, tensorboard=False),
)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """As mmjax.data.pipeline.Skipped, without what that module needs."""

    source: str
    id: str
    reason: str


class Data:
    """The batches of a stage, made from their step's number; stands in for mmjax.data.pipeline.Pipeline."""

    def __init__(self, steps: int, seed: int, broken: int = -1):
        self.steps, self.seed, self.broken = steps, seed, broken
        self.skipped: list[Skipped] = []

    def batches(self, start_step: int = 0):
        for step in range(start_step, self.steps):
            batch = tiny.batch(rows=4, length=8, groups=1, seed=self.seed + step)
            supervised = int(batch.weights.sum())
            if step == self.broken:
                batch.weights[2] = float("inf")
            skipped = (Skipped("set", f"bad{step}", "torn"),) if step == 5 else ()
            self.skipped += skipped
            info = types.SimpleNamespace(
                epoch=step / self.steps,
                ids=tuple((f"{step}-{row}",) for row in range(4)),
                tokens=int(batch.segments.sum()),
                supervised=supervised,
                padding=0.1,
                images=0,
                tiles=0,
                answers=0,
                samples=4,
                step=step,
                skipped=skipped,
                share=1.0,
            )
            yield dataclasses.replace(batch, images=None, tiles=None, media=None), info


def run(workdir: Path, recipe: config.Recipe = RECIPE, pipelines=None, model: ModelConfig = MODEL):
    """Trains; returns the run's parameters."""
    workdir.mkdir(exist_ok=True)
    store = Store(workdir, recipe.checkpoint, {})
    mesh = make_mesh(config.Mesh(data=1), jax.devices()[:1])
    made = pipelines or (
        lambda name, _: (Data(12, {"read": 0, "tune": 100}[name]), Data(1, 1000) if name == "tune" else None)
    )
    params = tiny.params(model)
    with noting_sigterm() as terminating:
        trained = train(Run(recipe, workdir, mesh, store, terminating), model, params, set(tiny.paths(params)), made)
    store.close()
    return trained


if __name__ == "__main__":
    run(Path(sys.argv[1]))
