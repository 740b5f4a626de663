"""The Q-Former (BLIP-2, arXiv 2301.12597; with text beside the pictures InstructBLIP, arXiv 2305.06500).

A BERT whose first positions are learned queries. Every layer is self-attention over queries and text together, then one
feed-forward for the queries and another for the text; in every `cross_every`-th layer, from the first on, the queries also read
the encoder's positions, between the two. Norms stand behind the sublayers, as in BERT. Queries have no positions, text counts
from 0, and one norm goes over both.

Who sees whom is up to the reader:

    read            queries alone, or queries and text, each seeing all (a connector; matching pictures with texts)
    read_text       text alone, each word seeing all
    read_behind     text behind queries that were read before: a word sees all of them and the words up to itself

Its leaves: `queries`, `embed` (tables of words and positions, the norm), `layers`, `cross/layers` (one row for each layer that
reads the encoder), `project_out` (to the language model) and, for BLIP-2's first stage, `heads` (mmjax.models.image_text).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.models.attention import Mask
from mmjax.models.block import Attention, CrossAttention, KeysValues, Surroundings, memory_keys_values
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import Execution
from mmjax.models.encoder_config import ConnectorConfig
from mmjax.models.layers import MLP, Linear, Norm, apply, fan_in_uniform
from mmjax.models.stack import init_stack, run_stack
from mmjax.models.tuning_config import Adapters

Params = dict[str, Any]
DEVIATION = 0.02  # of BERT's fresh weights


class Text(NamedTuple):
    """Words of a Q-Former's own vocabulary: tokens int [items, L], and segments int [items, L], 0 at padding."""

    tokens: jax.Array
    segments: jax.Array


class Read(NamedTuple):
    """`states` [items, T, width] of the last layer; what later text sees of them, `seen` [layers, items, S, heads, head_dim] twice."""

    states: jax.Array
    seen: KeysValues


def init(key: jax.Array, config: ConnectorConfig) -> Params:
    """Fresh parameters: weights, tables and queries N(0, 0.02), as BERT's; those of the Linears behind it as torch's."""
    block, width = block_config(config), config.inner_width
    keys = jax.random.split(key, 6)
    x, around = jnp.zeros((1, 1, width)), Surroundings(Mask(causal=False))

    def layer(key: jax.Array) -> Params:
        params: Params = {}
        for name in ["mlp"] + ["text_mlp"] * bool(config.text_vocab):
            params[name] = _mlp(block).init(key, x)["params"]
            params[f"{name}_norm"] = _norm(config).init(key, x)["params"]
        params["attention"] = Attention(block).init(key, x, around)["params"]
        return {**params, "attention_norm": _norm(config).init(key, x)["params"]}

    def cross(key: jax.Array) -> Params:
        memory = (*(jnp.zeros((1, 1, block.kv_heads, block.head_dim)),) * 2, Mask(causal=False))
        crossed = CrossAttention(block).init(key, x, memory)["params"]
        return {"cross_attention": crossed, "cross_attention_norm": _norm(config).init(key, x)["params"]}

    params: Params = {
        "queries": jnp.zeros((config.latents, width)),
        "embed": {"norm": _norm(config).init(key, x)["params"]},
        "layers": init_stack(layer, keys[0], config.depth),
        "cross": {"layers": init_stack(cross, keys[1], -(-config.depth // config.cross_every))},
    }
    if config.text_vocab:
        params["embed"]["embedding"] = jnp.zeros((config.text_vocab, width))
        params["embed"]["positions"] = jnp.zeros((config.text_positions, width))
    params = _as_bert_starts(keys[2], params)
    if config.out_width:
        params["project_out"] = _linear(keys[3], width, config.out_width)
    if config.contrast_width:
        params["heads"] = _init_heads(keys[4], config)
    return params


def connect(
    params: Params,
    config: ConnectorConfig,
    features: jax.Array,
    text: Text | None = None,
    adapters: Adapters = (),
    run: Execution = Execution(),
) -> jax.Array:
    """Features [items, positions, in_width], with or without text beside them -> [items, latents, out_width]."""
    return project(params, config, read(params, config, features, text, adapters, run).states, adapters)


def project(
    params: Params, config: ConnectorConfig, states: jax.Array, adapters: Adapters = ()
) -> jax.Array:
    """What `read` returned [items, latents (and text), width] -> LLM tokens [items, latents, out_width]."""
    return apply(Linear(config.out_width, True, adapters), params["project_out"], states[:, : config.latents])


def read(
    params: Params,
    config: ConnectorConfig,
    features: jax.Array,
    text: Text | None = None,
    adapters: Adapters = (),
    run: Execution = Execution(),
) -> Read:
    """Queries and, behind them, text: features [items, positions, in_width] -> states [items, latents (+ L), width].

    Padding is not seen, but sees, as in the references.
    """
    items = features.shape[0]
    queries = jnp.broadcast_to(params["queries"].astype(run.dtype), (items, *params["queries"].shape))
    x, seen = queries, jnp.ones(queries.shape[:2], jnp.int32)
    if text is not None:
        x = jnp.concatenate([queries, _words(params, config, text.tokens, run)], 1)
        seen = jnp.concatenate([seen, _real(text)], 1)
    mask = Mask(causal=False, query_segments=jnp.ones_like(seen), key_segments=seen)
    return _run(params, config, x, mask, features.astype(run.dtype), None, adapters, run)


def read_text(
    params: Params,
    config: ConnectorConfig,
    text: Text,
    adapters: Adapters = (),
    run: Execution = Execution(),
) -> Read:
    """Text alone: states [items, L, width]."""
    x, seen = _words(params, config, text.tokens, run), _real(text)
    mask = Mask(causal=False, query_segments=jnp.ones_like(seen), key_segments=seen)
    return _run(params, config, x, mask, None, None, adapters, run)


def read_behind(
    params: Params,
    config: ConnectorConfig,
    before: KeysValues,
    text: Text,
    adapters: Adapters = (),
    run: Execution = Execution(),
) -> Read:
    """Text behind queries, of which `before` is what `read` returned as `seen`: states [items, L, width]. The queries themselves
    see none of it, so that together it is UniLM's mask (arXiv 1905.03197)."""
    x, real = _words(params, config, text.tokens, run), _real(text)
    first = before[0].shape[2]
    seen = jnp.concatenate([jnp.ones((len(real), first), jnp.int32), real], 1)
    mask = Mask(causal=True, query_segments=jnp.ones_like(real), key_segments=seen, offset=first)
    return _run(params, config, x, mask, None, before, adapters, run)


def block_config(config: ConnectorConfig) -> BlockConfig:
    """A layer's shapes."""
    return BlockConfig(
        width=config.inner_width,
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.head_dim or config.inner_width // config.heads,
        mlp_width=config.mlp_width or 4 * config.inner_width,
        activation=config.activation,
        norm="layer",
        norm_eps=config.norm_eps,
        norm_place="after",
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        memory_width=config.in_width,
    )


def _run(
    params: Params,
    config: ConnectorConfig,
    x: jax.Array,
    mask: Mask,
    features: jax.Array | None,
    before: KeysValues | None,
    adapters: Adapters,
    run: Execution,
) -> Read:
    """The layers over embeddings x [items, T, width], whose first `latents` are queries where there are features to read."""
    block, norm = block_config(config), _norm(config)
    queries = 0 if features is None else config.latents
    period = config.cross_every
    x = apply(norm, params["embed"]["norm"], x)

    def sublayer(layer: Any, name: str, x: jax.Array, change: jax.Array) -> jax.Array:
        return apply(norm, layer[f"{name}_norm"], x + change)

    def body(x, layer, j, index, extra):
        crossing, held = extra
        stored: list[jax.Array] = []

        def store(key, value):
            stored[:] = [key, value]
            if held is None:
                return key, value
            return tuple(jnp.concatenate([old, new], 1) for old, new in zip(held, stored, strict=True))

        attended = Attention(block, adapters, run=run)
        x = sublayer(layer, "attention", x, apply(attended, layer["attention"], x, Surroundings(mask, store=store)))
        first, rest = x[:, :queries], x[:, queries:]
        parts = []
        if queries:
            if crossing is not None and features is not None:
                memory = (*memory_keys_values(crossing, block, features, adapters), Mask(causal=False))
                crossed = CrossAttention(block, adapters, run=run)
                change = apply(crossed, crossing["cross_attention"], first, memory)
                first = sublayer(crossing, "cross_attention", first, change)
            parts.append(sublayer(layer, "mlp", first, apply(_mlp(block, adapters), layer["mlp"], first)))
        if rest.shape[1]:
            parts.append(sublayer(layer, "text_mlp", rest, apply(_mlp(block, adapters), layer["text_mlp"], rest)))
        return jnp.concatenate(parts, 1), tuple(stored)

    extras = tuple(
        (params["cross"]["layers"] if j == 0 else None, before and tuple(a[j::period] for a in before))
        for j in range(period)
    )
    states, seen = run_stack(body, x, params["layers"], layers=config.depth, period=period, extras=extras, run=run)
    return Read(states, seen)


def _words(params: Params, config: ConnectorConfig, tokens: jax.Array, run: Execution) -> jax.Array:
    """Embeddings of text [items, L, width]. Raises ValueError where there is no text branch, or text is too long for it."""
    if not config.text_vocab:
        raise ValueError("this Q-Former reads no text: it has no table of words (text_vocab)")
    if tokens.shape[1] > config.text_positions:
        raise ValueError(f"text of {tokens.shape[1]} words; the Q-Former has positions for {config.text_positions}")
    embed = params["embed"]
    return (embed["embedding"][tokens] + embed["positions"][: tokens.shape[1]]).astype(run.dtype)


def _real(text: Text) -> jax.Array:
    return (text.segments > 0).astype(jnp.int32)


def _norm(config: ConnectorConfig) -> Norm:
    return Norm("layer", config.norm_eps)


def _mlp(block: BlockConfig, adapters: Adapters = ()) -> MLP:
    return MLP(block.mlp_width, block.width, block.activation, False, True, adapters)


def _as_bert_starts(key: jax.Array, params: Params) -> Params:
    """Every weight that is no norm's and no bias drawn anew."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    drawn = []
    for i, (path, leaf) in enumerate(leaves):
        kept = path[-1].key in ("scale", "bias")
        drawn.append(leaf if kept else DEVIATION * jax.random.normal(jax.random.fold_in(key, i), leaf.shape))
    return jax.tree_util.tree_unflatten(structure, drawn)


def _linear(key: jax.Array, inputs: int, outputs: int) -> Params:
    """A fresh Linear of torch."""
    kernel, bias = jax.random.split(key)
    bound = inputs**-0.5
    return {
        "kernel": fan_in_uniform(kernel, (inputs, outputs)),
        "bias": jax.random.uniform(bias, (outputs,), minval=-bound, maxval=bound),
    }


def _init_heads(key: jax.Array, config: ConnectorConfig) -> Params:
    keys, width = jax.random.split(key, 4), config.inner_width
    return {
        "image": _linear(keys[0], width, config.contrast_width),
        "text": _linear(keys[1], width, config.contrast_width),
        "temperature": jnp.full((), 0.07),
        "match": _linear(keys[2], width, 2),
        "language": {
            "transform": _as_bert_starts(keys[3], {"kernel": jnp.zeros((width, width)), "bias": jnp.zeros(width)}),
            "norm": _norm(config).init(key, jnp.zeros((1, width)))["params"],
            "bias": jnp.zeros(config.text_vocab),
        },
    }
