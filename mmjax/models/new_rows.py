"""New rows of the vocabulary: leaves of their own beside the tables, so that a stage trains them and nothing else.

    llm/embed/new_rows   [n, input width]
    llm/head/new_rows    [n, input width]   of an untied head
    llm/head/new_bias    [n]                of a head with a bias

`DecoderConfig.new_rows` are their ids. They are laid over the table at lookup and over the head's logits, and merged into
both tables when a model is written. An id may lie inside the tables (published vocabularies are often padded) or beyond.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Iterable, Literal, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import tree
from mmjax.models.config import DecoderConfig, ModelConfig
from mmjax.models.kernels import matmul

Params = dict[str, Any]
Flat = dict[str, jax.Array]
Start = Literal["mean", "normal"]

# Each table's leaf, the leaf of its new rows, and the axis of the table that counts tokens.
TABLES = (
    ("llm/embed/embedding", "llm/embed/new_rows", 0),
    ("llm/head/kernel", "llm/head/new_rows", 1),
    ("llm/head/bias", "llm/head/new_bias", 0),
)
LEAVES = tuple(leaf for _, leaf, _ in TABLES)


def init(config: DecoderConfig, params: Params) -> Params:
    """The LLM's fresh leaves with new rows of zeros; `add` gives them their values."""
    n, width = len(config.new_rows), config.input_width
    made: Params = {"embed": {"new_rows": jnp.zeros((n, width))}}
    if "kernel" in params.get("head", {}):
        made["head"] = {"new_rows": jnp.zeros((n, width))}
    if "bias" in params.get("head", {}):
        made.setdefault("head", {})["new_bias"] = jnp.zeros(n)
    return tree.merge(params, made)


def lookup(table: jax.Array, rows: jax.Array, config: DecoderConfig, tokens: jax.Array, dtype: Any) -> jax.Array:
    """The embeddings [..., width] of `tokens` [...], from table [table_size, width] and new rows [n, width]."""
    ids = jnp.array(config.new_rows)
    at = jnp.minimum(jnp.searchsorted(ids, tokens, method="scan_unrolled"), len(ids) - 1)
    old = table[jnp.minimum(tokens, config.table_size - 1)]
    return jnp.where((ids[at] == tokens)[..., None], rows[at].astype(dtype), old.astype(dtype))


def logits(params: Params, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., n] of the new rows for the head's input [..., width]; params are the LLM's."""
    kernel = params["embed" if config.tied_head else "head"]["new_rows"].T
    found = matmul(hidden, kernel).astype(jnp.float32)
    return found + params["head"]["new_bias"].astype(jnp.float32) if config.head_bias else found


def lay_over(old: jax.Array, new: jax.Array, config: DecoderConfig) -> jax.Array:
    """Logits [..., table_size] of the table and [..., n] of the new rows -> [..., vocab_size]."""
    parts, done = [], 0
    for first, start, stop in _runs(config.new_rows):
        parts += [old[..., done:first], new[..., start:stop]]
        done = first + stop - start
    return jnp.concatenate([*parts, old[..., done:]], -1)


def widened(config: ModelConfig, ids: Iterable[int]) -> ModelConfig:
    """The shapes with new rows for these ids as well. Raises ValueError where ids beyond the tables leave a gap."""
    llm = config.language
    rows = tuple(sorted({*llm.new_rows, *ids}))
    beyond = [id for id in rows if id >= llm.table_size]
    if beyond != list(range(llm.table_size, llm.table_size + len(beyond))):
        raise ValueError(f"new rows {beyond} behind a table of {llm.table_size} leave a gap")
    vocab = llm.table_size + len(beyond)
    encoder = dataclasses.replace(llm.encoder, vocab_size=vocab) if llm.encoder else None
    llm = dataclasses.replace(llm, new_rows=rows, beyond=len(beyond), vocab_size=vocab, encoder=encoder)
    return dataclasses.replace(config, llm=llm)


def add(
    params: Params, config: ModelConfig, fresh: Sequence[int], known: Sequence[int] = (), start: Start = "mean", seed: int = 0
) -> tuple[Params, ModelConfig]:
    """The parameters with float32 new rows for these ids as well, and their shapes.

    fresh   ids that begin anew: with the mean of the table's rows, or ("normal") drawn with the mean and the standard deviation
            of each channel; every table by its own
    known   ids that begin as what they are now
    """
    if not fresh and not known:
        return params, config
    wider = widened(config, (*fresh, *known))
    flat = tree.flatten(params)
    tables = {path: flat[path] for names in TABLES for path in names[:2] if path in flat}
    made = _add(tables, jax.random.key(seed), config, wider, frozenset(fresh), start)
    return tree.merge(params, tree.unflatten(made)), wider


def merge(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """The parameters with all new rows written into their tables, which grow where ids lie beyond, and their shapes."""
    llm, flat = config.language, tree.flatten(params)
    if not llm.new_rows:
        return params, config
    tables = {path: flat.pop(path) for names in TABLES for path in names[:2] if path in flat}
    plain = dataclasses.replace(config, llm=dataclasses.replace(llm, new_rows=(), beyond=0))
    return tree.merge(tree.unflatten(flat), tree.unflatten(_merge(tables, config))), plain


@functools.partial(jax.jit, static_argnames=("config", "wider", "fresh", "start"))
def _add(
    tables: Flat, key: jax.Array, config: ModelConfig, wider: ModelConfig, fresh: frozenset[int], start: Start
) -> Flat:
    """Tables and what new rows there are -> all new rows."""
    size, made = config.language.table_size, {}
    ids, before = np.array(wider.language.new_rows), np.array(config.language.new_rows, int)
    kept = np.array([id < size and id not in fresh for id in ids])
    for i, (path, leaf, axis) in enumerate(TABLES):
        if path not in tables:
            continue
        old = jnp.moveaxis(tables[path], axis, 0)
        mean = old.mean(0, dtype=jnp.float32)
        rows = jnp.broadcast_to(mean, (len(ids), *mean.shape))
        if start == "normal":
            drawn = jax.random.normal(jax.random.fold_in(key, i), rows.shape)
            rows = rows + drawn * old.astype(jnp.float32).std(0)
        rows = rows.at[kept].set(old[ids[kept]].astype(jnp.float32))
        if before.size:
            rows = rows.at[np.searchsorted(ids, before)].set(tables[leaf].astype(jnp.float32))
        made[leaf] = rows
    return made


@functools.partial(jax.jit, static_argnames="config")
def _merge(tables: Flat, config: ModelConfig) -> Flat:
    """Tables and their new rows -> the tables with the rows in their places."""
    llm, made = config.language, {}
    for path, leaf, axis in TABLES:
        if path in tables:
            old = jnp.moveaxis(tables[path], axis, 0)
            grown = jnp.pad(old, [(0, llm.beyond)] + [(0, 0)] * (old.ndim - 1))
            rows = tables[leaf].astype(old.dtype)
            made[path] = jnp.moveaxis(grown.at[np.array(llm.new_rows)].set(rows), 0, axis)
    return made


def _runs(ids: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Ascending ids as runs of consecutive ones: (first id, start, stop) of places in `ids`."""
    starts = [k for k, id in enumerate(ids) if k == 0 or ids[k - 1] != id - 1]
    return [(ids[start], start, stop) for start, stop in zip(starts, [*starts[1:], len(ids)])]
