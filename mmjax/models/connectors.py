"""Connectors: encoder features [..., positions, in_width] -> LLM tokens [..., tokens, out_width].

A connector of one's own is a module with three functions, and a recipe whose model.connector.kind is the module's name:

    tokens(config) -> int                                          LLM tokens of one image
    init(key, config) -> params                                    a nested dict of arrays; Linears as {"kernel": [in, out], "bias": [out]}
    connect(params, config, features, adapters, run) -> tokens     [..., positions, in_width] -> [..., tokens, out_width]

`config` is the ConnectorConfig, whose other fields (latents, hidden_width, ...) are at its disposal. Training, sharding, saving and loading
need no more; layers below a name `layers` are stacked on axis 0.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models import perceiver, qformer, visual_blocks
from mmjax.models.config import Execution
from mmjax.models.encoder_config import ConnectorConfig
from mmjax.models.layers import ACTIVATIONS, MLP, Linear, Norm, apply, fan_in_uniform

Params = dict[str, Any]


def init(key: jax.Array, config: ConnectorConfig) -> Params:
    """Fresh parameters as the published connectors have them: weights and biases U(-1/sqrt(in), 1/sqrt(in)).

    Each Linear stands at `layers_0`, `layers_1`, ...; a residual MLP at `first`, `norm`, `second`; see mmjax.models.perceiver,
    mmjax.models.qformer and mmjax.models.visual_blocks. A newline is drawn from N(0, 1/out_width), as LLaVA-NeXT's is; embeddings of frames are 0, as GIT's
    are.
    """
    params: Params = {}
    if config.newline:
        params["newline"] = jax.random.normal(jax.random.fold_in(key, 1 << 16), (config.out_width,)) * config.out_width**-0.5
    if config.own is not None:
        return {**params, **config.own.init(key, config)}
    if config.resamples:
        return {**params, **perceiver.init(key, config)}
    if config.kind == "qformer":
        return {**params, **qformer.init(key, config)}
    if config.kind == "visual_blocks":
        return {**params, **visual_blocks.init(key, config)}
    if config.input_norm:
        width = config.in_width if config.norm_each else grouped_width(config)
        params["input_norm"] = _norm(config).init(key, jnp.zeros((1, width)))["params"]
    if config.kind == "residual_mlp":
        keys = jax.random.split(key, 2)
        wide, narrow = jnp.zeros((1, config.in_width)), jnp.zeros((1, config.out_width))
        return {
            **params,
            "first": _mlp(config).init(keys[0], wide)["params"],
            "norm": _norm_of(config.out_width),
            "second": _mlp(config).init(keys[1], narrow)["params"],
        }
    for i, (inputs, outputs) in enumerate(widths(config)):
        kernel, bias = jax.random.split(jax.random.fold_in(key, i))
        params[f"layers_{i}"] = {"kernel": fan_in_uniform(kernel, (inputs, outputs))}
        if config.bias:
            bound = inputs**-0.5
            params[f"layers_{i}"]["bias"] = jax.random.uniform(bias, (outputs,), minval=-bound, maxval=bound)
    if config.squeeze_width:
        params["squeeze_norm"] = _norm_of(config.squeeze_width)
    if config.output_norm:
        params["output_norm"] = _norm(config).init(key, jnp.zeros((1, config.out_width)))["params"]
    if config.frames:
        params["frame_embeddings"] = jnp.zeros((config.frames, config.in_width))
    return params


def connect(
    params: Params,
    config: ConnectorConfig,
    features: jax.Array,
    adapters=(),
    run: Execution = Execution(),
    frames: bool = False,
    text: qformer.Text | None = None,
) -> jax.Array:
    """Features [..., positions, in_width], or what `pool` made of them -> [..., tokens, out_width].

    frames   they are [..., frames, positions, in_width], and a perceiver makes the tokens of all frames together
    text     int [..., L] twice: what a Q-Former reads beside each of them
    Raises ValueError when the features have another number of positions or width than the connector was made for.
    """
    if features.shape[-2:] == (config.positions, config.in_width):
        features = pool(config, features)
    if features.shape[-2:] != (config.pooled, config.in_width):
        raise ValueError(
            f"the connector was made for features of {config.positions} positions x {config.in_width} channels, "
            f"the encoder gives {features.shape[-2]} x {features.shape[-1]}"
        )
    if frames and not config.resamples:
        raise ValueError(f"a {config.kind} connector reads single pictures, not the frames of a medium together")
    if config.own is not None:
        return config.own.connect(params, config, features, adapters, run)
    if config.resamples:
        media = features[..., None, :, :, :] if frames else features[..., None, None, :, :]
        return perceiver.resample(params, config, media, None, adapters, run)[..., 0, :, :]
    if config.kind == "qformer":
        flat = features.reshape(-1, *features.shape[-2:])
        beside = text and qformer.Text(*(a.reshape(-1, a.shape[-1]) for a in text))
        out = qformer.connect(params, config, flat, beside, adapters, run)
        return out.reshape(*features.shape[:-2], *out.shape[1:])
    if config.kind == "visual_blocks":
        out = visual_blocks.connect(params, config, features.reshape(-1, *features.shape[-2:]), adapters, run)
        return out.reshape(*features.shape[:-2], *out.shape[1:])
    if config.input_norm and config.norm_each:
        features = apply(_norm(config), params["input_norm"], features)
    x = group(config, features)
    if config.input_norm and not config.norm_each:
        x = apply(_norm(config), params["input_norm"], x)
    if config.kind == "residual_mlp":
        x = apply(_mlp(config, adapters), params["first"], x)
        x = apply(Norm("layer", 1e-5), params["norm"], x)
        return x + apply(_mlp(config, adapters), params["second"], x)
    if config.kind == "pooled_mlp":
        x = x[..., 0, :]
    layers = widths(config)
    for i, (_, outputs) in enumerate(layers):
        x = apply(Linear(outputs, config.bias, adapters), params[f"layers_{i}"], x)
        if i + 1 < len(layers):
            x = ACTIVATIONS[config.activation](x)
        if i == 0 and config.squeeze_width:
            x = apply(Norm("layer", 1e-5), params["squeeze_norm"], x)
    if config.kind == "pooled_mlp":
        x = x.reshape(*x.shape[:-1], config.pooled_tokens, config.out_width)
    return apply(_norm(config), params["output_norm"], x) if config.output_norm else x


def with_frames(params: Params, config: ConnectorConfig, features: jax.Array, frames: jax.Array) -> jax.Array:
    """Features [groups, tiles, positions, in_width] with what tells a video's frames apart; frames: int [groups, tiles] from 0, -1 where
    a tile is a picture. Raises ValueError where the connector knows no frames."""
    if not config.frames or config.resamples:
        raise ValueError("this connector has no embeddings of frames: it cannot read videos")
    rows = params["frame_embeddings"].astype(features.dtype)[jnp.maximum(frames, 0)]
    return features + jnp.where(frames[..., None] >= 0, rows, 0)[..., None, :]


def pool(config: ConnectorConfig, features: jax.Array) -> jax.Array:
    """The averaging with which some connectors begin: [..., positions, in_width] -> [..., config.pooled, in_width].

    It has no parameters, so features are cached behind it.
    """
    if config.kind == "pooled_mlp":
        return features.mean(-2, keepdims=True)
    if not config.grid:
        return features
    side = math.isqrt(config.positions)
    share = np.zeros((config.grid, side), np.float32)  # of each row (or column) in each cell
    for i in range(config.grid):
        start, stop = i * side // config.grid, -(-(i + 1) * side // config.grid)
        share[i, start:stop] = 1 / (stop - start)
    rows = features.reshape(*features.shape[:-2], side, side, config.in_width)
    cells = jnp.einsum("gi,hj,...ijc->...ghc", share, share, rows.astype(jnp.float32)).astype(features.dtype)
    return cells.reshape(*features.shape[:-2], config.pooled, config.in_width)


def group(config: ConnectorConfig, features: jax.Array) -> jax.Array:
    """What `pool` made, [..., config.pooled, in_width], with the positions put together that become one token:
    [..., tokens, grouped_width(config)]."""
    before, width = features.shape[:-2], grouped_width(config)
    if config.kind == "concat":
        return features[..., : config.tokens * config.group, :].reshape(*before, config.tokens, width)
    if config.kind != "space_to_depth":
        return features
    side, size = math.isqrt(config.pooled), config.group
    blocks = -(-side // size)
    if side**2 != config.pooled:
        raise ValueError(f"a space_to_depth connector cuts up a square map of positions, not {config.pooled} of them")
    rows = features.reshape(*before, side, side, config.in_width)
    more = (0, blocks * size - side)
    rows = jnp.pad(rows, [(0, 0)] * len(before) + [more, more, (0, 0)])
    x = rows.reshape(*before, blocks, size, blocks, size, config.in_width)
    # [..., block's row, block's column, row in it, column in it, channel]
    x = jnp.swapaxes(x, -4, -3)
    if config.token_order == "columns":
        x = jnp.swapaxes(x, -5, -4)
    return x.reshape(*before, blocks**2, width)


def grouped_width(config: ConnectorConfig) -> int:
    """Channels of one token before the connector's parameters."""
    return config.in_width * {"concat": config.group, "space_to_depth": config.group**2}.get(config.kind, 1)


def widths(config: ConnectorConfig) -> list[tuple[int, int]]:
    """(in, out) of each Linear in the order in which they run."""
    outputs = config.out_width * (config.pooled_tokens if config.kind == "pooled_mlp" else 1)
    depth = {"identity": 0, "linear": 1}.get(config.kind, config.depth)
    squeezed = [config.squeeze_width] * bool(config.squeeze_width)
    ends = [grouped_width(config)] + squeezed + [config.inner_width] * (depth - 1) + [outputs]
    return list(zip(ends[:-1], ends[1:], strict=True)) if depth else []


def _norm(config: ConnectorConfig) -> Norm:
    return Norm(config.norm, config.norm_eps)


def _norm_of(width: int) -> Params:
    """A fresh layer norm."""
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _mlp(config: ConnectorConfig, adapters=()) -> MLP:
    return MLP(config.hidden_width, config.out_width, config.activation, False, config.bias, adapters)
