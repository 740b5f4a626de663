"""The linear port: what adapters make of a Linear's input, output and weights, one after another in the order of the model's list.

A later adapter changes the Linear that the earlier ones have made. So where one scales what the Linear reads, those before it read
that as well.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Sequence

import jax

from mmjax.models import elementwise, lora
from mmjax.models.kernels import Kernel
from mmjax.models.tuning_config import Adapter, Adapters, AffineConfig, Ia3Config, LoraConfig

Leaves = Mapping[str, Any]
Present = Sequence[tuple[Adapter, Leaves]]


def present(adapters: Adapters, leaves: Mapping[str, Leaves]) -> list[tuple[Adapter, Leaves]]:
    """The adapters that have leaves beside a weight, with them."""
    return [(adapter, leaves[adapter.name]) for adapter in adapters if adapter.name in leaves]


def linear(
    x: jax.Array,
    kernel: Kernel,
    bias: jax.Array | None,
    found: Present,
    product: Callable[[jax.Array], jax.Array],
    key: Callable[[], jax.Array] | None = None,
) -> jax.Array:
    """x [..., in] -> [..., out]: product(x), which is x @ kernel, plus bias [out] or [rows, out], changed by the adapters `found`. `key`
    makes the keys of dropout; without it nothing is dropped."""
    reads = [x]  # what each adapter reads, the last one first
    for adapter, leaves in reversed(found):
        reads.append(elementwise.read(reads[-1], leaves, adapter) if isinstance(adapter, Ia3Config | AffineConfig) else reads[-1])
    plain = product(reads[-1])
    y = with_bias(plain, bias)
    for (adapter, leaves), read in zip(found, reversed(reads[:-1])):
        if isinstance(adapter, LoraConfig):
            own = plain if read is reads[-1] or not adapter.dora else product(read)
            dropout = key() if key is not None and adapter.dropout else None
            y = lora.change(y, read, own, kernel, leaves, adapter, dropout)
        elif isinstance(adapter, Ia3Config | AffineConfig):
            y = elementwise.change(y, leaves, adapter)
    return y


def with_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """y [rows, ..., out] plus a bias [out], or [rows, out] where every row has its own."""
    if bias is None:
        return y
    if bias.ndim == 2:
        bias = bias.reshape(len(bias), *(1,) * (y.ndim - 2), bias.shape[-1])
    return y + bias.astype(y.dtype)


def merged(kernel: Any, bias: Any, found: Present) -> tuple[Any, Any]:
    """Kernel [..., in, out] and bias [..., out] or None (float32, of numpy or jax) with the changes in them."""
    base = kernel
    for adapter, leaves in found:
        if isinstance(adapter, LoraConfig):
            kernel, bias = lora.merged(kernel, bias, base, leaves, adapter)
        elif isinstance(adapter, Ia3Config | AffineConfig):
            kernel, bias = elementwise.merged(kernel, bias, leaves, adapter)
    return kernel, bias
