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
    buckets = config.buckets // 2 if bidirectional else config.buckets
    side = jnp.where(distance > 0, buckets, 0) if bidirectional else 0
    steps = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(steps, 1).astype(jnp.float32) / exact) / math.log(config.max_distance / exact)
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    bucket = side + jnp.where(steps < exact, steps, far)
    return table.astype(jnp.float32)[bucket].transpose(2, 0, 1)[None]
