"""Changes of a Linear by one number for each of its channels, which start as nothing.

    ia3 [out], or ia3_input [in]   of IA3 (arXiv 2205.05638): ia3 * (W x + b), or W (ia3_input * x) + b in feed-forward Linears
    affine_scale, affine_bias      of LLaMA-Adapter V2 (arXiv 2304.15010), in one of three orders: see AffineConfig

A `weight` beside them in the step (see mmjax.models.adapters) goes from nothing (0) to them (1).
"""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp

from mmjax import tree
from mmjax.models.tuning_config import AffineConfig, Ia3Config

Leaves = Mapping[str, Any]
Config = Ia3Config | AffineConfig


def draw(config: Config, path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """Fresh float32 leaves beside the kernel [..., in, out] at `path`."""
    *stack, inputs, outputs = shape
    if isinstance(config, Ia3Config):
        feeds = any(tree.matches(path, glob) for glob in config.feedforward)
        return {"ia3_input": jnp.ones((*stack, inputs))} if feeds else {"ia3": jnp.ones((*stack, outputs))}
    made = {"affine_bias": jnp.zeros((*stack, outputs))}
    if config.order != "bias":
        made["affine_scale"] = jnp.ones((*stack, inputs if config.order == "input" else outputs))
    return made


def read(x: jax.Array, leaves: Leaves, config: Config) -> jax.Array:
    """What the Linear reads in the place of x [..., in]."""
    scale = _input_scale(leaves, config)
    return x if scale is None else x * _weighed(scale, leaves, x)


def change(y: jax.Array, leaves: Leaves, config: Config) -> jax.Array:
    """What becomes of the Linear's output y [..., out]."""
    if isinstance(config, Ia3Config):
        return y * _weighed(leaves["ia3"], leaves, y) if "ia3" in leaves else y
    y = y + _weighed(leaves["affine_bias"], leaves, y, none=0)
    return y * _weighed(leaves["affine_scale"], leaves, y) if config.order == "output" else y


def merged(kernel: Any, bias: Any, leaves: Leaves, config: Config) -> tuple[Any, Any]:
    """Kernel [..., in, out] and bias [..., out] or None (float32, of numpy or jax) with the change in them."""
    weight = leaves.get("weight", 1.0)

    def toward(leaf: Any, none: float = 1.0) -> Any:
        return none + (leaf - none) * weight if "weight" in leaves else leaf

    scale = _input_scale(leaves, config)
    if scale is not None:
        kernel = kernel * toward(scale)[..., :, None]
    if isinstance(config, AffineConfig):
        more = toward(leaves["affine_bias"], 0.0)
        bias = more if bias is None else bias + more
    out = leaves.get("ia3") if isinstance(config, Ia3Config) else leaves["affine_scale"] if config.order == "output" else None
    if out is not None:
        kernel = kernel * toward(out)[..., None, :]
        bias = None if bias is None else bias * toward(out)
    return kernel, bias


def _input_scale(leaves: Leaves, config: Config) -> Any:
    if isinstance(config, Ia3Config):
        return leaves.get("ia3_input")
    return leaves["affine_scale"] if config.order == "input" else None


def _weighed(leaf: jax.Array, leaves: Leaves, like: jax.Array, none: float = 1.0) -> jax.Array:
    """A leaf [channels] in the dtype of what it changes [rows, ..., channels], the way from `none`, which changes nothing, that
    the weight, () or [rows], says."""
    if "weight" in leaves:
        weight = leaves["weight"]
        leaf = none + (leaf - none) * weight.reshape(weight.shape + (1,) * (like.ndim - weight.ndim))
    return leaf.astype(like.dtype)

