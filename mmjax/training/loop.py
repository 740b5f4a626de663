"""Training, read from the top: every stage is split, placed, restored, then run step after step until it ends."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Generator, Iterator, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from mmjax import flops, tree
from mmjax.batch import Batch
from mmjax.checkpoints.emergency import Emergency
from mmjax.checkpoints.store import Checkpoint, Store, overlay
from mmjax.config import Recipe
from mmjax.errors import UserError
from mmjax.models.config import ModelConfig
from mmjax.models.kernels import as_bits, as_numbers
from mmjax.models.quantised import is_part
from mmjax.parallel import cluster
from mmjax.parallel.sharding import from_own_rows, param_shardings, placed
from mmjax.training.metrics import Best, Board, Clock, Journal, Speed, format_line, parameter_table
from mmjax.training.optimizer import make_optimizer, make_schedule
from mmjax.training.state import State, init_state, state_shapes, state_shardings
from mmjax.training.step import StepMetrics, make_eval_step, make_train_step
from mmjax.training.termination import Agreement, Terminated
from mmjax.training.trainable import Selection, join, select, split
from mmjax.tree import Params

if TYPE_CHECKING:
    from mmjax.data.pipeline import Info, Pipeline

log = logging.getLogger(__name__)

RATE_STEPS = 10  # the least number of steps that tokens per second and the like are taken over
LAG = 2  # steps the host runs ahead of the metrics it reads, so that the device never waits for it
DEVICE_PREFETCH = 2  # batches on their way to the device


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a run share."""

    recipe: Recipe
    workdir: Path
    mesh: Mesh
    store: Store
    terminating: list[bool]  # gets an element when SIGTERM arrives; see mmjax.training.termination


def train(
    run: Run,
    config: ModelConfig,
    params: Params,
    own: set[str],
    pipelines: Callable[[str, Params], tuple[Pipeline, Pipeline | None]],
) -> Params:
    """Runs the stages of the recipe, from wherever an earlier start of the same command was stopped.

    params     as assembled, before any training; left empty, so that a leaf that is cast or trained is not there twice
    own        paths of leaves that have no published base
    pipelines  by a stage's name and the parameters it starts from, its training data and its held-out data
    Raises UserError for a loss that is not finite, naming the samples; Terminated after a SIGTERM.
    """
    names = run.recipe.run
    found = run.store.resume(names)
    if found is not None:
        log.info("going on from %s", found.path)
        params = overlay(params, found, param_shardings(params, run.mesh))
        saved = (leaf.split("/", 1) for leaf in found.manifest["leaves"])
        own = own | {path for kind, path in saved if found.ended or kind == "own"}
    first = names.index(found.stage) + found.ended if found else 0
    for name in names[first:]:
        training, validation = pipelines(name, params)
        trained = select(params, run.recipe.stages[name].trainable, f"stages.{name}.trainable").leaves
        here = found if found and found.stage == name else None
        acting = config.without(run.recipe.stages[name].idle)
        params = train_stage(run, name, acting, params, own, training, validation, here)
        own = own | set(trained)
    run.store.wait()
    cluster.wait("trained")
    if jax.process_index() == 0:
        _journals(run.workdir)[1].gather()
    return params


def train_stage(
    run: Run,
    name: str,
    config: ModelConfig,
    params: Params,
    own: set[str],
    pipeline: Pipeline,
    validation: Pipeline | None,
    found: Checkpoint | None,
) -> Params:
    """Trains the stage `name` to its end and returns the model's parameters.

    params   with everything earlier stages left, and, where `found` is a checkpoint of this stage, with its leaves laid over
             them; left empty
    own      paths of the leaves that differ from their published base, or have none
    Raises UserError for a loss that is not finite, naming the samples; Terminated after a SIGTERM.
    """
    stage, key, steps = run.recipe.stages[name], f"stages.{name}", pipeline.steps

    # ---- what trains, and where it lives
    selection = select(params, stage.trainable, f"{key}.trainable")
    log.info("stage %s\n%s", name, parameter_table(params, selection))
    shardings = param_shardings(params, run.mesh)
    trainable, frozen = _divided(params, shardings, selection, stage.param_dtype, run.recipe.model.dtype)

    optimizer = make_optimizer(stage.optimizer, trainable, steps, f"{key}.optimizer")
    schedule = make_schedule(stage.optimizer, steps)
    places = state_shardings(trainable, optimizer, run.mesh)
    if found is None:
        start, state = 0, init_state(trainable, optimizer, run.mesh)
    else:
        start, place = found.step, cast(Any, places.step)
        moments = found.optimizer(state_shapes(trainable, optimizer).optimizer, places.optimizer)
        state = State(placed(np.asarray(start, np.int32), place), jax.tree.map(placed, trainable, places.trainable), moments)
    del trainable
    first = jax.process_index() == 0
    metrics, skipped = _journals(run.workdir)
    near = Emergency.of(run.recipe.checkpoint, run.workdir, name, run.mesh, state)
    if near is not None and (newer := near.newest() or 0) > start:
        # which another start, on another mesh, may have left behind: then the journal does not reach that far
        if newer - cluster.from_first("journal", lambda: metrics.last(name)) < run.recipe.logging.every:
            log.info("%s: going on from step %d, which the machines have kept themselves (%s)", name, newer, near.folder)
            start, state = newer, near.restore(newer)

    seed = run.recipe.seed + run.recipe.run.index(name)
    train_step = make_train_step(config, stage, selection, optimizer, schedule, run.mesh, places, seed)
    eval_step = make_eval_step(config, stage, selection, run.mesh) if validation else None

    def save(validation_loss: float | None = None, ended: bool = False) -> None:
        kept = {path: as_numbers(leaf) for path, leaf in tree.flatten(frozen).items() if path in own}
        run.store.save(name, done, state, kept, selection.ranges, ended=ended, validation_loss=validation_loss)

    # ---- what is said
    cluster.wait("journals are whole")
    if first:
        for journal in (metrics, skipped):
            journal.rewind(run.recipe.run, name, start or (0 if found else -1))
    cluster.wait("journals")
    best = Best()
    for line in metrics.read():
        if line["stage"] == name and line.get("validation_loss") is not None:
            best.see(line["validation_loss"])
    if start == 0 and first:  # what the tables of lengths have left out, which are the same everywhere
        for item in pipeline.skipped:
            skipped.write(name, 0, dataclasses.asdict(item))
    board = Board(run.workdir / "tensorboard", name, start + 1) if run.recipe.logging.tensorboard and first else None
    beside = stage.length if stage.objective == "contrastive" else run.recipe.model.connector.text_length
    cost = flops.training_flops(config, selection, stage.objective, beside)
    speed = Speed(cost, not stage.cache_features, window=max(RATE_STEPS, run.recipe.logging.every))
    clock = Clock(start, steps)

    def report(
        step: int, info: Info, wait: float, values: StepMetrics, validate: Callable[[], float] | None = None
    ) -> None:
        """Stops the run where the step broke; writes its line where one is due."""
        loss, finite = jax.device_get((values.loss, values.finite))
        speed.count(info, wait)
        if not finite:
            raise UserError(_broken(name, step, info, values, float(loss)))  # on all processes
        for item in info.skipped:
            skipped.write(name, step, dataclasses.asdict(item))
        if step % run.recipe.logging.every and step != steps and not validate:
            return
        figures: dict[str, Any] = {
            "loss": float(loss),
            "gradient_norm": float(values.gradient_norm),
            "learning_rate": float(values.learning_rate),
            "epoch": info.epoch,
            **{f"loss_{part}": float(value) for part, value in values.parts.items()},
            **speed.read(),
        }
        if validate:
            with speed.pause():
                figures["validation_loss"] = validate()
        if first:
            metrics.write(name, step, figures)
            if board:
                board.write(step, figures)
            tqdm.write(format_line(name, step, steps, figures, clock.left(step)))

    def validate() -> float:
        assert eval_step is not None and validation is not None
        batches = _on_device(validation.batches(0), run.mesh)
        sums = [eval_step(state.trainable, frozen, batch) for batch, _ in batches]
        total, weight = (float(np.sum(jax.device_get(values), dtype=np.float64)) for values in zip(*sums))
        loss = total / max(weight, 1.0)
        best.see(loss)
        return loss

    # ---- the loop
    done = start
    waiting: collections.deque[tuple[int, Info, float, StepMetrics]] = collections.deque()
    termination = Agreement(run.terminating, run.mesh)
    feed = _on_device(pipeline.batches(start), run.mesh)
    profiling = False
    for done in tqdm(range(start + 1, steps + 1), name, steps, initial=start, disable=None if first else True, unit="step"):
        asked = time.perf_counter()
        batch, info = next(feed)
        wait = time.perf_counter() - asked
        if first and done == run.recipe.logging.profile_step:
            jax.profiler.start_trace(str(run.workdir / "profile"))
            profiling = True

        state, values = train_step(state, frozen, batch)

        if done == start + 1:
            jax.block_until_ready(values.loss)
            log.info("%s: first step, with compilation: %.1f s", name, time.perf_counter() - asked)
            clock.restart()
        if profiling and done >= run.recipe.logging.profile_step + run.recipe.logging.profile_steps - 1:
            jax.block_until_ready(values.loss)
            jax.profiler.stop_trace()
            profiling = False

        waiting.append((done, info, wait, values))
        stopping = termination.reached()
        validating = validation is not None and (done % stage.validation.every == 0 or done == steps)
        saving = stopping or (run.recipe.checkpoint.every and done % run.recipe.checkpoint.every == 0)
        keeping = near is not None and done % near.every == 0
        while len(waiting) > (1 if validating else 0 if saving or keeping or done == steps else LAG):
            report(*waiting.popleft())
        if validating:
            report(*waiting.popleft(), validate)
            if stage.validation.patience and best.since >= stage.validation.patience:
                log.info("%s stops at step %d: %d validations without a gain", name, done, best.since)
                break
        if done < steps and (saving or (validating and run.recipe.checkpoint.keep_best)):
            save(best.last if validating else None)
        elif near is not None and keeping and done < steps:
            near.save(done, state)
        if done < steps and stopping:
            if near is not None:
                near.close(finished=False)
            run.store.close()
            raise Terminated

    # ---- the end of the stage
    feed.close()
    if stage.validation.patience and best.since and (winner := run.store.best(name)) is not None:
        log.info("%s ends with the weights of step %d, its lowest held-out loss", name, winner.step)
        leaves = winner.leaves(shardings)
        trained = {path.removeprefix("trained/"): leaf for path, leaf in leaves.items() if path.startswith("trained/")}
        state = dataclasses.replace(state, trainable=tree.unflatten(trained))
    save(best.last, ended=True)
    if near is not None:
        run.store.wait()
        near.close(finished=True)
    if board:
        board.close()
    if pipeline.skipped:
        log.warning("%s: samples that were skipped: %d; see %s", name, len(pipeline.skipped), run.workdir / "skipped.jsonl")
    if termination.settled():
        run.store.close()
        raise Terminated
    return join(state.trainable, release(frozen), selection)


def _on_device(batches: Iterator[tuple[Batch, Info]], mesh: Mesh) -> Generator[tuple[Batch, Info], None, None]:
    """The batches, a few ahead, divided over the mesh. Each process brings the rows of its own data shards."""
    ahead: collections.deque[tuple[Batch, Info]] = collections.deque()
    for batch, info in batches:
        ahead.append((from_own_rows(batch, mesh), info))
        if len(ahead) > DEVICE_PREFETCH:
            yield ahead.popleft()
    yield from ahead


def hold(frozen: Params, dtype: str, whole: set[str]) -> Params:
    """Frozen leaves as the step takes them: floating-point ones in `dtype`, quantised kernels as they are. On CPUs stacked bfloat16
    kernels (but for those in `whole`) are held as bits, since XLA:CPU would widen a whole stack (see mmjax.models.kernels.stored)."""

    def held(path: str, leaf: jax.Array) -> jax.Array:
        if is_part(path):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = leaf.astype(dtype)
        stacked_kernel = tree.is_stacked(path) and path.endswith("/kernel") and path not in whole
        return as_bits(leaf) if stacked_kernel and jax.default_backend() == "cpu" else leaf

    return tree.unflatten({path: held(path, leaf) for path, leaf in tree.flatten(frozen).items()})


def release(frozen: Params) -> Params:
    """The numbers of what `hold` made bits."""
    return jax.tree.map(as_numbers, frozen)


def _divided(params: Params, shardings: Params, selection: Selection, trained_in: str, held_in: str) -> tuple[Params, Params]:
    """`split` and `hold` on the mesh, a leaf after another, the largest first: of what is cast there is one leaf twice, never all."""
    leaves, places = tree.take(params), tree.flatten(shardings)
    order, trainable, frozen = list(leaves), dict[str, jax.Array](), dict[str, jax.Array]()
    for path in sorted(leaves, key=lambda path: -leaves[path].size):
        leaf = placed(leaves.pop(path), places[path])
        own, others = split(tree.unflatten({path: leaf}), selection, trained_in)
        others = hold(others, held_in, whole=set(selection.ranges))
        jax.block_until_ready((own, others))  # or else all casts would be under way at once
        trainable |= tree.flatten(own)
        frozen |= tree.flatten(others)
    first, second = ({path: made[path] for path in order if path in made} for made in (trainable, frozen))
    return tree.unflatten(first), tree.unflatten(second)


def _broken(name: str, step: int, info: Info, values: StepMetrics, loss: float) -> str:
    """The message for a step whose loss or gradient is not finite, with the samples of the offending rows, whichever process brought
    them. All processes must call."""
    local = {shard.index[0].start or 0: np.asarray(shard.data) for shard in values.losses.addressable_shards}
    losses = np.concatenate([local[start] for start in sorted(local)])
    per_entry = len(info.ids) // len(losses)  # rows for each entry: 1, or the rows of a group in classification
    bad = [id for row, ids in enumerate(info.ids) for id in ids if not np.isfinite(losses[row // per_entry])]
    every = [id for ids in info.ids for id in ids]
    told = [json.loads(text) for text in cluster.gathered("broken", json.dumps([bad, every]))]
    bad, every = ([*dict.fromkeys(id for of_process in told for id in of_process[kind])] for kind in (0, 1))
    what = f"the loss is {loss}" if not np.isfinite(loss) else "the loss is finite but its gradient is not"
    where = "in these samples" if bad else "in a step of these samples"
    look = "Look at those samples, lower" if len(bad) < len(every) else "As it is all of the step, look at the weights it began with, lower"
    return (
        f"{name}, step {step}: {what}, {where}: {', '.join(bad or every)}. Nothing was changed by this step; the checkpoints are "
        f"from before it. {look} stages.{name}.optimizer.learning_rate, or set clip_norm."
    )


def _journals(workdir: Path) -> tuple[Journal, Journal]:
    """The figures of the steps, which process 0 writes, and the samples that were skipped: of process N > 0 in skipped-N.jsonl, until the
    end of the training, or its next start, brings them together."""
    process = f"-{jax.process_index()}" if jax.process_index() else ""
    return Journal(workdir / "metrics.jsonl"), Journal(workdir / f"skipped{process}.jsonl")
