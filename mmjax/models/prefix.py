"""Prefix tuning (arXiv 2101.00190): learned keys and values in front of what every layer attends to.

They are not turned by rotary embeddings and are seen from everywhere, also beyond a sliding window (in peft they stand in the cache, and
fall out of a window that is shorter than prefix and text); of packed samples each sees them all. The text stands behind them: a sample's positions begin at their number, and biases by distance (ALiBi, T5's) see them there. Of
an encoder-decoder, whose encoder has none, they stand in the decoder's attention to itself.

Leaves stand at llm/plugs/NAME, keys and values [layers, tokens, kv_heads * head_dim]. With `projected`, an MLP makes them of fewer
numbers, its leaves at llm/prompts/NAME. A model with a prefix does not equal its base, not at its start either: even a prefix of zeros takes
a share of the softmax.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mmjax import tree
from mmjax.models import ports, prompts
from mmjax.models.block import Extra
from mmjax.models.config import DecoderConfig, ModelConfig
from mmjax.models.position_bias import alibi_bias, relative_bias
from mmjax.models.tuning_config import PrefixConfig

Params = dict[str, Any]


def of(config: ModelConfig) -> tuple[PrefixConfig, ...]:
    """The prefixes among a model's adapters; the later ones stand in front."""
    return tuple(adapter for adapter in config.adapters if isinstance(adapter, PrefixConfig))


def count(config: ModelConfig) -> int:
    """Keys that stand in front of a text."""
    return sum(prefix.tokens for prefix in of(config))


def width(llm: DecoderConfig) -> int:
    """Numbers of a key of all heads."""
    return llm.block.kv_heads * llm.block.head_dim


def init(key: jax.Array, prefix: PrefixConfig, llm: DecoderConfig) -> dict[str, jax.Array]:
    """Fresh float32 leaves by path: keys and values, or what the MLP makes them of, ~ N(0, 1); the MLP as torch starts Linears."""
    first, second = jax.random.split(key)
    if prefix.made_by_mlp:
        hidden = prefix.encoder_width or width(llm)
        sizes = (width(llm), hidden, llm.layers * 2 * width(llm))
        leaves = {"vectors": jax.random.normal(first, (prefix.tokens, width(llm))), "encoder": prompts.mlp_init(second, sizes)}
        return {f"{prompts.path(prefix.name)}/{path}": leaf for path, leaf in tree.flatten(leaves).items()}
    shape = (llm.layers, prefix.tokens, width(llm))
    drawn = {"keys": jax.random.normal(first, shape), "values": jax.random.normal(second, shape)}
    return {f"llm/plugs/{prefix.name}/{name}": leaf for name, leaf in drawn.items()}


def prepared(params: Params, config: ModelConfig) -> Params:
    """The parameters with every prefix's keys and values at llm/plugs, those too that an MLP makes."""
    made: Params = {}
    for prefix in of(config):
        if prefix.made_by_mlp and prefix.name not in params["llm"].get("plugs", {}):
            made[prefix.name] = _made(params["llm"]["prompts"][prefix.name], prefix, config.language)
    if not made:
        return params
    return {**params, "llm": {**params["llm"], "plugs": {**params["llm"].get("plugs", {}), **made}}}


def plugs(llm: Params, config: ModelConfig, positions: jax.Array) -> tuple[ports.Plug, ...]:
    """The prefixes for a text at positions int [rows, T(, axes)], which count from the end of all of them; `llm` are its leaves."""
    found, behind = [], 0
    for prefix in of(config):
        bias = _bias(llm, config.language, positions, prefix.tokens, behind)
        found.append(_plug(prefix, config.language, bias))
        behind += prefix.tokens
    return tuple(found)


def _plug(prefix: PrefixConfig, llm: DecoderConfig, bias: jax.Array | None) -> ports.Plug:
    shape = (1, prefix.tokens, llm.block.kv_heads, llm.block.head_dim)

    def call(leaves: Params, query: jax.Array, project: Any) -> Extra:
        return Extra(leaves["keys"].reshape(shape), leaves["values"].reshape(shape), bias=bias)

    return ports.Plug(prefix.name, "keys_values", tuple(range(llm.layers)), call)


def _made(leaves: Params, prefix: PrefixConfig, llm: DecoderConfig) -> Params:
    """Keys and values [layers, tokens, kv_heads * head_dim] from a two-layer MLP with tanh."""
    both = prompts.mlp(leaves["encoder"], leaves["vectors"].astype(jnp.float32), jnp.tanh)
    both = both.reshape(prefix.tokens, llm.layers, 2, width(llm)).transpose(2, 1, 0, 3)
    return {"keys": both[0], "values": both[1]}


def _bias(llm: Params, config: DecoderConfig, positions: jax.Array, tokens: int, behind: int) -> jax.Array | None:
    """What is added to the scores of the prefix, float32 [rows, heads, T, tokens], of a model whose scores know how far keys are;
    `behind` keys stand between it and the text."""
    if not config.alibi and config.relative_bias is None:
        return None
    place = jnp.arange(tokens) - tokens - behind  # 0 = where the text begins
    distance = place[None, None, :] - positions[:, :, None]
    if config.alibi:
        return jax.vmap(lambda d: alibi_bias(config.block.heads, config.alibi, d)[0])(distance)
    assert config.relative_bias is not None
    shape, table = config.relative_bias, llm["relative_bias"]
    return jax.vmap(lambda d: relative_bias(table, shape, d, bidirectional=not config.causal)[0])(distance)
