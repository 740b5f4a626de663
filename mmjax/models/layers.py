"""The smallest parts: linear (with its adapter port), norm, MLP, activations. Each exists once."""

from __future__ import annotations

import functools
from typing import Any, Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmjax import tree
from mmjax.models import linear_port
from mmjax.models.block_config import Activation, NormKind
from mmjax.models.kernels import matmul, wide_matmul
from mmjax.models.tuning_config import Adapters
from mmjax.parallel.constraints import ANY, ROWS, constrain

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


class Linear(nn.Module):
    """[..., in] -> [..., features]. Adapter leaves found beside the kernel change what it makes (see mmjax.models.linear_port), but
    where it is called with adapted=False."""

    features: int
    use_bias: bool = True
    adapters: Adapters = ()
    deterministic: bool = True
    kernel_init: Callable = fan_in_normal
    bias_init: Callable = nn.initializers.zeros
    wide: bool = False  # the output is float32, whatever the input is

    @nn.compact
    def __call__(self, x: jax.Array, adapted: bool = True) -> jax.Array:
        kernel = held_kernel(self) or self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = None
        if self.use_bias or self.has_variable("params", "bias"):  # merged adapters may leave one
            bias = vector(self, "bias", self.bias_init, self.features)

        def product(x: jax.Array) -> jax.Array:
            return wide_matmul(x, kernel) if self.wide else matmul(x, kernel)

        if not (adapted and self.has_variable("params", "adapters")):
            return linear_port.with_bias(product(x), bias)
        leaves: Any = self.get_variable("params", "adapters")
        key = None if self.deterministic else functools.partial(self.make_rng, "dropout")
        return linear_port.linear(x, kernel, bias, linear_port.present(self.adapters, leaves), product, key)


def vector(module: nn.Module, name: str, init: Callable, width: int) -> jax.Array:
    """A module's leaf [width]; or [rows, width], where an adapter has made one for each row of the batch."""
    if module.has_variable("params", name):
        found: jax.Array = module.get_variable("params", name)
        if found.shape[-1] != width:
            raise ValueError(f"{name} is {list(found.shape)}, not [{width}]")
        return found
    return module.param(name, init, (width,))


def held_kernel(module: nn.Module) -> Any:
    """The leaves of a module's kernel where it is quantised, else None."""
    found = module.get_variable("params", "kernel") if module.has_variable("params", "kernel") else None
    return found if isinstance(found, Mapping) else None


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
        scale = vector(self, "scale", initial, width).astype(jnp.float32)
        if scale.ndim == 2:
            scale = scale.reshape(len(scale), *(1,) * (y.ndim - 2), width)
        y = y * (1 + scale if self.kind == "rms_plus_one" else scale)
        if self.kind == "layer" and self.use_bias:
            y = linear_port.with_bias(y, vector(self, "bias", nn.initializers.zeros, width))
        return y.astype(x.dtype)


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated; on a mesh the hidden channels are divided over `tensor`."""

    hidden: int
    out: int
    activation: Activation
    gated: bool
    use_bias: bool
    adapters: Adapters = ()
    deterministic: bool = True
    wide: bool = False  # the output is float32, whatever the input is
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def linear(name: str, width: int, wide: bool = False) -> Linear:
            return Linear(width, self.use_bias, self.adapters, self.deterministic, wide=wide, name=name)

        act = ACTIVATIONS[self.activation]
        if self.gated:
            h = act(linear("gate", self.hidden)(x)) * linear("up", self.hidden)(x)
        else:
            h = act(linear("up", self.hidden)(x))
        h = constrain(h, self.mesh, ROWS, *(ANY for _ in h.shape[1:-1]), "tensor")
        return linear("down", self.out, self.wide)(h)
