"""Generation: prefill once, then decode with a static key/value cache in a loop that stays on the device.

    generate(params, config, batch, sampling, run)   all new tokens
    stream(...)                                      the same tokens, a few at a time

What is carried from token to token is a `Rows` (mmjax.inference.rows) or `Beams` (mmjax.inference.beams).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.inference.beams import Beams
from mmjax.inference.rows import Rows
from mmjax.inference.sampling import Sampling
from mmjax.models import decoder, multimodal, prefix
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.parallel.placement import on_host
from mmjax.parallel.sharding import batch_shardings, placed, shards_of

Params = dict[str, Any]
Ended = Callable[[np.ndarray], int | None]
"""From a row's new ids to how many of them its answer is, None where it goes on (see mmjax.inference.stopping)."""

VIRTUAL = {"virtual": -1, "task": 0}  # fields of prompts, and what they are at padding and behind the prompt
CROSSED = ("begun", "media_seen")  # fields that say of each position which media the blocks' cross-attention shows it
ROOM = 32  # the number of new tokens is rounded up to a multiple, so that few lengths are compiled
LOOK = 8  # tokens between two looks for stop strings


class Generated(NamedTuple):
    """`tokens` int32 [rows, max_new_tokens], `pad` after an end; `scores` the logits of each step, float32 [rows, max_new_tokens, vocab],
    if asked for."""

    tokens: np.ndarray
    scores: np.ndarray | None


def generate(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    sampling: Sampling,
    run: Execution = Execution(),
    return_scores: bool = False,
    ended: Ended | None = None,
) -> Generated:
    """New tokens after each row's prompt. Rows may be padded on either side; parameters on a mesh divide them over its devices.

    Raises UserError where the model predicts no tokens, and for settings that exclude each other.
    """
    limit = sampling.max_new_tokens
    looks = range(LOOK, limit + LOOK, LOOK) if ended and limit else [limit]
    for state in _states(params, config, batch, sampling, run, looks, return_scores, ended):
        pass
    tokens = on_host(state.answers(sampling))[:, :limit]
    scores = on_host(state.scores)[:, :limit] if return_scores and isinstance(state, Rows) else None
    return Generated(tokens, scores)


def stream(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    sampling: Sampling,
    run: Execution = Execution(),
    every: int = 4,
    ended: Ended | None = None,
) -> Iterator[np.ndarray]:
    """The tokens so far, int32 [rows, n], after every few steps; the last one is what `generate` returns up to the end."""
    if sampling.num_beams > 1:
        raise UserError("beams are only known at their end: leave num_beams at 1 to see tokens as they come")
    limit = sampling.max_new_tokens
    for state in _states(params, config, batch, sampling, run, range(every, limit + every, every), False, ended):
        yield on_host(state.written[:, : min(int(state.step), limit)])


def _states(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    sampling: Sampling,
    run: Execution,
    looks: Sequence[int],
    return_scores: bool,
    ended: Ended | None,
) -> Iterator[Rows | Beams]:
    """The state after so many tokens as each of `looks` says, until all answers have ended."""
    beams, limit = sampling.num_beams > 1, sampling.max_new_tokens
    if not config.language.has_head:
        raise UserError("this model predicts no tokens")
    if beams and (ended or return_scores):
        raise UserError("beams are neither searched for stop strings nor have logits of their own: leave num_beams at 1")
    batch = _prompts(config.language, batch)
    if (batch.tokens if batch.decoder_tokens is None else batch.decoder_tokens).shape[1] != 1:
        sampling = dataclasses.replace(sampling, forced_bos_token_id=-1)
    longest = int(np.max(batch.positions, initial=0)) + 1 + prefix.count(config)
    decoder.require_positions(config.language, longest + limit - 1)
    copies = 1 if beams else sampling.num_return_sequences
    batch = divided(params, pad_prompt(repeated(batch, copies)))
    # The seed and the limit are data: another one compiles nothing anew.
    key = jax.random.key(sampling.seed)
    static = dataclasses.replace(sampling, seed=0, max_new_tokens=max(1, -(-limit // ROOM)) * ROOM)
    crossing = _crossing(config.language, longest)
    state, remembered = _start(params, batch, key, jnp.int32(limit), config, static, run, return_scores)
    for look in looks:
        if crossing and int(state.step) <= crossing <= look:
            state = _advance(params, remembered, state, jnp.int32(crossing), config, static, run)
            if int(state.step) == crossing and bool(state.open):
                again = pad_prompt(_extended(batch, on_host(state.written[:, :crossing])))
                state = _restart(params, divided(params, again), state, config, static, run)
        state = _advance(params, remembered, state, jnp.int32(look), config, static, run)
        if ended and isinstance(state, Rows):
            state = _cut(state, ended, sampling.pad)
        yield state
        if not bool(state.open):
            return


def _prompts(config: DecoderConfig, batch: Batch) -> Batch:
    """The batch on the host, an encoder-decoder's with what its decoder begins with."""
    fields = {name: np.asarray(getattr(batch, name)) for name in ("tokens", "segments", "positions")}
    fields |= {name: np.asarray(getattr(batch, name)) for name in VIRTUAL if getattr(batch, name) is not None}
    media = np.full_like(fields["tokens"], -1) if batch.media is None else np.asarray(batch.media)
    if batch.spans is not None:
        fields["spans"] = np.asarray(batch.spans)
    batch = dataclasses.replace(batch, **fields, media=media, targets=None, weights=None)
    if config.encoder is None or batch.decoder_tokens is not None:
        return batch
    start = np.full((len(media), 1), config.start_token, np.int32)
    return dataclasses.replace(batch, decoder_tokens=start, decoder_segments=np.ones_like(start))


def repeated(batch: Batch, times: int) -> Batch:
    """Every row so many times, one after another; rows stay in the group of their media."""
    if times == 1:
        return batch
    texts = ("tokens", "segments", "positions", "spans", "media", "decoder_tokens", "decoder_segments")
    in_rows = (*texts, *VIRTUAL, *CROSSED, "row_media", "media_segments")
    fields = {name: np.repeat(getattr(batch, name), times, 0) for name in in_rows if getattr(batch, name) is not None}
    return dataclasses.replace(batch, **fields)


def pad_prompt(batch: Batch) -> Batch:
    """The batch with each row's padding moved to the left, and lengths rounded up so that few shapes are compiled."""
    media = np.full_like(batch.tokens, -1) if batch.media is None else batch.media
    fields = {"tokens": (batch.tokens, 0), "segments": (batch.segments, 0), "positions": (batch.positions, 0), "media": (media, -1)}
    if batch.spans is not None:
        fields["spans"] = (batch.spans, 0)
    fields |= {name: (getattr(batch, name), 0) for name in CROSSED if getattr(batch, name) is not None}
    fields |= {name: (getattr(batch, name), fill) for name, fill in VIRTUAL.items() if getattr(batch, name) is not None}
    out = _padded_left(fields, np.asarray(batch.segments), 32)
    if batch.decoder_tokens is not None:
        fields = {name: (getattr(batch, name), 0) for name in ("decoder_tokens", "decoder_segments")}
        begun = np.asarray(batch.decoder_segments)
        out |= _padded_left(fields, begun, 1 if begun.shape[1] == 1 else 32)  # a start token alone needs no room
    return dataclasses.replace(batch, **out, targets=None, weights=None)


def _padded_left(fields: dict[str, tuple[Any, int]], segments: np.ndarray, grain: int) -> dict[str, np.ndarray]:
    """Arrays [rows, length, ...], each with what it is filled up with, to a multiple of `grain`."""
    rows, length = segments.shape
    grain = grain if length <= 256 else 128
    padded = -(-length // grain) * grain
    out = {name: np.full((rows, padded, *np.shape(values)[2:]), fill, np.int32) for name, (values, fill) in fields.items()}
    for row in range(rows):
        real = np.flatnonzero(segments[row])
        end = int(real[-1]) + 1 if real.size else 0
        for name, (values, _) in fields.items():
            out[name][row, padded - end :] = np.asarray(values)[row, :end]
    return out


def divided(params: Params, batch: Batch) -> Batch:
    """The batch on the devices of the parameters' mesh, rows and media groups apart; unchanged where they cannot be divided."""
    media = next((m for m in (batch.images, batch.features) if m is not None), None)
    mesh, shards = shards_of(params, batch.tokens.shape[0])
    if mesh is None or (media is not None and len(jax.tree.leaves(media)[0]) % shards):
        return batch
    return jax.tree.map(placed, batch, batch_shardings(batch, mesh))


def _crossing(config: DecoderConfig, longest: int) -> int:
    """After how many new tokens all keys change: "longrope" turns them otherwise once an input is longer than `original_length`,
    and with `cache_restarts` what is in the cache is then computed anew (transformers does it in Phi-3 alone). 0 = never."""
    rope = config.block.rope
    if rope is None or rope.kind != "longrope" or not config.cache_restarts or longest > rope.original_length:
        return 0
    return rope.original_length - longest + 1


def _extended(batch: Batch, tokens: np.ndarray) -> Batch:
    """Left-padded prompts [rows, length] with what was written behind them, int [rows or rows * beams, n]."""
    batch = repeated(jax.tree.map(on_host, batch), len(tokens) // len(batch.tokens))
    following = np.asarray(batch.positions)[:, -1:] + np.arange(1, tokens.shape[1] + 1)
    more = {
        "tokens": tokens,
        "segments": np.broadcast_to(batch.segments[:, -1:], tokens.shape),
        "positions": following,
        "media": np.full_like(tokens, -1),
    }
    if batch.spans is not None:
        more["spans"] = np.zeros_like(tokens)
    more |= {name: np.full_like(tokens, fill) for name, fill in VIRTUAL.items() if getattr(batch, name) is not None}
    for name in CROSSED:
        if (given := getattr(batch, name)) is not None:
            more[name] = np.repeat(given[:, -1:], tokens.shape[1], 1)
    return dataclasses.replace(batch, **{name: np.concatenate([getattr(batch, name), new], 1) for name, new in more.items()})


def _cut(state: Rows, ended: Ended, pad: int) -> Rows:
    """The state without what stands behind the end of an answer, as `ended` sees it."""
    tokens, finished, step = on_host(state.tokens).copy(), on_host(state.finished).copy(), int(state.step)
    for row in range(len(tokens)):
        length = ended(tokens[row, :step])
        if length is not None:
            tokens[row, length:], finished[row] = pad, True
    return state._replace(tokens=placed(tokens, state.tokens.sharding), finished=placed(finished, state.finished.sharding))


def _prefill(params: Params, batch: Batch, config: ModelConfig, run: Execution, room: int):
    """Logits of the first new token [rows, vocab]; the filled cache with so much room, position and segment of the last token
    [rows]; what is remembered for the others."""
    reading = multimodal.remember(params, config, multimodal.read(params, config, batch, run))
    rows, length = reading.segments.shape
    cache = decoder.empty_cache(config.language, rows, length + room, run.dtype)
    out = multimodal.decode_reading(params, config, reading, run, cache=cache)
    logits = multimodal.head(params, config, out.last[:, -1])
    position = reading.positions[:, -1]
    if position.ndim == 2:  # of several axes: the largest, whatever stands last
        position = jnp.broadcast_to(reading.positions.max((1, 2))[:, None], position.shape)
    prompt = {"cache": out.cache, "position": position, "segment": reading.segments[:, -1]}
    held: list[Any] = [part.at_end() if part is not None else None for part in (reading.media, reading.beside, reading.routed)]
    return logits, prompt, multimodal.Remembered(reading.memory, *held)


def _seen(batch: Batch, vocab: int) -> jax.Array:
    """bool [rows, vocab]: the ids of the prompts, of an encoder-decoder those that its decoder begins with."""
    ids, text = batch.tokens, (batch.segments > 0) & (batch.media < 0)
    if batch.virtual is not None:
        text = text & (batch.virtual < 0)
    if batch.decoder_tokens is not None:
        ids, text = batch.decoder_tokens, batch.decoder_segments > 0
    ids = jnp.where(text, ids, vocab)
    return jax.vmap(lambda row: jnp.zeros(vocab, bool).at[row].set(True, mode="drop"))(ids)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "run", "return_scores"))
def _start(
    params: Params,
    batch: Batch,
    key: jax.Array,
    limit: jax.Array,
    config: ModelConfig,
    sampling: Sampling,
    run: Execution,
    return_scores: bool,
) -> tuple[Rows | Beams, multimodal.Remembered]:
    """The state with the first token."""
    room, copies = sampling.max_new_tokens, sampling.num_beams
    logits, prompt, remembered = _prefill(params, batch, config, run, room)
    rows, vocab = logits.shape
    prompt["seen"] = _seen(batch, vocab) if sampling.repetition_penalty != 1.0 else jnp.zeros((rows, 0), bool)
    if copies == 1:
        scores = jnp.zeros((rows, room if return_scores else 0, vocab))
        return Rows.start(sampling, key, scores, limit=limit, **prompt).take(logits, sampling), remembered

    def widen(x: jax.Array, axis: int = 0) -> jax.Array:
        return jnp.repeat(x, copies, axis)

    cache = prompt.pop("cache")
    wide = cache._replace(keys=widen(cache.keys, 1), values=widen(cache.values, 1), segments=widen(cache.segments))
    state = Beams.start(sampling, limit=limit, cache=wide, **jax.tree.map(widen, prompt))
    return state.take(widen(logits), sampling), remembered.repeated(copies)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "run"), donate_argnums=(2,))
def _restart(
    params: Params, batch: Batch, state: Rows | Beams, config: ModelConfig, sampling: Sampling, run: Execution
) -> Rows | Beams:
    """The state with one token more, its cache made anew from prompts and tokens."""
    logits, prompt, _ = _prefill(params, batch, config, run, sampling.max_new_tokens)
    return state._replace(cache=prompt["cache"]).take(logits, sampling)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "run"), donate_argnums=(2,))
def _advance(
    params: Params,
    remembered: multimodal.Remembered,
    state: Rows | Beams,
    stop: jax.Array,
    config: ModelConfig,
    sampling: Sampling,
    run: Execution,
) -> Rows | Beams:
    """Chooses tokens until `stop` of them stand or all answers have ended."""
    params = multimodal.prepared(params, config)

    def one(state):
        last = jax.lax.dynamic_index_in_dim(state.written, state.step - 1, 1, keepdims=False)
        logits, cache = multimodal.decode_token(params, config, state.cache, last, state.position, state.segment, run, remembered)
        return state._replace(cache=cache).take(logits, sampling)

    return jax.lax.while_loop(lambda state: (state.step < stop) & state.open, one, state)
