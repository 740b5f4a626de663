"""The smallest parts: linear (with its adapter port), norm, MLP, activations. Each exists once."""

from __future__ import annotations

from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import tree
from mmjax.models.block_config import Activation, NormKind
from mmjax.models.tuning_config import LoraConfig

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv 2109.08668
    "tanh": jnp.tanh,
}

fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def fan_in_uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """U(-1/sqrt(in), 1/sqrt(in)): what torch gives a Linear's weight, and what the published connectors start from."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def as_torch_starts(key: jax.Array, params: tree.Params) -> tree.Params:
    """The parameters with every kernel [..., in, out] drawn anew from U(-1/sqrt(in), 1/sqrt(in))."""
    flat = tree.flatten(params)
    for i, path in enumerate(path for path in flat if path.endswith("/kernel")):
        shape = flat[path].shape
        bound = shape[-2] ** -0.5
        flat[path] = jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-bound, maxval=bound)
    return tree.unflatten(flat)


@jax.checkpoint
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] @ kernel [in, out] in x's dtype.

    Checkpointed so that the cast of a stored (bfloat16, say) kernel is made again in the backward pass: kept instead, the
    casts of all scanned layers would stand in memory at once. The product itself is never made twice.
    """
    return x @ stored(kernel).astype(x.dtype)


@jax.checkpoint
def wide_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`matmul` whose sums, kept in float32, are its result."""
    return jnp.matmul(x, stored(kernel).astype(x.dtype), preferred_element_type=jnp.float32)


def stored(kernel: jax.Array) -> jax.Array:
    """The numbers of a kernel that is kept as raw bfloat16 bits (uint16); any other kernel as it is.

    XLA:CPU cannot slice bfloat16 and widens a whole stack of layers to float32 to do it; bits it slices. `as_bits` makes them.
    """
    return jax.lax.bitcast_convert_type(kernel, jnp.bfloat16) if kernel.dtype == jnp.uint16 else kernel


def as_bits(kernel: jax.Array) -> jax.Array:
    """A bfloat16 kernel as its bits, without a copy; anything else as it is. Only for frozen kernels: bits have no gradient."""
    return kernel.view(jnp.uint16) if kernel.dtype == jnp.bfloat16 else kernel


def dropped(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """x with a share `rate` (to 1/65536) of its numbers set to 0 and the others scaled up (arXiv 1207.0580)."""
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= round(rate * 2**16)
    return jnp.where(keep, x / (1 - rate), 0)


class Linear(nn.Module):
    """[..., in] -> [..., features]. Adapter leaves found beside the kernel change its output (see mmjax.models.adapters), but where it is
    called with adapted=False."""

    features: int
    use_bias: bool = True
    adapters: tuple[LoraConfig, ...] = ()
    deterministic: bool = True
    kernel_init: Callable = fan_in_normal
    bias_init: Callable = nn.initializers.zeros
    wide: bool = False  # the output is float32, whatever the input is

    @nn.compact
    def __call__(self, x: jax.Array, adapted: bool = True) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = wide_matmul(x, kernel) if self.wide else matmul(x, kernel)
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,)).astype(y.dtype)
        if adapted and self.has_variable("params", "adapters"):
            leaves: Any = self.get_variable("params", "adapters")
            for adapter in self.adapters:
                if adapter.name in leaves:
                    y = y + self._low_rank(x, leaves[adapter.name], adapter)
        return y

    def _low_rank(self, x: jax.Array, leaf: dict[str, jax.Array], adapter: LoraConfig) -> jax.Array:
        if adapter.dropout and not self.deterministic:
            x = dropped(x, adapter.dropout, self.make_rng("dropout"))
        return matmul(matmul(x, leaf["lora_a"]), leaf["lora_b"]) * jnp.asarray(adapter.scale, x.dtype)


def apply(module: nn.Module, params: Any, *args: Any, **settings: Any) -> jax.Array:
    """A module's output with these parameters."""
    return module.apply({"params": params}, *args, **settings)  # type: ignore[return-value]


class Norm(nn.Module):
    """A norm over the last axis, computed in float32; see mmjax.models.block_config.NormKind."""

    kind: NormKind
    eps: float
    use_bias: bool = True  # of layer norms

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        initial = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
        scale = self.param("scale", initial, (width,)).astype(jnp.float32)
        y = y * (1 + scale if self.kind == "rms_plus_one" else scale)
        if self.kind == "layer" and self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (width,)).astype(jnp.float32)
        return y.astype(x.dtype)


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated."""

    hidden: int
    out: int
    activation: Activation
    gated: bool
    use_bias: bool
    adapters: tuple[LoraConfig, ...] = ()
    deterministic: bool = True
    wide: bool = False  # the output is float32, whatever the input is

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def linear(name: str, width: int, wide: bool = False) -> Linear:
            return Linear(width, self.use_bias, self.adapters, self.deterministic, wide=wide, name=name)

        act = ACTIVATIONS[self.activation]
        if self.gated:
            h = act(linear("gate", self.hidden)(x)) * linear("up", self.hidden)(x)
        else:
            h = act(linear("up", self.hidden)(x))
        return linear("down", self.out, self.wide)(h)
