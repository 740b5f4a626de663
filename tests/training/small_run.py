"""A whole run of two stages on a tiny language model, without files of data: `python -m tests.training.small_run WORKDIR`.

The tests kill it and start it again. `... WORKDIR HOST:PORT PROCESSES PROCESS` is one of several processes, which train the second stage
alone, and then write what the model answers to WORKDIR/answers.json. `... FOLDER` after them: they keep checkpoints of their own there,
and the workdir gets none before the end."""

import dataclasses
import json
import os
import sys
import types
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from mmjax import config
from mmjax.checkpoints.store import Store
from mmjax.inference.generate import generate
from mmjax.inference.sampling import Sampling
from mmjax.models.config import Execution, ModelConfig
from mmjax.parallel import cluster
from mmjax.parallel.mesh import make_mesh, own_shards
from mmjax.parallel.sharding import param_shardings, placed
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
    """The batches of a stage, made from their step's number; stands in for mmjax.data.pipeline.Pipeline. `own` of two: the rows of
    those shards."""

    def __init__(self, steps: int, seed: int, broken: int = -1, own: tuple[int, ...] = (0, 1)):
        self.steps, self.seed, self.broken, self.own = steps, seed, broken, own
        self.skipped: list[Skipped] = []

    def batches(self, start_step: int = 0):
        for step in range(start_step, self.steps):
            batch = tiny.batch(rows=4, length=8, groups=1, seed=self.seed + step)
            supervised = int(batch.weights.sum())
            if step == self.broken:
                batch.weights[2] = float("inf")
            rows = [row for row in range(4) if row // 2 in self.own]
            skipped = (Skipped("set", f"bad{step}", "torn"),) if step == 5 and 1 in self.own else ()
            self.skipped += skipped
            info = types.SimpleNamespace(
                epoch=step / self.steps,
                ids=tuple((f"{step}-{row}",) for row in rows),
                tokens=int(batch.segments.sum()),
                supervised=supervised,
                padding=0.1,
                images=0,
                tiles=0,
                answers=0,
                samples=len(rows),
                step=step,
                skipped=skipped,
                share=len(rows) / 4,
            )
            batch = dataclasses.replace(batch, images=None, tiles=None, media=None)
            yield jax.tree.map(lambda leaf: leaf[rows], batch), info


def run(workdir: Path, recipe: config.Recipe = RECIPE, pipelines=None, model: ModelConfig = MODEL, mesh=None):
    """Trains, on one device unless a mesh is given; returns the run's parameters."""
    workdir.mkdir(exist_ok=True)
    store = Store(workdir, recipe.checkpoint, {})
    mesh = mesh or make_mesh(config.Mesh(data=1), jax.devices()[:1])
    made = pipelines or (
        lambda name, _: (Data(12, {"read": 0, "tune": 100}[name]), Data(1, 1000) if name == "tune" else None)
    )
    params = tiny.params(model)
    with noting_sigterm() as terminating:
        trained = train(Run(recipe, workdir, mesh, store, terminating), model, params, set(tiny.paths(params)), made)
    store.close()
    return trained


def run_on_two(workdir: Path, local: str = "") -> None:
    """The second stage on two devices, of this process or of two, and then an answer to each of four prompts. `local`: see Checkpoint."""
    mesh = make_mesh(config.Mesh(data=2), jax.devices()[:2])
    own = own_shards(mesh)
    recipe = dataclasses.replace(RECIPE, run=("tune",))
    if local:
        recipe.checkpoint = config.Checkpoint(every=0, keep_best=0, local=local, local_every=2)
    params = run(workdir, recipe, lambda *_: (Data(12, 100, own=own), Data(1, 1000, own=own)), mesh=mesh)
    params = jax.tree.map(placed, params, param_shardings(params, mesh))
    prompts = dataclasses.replace(tiny.batch(rows=4, length=8, groups=1), images=None, tiles=None, media=None)
    tokens = generate(params, MODEL, prompts, Sampling(max_new_tokens=6), Execution(mesh=mesh)).tokens
    if jax.process_index() == 0:
        (workdir / "answers.json").write_text(json.dumps(tokens.tolist()))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        run(Path(sys.argv[1]))
    else:
        with cluster.joined(cluster.Asked(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), heartbeat=20)):
            run_on_two(Path(sys.argv[1]), *sys.argv[5:])
