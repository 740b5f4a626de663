"""Generation: prefill once, then decode with a static key/value cache in a loop that stays on the device.

    generate(params, config, batch, sampling, run)   all new tokens
    stream(...)                                      the same tokens, a few at a time
    beam_search in mmjax.inference.beams             chosen by sampling.num_beams > 1
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Iterator, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.batch import Batch
from mmjax.inference import beams
from mmjax.models import decoder, multimodal
from mmjax.models.config import Execution, ModelConfig
from mmjax.parallel.sharding import batch_shardings, shards_of

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens, with transformers' meanings.

    temperature 0 is greedy. `end` are the ids that end an answer (they are kept, `pad` follows); none = always all tokens.
    `repetition_penalty` divides positive and multiplies negative logits of ids already seen (arXiv 1909.05858). The same seed gives
    a row the same draws, whatever stands beside it in the batch at the same place.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    end: tuple[int, ...] = ()
    pad: int = 0
    seed: int = 0


class State(NamedTuple):
    """Between two tokens. rows are those of the batch."""

    step: jax.Array  # int32 []: tokens chosen so far
    logits: jax.Array  # float32 [rows, vocab]: of the next token
    cache: decoder.Cache
    position: jax.Array  # int32 [rows]: of the next token
    segment: jax.Array  # int32 [rows]
    finished: jax.Array  # bool [rows]
    seen: jax.Array  # bool [rows, vocab], or [rows, 0] without a repetition penalty
    tokens: jax.Array  # int32 [rows, max_new_tokens]
    scores: jax.Array  # float32 [rows, max_new_tokens, vocab], or [.., 0] when not asked for


class Generated(NamedTuple):
    """`tokens` int32 [rows, max_new_tokens], `pad` after an end; `scores` the logits of each step, if asked for."""

    tokens: np.ndarray
    scores: np.ndarray | None


def generate(
    params: Params, config: ModelConfig, batch: Batch, sampling: Sampling, run: Execution = Execution(), return_scores: bool = False
) -> Generated:
    """New tokens after each row's prompt. Rows may be padded on either side; parameters on a mesh divide them over its devices.

    Raises ValueError when the model has no LLM, or for sampling together with beams.
    """
    batch = divided(params, pad_prompt(batch))
    if sampling.num_beams > 1:
        if sampling.temperature:
            raise ValueError("beam search is not sampled: leave temperature at 0 or num_beams at 1")
        logits, cache, position, segment = _prefill(params, batch, config, run, sampling.max_new_tokens)
        tokens = beams.beam_search(params, config, logits, cache, position, segment, sampling, run)
        return Generated(np.asarray(tokens), None)
    state = _start(params, batch, config, sampling, run, return_scores)
    state = _advance(params, state, jnp.int32(sampling.max_new_tokens), config, sampling, run)
    return Generated(np.asarray(state.tokens), np.asarray(state.scores) if return_scores else None)


def stream(
    params: Params, config: ModelConfig, batch: Batch, sampling: Sampling, run: Execution = Execution(), every: int = 4
) -> Iterator[np.ndarray]:
    """The tokens so far, int32 [rows, n], after every few steps; the last one is what `generate` returns up to the end."""
    state = _start(params, divided(params, pad_prompt(batch)), config, sampling, run, False)
    for stop in range(every, sampling.max_new_tokens + every, every):
        stop = min(stop, sampling.max_new_tokens)
        state = _advance(params, state, jnp.int32(stop), config, sampling, run)
        yield np.asarray(state.tokens[:, : int(state.step)])
        if bool(state.finished.all()):
            return


def pad_prompt(batch: Batch) -> Batch:
    """The batch with each row's padding moved to the left, and the length rounded up so that few shapes are compiled."""
    tokens, segments, positions = (np.asarray(a) for a in (batch.tokens, batch.segments, batch.positions))
    media = np.full_like(tokens, -1) if batch.media is None else np.asarray(batch.media)
    rows, length = tokens.shape
    grain = 32 if length <= 256 else 128
    padded = -(-length // grain) * grain
    fields = {"tokens": (tokens, 0), "segments": (segments, 0), "positions": (positions, 0), "media": (media, -1)}
    out = {name: np.full((rows, padded), fill, np.int32) for name, (_, fill) in fields.items()}
    for row in range(rows):
        real = np.flatnonzero(segments[row])
        end = int(real[-1]) + 1 if real.size else 0
        for name, (values, _) in fields.items():
            out[name][row, padded - end :] = values[row, :end]
    return dataclasses.replace(batch, **out, targets=None, weights=None)


def divided(params: Params, batch: Batch) -> Batch:
    """The batch on the devices of the parameters' mesh, rows and media groups apart; unchanged where they cannot be divided."""
    media = next((m for m in (batch.images, batch.features) if m is not None), None)
    mesh, shards = shards_of(params, batch.tokens.shape[0])
    if mesh is None or (media is not None and media.shape[0] % shards):
        return batch
    return jax.device_put(batch, batch_shardings(batch, mesh))


@functools.partial(jax.jit, static_argnames=("config", "run", "new"))
def _prefill(params: Params, batch: Batch, config: ModelConfig, run: Execution, new: int):
    """Logits of the first new token [rows, vocab], the filled cache, and the position and segment of that token [rows]."""
    rows, length = batch.tokens.shape
    x = multimodal.embed(params, config, batch, run)
    cache = decoder.empty_cache(config.language, rows, length + new, run.dtype)
    out = decoder.decode(
        params["llm"], config.language, x, segments=batch.segments, positions=batch.positions, run=run, adapters=config.adapters, cache=cache
    )
    logits = multimodal.head(params, config, out.last[:, -1])
    return logits, out.cache, batch.positions[:, -1] + 1, batch.segments[:, -1]


@functools.partial(jax.jit, static_argnames=("config", "sampling", "run", "return_scores"))
def _start(params: Params, batch: Batch, config: ModelConfig, sampling: Sampling, run: Execution, return_scores: bool) -> State:
    new = sampling.max_new_tokens
    logits, cache, position, segment = _prefill(params, batch, config, run, new)
    rows, vocab = logits.shape
    seen = jnp.zeros((rows, 0), bool)
    if sampling.repetition_penalty != 1.0:
        text = (batch.segments > 0) & (batch.media < 0)
        ids = jnp.where(text, batch.tokens, vocab)
        seen = jax.vmap(lambda row: jnp.zeros(vocab, bool).at[row].set(True, mode="drop"))(ids)
    return State(
        step=jnp.int32(0),
        logits=logits,
        cache=cache,
        position=position,
        segment=segment,
        finished=jnp.zeros(rows, bool),
        seen=seen,
        tokens=jnp.full((rows, new), sampling.pad, jnp.int32),
        scores=jnp.zeros((rows, new, vocab if return_scores else 0)),
    )


@functools.partial(jax.jit, static_argnames=("config", "sampling", "run"), donate_argnums=(1,))
def _advance(params: Params, state: State, stop: jax.Array, config: ModelConfig, sampling: Sampling, run: Execution) -> State:
    """Chooses tokens until `stop` of them stand or all rows have ended."""

    def unfinished(state: State):
        return (state.step < stop) & ~state.finished.all()

    def one(state: State) -> State:
        chosen = choose(state.logits, state.seen, state.step, sampling)
        token = jnp.where(state.finished, sampling.pad, chosen)
        finished = state.finished
        if sampling.end:
            finished = finished | jnp.isin(token, jnp.array(sampling.end)) & ~state.finished
        scores = state.scores
        if scores.shape[-1]:
            scores = jax.lax.dynamic_update_slice(scores, state.logits[:, None], (0, state.step, 0))
        seen = state.seen
        if seen.shape[-1]:
            seen = seen.at[jnp.arange(seen.shape[0]), token].set(True)
        logits, cache = multimodal.decode_token(
            params, config, state.cache, token, state.position, state.segment, run
        )
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step))
        return State(state.step + 1, logits, cache, state.position + 1, state.segment, finished, seen, tokens, scores)

    return jax.lax.while_loop(unfinished, one, state)


def choose(logits: jax.Array, seen: jax.Array, step: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each row, int32 [rows], from float32 logits [rows, vocab]."""
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if not sampling.temperature:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1.0:
        descending = -jnp.sort(-logits, -1)
        mass = jnp.cumsum(jax.nn.softmax(descending, -1), -1)
        # The smallest set whose mass reaches top_p: everything before it is reached, and the one that reaches it.
        kept = jnp.concatenate([jnp.ones_like(mass[:, :1], bool), mass[:, :-1] < sampling.top_p], -1)
        least = jnp.min(jnp.where(kept, descending, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    key = jax.random.fold_in(jax.random.key(sampling.seed), step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
