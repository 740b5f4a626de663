"""The one language model, with the ports of the ground plan: decoder-only, or a half of an encoder-decoder.

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

from mmjax.errors import UserError
from mmjax.models import linear_port, lora, new_rows, ports
from mmjax.models.attention import Mask
from mmjax.models.block import Block, Surroundings
from mmjax.models.config import DecoderConfig, Execution
from mmjax.models.kernels import matmul
from mmjax.models.layers import ACTIVATIONS, Linear, Norm, apply, fan_in_normal
from mmjax.models.position_bias import alibi_bias, relative_bias
from mmjax.models.rope import rotation
from mmjax.models.stack import init_stack, run_stack
from mmjax.models.tuning_config import Adapters, LoraConfig
from mmjax.parallel.constraints import ROWS, STREAM, constrain

Params = dict[str, Any]


class Memory(NamedTuple):
    """What an encoder-decoder's decoder reads: keys and values of each layer's cross-attention [layers, rows, S, kv_heads, head_dim],
    and int [rows, S], the packed sample that each is of, 0 where there is nothing to see."""

    keys: jax.Array
    values: jax.Array
    segments: jax.Array


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
    keys = jax.random.split(key, 8)
    block, width = config.block, config.block.width
    x = jnp.zeros((1, 1, width))
    turn = rotation(block.rope, block.head_dim, jnp.zeros((1, 1), jnp.int32)) if block.rope else None
    around = Surroundings(Mask(), turn, memory=_blank_memory(config))

    def table(key: jax.Array, rows: int, columns: int) -> jax.Array:
        return jax.random.normal(key, (rows, columns)) * columns**-0.5

    def linear(key: jax.Array, inputs: int, outputs: int) -> Params:
        return {"kernel": fan_in_normal(key, (inputs, outputs))}

    embed: Params = {"embedding": table(keys[0], config.table_size, config.input_width)}
    if config.learned_positions:
        embed["positions"] = table(keys[3], config.learned_positions, width)
    if config.token_types:
        embed["token_types"] = table(keys[4], config.token_types, width)
    if config.embed_norm:
        embed["norm"] = _norm(config).init(key, x)["params"]
    if config.embed_width:
        embed["project_in"] = linear(keys[5], config.embed_width, width)
    params: Params = {
        "embed": embed,
        "layers": init_stack(lambda k: Block(block).init(k, x, around)["params"], keys[1], config.layers),
    }
    if config.final_norm:
        params["final_norm"] = _norm(config).init(key, x)["params"]
    if config.relative_bias:
        params["relative_bias"] = table(keys[6], config.relative_bias.buckets, block.heads)
    if config.embed_width:
        params["project_out"] = linear(keys[7], width, config.embed_width)
    if config.pooler:
        params["pooler"] = {**linear(keys[7], width, width), "bias": jnp.zeros(width)}
    if config.classes:
        params["classifier"] = {**linear(jax.random.fold_in(keys[7], 1), width, config.classes), "bias": jnp.zeros(config.classes)}
    if config.has_head and not config.tied_head:
        params["head"] = {"kernel": nn.initializers.normal(config.input_width**-0.5)(keys[2], (config.input_width, config.table_size))}
    if config.head_bias:
        params.setdefault("head", {})["bias"] = jnp.zeros(config.table_size)
    if config.head_transform:
        transform = {**linear(jax.random.fold_in(keys[2], 1), width, width), "bias": jnp.zeros(width)}
        params.setdefault("head", {}).update(transform=transform, norm=_norm(config).init(key, x)["params"])
    if config.encoder is not None:
        params["encoder"] = init(jax.random.fold_in(key, 1), config.encoder)
        del params["encoder"]["embed"]["embedding"]  # the two halves share one
        if not params["encoder"]["embed"]:
            del params["encoder"]["embed"]
    return new_rows.init(config, params) if config.new_rows else params


def require_positions(config: DecoderConfig, count: int) -> None:
    """Raises UserError where texts of `count` positions are longer than a table of learned positions."""
    rows = config.learned_positions - config.position_offset
    if config.learned_positions and count > rows:
        raise UserError(f"the text takes {count} positions, and the model's table of learned positions has {rows}: shorten it")


def embed(params: Params, config: DecoderConfig, tokens: jax.Array, run: Execution, adapters: Adapters = ()) -> jax.Array:
    """Token embeddings: int [rows, length] -> [rows, length, input width]. Positions and the like are added by `decode`."""
    # Gathered over fsdp like any weight: of a table divided on its width, XLA would bring the looked-up rows of all devices together.
    table = constrain(params["embed"]["embedding"], run.mesh, "tensor")
    if config.new_rows:
        x = new_rows.lookup(table, params["embed"]["new_rows"], config, tokens, run.dtype)
    else:
        x = table[tokens].astype(run.dtype)
    for adapter, leaves in linear_port.present(adapters, params["embed"].get("adapters", {})):
        assert isinstance(adapter, LoraConfig)
        x = lora.embedded(x, tokens, table, leaves, adapter)
    # As the references do: the factor is rounded to the activations' dtype first.
    return x * jnp.asarray(config.embed_scale, x.dtype) if config.embed_scale != 1.0 else x


class Decoded(NamedTuple):
    """`last` [rows, length, input width], what the head reads; the cache, if one was given; on request the inputs of all blocks,
    `states` [layers, rows, length, width] (transformers' hidden_states without the last one, which is `last`); of a mixture of
    experts the router's logits, float32 [layers, rows, length, experts]; what plugs tell, by their names, [layers, ...]."""

    last: jax.Array
    cache: Cache | None
    states: jax.Array | None
    router: jax.Array | None = None
    told: dict[str, dict[str, jax.Array]] | None = None


def decode(
    params: Params,
    config: DecoderConfig,
    x: jax.Array,
    *,
    segments: jax.Array,
    positions: jax.Array,
    run: Execution,
    mask: Mask = Mask(),
    adapters: Adapters = (),
    plugs: tuple[ports.Plug, ...] = (),
    cache: Cache | None = None,
    memory: Memory | None = None,
    token_types: jax.Array | None = None,
    is_media: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_states: bool = False,
) -> Decoded:
    """Runs the blocks over embeddings x [rows, length, input width].

    segments, positions: int [rows, length] as in mmjax.batch.Batch; token_types: int [rows, length], 0 where not given; is_media:
    bool [rows, length], needed with `media_as_they_are`. With a cache the new keys are written at its next slots (the same for all
    rows: prompts are padded on the left) and attention runs over all slots; what is in it already is in nobody's span. Where the
    mask has query_segments, they say what a position sees in place of `segments` (padding that looks at what is real). Without a
    `dropout_key` nothing is dropped, in blocks or adapters.
    """
    period = ports.period(plugs, len(config.windows), config.layers)
    turns = rotations(config, positions)
    sees = segments if mask.query_segments is None else mask.query_segments
    mask = dataclasses.replace(mask, causal=config.causal, query_segments=sees, key_segments=segments)
    slot: Any = 0
    if cache is not None:
        slot = cache.next
        held = jax.lax.dynamic_update_slice(cache.segments, segments.astype(jnp.int32), (0, slot))
        mask = dataclasses.replace(mask, key_segments=held, offset=slot)
        if mask.query_spans is not None:
            blank = jnp.zeros_like(held)
            mask = dataclasses.replace(mask, key_spans=jax.lax.dynamic_update_slice(blank, mask.query_spans.astype(jnp.int32), (0, slot)))
        cache = cache._replace(segments=held, next=slot + x.shape[1])
    bias = position_bias(params, config, x.shape[1], slot, x.shape[1] if cache is None else cache.segments.shape[1])
    block = Block(config.block, adapters, dropout_key is None, run, dropout)
    x = into_blocks(params, config, x, positions, token_types, is_media)
    if config.block.wide_residual:
        x = x.astype(jnp.float32)
    x = constrain(x, run.mesh, ROWS, STREAM)

    def body(carry, layer, j, index, extra):
        x, keys, values = carry
        plugged, remembered = extra
        stored: list[jax.Array] = []
        routed: list[jax.Array] = []

        def store(key, value):
            at: Any = (index, 0, slot, 0, 0)
            stored[:] = [
                jax.lax.dynamic_update_slice(keys, key.astype(keys.dtype)[None], at),
                jax.lax.dynamic_update_slice(values, value.astype(values.dtype)[None], at),
            ]
            return tuple(jax.lax.dynamic_index_in_dim(a, index, keepdims=False).astype(key.dtype) for a in stored)

        told: dict[str, dict[str, jax.Array]] = {}
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        around = Surroundings(
            mask=dataclasses.replace(mask, window=config.windows[j % len(config.windows)]),
            rotation=turns[j % len(turns)],
            bias=bias,
            store=store if cache is not None else None,
            memory=None if memory is None else (*remembered, _memory_mask(memory, segments)),
            route=routed.append,
            ports=ports.bind(plugs, plugged, key, told),
        )
        rngs = {"dropout": key} if key is not None else None
        entered = x if return_states else None
        x = constrain(apply(block, layer, x, around, rngs=rngs), run.mesh, ROWS, STREAM)
        return (x, *(stored or (keys, values))), (entered, routed[0] if routed else None, told)

    carry = (x, cache.keys, cache.values) if cache is not None else (x, None, None)
    extras = _extras(params, config, plugs, memory, period)
    (last, keys, values), (states, router, told) = run_stack(
        body, carry, params["layers"], layers=config.layers, period=period, pattern=len(config.windows), extras=extras, run=run
    )
    if config.final_norm:
        last = apply(_norm(config), params["final_norm"], last)
    if config.block.wide_residual:
        last = last.astype(run.dtype)
    if config.embed_width:
        last = apply(Linear(config.embed_width, False, adapters), params["project_out"], last)
    return Decoded(last, cache._replace(keys=keys, values=values) if cache is not None else None, states, router, told)


def head(params: Params, config: DecoderConfig, hidden: jax.Array, adapters: Adapters = ()) -> jax.Array:
    """float32 logits [..., vocab] of what `decode` returned as `last`."""
    if config.head_transform:
        hidden = apply(Linear(hidden.shape[-1]), params["head"]["transform"], hidden)
        hidden = apply(_norm(config), params["head"]["norm"], ACTIVATIONS[config.block.activation](hidden))
    own = params.get("head", {})  # under adapters a tied head may have a kernel of its own
    kernel = own["kernel"] if "kernel" in own else params["embed"]["embedding"].T
    found = linear_port.present(adapters, own.get("adapters", {}))
    logits = linear_port.linear(hidden, kernel, None, found, lambda x: matmul(x, kernel)).astype(jnp.float32)
    if "bias" in own:  # under a merged adapter, also where the config has none
        logits = linear_port.with_bias(logits, own["bias"])
    if config.new_rows:
        logits = new_rows.lay_over(logits, new_rows.logits(params, config, hidden), config)
    if config.logit_scale != 1.0:
        logits = logits * config.logit_scale
    if config.logit_softcap:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    return logits


def pool(params: Params, last: jax.Array) -> jax.Array:
    """BERT's pooler over the first position: [rows, length, width] -> [rows, width]."""
    return jnp.tanh(apply(Linear(last.shape[-1]), params["pooler"], last[:, 0]))


def classify(params: Params, config: DecoderConfig, pooled: jax.Array) -> jax.Array:
    """float32 [rows, classes] of the pooled states [rows, width]."""
    return apply(Linear(config.classes), params["classifier"], pooled).astype(jnp.float32)


def _norm(config: DecoderConfig) -> Norm:
    return Norm(config.block.norm, config.block.norm_eps, config.block.norm_bias)


def rotations(config: DecoderConfig, positions: jax.Array) -> list[tuple[jax.Array, jax.Array] | None]:
    """Cosines and sines for each layer of the pattern."""
    ropes = config.ropes or (config.block.rope,) * len(config.windows)
    made = {rope: rotation(rope, config.block.head_dim, positions) for rope in ropes if rope is not None}
    return [made[rope] if rope is not None else None for rope in ropes]


def into_blocks(
    params: Params,
    config: DecoderConfig,
    x: jax.Array,
    positions: jax.Array,
    token_types: jax.Array | None,
    is_media: jax.Array | None,
) -> jax.Array:
    """Embeddings [rows, length, input width] -> the first block's input [rows, length, width]."""
    if config.embed_width:
        x = apply(Linear(config.block.width, False), params["embed"]["project_in"], x)
    entered = x
    if config.learned_positions:
        x = x + params["embed"]["positions"][positions + config.position_offset].astype(x.dtype)
    if config.token_types:
        kinds = jnp.zeros(x.shape[:2], jnp.int32) if token_types is None else token_types
        x = x + params["embed"]["token_types"][kinds].astype(x.dtype)
    if config.embed_norm:
        x = apply(_norm(config), params["embed"]["norm"], x)
    return jnp.where(is_media[..., None], entered, x) if config.media_as_they_are and is_media is not None else x


def position_bias(params: Params, config: DecoderConfig, queries: int, first: Any, keys: int) -> jax.Array | None:
    """What is added to the scores of all layers, [1, heads, queries, keys]: a function of how far apart slots are."""
    distance = jnp.arange(keys)[None, :] - (jnp.arange(queries)[:, None] + first)
    if config.alibi:
        return alibi_bias(config.block.heads, config.alibi, distance)
    if config.relative_bias:
        return relative_bias(params["relative_bias"], config.relative_bias, distance, bidirectional=not config.causal)
    return None


def _blank_memory(config: DecoderConfig) -> tuple[jax.Array, jax.Array, Mask] | None:
    if not config.block.memory_width:
        return None
    blank = jnp.zeros((1, 1, config.block.kv_heads, config.block.head_dim))
    return blank, blank, Mask(causal=False)


def _memory_mask(memory: Memory, segments: jax.Array) -> Mask:
    """Every position sees what was read of its own sample."""
    return Mask(causal=False, query_segments=segments, key_segments=memory.segments)


def _extras(
    params: Mapping, config: DecoderConfig, plugs: tuple[ports.Plug, ...], memory: Memory | None, period: int
) -> tuple[tuple, ...]:
    """For each layer of the period: the rows of the plugs that sit there, and of the memory, one for each group."""
    remembered = [None if memory is None else (memory.keys[r::period], memory.values[r::period]) for r in range(period)]
    return tuple(zip(ports.extras(params, plugs, period, config.layers), remembered))
