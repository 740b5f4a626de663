"""Positions as a bias of attention scores: ALiBi's slopes, T5's learned buckets."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models.config import RelativeBias


def alibi_bias(heads: int, largest: float, distance: jax.Array) -> jax.Array:
    """float32 [1, heads, T, S]: a slope for each head times the distance int [T, S] (key slot - query slot); arXiv 2108.12409."""
    return (jnp.asarray(slopes(heads, largest))[:, None, None] * distance.astype(jnp.float32))[None]


def slopes(heads: int, largest: float) -> np.ndarray:
    """float32 [heads]: 2 ** -(largest * i / n) for i = 1 .. n, n the next power of two; of more than `heads`, every second one first."""
    n = 2 ** math.ceil(math.log2(heads))
    found = 2.0 ** -(largest * np.arange(1, n + 1, dtype=np.float64) / n)
    if n != heads:
        found = np.concatenate([found[1::2], found[::2]])[:heads]
    return found.astype(np.float32)


def relative_bias(table: jax.Array, config: RelativeBias, distance: jax.Array, *, bidirectional: bool) -> jax.Array:
    """float32 [1, heads, T, S]: the row of `table` [buckets, heads] for each distance int [T, S] (key slot - query slot).

    The first half of the buckets (of each direction's, where there are two) counts single steps, the second half grows by equal
    factors up to `max_distance` (arXiv 1910.10683, section 2.1). Without `bidirectional` all that lies ahead is bucket 0.
    """
    steps = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    bucket = jnp.asarray(buckets(config, bidirectional))[jnp.minimum(steps, config.max_distance)]
    if bidirectional:
        bucket = bucket + jnp.where(distance > 0, config.buckets // 2, 0)
    return table.astype(jnp.float32)[bucket].transpose(2, 0, 1)[None]


def buckets(config: RelativeBias, bidirectional: bool) -> np.ndarray:
    """int32 [max_distance + 1]: the bucket of so many steps in one direction.

    Made on the host in float32, as the references round: a compiled logarithm may fall on the other side of a boundary.
    """
    count = config.buckets // 2 if bidirectional else config.buckets
    exact = count // 2
    steps = np.arange(config.max_distance + 1)
    ratio = np.log(np.maximum(steps, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(config.max_distance / exact)) * np.float32(count - exact)
    far = np.minimum(exact + ratio.astype(np.int32), count - 1)
    return np.where(steps < exact, steps, far).astype(np.int32)
