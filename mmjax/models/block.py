"""The one transformer block, used by the decoder, the vision transformer and the text tower."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models.attention import Mask, attention
from mmjax.models.config import BlockConfig, LoraConfig
from mmjax.models.layers import MLP, Linear, Norm, dropped
from mmjax.models.rope import rotate

KeysValues = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class LayerPorts:
    """What is plugged into one layer, already bound to its parameters; see mmjax.models.ports.

    keys_values   functions of the queries [rows, T, heads, dim] to extra (keys, values [rows, P, kv_heads, dim], gate [heads] or None): without
                  a gate they join the softmax, with one they have a softmax of their own
    sublayer      functions (where, input, output) -> output, called with where "attention" and "mlp" before the residual sum
    before        functions x -> x, run before the block (gated cross-attention, ...)
    """

    keys_values: tuple[Callable, ...] = ()
    sublayer: tuple[Callable, ...] = ()
    before: tuple[Callable, ...] = ()


class Attention(nn.Module):
    """Self-attention: x [rows, T, width] -> [rows, T, width]; with a cache, over what was written before as well."""

    config: BlockConfig
    adapters: tuple[LoraConfig, ...] = ()
    deterministic: bool = True
    backend: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        rotation: tuple[jax.Array, jax.Array] | None = None,
        store: Callable[[jax.Array, jax.Array], KeysValues] | None = None,
        ports: LayerPorts = LayerPorts(),
    ) -> jax.Array:
        c = self.config

        def linear(name: str, width: int, bias: bool) -> Linear:
            return Linear(width, bias, self.adapters, self.deterministic, name=name)

        def heads(name: str, count: int) -> jax.Array:
            y = linear(name, count * c.head_dim, c.qkv_bias)(x)
            return y.reshape(*y.shape[:-1], count, c.head_dim)

        query, key, value = heads("query", c.heads), heads("key", c.kv_heads), heads("value", c.kv_heads)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if store is not None:
            key, value = store(key, value)
        gated = []
        for port in ports.keys_values:
            more_keys, more_values, gate = port(query)
            if gate is None:
                key = jnp.concatenate([more_keys.astype(key.dtype), key], 1)
                value = jnp.concatenate([more_values.astype(value.dtype), value], 1)
                mask = dataclasses.replace(mask, free_keys=mask.free_keys + more_keys.shape[1])
            else:
                own = attention(query, more_keys, more_values, Mask(causal=False), backend=self.backend)
                gated.append(own * gate[:, None].astype(own.dtype))
        y = attention(query, key, value, mask, backend=self.backend)
        for extra in gated:
            y = y + extra
        return linear("output", x.shape[-1], c.output_bias)(y.reshape(*y.shape[:-2], c.heads * c.head_dim))


class Block(nn.Module):
    """Attention and MLP behind norms, with residuals: x [rows, T, width] -> the same.

    `dropout` acts on what each of the two adds to the residual.
    """

    config: BlockConfig
    adapters: tuple[LoraConfig, ...] = ()
    deterministic: bool = True
    backend: str = "auto"
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        rotation: tuple[jax.Array, jax.Array] | None = None,
        store: Callable[[jax.Array, jax.Array], KeysValues] | None = None,
        ports: LayerPorts = LayerPorts(),
    ) -> jax.Array:
        c = self.config
        settings: dict[str, Any] = {"adapters": self.adapters, "deterministic": self.deterministic}
        attend = Attention(c, backend=self.backend, name="attention", **settings)
        mlp = MLP(c.mlp_width, c.width, c.activation, c.gated_mlp, c.mlp_bias, name="mlp", **settings)

        def added(y: jax.Array) -> jax.Array:
            active = self.dropout and not self.deterministic
            return dropped(y, self.dropout, self.make_rng("dropout")) if active else y

        for port in ports.before:
            x = port(x)
        h = Norm(c.norm, c.norm_eps, name="attention_norm")(x)
        y = attend(h, mask, rotation, store, ports)
        for port in ports.sublayer:
            y = port("attention", x, y)
        if c.parallel:
            z = mlp(h)
            for port in ports.sublayer:
                z = port("mlp", x, z)
            return x + added(y + z)
        x = x + added(y)
        z = mlp(Norm(c.norm, c.norm_eps, name="mlp_norm")(x))
        for port in ports.sublayer:
            z = port("mlp", x, z)
        return x + added(z)
