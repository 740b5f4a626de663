"""Products with a stored kernel, whatever it is stored as."""

from __future__ import annotations

from typing import Mapping, TypeAlias

import jax
import jax.numpy as jnp

from mmjax.models import quantised
from mmjax.parallel import placement

Kernel: TypeAlias = jax.Array | Mapping[str, jax.Array]
"""[in, out]: an array, or the leaves of a quantised one."""


@jax.checkpoint
def matmul(x: jax.Array, kernel: Kernel) -> jax.Array:
    """x [..., in] @ kernel [in, out] in x's dtype.

    Checkpointed so that the cast of a stored (bfloat16, say, or quantised) kernel is made again in the backward pass: kept instead,
    the casts of all scanned layers would stand in memory at once. The product itself is never made twice.
    """
    return x @ stored(kernel).astype(x.dtype)


@jax.checkpoint
def wide_matmul(x: jax.Array, kernel: Kernel) -> jax.Array:
    """`matmul` whose sums, kept in float32, are its result."""
    return jnp.matmul(x, stored(kernel).astype(x.dtype), preferred_element_type=jnp.float32)


def stored(kernel: Kernel) -> jax.Array:
    """The numbers of a kernel that is quantised (mmjax.models.quantised) or kept as raw bfloat16 bits (uint16); any other as it is.

    XLA:CPU cannot slice bfloat16 and widens a whole stack of layers to float32 to do it; bits it slices. `as_bits` makes them.
    """
    if isinstance(kernel, Mapping):
        return quantised.dense(kernel)
    return jax.lax.bitcast_convert_type(kernel, jnp.bfloat16) if kernel.dtype == jnp.uint16 else kernel


def as_bits(kernel: jax.Array) -> jax.Array:
    """A bfloat16 kernel as its bits, without a copy; anything else as it is. Only for frozen kernels: bits have no gradient."""
    return placement.viewed(kernel, jnp.uint16) if kernel.dtype == jnp.bfloat16 else kernel


def as_numbers(kernel: jax.Array) -> jax.Array:
    """The inverse, without a copy either."""
    return placement.viewed(kernel, jnp.bfloat16) if kernel.dtype == jnp.uint16 else kernel


def dropped(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """x with a share `rate` (to 1/65536) of its numbers set to 0 and the others scaled up (arXiv 1207.0580)."""
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= round(rate * 2**16)
    return jnp.where(keep, x / (1 - rate), 0)
