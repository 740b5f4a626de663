"""Bottleneck adapters on the block port: what a sublayer adds to the residual stream gets a small network added.

    y + scale * up(activation(down(what is read)))

is added in place of the sublayer's output y. Read is y itself, behind attention and behind the MLP (Houlsby et al., arXiv 1902.00751);
the residual stream as y makes it, behind the MLP alone (Pfeiffer et al., arXiv 2005.00247); or the stream that y is added to (parallel,
He et al., arXiv 2110.04366, as the `adapters` library has it: before the norm). With `norm_after` what comes up is normed before it is
added. A fresh one adds nothing: `up` begins at 0, as He et al. have it.

Leaves, one row for each layer: `PLACE/{down,down_bias,up,up_bias}`, and `PLACE/{norm_before,norm_after}/{scale,bias}`.
"""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp

from mmjax.models import ports
from mmjax.models.kernels import dropped, matmul
from mmjax.models.layers import ACTIVATIONS, Norm, apply
from mmjax.models.tuning_config import BottleneckConfig

Params = dict[str, Any]
EPS = 1e-5  # of its norms, torch's own


def init(key: jax.Array, adapter: BottleneckConfig, width: int, layers: int) -> Params:
    """Fresh float32 leaves for so many layers of blocks `width` wide: `down` ~ U(-1/sqrt(width), 1/sqrt(width)), the rest 0."""
    inner = inner_width(adapter, width)
    params: Params = {}
    for place, draw in zip(adapter.places, jax.random.split(key, len(adapter.places))):
        params[place] = {
            "down": jax.random.uniform(draw, (layers, width, inner), minval=-(width**-0.5), maxval=width**-0.5),
            "down_bias": jnp.zeros((layers, inner)),
            "up": jnp.zeros((layers, inner, width)),
            "up_bias": jnp.zeros((layers, width)),
        }
        for norm, there in (("norm_before", adapter.norm_before), ("norm_after", adapter.norm_after)):
            if there:
                params[place][norm] = {"scale": jnp.ones((layers, width)), "bias": jnp.zeros((layers, width))}
    return params


def inner_width(adapter: BottleneckConfig, width: int) -> int:
    """Channels of the bottleneck in blocks `width` wide."""
    return adapter.width or max(1, int(width // adapter.reduction))


def plug(adapter: BottleneckConfig, layers: int) -> ports.Plug:
    """The adapter in a stack of so many layers."""

    def call(params: Params, where: str, x: jax.Array, joined: Callable, y: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if where not in adapter.places:
            return y
        leaves = params[where]
        h = {"input": x, "output": y}.get(adapter.reads, None)
        h = (joined(y) if h is None else h).astype(y.dtype)
        if adapter.norm_before:
            h = apply(Norm("layer", EPS), leaves["norm_before"], h)
        h = ACTIVATIONS[adapter.activation](matmul(h, leaves["down"]) + leaves["down_bias"].astype(h.dtype))
        h = (matmul(h, leaves["up"]) + leaves["up_bias"].astype(h.dtype)) * jnp.asarray(adapter.scale, h.dtype)
        if adapter.dropout and key is not None:
            h = dropped(h, adapter.dropout, jax.random.fold_in(key, adapter.places.index(where)))  # type: ignore[arg-type]
        if adapter.norm_after:
            h = apply(Norm("layer", EPS), leaves["norm_after"], h)
        return y + h

    return ports.Plug(adapter.name, "sublayer", adapter.layers or tuple(range(layers)), call, draws=adapter.dropout > 0)
