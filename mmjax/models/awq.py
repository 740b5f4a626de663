"""AWQ (arXiv 2306.00978): what inputs are multiplied by before a weight is rounded to 4 bits, and where its range is cut.

An input channel that is large on calibration data is made larger in the weight and smaller in what produces it, so that it loses less
in rounding. Both searches are exhaustive over a grid, as in llm-awq, and find its numbers.
"""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models import number_formats

STEPS = 20
SHRINK = 0.5  # the largest share of a group's range that is cut off
TOKENS = 512  # of the calibration data that the cutting is judged by


def magnitudes(x: jax.Array) -> jax.Array:
    """The mean absolute value of each input channel: [..., in] -> [in]."""
    return jnp.abs(x.astype(jnp.float32)).reshape(-1, x.shape[-1]).mean(0)


def scales(magnitude: jax.Array, step: jax.Array | int) -> jax.Array:
    """What the inputs are divided by at one step (of 0 .. STEPS - 1) of the search: magnitude ** (step / STEPS), around 1."""
    found = jnp.maximum(magnitude ** (step / STEPS), 1e-4)
    return found / jnp.sqrt(found.max() * found.min())


def search(magnitude: jax.Array, loss: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss of each step [STEPS], the step of the smallest one, the first of equal ones, and its scales [in]); `loss` is that of scales."""
    losses = jax.lax.map(lambda step: loss(scales(magnitude, step)), jnp.arange(STEPS))
    best = jnp.argmin(losses)
    return losses, best, scales(magnitude, best)


def rounded(kernel: jax.Array, group: int) -> jax.Array:
    """A kernel [in, out] rounded to 4 bits in groups of inputs, float32."""
    return number_formats.dense(number_formats.to_int4(kernel, group), kernel.shape[0])


def rounded_between(kernel: jax.Array, scale: jax.Array, group: int) -> jax.Array:
    """A kernel [in, out] rounded when its inputs are divided by `scale` [in]."""
    return rounded(kernel * scale[:, None], group) / scale[:, None]


def clip(kernel: jax.Array, x: jax.Array, group: int) -> jax.Array:
    """The largest absolute value to which each group of each output is cut, [groups, out]: that of the steps from no cut to SHRINK whose
    rounding changes the group's own share of the output least, over some TOKENS of the inputs x [..., in]."""
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    x = x[:: max(1, len(x) // TOKENS)]
    inputs, outputs = kernel.shape
    grouped = kernel.astype(jnp.float32).reshape(-1, group, outputs)
    largest = jnp.abs(grouped).max(1)
    shares = x.reshape(len(x), -1, group)
    # The mean over tokens of (x @ d) ** 2 is d @ gram @ d.
    gram = jnp.einsum("tgi,tgj->gij", shares, shares, precision="highest") / len(x)

    def error(share: jax.Array) -> jax.Array:
        bound = (largest * share)[:, None]
        cut = jnp.clip(grouped, -bound, bound).reshape(inputs, outputs)
        change = rounded(cut, group).reshape(grouped.shape) - grouped
        return (jnp.einsum("gij,gjo->gio", gram, change, precision="highest") * change).sum(1)

    left = jnp.asarray(1 - np.arange(round(SHRINK * STEPS)) / STEPS, jnp.float32)
    return largest * left[jnp.argmin(jax.lax.map(error, left), 0)]


def clipped(kernel: jax.Array, bound: jax.Array) -> jax.Array:
    """A kernel [in, out] with each group of each output cut to a bound [groups, out]."""
    grouped = kernel.reshape(bound.shape[0], -1, kernel.shape[1])
    return jnp.clip(grouped, -bound[:, None], bound[:, None]).reshape(kernel.shape)
