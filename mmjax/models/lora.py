"""LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353) of one Linear; rsLoRA (arXiv 2312.03732) is another scale of the same.

    lora_a [in, rank], lora_b [rank, out]    W' = W + s * lora_a @ lora_b
    lora_bias [out]                          of lora_b, where it has one: b' = b + s * lora_bias
    lora_magnitude [out]                     of DoRA: W' = lora_magnitude * (W + s * lora_a @ lora_b) / its columns' norms

The norms are over the input dimension and get no gradient (section 4.3 of the paper). Computing them takes `rank` times the
multiplications of one token's product: to generate with DoRA, merge it first. In the step leaves may have two companions: `factor`,
the scale s where it differs between layers, and `weight` (see mmjax.models.adapters).
"""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp

from mmjax.models.kernels import Kernel, dropped, matmul, stored
from mmjax.models.tuning_config import LoraConfig

Leaves = Mapping[str, Any]


def draw(key: jax.Array, config: LoraConfig, shape: tuple[int, ...], rank: int, table: bool = False) -> dict[str, jax.Array]:
    """Fresh float32 leaves beside a kernel [..., in, out], so that the adapted model equals the base: lora_a ~ U(-1/sqrt(in), 1/sqrt(in))
    (Kaiming-uniform with a = sqrt 5) and lora_b = 0; of a table lora_a = 0 and lora_b ~ N(0, 1), all as in peft. DoRA's magnitudes are
    still 0: see `magnitudes`."""
    *stack, inputs, outputs = shape
    bound = inputs**-0.5
    if table:
        made = {"lora_a": jnp.zeros((inputs, rank)), "lora_b": jax.random.normal(key, (rank, outputs))}
    else:
        made = {
            "lora_a": jax.random.uniform(key, (*stack, inputs, rank), minval=-bound, maxval=bound),
            "lora_b": jnp.zeros((*stack, rank, outputs)),
        }
    if config.lora_bias and not table:
        made["lora_bias"] = jnp.zeros((*stack, outputs))
    if config.dora:
        made["lora_magnitude"] = jnp.zeros((*stack, outputs))
    return made


def magnitudes(kernel: Kernel, leaves: Leaves, config: LoraConfig) -> jax.Array:
    """DoRA's fresh magnitudes [..., out] beside a kernel [..., in, out]: the norms of its columns."""
    if leaves["lora_a"].ndim == 2:
        return _norms(kernel, leaves, config)
    return jax.lax.map(lambda layer: _norms(layer[0], layer[1], config), (kernel, dict(leaves)))


def change(
    y: jax.Array, x: jax.Array, plain: jax.Array, kernel: Kernel, leaves: Leaves, config: LoraConfig, key: jax.Array | None
) -> jax.Array:
    """The output y [..., out] with what the adapter adds to it; `plain` is x @ kernel, x [..., in] what the adapter reads. With a key
    its input is dropped out."""
    if key is not None and config.dropout:
        x = dropped(x, config.dropout, key)
        plain = matmul(x, kernel) if config.dora else plain
    low = matmul(matmul(x, leaves["lora_a"]), leaves["lora_b"])
    if "lora_bias" in leaves:
        low = low + leaves["lora_bias"].astype(low.dtype)
    added = low * jnp.asarray(_scale(leaves, config), low.dtype)
    if config.dora:
        ratio = (leaves["lora_magnitude"] / _norms(kernel, leaves, config)).astype(low.dtype)
        added = (ratio - 1) * plain.astype(low.dtype) + ratio * added
    return y + weighed(added, leaves)


def merged(kernel: Any, bias: Any, base: Any, leaves: Leaves, config: LoraConfig) -> tuple[Any, Any]:
    """Kernel [..., in, out] and bias [..., out] or None (float32, of numpy or jax) with the change in them; `base` is the kernel under
    all adapters."""
    scale = _scale(leaves, config)
    delta = leaves["lora_a"] @ leaves["lora_b"] * scale
    if config.dora:
        wide = base + delta
        ratio = leaves["lora_magnitude"] / (wide * wide).sum(-2) ** 0.5
        delta = wide * ratio[..., None, :] - base
    weight = leaves.get("weight", 1.0)
    if "lora_bias" in leaves:
        more = leaves["lora_bias"] * scale * weight * (ratio if config.dora else 1.0)
        bias = more if bias is None else bias + more
    return kernel + delta * weight, bias


def embedded(x: jax.Array, tokens: jax.Array, table: jax.Array, leaves: Leaves, config: LoraConfig) -> jax.Array:
    """Embeddings x [rows, T, width] of tokens [rows, T] in table [vocab, width] with what the adapter adds: lora_a is [vocab, rank]."""
    added = matmul(leaves["lora_a"][tokens].astype(x.dtype), leaves["lora_b"]) * jnp.asarray(_scale(leaves, config), x.dtype)
    added = jnp.where((tokens < len(table))[..., None], added, 0)  # new rows of the vocabulary lie beyond
    if config.dora:
        ratio = (leaves["lora_magnitude"] / _norms(table, leaves, config)).astype(x.dtype)
        added = (ratio - 1) * x + ratio * added
    return x + weighed(added, leaves)


def weighed(added: jax.Array, leaves: Leaves) -> jax.Array:
    """What an adapter adds [rows, ..., out], times its weight, () or [rows], if it has one for this call."""
    if "weight" not in leaves:
        return added
    weight = leaves["weight"].astype(added.dtype)
    return added * weight.reshape(weight.shape + (1,) * (added.ndim - weight.ndim))


def _scale(leaves: Leaves, config: LoraConfig) -> Any:
    return leaves["factor"] if "factor" in leaves else config.scale


def _norms(kernel: Kernel, leaves: Leaves, config: LoraConfig) -> jax.Array:
    """float32 [out]: the norms of the changed kernel's columns, without a gradient."""
    a, b = (jax.lax.stop_gradient(leaves[name]).astype(jnp.float32) for name in ("lora_a", "lora_b"))
    wide = jax.lax.stop_gradient(stored(kernel)).astype(jnp.float32) + a @ b * _scale(leaves, config)
    return jnp.sqrt(jnp.sum(wide * wide, -2))
