"""Perceiver resamplers: a fixed number of learned latents read any number of media positions.

Every layer is a cross-attention of the latents to the media and an MLP, each behind a layer norm and with a residual:

    perceiver             latents read the media and, in the same softmax, themselves (Flamingo, arXiv 2204.14198)
    cross_self_perceiver  latents read the media, then attend to each other in a sublayer of its own (AnyMAL-like code,
                          after arXiv 2309.16058)

They run at the connector's `hidden_width`; where the widths before and behind are others, a Linear joins them to it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.models.attention import Mask
from mmjax.models.block import Block, CrossAttention, Surroundings, memory_keys_values
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import Execution
from mmjax.models.encoder_config import ConnectorConfig
from mmjax.models.layers import MLP, Linear, Norm, apply, as_torch_starts
from mmjax.models.stack import init_stack, run_stack
from mmjax.models.tuning_config import Adapters

Params = dict[str, Any]
NORM = Norm("layer", 1e-5)


def init(key: jax.Array, config: ConnectorConfig) -> Params:
    """Fresh parameters: weights U(-1/sqrt(in), 1/sqrt(in)), biases 0, embeddings and latents N(0, 1) as in Flamingo's
    open implementations (a cross_self_perceiver's latents 0.02 of that)."""
    width, block = config.inner_width, block_config(config)
    keys = jax.random.split(key, 5)
    x = jnp.zeros((1, 1, width))

    def layer(key: jax.Array) -> Params:
        memory = (*(jnp.zeros((1, 1, block.kv_heads, block.head_dim)),) * 2, Mask(causal=False))
        params: Params = {
            "cross_attention": CrossAttention(block).init(key, x, memory)["params"],
            "media_norm": NORM.init(key, x)["params"],
            "cross_attention_norm": NORM.init(key, x)["params"],
        }
        if _attends_to_itself(config):
            return {**params, **Block(_without_memory(block)).init(key, x, Surroundings(Mask(causal=False)))["params"]}
        return {**params, "mlp_norm": NORM.init(key, x)["params"], "mlp": _mlp(block).init(key, x)["params"]}

    def linear(inputs: int, outputs: int) -> Params:
        bias = {"bias": jnp.zeros(outputs)} if config.bias else {}
        return {"kernel": jnp.zeros((inputs, outputs)), **bias}

    params: Params = {
        "latents": jax.random.normal(keys[0], (config.latents, width)),
        "layers": init_stack(layer, keys[1], config.depth),
        "norm": NORM.init(key, x)["params"],
    }
    if _attends_to_itself(config):
        params["latents"] *= 0.02
    if config.frames:
        params["frame_embeddings"] = jax.random.normal(keys[2], (config.frames, width))
    if config.media:
        params["media_embeddings"] = jax.random.normal(keys[3], (config.media, width))
    if config.in_width != width:
        params["project_in"] = linear(config.in_width, width)
    if config.out_width != width:
        params["project_out"] = linear(width, config.out_width)
    return as_torch_starts(keys[4], params)


def resample(
    params: Params,
    config: ConnectorConfig,
    features: jax.Array,
    seen: jax.Array | None = None,
    adapters: Adapters = (),
    run: Execution = Execution(),
) -> jax.Array:
    """Features [..., media, frames, positions, in_width] of pictures (one frame) or videos ->
    [..., media, latents, out_width].

    Each medium is read on its own; all positions of its frames are read at once. Frames get their embeddings by their
    place, and so do media where config.media says so (they are told apart by nothing else).
    seen   int or bool [..., media, frames], 0 = padding, which no latent reads; all are read where it is not given
    Raises ValueError for more frames or media than there are embeddings.
    """
    media, frames, positions = features.shape[-4:-1]
    x = features
    if config.in_width != config.inner_width:
        x = apply(Linear(config.inner_width, config.bias, adapters), params["project_in"], x)
    if config.frames:
        x = x + _first("frames", frames, params["frame_embeddings"])[:, None, :].astype(x.dtype)
    if config.media:
        x = x + _first("media", media, params["media_embeddings"])[:, None, None, :].astype(x.dtype)
    x = x.reshape(-1, frames * positions, config.inner_width)
    if seen is None:
        seen = jnp.ones(features.shape[:-2], jnp.int32)
    readable = jnp.repeat((seen > 0).astype(jnp.int32).reshape(-1, frames), positions, 1)
    latents = jnp.broadcast_to(params["latents"].astype(x.dtype), (x.shape[0], config.latents, config.inner_width))
    if not _attends_to_itself(config):  # what follows the media are the latents themselves
        readable = jnp.pad(readable, ((0, 0), (0, config.latents)), constant_values=1)
    mask = Mask(causal=False, query_segments=jnp.ones(latents.shape[:2], jnp.int32), key_segments=readable)

    def body(latents, layer, j, index, extra):
        return _layer(layer, config, latents, x, mask, adapters, run), None

    latents, _ = run_stack(body, latents, params["layers"], layers=config.depth, run=run)
    latents = apply(NORM, params["norm"], latents)
    if config.out_width != config.inner_width:
        latents = apply(Linear(config.out_width, config.bias, adapters), params["project_out"], latents)
    return latents.reshape(*features.shape[:-3], config.latents, config.out_width)


def block_config(config: ConnectorConfig) -> BlockConfig:
    """A layer's shapes."""
    return BlockConfig(
        width=config.inner_width,
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.head_dim or config.inner_width // config.heads,
        mlp_width=config.widening * config.inner_width,
        activation=config.activation,
        norm=NORM.kind,
        norm_eps=NORM.eps,
        gated_mlp=False,
        qkv_bias=config.bias,
        output_bias=config.bias,
        mlp_bias=config.bias,
        qk_norm=NORM.kind if config.qk_norm else "",
        memory_width=config.inner_width,
    )


def _layer(
    params: Params,
    config: ConnectorConfig,
    latents: jax.Array,
    media: jax.Array,
    mask: Mask,
    adapters: Adapters,
    run: Execution,
) -> jax.Array:
    """Latents [items, latents, width] that have read media [items, positions, width]."""
    block = block_config(config)
    query = apply(NORM, params["cross_attention_norm"], latents)
    memory = apply(NORM, params["media_norm"], media)
    if not _attends_to_itself(config):
        memory = jnp.concatenate([memory, query], 1)
    keys, values = memory_keys_values(params, block, memory, adapters)
    crossed = CrossAttention(block, adapters, run=run)
    latents = latents + apply(crossed, params["cross_attention"], query, (keys, values, mask))
    if _attends_to_itself(config):
        whole = Block(_without_memory(block), adapters, run=run)
        return apply(whole, params, latents, Surroundings(Mask(causal=False)))
    return latents + apply(_mlp(block, adapters), params["mlp"], apply(NORM, params["mlp_norm"], latents))


def _attends_to_itself(config: ConnectorConfig) -> bool:
    return config.kind == "cross_self_perceiver"


def _without_memory(block: BlockConfig) -> BlockConfig:
    return dataclasses.replace(block, memory_width=0)


def _mlp(block: BlockConfig, adapters: Adapters = ()) -> MLP:
    return MLP(block.mlp_width, block.width, block.activation, False, block.mlp_bias, adapters)


def _first(name: str, count: int, table: jax.Array) -> jax.Array:
    if count > table.shape[0]:
        raise ValueError(f"the perceiver has embeddings of {table.shape[0]} {name}, not of {count}")
    return table[:count]
