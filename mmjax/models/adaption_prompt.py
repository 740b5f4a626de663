"""Learned prompts with zero-init gated attention: LLaMA-Adapter (V1 arXiv 2303.16199, V2 arXiv 2304.15010).

A layer has P prompts of the LLM's width. They are neither normed nor rotated; the layer's own frozen key and value Linears make keys and
values of them, which every position of the text reads in a softmax of its own:

    out = softmax(q k) v + gate * softmax(q k_prompts) v_prompts          gate = tanh(g) (or g), g = 0 at the beginning

for each head (peft: for each layer), so that a model with fresh prompts is the model. Media tokens may be added to the prompts of every
layer (V1 multimodal, and V2 as released), or be the prompts (V2's early fusion as the paper writes it: of the first layers, while learned
prompts are those of the last).

    leaves, k rows for k layers:   prompts [k, P, width], gate [k, heads] or [k, 1], gate_scale [k, 1]
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.models import ports
from mmjax.models.attention import Mask
from mmjax.models.block import Extra
from mmjax.models.config import DecoderConfig
from mmjax.models.tuning_config import AdaptionPromptConfig

Params = dict[str, Any]


class Beside(NamedTuple):
    """The media beside a text, which stand nowhere in it: `tokens` [rows, media, tokens, width], and which of its row's each position
    belongs to, `number` int [rows, T], from 1; 0 = none."""

    tokens: jax.Array
    number: jax.Array

    def at_end(self) -> Beside:
        """The same for what follows the text: the medium of its last position alone."""
        last = self.number[:, -1:]
        picked = jnp.take_along_axis(self.tokens, jnp.maximum(last - 1, 0)[:, :, None, None], 1)
        return Beside(picked, jnp.minimum(last, 1))

    def repeated(self, times: int) -> Beside:
        """Every row so many times, one after another."""
        return Beside(jnp.repeat(self.tokens, times, 0), jnp.repeat(self.number, times, 0))


def number_of_own(segments: jax.Array, row_media: jax.Array, media_segments: jax.Array) -> jax.Array:
    """int [rows, T]: the first of its row's media, from 1, that is of a position's own sample; 0 = there is none. The arguments are
    those of mmjax.batch.Batch."""
    own = (segments[:, :, None] == media_segments[:, None, :]) & (segments > 0)[:, :, None] & (row_media >= 0)[:, None, :]
    return jnp.where(own.any(-1), own.argmax(-1) + 1, 0)


def sits_on(first: bool, count: int, layers: int) -> tuple[int, ...]:
    """`count` of so many layers, the first ones or the last (0 = all)."""
    count = min(count or layers, layers)
    return tuple(range(count)) if first else tuple(range(layers - count, layers))


def init(key: jax.Array, config: AdaptionPromptConfig, llm: DecoderConfig) -> Params:
    """Fresh leaves: prompts ~ N(0, 1), as torch's Embedding has them, gates 0, their factors 1."""
    rows = len(sits_on(config.bottom, config.depth, llm.layers))
    leaves: Params = {"gate": jnp.zeros((rows, llm.block.heads if config.gate == "head" else 1))}
    if config.learned:
        leaves["prompts"] = jax.random.normal(key, (rows, config.length, llm.block.width))
    if config.gate_scale:
        leaves["gate_scale"] = jnp.ones((rows, 1))
    return leaves


def plug(config: AdaptionPromptConfig, llm: DecoderConfig, beside: Beside | None) -> ports.Plug:
    """The prompts, with these media (None: the batch has none)."""
    reads = beside if config.media else None

    def call(params: Params, query: jax.Array, project: Callable) -> Extra | None:
        if reads is None and not config.learned:
            return None
        prompts, mask = _prompts(params, config, reads, query.dtype)
        keys, values = project(prompts, config.adapted)
        count = config.length if config.learned or reads is None else reads.tokens.shape[2]
        return Extra(keys, values, gate(params, config, count), mask=mask)

    return ports.Plug(config.name, "keys_values", sits_on(config.bottom, config.depth, llm.layers), call)


def gate(params: Params, config: AdaptionPromptConfig, count: int) -> jax.Array:
    """What the prompts' attention is multiplied by, float32 [heads] or [1]. Its factor is left out where there is one prompt to read
    (as in V2's code)."""
    value = params["gate"].astype(jnp.float32)
    value = jnp.tanh(value) if config.gate_fn == "tanh" else value
    return value * params["gate_scale"].astype(jnp.float32) if config.gate_scale and count > 1 else value


def _prompts(params: Params, config: AdaptionPromptConfig, beside: Beside | None, dtype: Any) -> tuple[jax.Array, Mask | None]:
    """All prompts of a layer [1 or rows, P or (1 +) media * P, width], and who sees which: a sample those of its own medium, and where it
    has none, those without any."""
    own = params["prompts"].astype(dtype)[None] if config.learned else None
    if beside is None:
        assert own is not None
        return own, None
    media = beside.tokens.astype(dtype)
    number = beside.number
    if own is not None:
        rows, count = media.shape[:2]
        media = jnp.broadcast_to(own[None] + media, (rows, count, *own.shape[1:]))
        media = jnp.concatenate([jnp.broadcast_to(own[None], (rows, 1, *own.shape[1:])), media], 1)
        number = number + 1
    return laid_out(media), seen_by_number(number, media.shape[1], media.shape[2])


def laid_out(media: jax.Array) -> jax.Array:
    """[rows, media, P, ...] -> [rows, media * P, ...]"""
    return media.reshape(media.shape[0], -1, *media.shape[3:])


def seen_by_number(number: jax.Array, media: int, length: int) -> Mask:
    """The mask over so many media of `length` keys, numbered from 1: a position sees those of its number, 0 sees none."""
    keys = jnp.repeat(jnp.arange(1, 1 + media), length)[None]
    return Mask(causal=False, query_segments=number, key_segments=keys)
