"""Gated cross-attention between the blocks of a language model (Flamingo, arXiv 2204.14198, section 2.2).

    y = x + tanh(gate) * attention(norm(x), media)
    z = y + tanh(gate') * mlp(norm'(y))

Gates start at 0, so that a language model with fresh cross-attention is the language model. `plug` puts it before some
of the decoder's blocks, with its leaves at llm/plugs/cross_attention; what a position of text may see is a Mask over media
(`media_begun`, `media_mask`), and one that may see none gets nothing from the attention. The MLP acts on all text alike.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.models import ports
from mmjax.models.attention import Mask
from mmjax.models.block import CrossAttention, KeysValues, memory_keys_values
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import Execution
from mmjax.models.encoder_config import GatedCrossAttentionConfig
from mmjax.models.layers import MLP, Norm, apply, as_torch_starts
from mmjax.models.stack import init_stack
from mmjax.models.tuning_config import Adapters

Params = dict[str, Any]
Memory = tuple[jax.Array, jax.Array, Mask]  # keys and values [rows, S, kv_heads, dim] of the media, and who sees them
NAME = "cross_attention"  # of the plug


class Media(NamedTuple):
    """What a batch's cross-attention reads: `tokens` [rows, media, tokens, memory_width] and who sees them; for a whole generation
    the keys and values that the layers make of them, [layers, rows, media * tokens, kv_heads, head_dim] (see `remember`)."""

    tokens: jax.Array
    mask: Mask
    keys: jax.Array | None = None
    values: jax.Array | None = None

    def at_end(self) -> Media:
        """The same for what follows the text: it sees what the last position sees."""
        last = {
            name: getattr(self.mask, name)[:, -1:]
            for name in ("query_segments", "query_media", "seen_media")
            if getattr(self.mask, name) is not None
        }
        return self._replace(mask=dataclasses.replace(self.mask, **last))

    def repeated(self, times: int) -> Media:
        """Every row so many times, one after another."""
        tokens, mask = jax.tree.map(lambda leaf: jnp.repeat(leaf, times, 0) if jnp.ndim(leaf) else leaf, (self.tokens, self.mask))
        keys, values = jax.tree.map(lambda leaf: jnp.repeat(leaf, times, 1), (self.keys, self.values))
        return Media(tokens, mask, keys, values)


def plug(
    config: GatedCrossAttentionConfig,
    media: Media | None,
    adapters: Adapters = (),
    run: Execution = Execution(),
) -> ports.Plug:
    """Cross-attention to these media (None: the text has none) before each of config.layers of the decoder."""

    def call(params: Params, x: jax.Array) -> jax.Array:
        if media is None:
            return cross(params, config, x, None, adapters, run)
        held = (params["keys"], params["values"]) if "keys" in params else keys_values(params, config, media.tokens, adapters)
        return cross(params, config, x, (*held, media.mask), adapters, run)

    return ports.Plug(NAME, "before", config.layers, call)


def plugged(leaves: Params, media: Media | None) -> Params:
    """The leaves [layers, ...] that the plug is given: with the keys and values that are remembered beside them."""
    return leaves if media is None or media.keys is None else {**leaves, "keys": media.keys, "values": media.values}


def remember(
    leaves: Params, config: GatedCrossAttentionConfig, media: Media, adapters: Adapters = ()
) -> Media:
    """The media with every layer's keys and values, which stay the same while tokens are generated."""
    keys, values = jax.vmap(lambda layer: keys_values(layer, config, media.tokens, adapters))(leaves)
    return media._replace(keys=keys, values=values)


def init_layers(key: jax.Array, config: GatedCrossAttentionConfig, layers: int) -> Params:
    """Fresh parameters of so many of them, [layers, ...]."""
    return dict(init_stack(lambda k: init(k, config), key, layers))


def init(key: jax.Array, config: GatedCrossAttentionConfig) -> Params:
    """Fresh parameters of one: weights U(-1/sqrt(in), 1/sqrt(in)), gates and biases 0."""
    block, x = config.block, jnp.zeros((1, 1, config.block.width))
    blank = jnp.zeros((1, 1, block.kv_heads, block.head_dim))
    gate = jnp.zeros(block.width if config.vector_gates else ())
    params: Params = {
        "cross_attention_norm": _norm(block).init(key, x)["params"],
        "cross_attention": CrossAttention(block).init(key, x, (blank, blank, Mask(causal=False)))["params"],
        "cross_attention_gate": gate,
        "mlp_norm": _norm(block).init(key, x)["params"],
        "mlp": _mlp(block).init(key, x)["params"],
        "mlp_gate": gate,
    }
    return as_torch_starts(key, params)


def cross(
    params: Params,
    config: GatedCrossAttentionConfig,
    x: jax.Array,
    memory: Memory | None,
    adapters: Adapters = (),
    run: Execution = Execution(),
) -> jax.Array:
    """x [rows, T, width] -> the same, with what it reads of the media (None: there are none)."""
    if memory is not None:
        x = x + _gate(params["cross_attention_gate"], x) * read(params, config, x, memory, adapters, run)
    change = apply(_mlp(config.block, adapters, run), params["mlp"], apply(_norm(config.block), params["mlp_norm"], x))
    return x + _gate(params["mlp_gate"], x) * change


def read(
    params: Params,
    config: GatedCrossAttentionConfig,
    x: jax.Array,
    memory: Memory,
    adapters: Adapters = (),
    run: Execution = Execution(),
) -> jax.Array:
    """What x [rows, T, width] reads before the gate; 0 where it may see no medium."""
    crossed = CrossAttention(config.block, adapters, run=run)
    return apply(
        crossed, params["cross_attention"], apply(_norm(config.block), params["cross_attention_norm"], x), memory
    )


def keys_values(
    params: Params, config: GatedCrossAttentionConfig, media: jax.Array, adapters: Adapters = ()
) -> KeysValues:
    """Keys and values [rows, media * tokens, kv_heads, dim] of media [rows, media, tokens, memory_width]."""
    return memory_keys_values(params, config.block, media.reshape(media.shape[0], -1, media.shape[-1]), adapters)


def media_begun(locations: jax.Array, following: bool = False) -> jax.Array:
    """bool [rows, T], true where a medium's placeholder stands -> int [rows, T]: the number of the medium that each
    position belongs to, counted from 1; 0 = none.

    That is the latest one begun, a placeholder's own included. With `following`, text belongs to the next one instead,
    as in Flamingo's augmentation of where images are placed; behind the last there is none.
    """
    begun = jnp.cumsum(jnp.asarray(locations, jnp.int32), 1)
    if not following:
        return begun
    number = jnp.where(locations, begun, begun + 1)
    return jnp.where(number > begun[:, -1:], 0, number)


def media_mask(
    config: GatedCrossAttentionConfig,
    begun: jax.Array,
    media: int,
    tokens: int,
    present: jax.Array | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    seen: jax.Array | None = None,
) -> Mask:
    """Which of `media` media of `tokens` tokens each the positions see that `media_begun` numbered.

    present    bool [rows, media]: false = padding, which nothing sees
    segments   int [rows, T] and [rows, media]: the packed sample of each position and each medium
    seen       bool [rows, T, media], in the place of `begun`
    """
    number = jnp.broadcast_to(jnp.arange(1, media + 1), (begun.shape[0], media))
    if present is not None:
        number = jnp.where(present, number, 0)
    ids: dict[str, Any] = {"key_media": jnp.repeat(number, tokens, 1)}
    ids |= {"query_media": begun} if seen is None else {"seen_media": seen}
    if segments is not None:
        ids |= {"query_segments": segments[0], "key_segments": jnp.repeat(segments[1], tokens, 1)}
    return Mask(causal=False, last_media_only=config.last_media_only, **ids)


def _gate(gate: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(gate.astype(jnp.float32)).astype(x.dtype)


def _norm(block: BlockConfig) -> Norm:
    return Norm(block.norm, block.norm_eps, block.norm_bias)


def _mlp(block: BlockConfig, adapters: Adapters = (), run: Execution = Execution()) -> MLP:
    return MLP(block.mlp_width, block.width, block.activation, block.gated_mlp, block.mlp_bias, adapters, mesh=run.mesh)
