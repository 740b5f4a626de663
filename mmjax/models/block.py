"""The one transformer block, used by the decoder, the encoder-decoder, the vision transformer and the text tower."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models.attention import Mask, attention
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import Execution
from mmjax.models.experts import MixtureOfExperts
from mmjax.models.kernels import dropped
from mmjax.models.layers import MLP, Linear, Norm, apply
from mmjax.models.rope import rotate
from mmjax.models.tuning_config import Adapters
from mmjax.parallel.constraints import ANY, POSITIONS, ROWS, constrain

KeysValues = tuple[jax.Array, jax.Array]


class Extra(NamedTuple):
    """Keys and values [1 or rows, P, kv_heads (or heads), dim] that a plug adds to a layer's own. Without a gate they join its softmax,
    seen by all, and `bias` [rows, heads, T, P] is added to their scores in a model that has biases; with one, [heads], [1] or [rows, 1,
    heads], they have a softmax of their own, whose result is multiplied by it, and are seen as the mask says (None: by all)."""

    keys: jax.Array
    values: jax.Array
    gate: jax.Array | None = None
    mask: Mask | None = None
    bias: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class LayerPorts:
    """What is plugged into one layer, already bound to its parameters; see mmjax.models.ports.

    keys_values   functions of the queries [rows, T, heads, dim] and of `project` to an Extra or to None. project(states [..., P, width],
                  adapted=True) makes the layer's own (keys, values [..., P, kv_heads, dim]) of other states, unrotated; with adapted=False
                  as its Linears do without their adapters
    inputs        functions (where, x) -> x of what a sublayer reads, behind its norm, where it has one; where is "attention" or "mlp"
    sublayer      functions (where, input, joined, output) -> output before the residual sum, where as above or "cross_attention";
                  joined(output) is what the residual stream becomes with it (in a block whose sublayers read the same: the output)
    before        functions x -> x, run before the block (gated cross-attention, ...)
    """

    keys_values: tuple[Callable, ...] = ()
    inputs: tuple[Callable, ...] = ()
    sublayer: tuple[Callable, ...] = ()
    before: tuple[Callable, ...] = ()


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a block is run with besides its input.

    rotation   cosines and sines of the rotary embedding [rows, T, rotated / 2]
    bias       added to the scores, broadcast to [rows, heads, T, S]
    store      with a cache: writes this layer's new keys and values, and returns those of all slots
    memory     for blocks with cross-attention: keys and values [rows, S, kv_heads, dim] (see `memory_keys_values`), and their mask
    route      is handed the router's logits of a mixture of experts, float32 [rows, T, experts]
    """

    mask: Mask
    rotation: tuple[jax.Array, jax.Array] | None = None
    bias: jax.Array | None = None
    store: Callable[[jax.Array, jax.Array], KeysValues] | None = None
    memory: tuple[jax.Array, jax.Array, Mask] | None = None
    route: Callable[[jax.Array], None] | None = None
    ports: LayerPorts = LayerPorts()


class Attention(nn.Module):
    """Self-attention: x [rows, T, width] -> [rows, T, width]; with a cache, over what was written before as well."""

    config: BlockConfig
    adapters: Adapters = ()
    deterministic: bool = True
    run: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, around: Surroundings) -> jax.Array:
        c, mask, bias = self.config, around.mask, around.bias

        def linear(name: str, width: int, bias: bool) -> Linear:
            return Linear(width, bias, self.adapters, self.deterministic, name=name)

        linears = {
            name: linear(name, count * c.head_dim, c.qkv_bias and (name != "key" or c.key_bias))
            for name, count in (("query", c.heads), ("key", c.kv_heads), ("value", c.kv_heads))
        }
        norms: dict[str, Norm] = {}
        if c.qk_norm:
            norms = {
                name: Norm(c.qk_norm, c.qk_norm_eps or c.norm_eps, name=f"{name}_norm")  # type: ignore[arg-type]
                for name in ("query", "key")
            }

        def heads(name: str, states: jax.Array, adapted: bool = True) -> jax.Array:
            y = linears[name](states, adapted)
            if c.clip_qkv:
                y = jnp.clip(y, -c.clip_qkv, c.clip_qkv)
            if name in norms and c.qk_norm_over == "width":
                y = norms[name](y)
            y = y.reshape(*y.shape[:-1], -1, c.head_dim)
            return norms[name](y) if name in norms and c.qk_norm_over == "head" else y

        def project(states: jax.Array, adapted: bool = True) -> KeysValues:
            return heads("key", states, adapted), heads("value", states, adapted)

        query, key, value = (
            constrain(heads(name, x), self.run.mesh, ROWS, ANY, "tensor") for name in ("query", "key", "value")
        )
        if around.rotation is not None:
            query, key = rotate(query, *around.rotation), rotate(key, *around.rotation)
        if around.store is not None:
            key, value = around.store(key, value)
        key, value = (constrain(a, self.run.mesh, ROWS, None, "tensor") for a in (key, value))  # of all positions
        gated = []
        for port in around.ports.keys_values:
            extra = port(query, project)
            if extra is None:
                continue
            if extra.gate is None:
                more = [jnp.broadcast_to(a.astype(key.dtype), (len(key), *a.shape[1:])) for a in extra[:2]]
                key, value = jnp.concatenate([more[0], key], 1), jnp.concatenate([more[1], value], 1)
                mask = dataclasses.replace(mask, free_keys=mask.free_keys + more[0].shape[1])
                bias = _with_bias(bias, extra, len(key), key.shape[1])
            else:
                own = _read_apart(query, extra, c, self.run)
                gated.append(own * extra.gate[..., None].astype(own.dtype))
        y = attention(query, key, value, mask, bias=bias, softcap=c.softcap, **_settings(c, self.run))
        for change in gated:
            y = y + change
        return linear("output", x.shape[-1], c.output_bias)(y.reshape(*y.shape[:-2], c.heads * c.head_dim))


def _with_bias(bias: jax.Array | None, extra: Extra, rows: int, keys: int) -> jax.Array | None:
    """The bias of all keys, the extra ones in front; theirs is 0 where they bring none."""
    if bias is None:
        if extra.bias is not None:
            raise ValueError("keys with a bias stand in front of keys that have none")
        return None
    if extra.bias is None:
        return jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (keys - bias.shape[-1], 0)))
    return jnp.concatenate([jnp.broadcast_to(a, (rows, *a.shape[1:])) for a in (extra.bias, bias)], -1)


def _read_apart(query: jax.Array, extra: Extra, config: BlockConfig, run: Execution) -> jax.Array:
    """What the queries [rows, T, heads, dim] read of extra keys and values in a softmax of their own."""
    rows = query.shape[0]
    keys, values = (jnp.broadcast_to(a, (rows, *a.shape[1:])).astype(query.dtype) for a in (extra.keys, extra.values))
    if extra.mask is None and keys.shape[1] == 1:  # a softmax over one key is 1
        values = jnp.repeat(values, query.shape[2] // values.shape[2], 2)
        return jnp.broadcast_to(values, query.shape)
    mask = Mask(causal=False) if extra.mask is None else extra.mask
    return attention(query, keys, values, mask, softcap=config.softcap, **_settings(config, run))


def _settings(config: BlockConfig, run: Execution) -> dict[str, Any]:
    return {"scale": config.scale or None, "backend": run.attention, "mesh": run.mesh}


class CrossAttention(nn.Module):
    """Attention of x [rows, T, width] to a memory's keys and values; its own projections of the memory stand beside, at `key`
    and `value` (and `key_norm`), and are used by `memory_keys_values`."""

    config: BlockConfig
    adapters: Adapters = ()
    deterministic: bool = True
    run: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, memory: tuple[jax.Array, jax.Array, Mask]) -> jax.Array:
        c, (key, value, mask) = self.config, memory

        def linear(name: str, width: int, bias: bool) -> Linear:
            return Linear(width, bias, self.adapters, self.deterministic, name=name)

        if self.is_initializing():
            for name in ("key", "value"):
                linear(name, c.kv_heads * c.head_dim, c.qkv_bias)(jnp.zeros((1, c.memory_width), x.dtype))
            if c.qk_norm:
                _qk_norm(c, "key_norm")(jnp.zeros((1, c.head_dim), x.dtype))
        query = linear("query", c.heads * c.head_dim, c.qkv_bias)(x)
        query = query.reshape(*query.shape[:-1], c.heads, c.head_dim)
        if c.qk_norm:
            query = _qk_norm(c, "query_norm")(query)
        y = attention(query, key, value, mask, **_settings(c, self.run))
        return linear("output", x.shape[-1], c.output_bias)(y.reshape(*y.shape[:-2], c.heads * c.head_dim))


def memory_keys_values(
    layer: Any, config: BlockConfig, states: jax.Array, adapters: Adapters = ()
) -> KeysValues:
    """The keys and values [rows, S, kv_heads, dim] with which one layer's cross-attention reads states [rows, S, memory_width].
    They stay the same while tokens are generated."""
    width = config.kv_heads * config.head_dim

    def project(name: str) -> jax.Array:
        leaves = {"params": layer["cross_attention"][name]}
        y: Any = Linear(width, config.qkv_bias, adapters).apply(leaves, states)
        return y.reshape(*y.shape[:-1], config.kv_heads, config.head_dim)

    keys = project("key")
    if config.qk_norm:
        keys = apply(_qk_norm(config), layer["cross_attention"]["key_norm"], keys)
    return keys, project("value")


def _qk_norm(config: BlockConfig, name: str | None = None) -> Norm:
    """Of a cross-attention's queries or keys, over the channels of each head."""
    if config.qk_norm_over != "head":
        raise ValueError("a cross-attention norms queries and keys over each head, not over all of their channels")
    return Norm(config.qk_norm, config.qk_norm_eps or config.norm_eps, name=name)  # type: ignore[arg-type]


class Block(nn.Module):
    """Attention and MLP with norms and residuals (see BlockConfig): x [rows, T, width] -> the same.

    `dropout` acts on what each of them adds to the residual. Where the residual is wide, attention and MLP compute in `run.dtype`.
    """

    config: BlockConfig
    adapters: Adapters = ()
    deterministic: bool = True
    run: Execution = Execution()
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, around: Surroundings) -> jax.Array:
        c = self.config
        settings: dict[str, Any] = {"adapters": self.adapters, "deterministic": self.deterministic}

        norms: dict[str, Norm] = {}  # those behind sublayers are read by ports as well

        def norm(name: str) -> Norm:
            if name not in norms:
                norms[name] = Norm(c.norm, c.norm_eps, c.norm_bias, name=name)
            return norms[name]

        def before(name: str, x: jax.Array) -> jax.Array:
            y = x if c.norm_place == "after" else norm(f"{name}_norm")(x)
            y = y.astype(self.run.dtype) if c.wide_residual else y
            return constrain(y, self.run.mesh, ROWS, POSITIONS)  # once for all Linears that read it

        def read(name: str, x: jax.Array) -> jax.Array:
            """What a sublayer reads of what stands behind its norm."""
            for port in around.ports.inputs:
                x = port(name, x)
            return x

        def change(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
            """What the sublayer adds to the residual, from its input x and its output y."""

            def joined(y: jax.Array) -> jax.Array:
                return y if c.parallel_norms else after(name, x + y)

            for port in around.ports.sublayer:
                y = port(name, x, joined, y)
            if c.norm_place == "both":
                y = norm(f"{name}_post_norm")(y)
            if c.layer_scale:
                y = y * self.param(f"{name}_scale", nn.initializers.ones, (c.width,)).astype(y.dtype)
            active = self.dropout and not self.deterministic
            return dropped(y, self.dropout, self.make_rng("dropout")) if active else y

        def after(name: str, x: jax.Array) -> jax.Array:
            return norm(f"{name}_norm")(x) if c.norm_place == "after" else x

        def mlp(x: jax.Array) -> jax.Array:
            if c.experts is None:
                shape = (c.mlp_width, c.width, c.activation, c.gated_mlp, c.mlp_bias)
                return MLP(*shape, wide=c.wide_residual, mesh=self.run.mesh, name="mlp", **settings)(x)
            y, logits = MixtureOfExperts(c.experts, c.mlp_width, c.activation, self.run.mesh, name="mlp")(x)
            if around.route is not None:
                around.route(logits)
            return y

        for port in around.ports.before:
            x = port(x)
        h = before("attention", x)
        y = Attention(c, run=self.run, name="attention", **settings)(read("attention", h), around)
        y = change("attention", x, y)
        if c.parallel_norms:
            return x + y + change("mlp", x, mlp(read("mlp", h if c.parallel_norms == 1 else before("mlp", x))))
        x = after("attention", x + y)
        if c.memory_width:
            assert around.memory is not None
            crossed = CrossAttention(c, run=self.run, name="cross_attention", **settings)
            y = crossed(before("cross_attention", x), around.memory)
            x = after("cross_attention", x + change("cross_attention", x, y))
        return after("mlp", x + change("mlp", x, mlp(read("mlp", before("mlp", x)))))
