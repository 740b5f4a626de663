"""One training step as one compiled function: micro-batches, gradients of the trainable tree, one update."""

from __future__ import annotations

import dataclasses
from typing import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax.batch import Batch
from mmjax.config import Stage
from mmjax.models.config import Execution, ModelConfig
from mmjax.parallel.mesh import DATA_AXES, data_shards
from mmjax.training.loss import classification_loss, language_loss, total_weight
from mmjax.training.optimizer import Schedule
from mmjax.training.state import State
from mmjax.training.trainable import Selection, join
from mmjax.tree import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What a step tells the host, all float32 but `finite`.

    loss           [] sum over supervised positions / their number, over the whole accumulated, sharded batch
    weight         [] that number
    gradient_norm  [] over all trainable leaves, before clipping
    learning_rate  []
    finite         bool []; where it is false the step changed nothing
    losses         [rows] (or [groups] for classification) summed losses, to name the sample that broke
    """

    loss: jax.Array
    weight: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    finite: jax.Array
    losses: jax.Array


TrainStep = Callable[[State, Params, Batch], tuple[State, StepMetrics]]
EvalStep = Callable[[Params, Params, Batch], tuple[jax.Array, jax.Array]]


def execution(stage: Stage, mesh: Mesh) -> Execution:
    """How this stage's recipe wants the model run."""
    return Execution(stage.dtype, stage.remat, stage.attention, stage.unroll, mesh)


def make_train_step(
    config: ModelConfig,
    stage: Stage,
    selection: Selection,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    mesh: Mesh,
    shardings: State,
    seed: int,
) -> TrainStep:
    """step(state, frozen, batch) -> (state, metrics), jitted; the state is donated.

    The batch holds all micro-batches: `stage.accumulate` of them, cut so that every data shard keeps its own rows.
    `shardings` are the state's (see state_shardings), so that a step's output is the next one's input."""
    shards, accumulate = data_shards(mesh), stage.accumulate
    weigh = _losses(config, stage, mesh)
    dropout = stage.dropout > 0 or any(adapter.dropout > 0 for adapter in config.adapters)

    def summed_loss(
        trainable: Params, frozen: Params, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        losses = weigh(join(trainable, frozen, selection), batch, key)
        return losses.sum(), losses

    gradient = jax.value_and_grad(summed_loss, has_aux=True)

    def train_step(state: State, frozen: Params, batch: Batch) -> tuple[State, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None
        if accumulate == 1:
            (loss, losses), gradients = gradient(state.trainable, frozen, batch, key)
        else:

            def add(total: tuple[jax.Array, Params], inputs: tuple[jax.Array, Batch]):
                i, micro = inputs
                micro_key = jax.random.fold_in(key, i) if key is not None else None
                (loss, losses), gradients = gradient(state.trainable, frozen, micro, micro_key)
                return jax.tree.map(lambda sum, new: sum + new.astype(sum.dtype), total, (loss, gradients)), losses

            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), state.trainable)
            micro_batches = jax.tree.map(lambda leaf: _cut(leaf, accumulate, shards, mesh), batch)
            (loss, gradients), losses = jax.lax.scan(
                add, (jnp.float32(0), zeros), (jnp.arange(accumulate), micro_batches)
            )
            losses = losses.reshape(accumulate, shards, -1).swapaxes(0, 1).reshape(-1)

        weight = total_weight(batch)
        scale = 1.0 / jnp.where(weight > 0, weight, 1.0)
        gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * scale, gradients)
        norm = optax.global_norm(gradients)
        loss = loss * scale
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        updates, moments = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        # A step that broke must not reach a checkpoint before the host has heard of it.
        trainable, moments = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old).astype(old.dtype),
            (trainable, moments),
            (state.trainable, state.optimizer),
        )
        losses = jax.lax.with_sharding_constraint(losses, NamedSharding(mesh, PartitionSpec(DATA_AXES)))
        metrics = StepMetrics(loss, weight, norm, schedule(state.step), finite, losses)
        return State(state.step + 1, trainable, moments), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(config: ModelConfig, stage: Stage, selection: Selection, mesh: Mesh) -> EvalStep:
    """step(trainable, frozen, batch) -> (summed loss, weight), without dropout, label smoothing and the balance of experts."""
    weigh = _losses(config, dataclasses.replace(stage, label_smoothing=0.0, router_loss=0.0), mesh)

    def eval_step(trainable: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return weigh(join(trainable, frozen, selection), batch, None).sum(), total_weight(batch)

    return jax.jit(eval_step)


def _losses(config: ModelConfig, stage: Stage, mesh: Mesh) -> Callable[[Params, Batch, jax.Array | None], jax.Array]:
    run, smoothing = execution(stage, mesh), stage.label_smoothing
    if stage.objective == "classify":
        return lambda params, batch, key: classification_loss(params, config, batch, run, smoothing=smoothing)
    return lambda params, batch, key: language_loss(
        params,
        config,
        batch,
        run,
        groups=data_shards(mesh),
        smoothing=smoothing,
        router_loss=stage.router_loss,
        dropout=stage.dropout,
        dropout_key=key,
    )


def _cut(leaf: jax.Array, accumulate: int, shards: int, mesh: Mesh) -> jax.Array:
    """[n, ...] -> [accumulate, n / accumulate, ...]: micro-batch i is the i-th part of every data shard; no row moves."""
    micro = leaf.shape[0] // (accumulate * shards)
    parts = leaf.reshape(shards, accumulate, micro, *leaf.shape[1:]).swapaxes(0, 1)
    parts = parts.reshape(accumulate, shards * micro, *leaf.shape[1:])
    return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, DATA_AXES)))
