"""Beam search on the device, with transformers' scoring: sum of log-probabilities / length ** length_penalty."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.models import decoder, multimodal
from mmjax.models.config import Execution, ModelConfig

if TYPE_CHECKING:
    from mmjax.inference.generate import Sampling

Params = dict[str, Any]
WORST = -1e9


class Beams(NamedTuple):
    step: jax.Array
    logits: jax.Array  # [rows * beams, vocab] of the next token
    cache: decoder.Cache  # of rows * beams
    position: jax.Array  # [rows * beams]
    live: jax.Array  # int32 [rows, beams, new]: unfinished hypotheses
    live_scores: jax.Array  # float32 [rows, beams]: their summed log-probabilities
    done: jax.Array  # int32 [rows, beams, new]: finished hypotheses
    done_scores: jax.Array  # float32 [rows, beams]: with the length penalty; WORST = empty
    open: jax.Array  # bool [rows]: an unfinished hypothesis may still overtake a finished one


@functools.partial(jax.jit, static_argnames=("config", "sampling", "run"))
def beam_search(
    params: Params,
    config: ModelConfig,
    logits: jax.Array,
    cache: decoder.Cache,
    position: jax.Array,
    segment: jax.Array,
    sampling: Sampling,
    run: Execution,
) -> jax.Array:
    """The best hypothesis of each row, int32 [rows, max_new_tokens], `pad` after its end.

    logits [rows, vocab], cache, position and segment [rows] are what the prefill left. A row is settled once no unfinished
    hypothesis could overtake its worst finished one at its present length (transformers' early_stopping=False).
    """
    rows, vocab = logits.shape
    count, new = sampling.num_beams, sampling.max_new_tokens
    # Enough candidates that the beams stay full even if every end is among them.
    candidates = count * (1 + max(1, len(sampling.end)))
    ends = jnp.zeros(vocab, bool).at[jnp.array(sampling.end, jnp.int32)].set(True) if sampling.end else jnp.zeros(vocab, bool)

    def widen(x, axis=0):
        return jnp.repeat(x, count, axis)

    def unfinished(state: Beams):
        return (state.step < new) & state.open.any()

    def one(state: Beams) -> Beams:
        log = jax.nn.log_softmax(state.logits, -1).reshape(rows, count, vocab)
        total = (state.live_scores[:, :, None] + log).reshape(rows, count * vocab)
        scores, flat = jax.lax.top_k(total, candidates)
        beam, token = flat // vocab, (flat % vocab).astype(jnp.int32)
        hypotheses = jnp.take_along_axis(state.live, beam[:, :, None], 1)
        hypotheses = jax.lax.dynamic_update_slice(hypotheses, token[:, :, None], (0, 0, state.step))
        ended = ends[token] | (state.step + 1 == new)

        # Only an end among the first `count` candidates makes a finished hypothesis, as in transformers.
        final = scores / (state.step + 1.0) ** sampling.length_penalty
        final = jnp.where(ended & (jnp.arange(candidates) < count) & state.open[:, None], final, WORST)
        done, done_scores = _best(
            jnp.concatenate([state.done, hypotheses], 1), jnp.concatenate([state.done_scores, final], 1), count
        )
        live_candidates = jnp.where(ended, WORST, scores)
        live_scores, kept = jax.lax.top_k(live_candidates, count)
        live = jnp.take_along_axis(hypotheses, kept[:, :, None], 1)
        source = jnp.take_along_axis(beam, kept, 1)
        token = jnp.take_along_axis(token, kept, 1).reshape(-1)

        rows_from = (jnp.arange(rows)[:, None] * count + source).reshape(-1)
        cache = state.cache._replace(keys=state.cache.keys[:, rows_from], values=state.cache.values[:, rows_from])
        next_logits, cache = multimodal.decode_token(
            params, config, cache, token, state.position, widen(segment), run
        )
        reachable = live_scores[:, 0] / (state.step + 1.0) ** sampling.length_penalty
        worst = done_scores.min(1)
        open_ = state.open & ((worst <= WORST / 2) | (reachable > worst))
        return Beams(
            state.step + 1, next_logits, cache, state.position + 1, live, live_scores, done, done_scores, open_
        )

    wide = decoder.Cache(widen(cache.keys, 1), widen(cache.values, 1), widen(cache.segments), cache.next)
    blank = jnp.full((rows, count, new), sampling.pad, jnp.int32)
    # All beams begin alike: only the first may be extended at the first step.
    first = jnp.where(jnp.arange(count) == 0, 0.0, WORST) * jnp.ones((rows, 1))
    none = jnp.full((rows, count), WORST)
    state = Beams(
        jnp.int32(0), widen(logits), wide, widen(position), blank, first, blank, none, jnp.ones(rows, bool)
    )
    return jax.lax.while_loop(unfinished, one, state).done[:, 0]


def _best(hypotheses: jax.Array, scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    scores, index = jax.lax.top_k(scores, count)
    return jnp.take_along_axis(hypotheses, index[:, :, None], 1), scores
