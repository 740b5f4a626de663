"""The one vision transformer (arXiv 2010.11929): every family's tower, from CLIP to InternVL, is a setting of it.

Its tokens are the class token, the registers, and the patches row by row, as far as a setting has them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models import ports
from mmjax.models.attention import Mask, attention
from mmjax.models.block import Block, Surroundings
from mmjax.models.config import Execution
from mmjax.models.encoder_config import FeatureSpec, ViTConfig
from mmjax.models.interpolation import resized, resized_to_each
from mmjax.models.layers import ACTIVATIONS, MLP, Linear, Norm, apply, fan_in_normal
from mmjax.models.rope import rotation
from mmjax.models.stack import init_stack, run_stack
from mmjax.models.tuning_config import Adapters
from mmjax.parallel.constraints import ROWS, constrain

Params = dict[str, Any]
Plugs = tuple[ports.Plug, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patches:
    """Normalised pictures of unequal shapes, cut into patches (NaFlex, arXiv 2502.14786).

    pixels  float [n, length, patch_size ** 2 * channels * patch_frames]: patches, each (row, column, channel), or with patch_frames
            (channel, frame, row, column); then padding
    shapes  int [n, 2]: rows and columns of patches
    seen    int [n, length]: 1 = a patch, 0 = padding, which no patch attends to
    places  int [n, length, 2]: row and column of each patch; None = they stand row by row
    """

    pixels: jax.Array
    shapes: jax.Array
    seen: jax.Array
    places: jax.Array | None = None


Pictures = jax.Array | Patches
"""Normalised pixels [n, height, width, channels], or pictures that are cut already."""


def init(key: jax.Array, config: ViTConfig) -> Params:
    """Fresh float32 parameters."""
    keys = jax.random.split(key, 8)
    width = config.block.width
    x = jnp.zeros((1, 1, width))

    def vectors(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, (*shape, width)) * 0.02

    def linear(key: jax.Array, inputs: int, outputs: int) -> Params:
        return {"kernel": fan_in_normal(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}

    params: Params = {
        "patch": linear(keys[0], config.patch_size**2 * config.channels * config.patch_frames, width),
        "layers": init_stack(
            lambda k: Block(config.block).init(k, x, Surroundings(Mask(causal=False)))["params"], keys[2], config.layers
        ),
    }
    if not config.patch_bias:
        del params["patch"]["bias"]
    if config.learned_positions:
        params["positions"] = vectors(keys[1], config.native_side**2 + config.class_token)
    if config.class_token:
        params["class_embedding"] = vectors(keys[3])
    if config.registers:
        params["registers"] = vectors(keys[7], config.registers)
    if config.mask_token:
        params["mask_token"] = jnp.zeros(width)
    for name, present in (("pre_norm", config.pre_norm), ("post_norm", config.post_norm)):
        if present:
            params[name] = _norm(config).init(key, x)["params"]
    if config.pooling == "attention":
        params["pool"] = AttentionPool(config).init(keys[4], x)["params"]
    if config.pooler:
        params["pooler"] = linear(jax.random.fold_in(keys[6], 1), width, config.pooler)
    if config.projection:
        params["projection"] = {"kernel": fan_in_normal(keys[5], (width, config.projection))}
    if config.classes:
        pooled_width = width * (2 if config.pooling == "class_and_mean" else 1)
        params["head"] = linear(keys[6], pooled_width, config.classes)
    return params


def hidden_states(
    params: Params, config: ViTConfig, pictures: Pictures, run: Execution, adapters: Adapters = (), plugs: Plugs = ()
) -> jax.Array:
    """All states [layers + 1, n, tokens, width].

    Counted as transformers does: 0 is the embedding output (after CLIP's pre-norm), i the output of block i.
    """
    x = embed(params, config, pictures, run)
    _, states = run_blocks(params, config, x, pictures, config.layers, True, run, adapters, plugs)
    assert states is not None
    return jnp.concatenate([x[None], states])


def features(
    params: Params,
    config: ViTConfig,
    spec: FeatureSpec,
    pictures: Pictures,
    run: Execution,
    adapters: Adapters = (),
    plugs: Plugs = (),
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """What the connector reads: [n, positions, width * len(spec.layers)].

    Blocks above the highest layer read are not run. Raises ValueError for a layer that the encoder does not have.
    """
    if any(not -config.layers - 1 <= layer <= config.layers for layer in spec.layers):
        raise ValueError(f"feature layers {spec.layers} of an encoder with {config.layers} blocks")
    x = embed(params, config, pictures, run)
    if spec.pooled:
        last, _ = run_blocks(params, config, x, pictures, config.layers, False, run, adapters, plugs, dropout_key)
        return pooled(params, config, last, pictures)[:, None]
    wanted = [layer % (config.layers + 1) for layer in spec.layers]
    last, states = x, None
    if max(wanted):
        top, keep = max(wanted), len(wanted) > 1
        last, states = run_blocks(params, config, x, pictures, top, keep, run, adapters, plugs, dropout_key)
    picked = [last] if states is None else [x if layer == 0 else states[layer - 1] for layer in wanted]
    if spec.post_norm:
        picked = [post_norm(params, config, state) for state in picked]
    if spec.projected:
        picked = [project(params, config, state) for state in picked]
    if spec.class_tokens:
        return jnp.concatenate([state[:, :1] for state in picked], 1)
    return jnp.concatenate([kept(config, spec, state) for state in picked], -1)


def kept(config: ViTConfig, spec: FeatureSpec, state: jax.Array) -> jax.Array:
    """A state [n, tokens, ...] without the tokens before the patches that the connector does not read."""
    first = state[:, : int(config.class_token and spec.keep_class_token)]
    registers = state[:, int(config.class_token) : config.prefix if spec.keep_registers else int(config.class_token)]
    return jnp.concatenate([first, registers, state[:, config.prefix :]], 1)


def embed(params: Params, config: ViTConfig, pictures: Pictures, run: Execution) -> jax.Array:
    """The embedding output [n, tokens, width]. Pixels that fill no patch are dropped."""
    if config.block.rope is not None and not (isinstance(pictures, Patches) and pictures.places is not None):
        raise ValueError("this vision transformer is told where each patch stands: it takes pictures that are cut already")
    cut = pictures.pixels if isinstance(pictures, Patches) else _cut(config, pictures)
    x = apply(Linear(config.block.width, config.patch_bias), params["patch"], cut.astype(run.dtype))

    def tokens(name: str) -> jax.Array:
        leaf = params[name].reshape(1, -1, x.shape[-1]).astype(x.dtype)
        return jnp.broadcast_to(leaf, (len(x), *leaf.shape[1:]))

    if config.class_token:
        x = jnp.concatenate([tokens("class_embedding"), x], 1)
    if config.learned_positions:
        x = x + _positions(params["positions"], config, pictures).astype(x.dtype)
    if config.registers:
        first = int(config.class_token)
        x = jnp.concatenate([x[:, :first], tokens("registers"), x[:, first:]], 1)
    return apply(_norm(config), params["pre_norm"], x) if config.pre_norm else x


def _cut(config: ViTConfig, pixels: jax.Array) -> jax.Array:
    """Pixels [n, height, width, channels] -> patches [n, rows * columns, patch_size ** 2 * channels]."""
    n, p, (rows, columns) = len(pixels), config.patch_size, _shape(config, pixels)
    x = pixels[:, : rows * p, : columns * p].reshape(n, rows, p, columns, p, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * columns, -1)


def _shape(config: ViTConfig, pixels: jax.Array) -> tuple[int, int]:
    """Rows and columns of patches. Raises ValueError for pictures smaller than one."""
    rows, columns = (side // config.patch_size for side in pixels.shape[1:3])
    if not rows or not columns:
        height, width = pixels.shape[1:3]
        raise ValueError(f"pictures of {height} x {width} pixels have no patch of {config.patch_size}")
    return rows, columns


def _positions(table: jax.Array, config: ViTConfig, pictures: Pictures) -> jax.Array:
    """The positions [1 or n, (1 +) patches, width] of pictures, interpolated to another shape than those stored."""
    if isinstance(pictures, Patches):
        assert not config.class_token
        square = table.reshape(config.native_side, config.native_side, -1)
        return resized_to_each(square, pictures.shapes, pictures.pixels.shape[1], config.interpolation)
    return positions(table, config, *_shape(config, pictures))[None]


def positions(table: jax.Array, config: ViTConfig, rows: int, columns: int) -> jax.Array:
    """The stored positions [(1 +) side ** 2, width] for pictures of so many patches: [(1 +) rows * columns, width]."""
    side, first = config.native_side, int(config.class_token)
    if (rows, columns) == (side, side):
        return table
    own = resized(table[first:].reshape(side, side, -1), rows, columns, config.interpolation)
    return jnp.concatenate([table[:first].astype(own.dtype), own])


def run_blocks(
    params: Params,
    config: ViTConfig,
    x: jax.Array,
    pictures: Pictures | None,
    layers: int,
    keep: bool,
    run: Execution,
    adapters: Adapters,
    plugs: Plugs = (),
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The first `layers` blocks: the last state [n, tokens, width] and, to `keep`, those behind each block, stacked. Of what is plugged in
    alone anything is dropped."""
    block = Block(config.block, adapters, run=run)
    x = constrain(x, run.mesh, ROWS)
    around = Surroundings(_mask(pictures, x.shape[1]), _rotation(config, pictures))

    def body(x, layer, j, index, extra):
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        x = apply(block, layer, x, dataclasses.replace(around, ports=ports.bind(plugs, extra, key)))
        x = constrain(x, run.mesh, ROWS)
        return x, x if keep else None

    return run_stack(body, x, params["layers"], layers=layers, extras=ports.extras(params, plugs, 1, layers), run=run)


def _rotation(config: ViTConfig, pictures: Pictures | None) -> tuple[jax.Array, jax.Array] | None:
    """Cosines and sines of the patches' rows and columns, where the blocks turn by them."""
    if config.block.rope is None:
        return None
    assert isinstance(pictures, Patches) and pictures.places is not None  # see embed
    return rotation(config.block.rope, config.block.head_dim, pictures.places)


def _mask(pictures: Pictures | None, queries: int) -> Mask:
    """Everything is seen but padding."""
    if not isinstance(pictures, Patches):
        return Mask(causal=False)
    everyone = jnp.ones((len(pictures.seen), queries), pictures.seen.dtype)
    return Mask(causal=False, query_segments=everyone, key_segments=pictures.seen)


def post_norm(params: Params, config: ViTConfig, state: jax.Array) -> jax.Array:
    norm = Norm("layer", config.post_norm_eps or config.block.norm_eps)
    return apply(norm, params["post_norm"], state) if config.post_norm else state


def last_state(params: Params, config: ViTConfig, state: jax.Array) -> jax.Array:
    """The output of the last block as the encoder hands it out: normed, but for CLIP, which norms the pooled one."""
    return state if config.post_norm == "pooled" else post_norm(params, config, state)


def pooled(params: Params, config: ViTConfig, last: jax.Array, pictures: Pictures) -> jax.Array:
    """The output of the last block [n, tokens, width] (before the post-norm) -> one state a picture [n, width]."""
    last = last_state(params, config, last)
    if config.pooling == "none":
        raise ValueError("this vision tower pools nothing: it has features, but no image embedding or classes")
    if config.pooling == "attention":
        state = apply(AttentionPool(config), params["pool"], last, _mask(pictures, 1))
    elif config.pooling == "class_token":
        state = last[:, 0]
    else:
        state = last[:, config.prefix :].mean(1)
        if config.pooling == "class_and_mean":
            state = jnp.concatenate([last[:, 0], state], -1)
    return post_norm(params, config, state) if config.post_norm in ("pooled", "both") else state


def pooler(params: Params, config: ViTConfig, state: jax.Array) -> jax.Array:
    """Pooled state [n, width] -> [n, config.pooler]; unchanged where the tower has no pooler."""
    if not config.pooler:
        return state
    return ACTIVATIONS[config.pooler_activation](apply(Linear(config.pooler), params["pooler"], state))


def project(params: Params, config: ViTConfig, state: jax.Array) -> jax.Array:
    """Pooled state [n, width] -> [n, projection]; unchanged where the tower has no projection."""
    return state @ params["projection"]["kernel"].astype(state.dtype) if config.projection else state


def classify(params: Params, config: ViTConfig, pictures: Pictures, run: Execution, plugs: Plugs = ()) -> jax.Array:
    """float32 class logits [n, classes]."""
    x = embed(params, config, pictures, run)
    last, _ = run_blocks(params, config, x, pictures, config.layers, False, run, (), plugs)
    return logits(params, config, pooled(params, config, last, pictures))


def logits(params: Params, config: ViTConfig, state: jax.Array) -> jax.Array:
    """float32 class logits [n, classes] of pooled states."""
    return apply(Linear(config.classes), params["head"], state).astype(jnp.float32)


class AttentionPool(nn.Module):
    """SigLIP's pooling [n, positions, width] -> [n, width]: a learned probe attends to positions; a residual MLP."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask = Mask(causal=False)) -> jax.Array:
        c = self.config.block
        probe = self.param("probe", nn.initializers.normal(0.02), (c.width,)).astype(x.dtype)
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, c.width))
        x = PoolAttention(self.config, name="attention")(probe, x, mask)
        h = Norm(c.norm, c.norm_eps, name="norm")(x)
        return (x + MLP(c.mlp_width, c.width, c.activation, False, True, name="mlp")(h))[:, 0]


class PoolAttention(nn.Module):
    """Attention of the probe [n, 1, width] over x [n, positions, width]."""

    config: ViTConfig

    @nn.compact
    def __call__(self, probe: jax.Array, x: jax.Array, mask: Mask) -> jax.Array:
        c = self.config.block

        def heads(name: str, y: jax.Array) -> jax.Array:
            y = Linear(c.width, name=name)(y)
            return y.reshape(*y.shape[:-1], c.heads, c.width // c.heads)

        y = attention(heads("query", probe), heads("key", x), heads("value", x), mask)
        return Linear(c.width, name="output")(y.reshape(*probe.shape))


def _norm(config: ViTConfig) -> Norm:
    """The norms around the blocks are layer norms even where those in the blocks are not (InternVL)."""
    return Norm("layer", config.block.norm_eps)
