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
from mmjax.training.loss import classification_loss, image_text_loss, language_loss, total_weight
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
    parts          the losses that `loss` is the sum of, where there are several: name -> []
    """

    loss: jax.Array
    weight: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    finite: jax.Array
    losses: jax.Array
    parts: dict[str, jax.Array]


# XLA:TPU would cut large products with gathered weights into a loop of thin ones, that the gathering can run beside: at these widths thin
# products cost several times what the gathering does.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
# XLA:CPU computes bfloat16 in float32, and would cast the weights of all layers before the first: three times the model in memory.
CPU_OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}

TrainStep = Callable[[State, Params, Batch], tuple[State, StepMetrics]]
Losses = tuple[jax.Array, dict[str, jax.Array]]
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
    dropout = stage.dropout > 0 or any(getattr(adapter, "dropout", 0.0) > 0 for adapter in config.adapters)
    random = dropout or stage.objective == "contrastive"

    def summed_loss(
        trainable: Params, frozen: Params, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Losses]:
        losses, parts = weigh(join(trainable, frozen, selection), batch, key)
        return losses.sum(), (losses, parts)

    gradient = jax.value_and_grad(summed_loss, has_aux=True)

    def train_step(state: State, frozen: Params, batch: Batch) -> tuple[State, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step) if random else None
        if accumulate == 1:
            (loss, (losses, parts)), gradients = gradient(state.trainable, frozen, batch, key)
        else:

            def add(total: tuple[jax.Array, Params], inputs: tuple[jax.Array, Batch]):
                i, micro = inputs
                micro_key = jax.random.fold_in(key, i) if key is not None else None
                (loss, found), gradients = gradient(state.trainable, frozen, micro, micro_key)
                return jax.tree.map(lambda sum, new: sum + new.astype(sum.dtype), total, (loss, gradients)), found

            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), state.trainable)
            zeros = jax.lax.with_sharding_constraint(zeros, shardings.trainable)
            micro_batches = jax.tree.map(lambda leaf: _cut(leaf, accumulate, shards, mesh), batch)
            (loss, gradients), (losses, parts) = jax.lax.scan(
                add, (jnp.float32(0), zeros), (jnp.arange(accumulate), micro_batches)
            )
            parts = jax.tree.map(lambda part: part.sum(0), parts)
            losses = losses.reshape(accumulate, shards, -1).swapaxes(0, 1).reshape(-1)

        weight = total_weight(batch)
        scale = 1.0 / jnp.where(weight > 0, weight, 1.0)
        gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * scale, gradients)
        gradients = jax.lax.with_sharding_constraint(gradients, shardings.trainable)
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
        parts = jax.tree.map(lambda part: part * scale, parts)
        metrics = StepMetrics(loss, weight, norm, schedule(state.step), finite, losses, parts)
        return State(state.step + 1, trainable, moments), metrics

    options = {"tpu": TPU_OPTIONS, "cpu": CPU_OPTIONS if stage.dtype == "bfloat16" else None}.get(mesh.devices.flat[0].platform)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def make_eval_step(config: ModelConfig, stage: Stage, selection: Selection, mesh: Mesh) -> EvalStep:
    """step(trainable, frozen, batch) -> (summed loss, weight), without dropout, label smoothing, the balance of experts and the
    distillation of noise."""
    weigh = _losses(config, dataclasses.replace(stage, label_smoothing=0.0, router_loss=0.0, noise_distillation=0.0), mesh)
    drawn = stage.objective == "contrastive"  # hard negatives, the same ones at every validation

    def eval_step(trainable: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        losses, _ = weigh(join(trainable, frozen, selection), batch, jax.random.key(0) if drawn else None)
        return losses.sum(), total_weight(batch)

    return jax.jit(eval_step)


def _losses(config: ModelConfig, stage: Stage, mesh: Mesh) -> Callable[[Params, Batch, jax.Array | None], Losses]:
    """The stage's losses, summed over each row or group, and their parts."""
    run, smoothing = execution(stage, mesh), stage.label_smoothing

    def contrastive(params: Params, batch: Batch, key: jax.Array | None) -> Losses:
        assert key is not None
        return image_text_loss(params, config, batch, run, key)

    def classify(params: Params, batch: Batch, key: jax.Array | None) -> Losses:
        return classification_loss(params, config, batch, run, smoothing=smoothing), {}

    def language(params: Params, batch: Batch, key: jax.Array | None) -> Losses:
        losses = language_loss(
            params,
            config,
            batch,
            run,
            groups=data_shards(mesh),
            smoothing=smoothing,
            router_loss=stage.router_loss,
            dropout=stage.dropout,
            dropout_key=key,
            noise_distillation=stage.noise_distillation,
        )
        return losses, {}

    return {"contrastive": contrastive, "classify": classify, "language": language}[stage.objective]


def _cut(leaf: jax.Array, accumulate: int, shards: int, mesh: Mesh) -> jax.Array:
    """[n, ...] -> [accumulate, n / accumulate, ...]: micro-batch i is the i-th part of every data shard; no row moves."""
    micro = leaf.shape[0] // (accumulate * shards)
    parts = leaf.reshape(shards, accumulate, micro, *leaf.shape[1:]).swapaxes(0, 1)
    parts = parts.reshape(accumulate, shards * micro, *leaf.shape[1:])
    return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, DATA_AXES)))
