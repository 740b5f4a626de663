"""The losses, without full logits: supervised positions are brought together and go through the head chunk by chunk."""

from __future__ import annotations

import math
from typing import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmjax.batch import Batch
from mmjax.models import adapters, image_text, multimodal
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.experts import balance_loss
from mmjax.parallel.constraints import POSITIONS, ROWS, constrain
from mmjax.training.distillation import noise_loss
from mmjax.tree import Params

CHUNK_LOGITS = 2**26  # logits of one chunk in one group of rows: 256 MiB of float32
LEAST_CHUNKS = 8  # however small the vocabulary, so that chunks without supervised positions are skipped


def language_loss(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    run: Execution,
    *,
    groups: int,
    smoothing: float = 0.0,
    router_loss: float = 0.0,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    noise_distillation: float = 0.0,
) -> jax.Array:
    """Weighted next-token losses summed over each row, float32 [rows]. `groups` is the number of data shards.

    router_loss   weight of a mixture of experts' load-balancing loss; it is spread over the rows so that the quotient of all sums
                  is the mean loss plus this
    noise_distillation   weight of the audio noise distillation (mmjax.training.distillation), spread likewise; MINE's own loss comes with
                  it in full, since the two have no leaf in common
    """
    decoded = multimodal.decode(params, config, batch, run, dropout, dropout_key)
    assert config.llm is not None and batch.targets is not None and batch.weights is not None
    losses = cross_entropy(
        lambda hidden: multimodal.head(params, config, hidden),
        decoded.last,
        jnp.asarray(batch.targets),
        jnp.asarray(batch.weights),
        vocab=config.llm.vocab_size,
        groups=groups,
        smoothing=smoothing,
        mesh=run.mesh,
    )
    if noise_distillation:
        extra = noise_loss(params, config, batch, noise_distillation)
        losses = losses + extra * total_weight(batch) / len(losses)
    if not router_loss or decoded.router is None or config.llm.block.experts is None:
        return losses
    balance = balance_loss(decoded.router, jnp.asarray(batch.segments) > 0, config.llm.block.experts.chosen)
    return losses + router_loss * balance * total_weight(batch) / len(losses)


def classification_loss(
    params: Params, config: ModelConfig, batch: Batch, run: Execution, *, smoothing: float = 0.0
) -> jax.Array:
    """The encoder's own head against each tile's class: losses summed over each group, float32 [groups]."""
    logits = multimodal.classify(params, config, batch, run)
    assert batch.classes is not None
    classes = jnp.asarray(batch.classes)
    return (_nll(logits, classes, smoothing) * (classes >= 0)).sum(-1)


def image_text_loss(
    params: Params, config: ModelConfig, batch: Batch, run: Execution, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A Q-Former's first stage (mmjax.models.image_text) on all pictures of the batch and the texts beside them, over all devices:
    the sum of its losses times the pairs, in equal parts, float32 [groups]; and each loss, times the pairs.

    key   draws the hard negatives
    """
    assert config.connector is not None and batch.connector_tokens is not None
    features = batch.features
    if features is None:
        features = multimodal.vision_features(params, config, batch.images, run)
    flat = jnp.asarray(features, run.dtype).reshape(-1, *features.shape[2:])
    tokens, segments = (jnp.asarray(a).reshape(-1, a.shape[-1]) for a in (batch.connector_tokens, batch.connector_segments))
    losses = image_text.stage1_losses(
        adapters.bound(params, config, "connector"), config.connector, flat, tokens, segments, key, adapters=config.adapters, run=run
    )
    weighted = {name: loss * total_weight(batch) for name, loss in losses.items()}
    total = weighted.pop("loss")
    groups = len(features)
    return jnp.full(groups, total / groups), weighted


def total_weight(batch: Batch) -> jax.Array:
    """What the summed losses are divided by: supervised positions (by their weights), classified tiles, or pictures with a text."""
    if batch.weights is not None:
        return jnp.asarray(batch.weights, jnp.float32).sum()
    if batch.classes is not None:
        return (jnp.asarray(batch.classes) >= 0).sum().astype(jnp.float32)
    assert batch.connector_segments is not None
    return (jnp.asarray(batch.connector_segments) > 0).any(-1).sum().astype(jnp.float32)


def cross_entropy(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    vocab: int,
    groups: int,
    smoothing: float = 0.0,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Weighted cross-entropy of `head(hidden)`, summed over each row.

    hidden   [rows, length, width]
    targets  int32 [rows, length]; weights float32 [rows, length], 0 = no loss here
    head     [..., width] -> float32 logits [..., vocab]
    groups   of neighbouring rows; in each the supervised positions are moved to the front, so that nothing crosses the
             boundary of a data shard. Logits exist for one chunk of positions at a time, and are made again in the
             backward pass; a chunk without supervised positions costs nothing.
    mesh     whose `sequence` parts each take their part of a chunk, and whose `tensor` parts theirs of its logits
    """
    rows, length, width = hidden.shape
    count = rows // groups * length
    chunks, size = chunking(count, vocab)
    padding = chunks * size - count

    grouped_weights = weights.reshape(groups, count).astype(jnp.float32)
    order = jnp.argsort(grouped_weights == 0, axis=-1, stable=True)
    inverse = jnp.argsort(order, axis=-1)

    def in_chunks(values: jax.Array) -> jax.Array:
        """[groups, count, ...] -> [chunks, groups, size, ...], zeros at the end"""
        values = jnp.pad(values, [(0, 0), (0, padding)] + [(0, 0)] * (values.ndim - 2))
        return values.reshape(groups, chunks, size, *values.shape[2:]).swapaxes(0, 1)

    inputs = (
        in_chunks(_permute(constrain(hidden.reshape(groups, count, width), mesh, ROWS), order, inverse)),
        in_chunks(jnp.take_along_axis(targets.reshape(groups, count), order, axis=1)),
        in_chunks(jnp.take_along_axis(grouped_weights, order, axis=1)),
    )

    @jax.checkpoint
    def chunk_losses(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        def supervised() -> jax.Array:
            logits = head(constrain(hidden, mesh, ROWS, POSITIONS))
            return _nll(constrain(logits, mesh, ROWS, POSITIONS, "tensor"), targets, smoothing) * weights

        return jax.lax.cond(jnp.any(weights != 0), supervised, lambda: jnp.zeros(weights.shape, jnp.float32))

    _, losses = jax.lax.scan(lambda _, chunk: (None, chunk_losses(*chunk)), None, inputs)
    losses = losses.swapaxes(0, 1).reshape(groups, chunks * size)[:, :count]
    return jnp.take_along_axis(losses, inverse, axis=1).reshape(rows, length).sum(-1)


def _nll(logits: jax.Array, targets: jax.Array, smoothing: float) -> jax.Array:
    """-log p(target), smoothed towards the uniform distribution. A comparison with an iota instead of a gather: it
    fuses, and stays local where the vocabulary is sharded."""
    logits = logits.astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    target = jnp.where(ids == targets[..., None], logits, 0.0).sum(-1)
    if smoothing:
        target = (1.0 - smoothing) * target + smoothing * logits.mean(-1)
    return normaliser - target


def chunking(count: int, vocab: int) -> tuple[int, int]:
    """In how many chunks so many positions go through the head, and the positions of a chunk."""
    chunks = min(count, max(LEAST_CHUNKS, math.ceil(count * vocab / CHUNK_LOGITS)))
    return chunks, math.ceil(count / chunks)


@jax.custom_vjp
def _permute(values: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """values[g, order[g, i]]: the gradient of a permutation is a gather too, where autodiff would scatter."""
    return jnp.take_along_axis(values, order[..., None], axis=1)


def _permute_forward(
    values: jax.Array, order: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _permute(values, order, inverse), (order, inverse)


def _permute_backward(
    orders: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    return jnp.take_along_axis(gradient, orders[1][..., None], axis=1), None, None


_permute.defvjp(_permute_forward, _permute_backward)
