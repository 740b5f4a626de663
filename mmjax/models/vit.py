"""The one vision transformer (arXiv 2010.11929): CLIP's and SigLIP's towers are settings of it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models.attention import Mask, attention
from mmjax.models.block import Block, Surroundings
from mmjax.models.config import Execution, FeatureSpec, LoraConfig, ViTConfig
from mmjax.models.layers import MLP, Linear, Norm, apply, fan_in_normal
from mmjax.models.stack import init_stack, run_stack

Params = dict[str, Any]


def init(key: jax.Array, config: ViTConfig) -> Params:
    """Fresh float32 parameters."""
    keys = jax.random.split(key, 8)
    width = config.block.width
    x = jnp.zeros((1, 1, width))
    patch = config.patch_size**2 * config.channels
    params: Params = {
        "patch": {"kernel": fan_in_normal(keys[0], (patch, width))},
        "positions": jax.random.normal(keys[1], (config.positions + config.class_token, width)) * 0.02,
        "layers": init_stack(
            lambda k: Block(config.block).init(k, x, Surroundings(Mask(causal=False)))["params"], keys[2], config.layers
        ),
    }
    if config.patch_bias:
        params["patch"]["bias"] = jnp.zeros(width)
    if config.class_token:
        params["class_embedding"] = jax.random.normal(keys[3], (width,)) * 0.02
    for name, present in (("pre_norm", config.pre_norm), ("post_norm", config.post_norm)):
        if present:
            params[name] = _norm(config).init(key, x)["params"]
    if config.pooling == "attention":
        params["pool"] = AttentionPool(config).init(keys[4], x)["params"]
    if config.projection:
        params["projection"] = {"kernel": fan_in_normal(keys[5], (width, config.projection))}
    if config.classes:
        params["head"] = {"kernel": fan_in_normal(keys[6], (width, config.classes)), "bias": jnp.zeros(config.classes)}
    return params


def hidden_states(
    params: Params, config: ViTConfig, pixels: jax.Array, run: Execution, adapters: tuple[LoraConfig, ...] = (), layers: int | None = None
) -> jax.Array:
    """Normalised pixels [n, height, width, channels] -> states [layers + 1, n, positions (+ 1), width].

    Counted as transformers does: 0 is the embedding output (after CLIP's pre-norm), i the output of block i. `layers`: how many
    blocks to run, all by default.
    """
    x = embed(params, config, pixels.astype(run.dtype))
    block = Block(config.block, adapters, backend=run.attention)

    def body(x, layer, j, index, extra):
        x = apply(block, layer, x, Surroundings(Mask(causal=False)))
        return x, x

    layers = config.layers if layers is None else layers
    _, states = run_stack(body, x, params["layers"], layers=layers, run=run)
    return jnp.concatenate([x[None], states])


def embed(params: Params, config: ViTConfig, pixels: jax.Array) -> jax.Array:
    """Pixels [n, height, width, channels] -> embedding output [n, positions (+ 1), width]. Pixels that fill no patch are dropped."""
    n, _, _, channels = pixels.shape
    p, side = config.patch_size, config.image_size // config.patch_size
    if pixels.shape[1:3] != (config.image_size, config.image_size):
        raise ValueError(f"the encoder takes {config.image_size} x {config.image_size} pixels, got {pixels.shape[1]} x {pixels.shape[2]}")
    x = pixels[:, : side * p, : side * p].reshape(n, side, p, side, p, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, side * side, p * p * channels)
    x = apply(Linear(config.block.width, config.patch_bias), params["patch"], x)
    if config.class_token:
        first = jnp.broadcast_to(params["class_embedding"].astype(x.dtype), (n, 1, x.shape[-1]))
        x = jnp.concatenate([first, x], 1)
    x = x + params["positions"].astype(x.dtype)
    return apply(_norm(config), params["pre_norm"], x) if config.pre_norm else x


def features(
    params: Params, config: ViTConfig, spec: FeatureSpec, pixels: jax.Array, run: Execution, adapters: tuple[LoraConfig, ...] = ()
) -> jax.Array:
    """What the connector reads: [n, positions, width * len(spec.layers)]. Blocks above the highest layer read are not run.

    Raises ValueError for a layer that the encoder does not have.
    """
    if any(not -config.layers - 1 <= layer <= config.layers for layer in spec.layers):
        raise ValueError(f"feature layers {spec.layers} of an encoder with {config.layers} blocks")
    wanted = [layer % (config.layers + 1) for layer in spec.layers]
    x = embed(params, config, pixels.astype(run.dtype))
    block = Block(config.block, adapters, backend=run.attention)

    def body(x, layer, j, index, extra):
        x = apply(block, layer, x, Surroundings(Mask(causal=False)))
        return x, x if len(wanted) > 1 else None

    last, states = x, None
    if max(wanted):
        last, states = run_stack(body, x, params["layers"], layers=max(wanted), run=run)
    picked = [last] if states is None else [x if layer == 0 else states[layer - 1] for layer in wanted]
    if spec.post_norm:
        picked = [post_norm(params, config, state) for state in picked]
    if config.class_token and not spec.keep_class_token:
        picked = [state[:, 1:] for state in picked]
    return jnp.concatenate(picked, -1)


def post_norm(params: Params, config: ViTConfig, state: jax.Array) -> jax.Array:
    return apply(_norm(config), params["post_norm"], state) if config.post_norm else state


def pooled(params: Params, config: ViTConfig, last: jax.Array) -> jax.Array:
    """The output of the last block [n, positions, width] (before the post-norm) -> one state an image [n, width]."""
    if config.pooling == "class_token":
        return post_norm(params, config, last[:, 0])
    last = post_norm(params, config, last)
    if config.pooling == "attention":
        return apply(AttentionPool(config), params["pool"], last)
    if config.pooling == "mean":
        return last[:, int(config.class_token) :].mean(1)
    raise ValueError("this vision tower pools nothing: it has features, but no image embedding or classes")


def project(params: Params, config: ViTConfig, state: jax.Array) -> jax.Array:
    """Pooled state [n, width] -> [n, projection]; unchanged where the tower has no projection."""
    return state @ params["projection"]["kernel"].astype(state.dtype) if config.projection else state


def classify(params: Params, config: ViTConfig, pixels: jax.Array, run: Execution) -> jax.Array:
    """Normalised pixels [n, height, width, channels] -> float32 class logits [n, classes]."""
    spec = FeatureSpec(layers=(-1,), keep_class_token=True)
    state = pooled(params, config, features(params, config, spec, pixels, run))
    return apply(Linear(config.classes), params["head"], state).astype(jnp.float32)


class AttentionPool(nn.Module):
    """SigLIP's pooling: a learned probe attends to all positions, then a residual MLP. [n, positions, width] -> [n, width]."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config.block
        probe = self.param("probe", nn.initializers.normal(0.02), (c.width,)).astype(x.dtype)
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, c.width))
        x = PoolAttention(self.config, name="attention")(probe, x)
        h = Norm(c.norm, c.norm_eps, name="norm")(x)
        return (x + MLP(c.mlp_width, c.width, c.activation, False, True, name="mlp")(h))[:, 0]


class PoolAttention(nn.Module):
    """Attention of the probe [n, 1, width] over x [n, positions, width]."""

    config: ViTConfig

    @nn.compact
    def __call__(self, probe: jax.Array, x: jax.Array) -> jax.Array:
        c = self.config.block

        def heads(name: str, y: jax.Array) -> jax.Array:
            y = Linear(c.width, name=name)(y)
            return y.reshape(*y.shape[:-1], c.heads, c.width // c.heads)

        y = attention(heads("query", probe), heads("key", x), heads("value", x), Mask(causal=False))
        return Linear(c.width, name="output")(y.reshape(*probe.shape))


def _norm(config: ViTConfig) -> Norm:
    return Norm(config.block.norm, config.block.norm_eps)
