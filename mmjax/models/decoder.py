"""The one decoder-only language model, with the ports of the ground plan.

    embeddings      the caller hands in [rows, length, width]; mmjax.models.multimodal splices media there
    linear          adapter leaves beside any kernel (mmjax.models.layers.Linear)
    keys/values, block, between blocks   plugs (mmjax.models.ports)
    mask            mmjax.models.attention.Mask
    hidden states   returned on request
"""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models import ports
from mmjax.models.attention import Mask
from mmjax.models.block import Block
from mmjax.models.config import DecoderConfig, Execution, LoraConfig
from mmjax.models.layers import Norm, apply, matmul
from mmjax.models.rope import rotation
from mmjax.models.stack import init_stack, run_stack

Params = dict[str, Any]


class Cache(NamedTuple):
    """Keys and values of all layers, [layers, rows, slots, kv_heads, head_dim]; what each slot holds, [rows, slots] (0 = nothing);
    and the next slot to write."""

    keys: jax.Array
    values: jax.Array
    segments: jax.Array
    next: jax.Array


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: Any) -> Cache:
    shape = (config.layers, rows, slots, config.block.kv_heads, config.block.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((rows, slots), jnp.int32), jnp.int32(0))


def init(key: jax.Array, config: DecoderConfig) -> Params:
    """Fresh float32 parameters: normal with variance 1/fan-in; embeddings with variance 1/width."""
    embed, layers, head = jax.random.split(key, 3)
    width = config.block.width
    x = jnp.zeros((1, 1, width))
    rope = config.block.rope
    turn = rotation(rope, config.block.head_dim, jnp.zeros((1, 1), jnp.int32)) if rope else None
    params = {
        "embed": {"embedding": jax.random.normal(embed, (config.vocab_size, width)) * width**-0.5},
        "layers": init_stack(lambda k: Block(config.block).init(k, x, Mask(), turn)["params"], layers, config.layers),
        "final_norm": _final_norm(config).init(key, x)["params"],
    }
    if not config.tied_head:
        params["head"] = {"kernel": nn.initializers.normal(width**-0.5)(head, (width, config.vocab_size))}
        if config.head_bias:
            params["head"]["bias"] = jnp.zeros(config.vocab_size)
    return params


def embed(params: Params, tokens: jax.Array, run: Execution) -> jax.Array:
    """int [rows, length] -> [rows, length, width]."""
    return params["embed"]["embedding"][tokens].astype(run.dtype)


class Decoded(NamedTuple):
    """`last` [rows, length, width] after the final norm; the cache, if one was given; on request the states
    [layers + 1, rows, length, width] as transformers counts them (embeddings first; the last one is `last`)."""

    last: jax.Array
    cache: Cache | None
    states: jax.Array | None


def decode(
    params: Params,
    config: DecoderConfig,
    x: jax.Array,
    *,
    segments: jax.Array,
    positions: jax.Array,
    run: Execution,
    mask: Mask = Mask(),
    adapters: tuple[LoraConfig, ...] = (),
    plugs: tuple[ports.Plug, ...] = (),
    cache: Cache | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_states: bool = False,
) -> Decoded:
    """Runs the blocks over embeddings x [rows, length, width].

    segments, positions: int [rows, length] as in mmjax.batch.Batch. With a cache the new keys are written at its next slots
    (the same for all rows: prompts are padded on the left) and attention runs over all slots. Without a `dropout_key` nothing is
    dropped, in blocks or adapters.
    """
    period = len(config.windows)
    turn = rotation(config.block.rope, config.block.head_dim, positions) if config.block.rope else None
    mask = dataclasses.replace(mask, query_segments=segments, key_segments=segments)
    slot: Any = 0
    if cache is not None:
        slot = cache.next
        held = jax.lax.dynamic_update_slice(cache.segments, segments.astype(jnp.int32), (0, slot))
        mask = dataclasses.replace(mask, key_segments=held, offset=slot)
        cache = cache._replace(segments=held, next=slot + x.shape[1])
    block = Block(config.block, adapters, dropout_key is None, run.attention, dropout)

    def body(carry, layer, j, index, extra):
        x, keys, values = carry
        stored: list[jax.Array] = []

        def store(key, value):
            at: Any = (index, 0, slot, 0, 0)
            stored[:] = [
                jax.lax.dynamic_update_slice(keys, key.astype(keys.dtype)[None], at),
                jax.lax.dynamic_update_slice(values, value.astype(values.dtype)[None], at),
            ]
            return tuple(jax.lax.dynamic_index_in_dim(a, index, keepdims=False).astype(x.dtype) for a in stored)

        rngs = {"dropout": jax.random.fold_in(dropout_key, index)} if dropout_key is not None else None
        x = apply(
            block,
            layer,
            x,
            dataclasses.replace(mask, window=config.windows[j]),
            turn,
            store if cache is not None else None,
            ports.bind(plugs, extra),
            rngs=rngs,
        )
        return (x, *(stored or (keys, values))), x if return_states else None

    carry = (x, cache.keys, cache.values) if cache is not None else (x, None, None)
    extras = _plug_rows(params, config, plugs, period)
    (last, keys, values), states = run_stack(
        body, carry, params["layers"], layers=config.layers, period=period, extras=extras, run=run
    )
    last = apply(_final_norm(config), params["final_norm"], last)
    if return_states:
        states = jnp.concatenate([x[None], states[:-1], last[None]])
    return Decoded(last, cache._replace(keys=keys, values=values) if cache is not None else None, states)


def head(params: Params, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., vocab] of hidden states after the final norm."""
    kernel = params["embed"]["embedding"].T if config.tied_head else params["head"]["kernel"]
    logits = matmul(hidden, kernel).astype(jnp.float32)
    if config.head_bias:
        logits = logits + params["head"]["bias"].astype(jnp.float32)
    return logits


def _final_norm(config: DecoderConfig) -> Norm:
    return Norm(config.block.norm, config.block.norm_eps)


def _plug_rows(params: Mapping, config: DecoderConfig, plugs: tuple[ports.Plug, ...], period: int) -> tuple[dict, ...]:
    """For each layer of the period, the rows of the plugs that sit there."""
    groups = -(-config.layers // period)
    extras = []
    for residue in range(period):
        rows = {plug.name: ports.rows_for(plug, params["plugs"][plug.name], residue, period, groups) for plug in plugs}
        extras.append({name: found for name, found in rows.items() if found is not None})
    return tuple(extras)
