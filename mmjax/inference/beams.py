"""Beam search with transformers' scoring: the sum of log-probabilities divided by length ** length_penalty."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.inference.sampling import Sampling, penalised
from mmjax.models.decoder import Cache

WORST = -1e9


class Beams(NamedTuple):
    """Between two tokens. Of each row `beams` unfinished hypotheses are followed, and the best `beams` finished ones kept.

    A row is settled once no unfinished hypothesis could overtake its worst finished one: judged by its present length, with
    early_stopping="never" by the length that suits it best, and with True once there are `beams` finished ones.
    """

    step: jax.Array  # int32 []: tokens chosen so far
    live: jax.Array  # int32 [rows, beams, room]: unfinished hypotheses
    live_scores: jax.Array  # float32 [rows, beams]: their summed log-probabilities
    done: jax.Array  # int32 [rows, beams, room]: finished hypotheses
    done_scores: jax.Array  # float32 [rows, beams]: with the length penalty; WORST = none
    unsettled: jax.Array  # bool [rows]
    limit: jax.Array  # int32 []: tokens at most
    cache: Cache  # of rows * beams, all that stands before the last token chosen
    position: jax.Array  # int32 [rows * beams], or [rows * beams, axes]: of the last token
    segment: jax.Array  # int32 [rows * beams]
    seen: jax.Array  # bool [rows * beams, vocab], or [.., 0] without a repetition penalty

    @classmethod
    def start(cls, sampling: Sampling, position: jax.Array, **prompt: jax.Array) -> Beams:
        """Before the first token; `prompt` are the fields that the prompts give, each row of them `num_beams` times."""
        count = sampling.num_beams
        rows = position.shape[0] // count
        # What stands behind an end: as in transformers, never the id 0.
        fill = sampling.pad or (sampling.end[0] if sampling.end else 0)
        blank = jnp.full((rows, count, sampling.max_new_tokens), fill, jnp.int32)
        # All beams begin alike: only the first may be extended at the first step.
        first = jnp.where(jnp.arange(count) == 0, 0.0, WORST) * jnp.ones((rows, 1))
        none, unsettled = jnp.full((rows, count), WORST), jnp.ones(rows, bool)
        more: Any = prompt
        return cls(jnp.int32(0), blank, first, blank, none, unsettled, position=position, **more)

    @property
    def full(self) -> jax.Array:
        """bool [rows]: whether as many hypotheses as there are beams have finished."""
        return (self.done_scores > WORST / 2).all(1)

    @property
    def open(self) -> jax.Array:
        """Whether any row is unsettled."""
        return (self.step < self.limit) & self.unsettled.any()

    @property
    def written(self) -> jax.Array:
        """The tokens behind the prompts, int32 [rows of the cache, room]."""
        return self.live.reshape(-1, self.live.shape[-1])

    def take(self, logits: jax.Array, sampling: Sampling) -> Beams:
        """With one token more, by its logits, float32 [rows * beams, vocab]."""
        rows, count, _ = self.live.shape
        vocab = logits.shape[-1]
        # Enough candidates that the beams stay full even if every end is among them.
        candidates = count * max(2, 1 + len(sampling.end))
        log = penalised(jax.nn.log_softmax(logits, -1), self.seen, self.step, self.limit, sampling)
        total = (self.live_scores[:, :, None] + log.reshape(rows, count, vocab)).reshape(rows, count * vocab)
        scores, flat = jax.lax.top_k(total, candidates)
        beam, token = flat // vocab, (flat % vocab).astype(jnp.int32)
        hypotheses = jnp.take_along_axis(self.live, beam[:, :, None], 1)
        hypotheses = jax.lax.dynamic_update_slice(hypotheses, token[:, :, None], (0, 0, self.step))
        step = self.step + 1
        ended = jnp.broadcast_to(step == self.limit, token.shape)
        if sampling.end:
            ended = ended | jnp.isin(token, jnp.array(sampling.end))

        # Only an end among the first `count` candidates makes a finished hypothesis, as in transformers.
        counts = ended & (jnp.arange(candidates) < count) & self.unsettled[:, None]
        if sampling.early_stopping is True:
            counts = counts & ~self.full[:, None]
        final = jnp.where(counts, scores / step.astype(jnp.float32) ** sampling.length_penalty, WORST)
        done_scores, best = jax.lax.top_k(jnp.concatenate([self.done_scores, final], 1), count)
        done = jnp.take_along_axis(jnp.concatenate([self.done, hypotheses], 1), best[:, :, None], 1)

        live_scores, kept = jax.lax.top_k(jnp.where(ended, WORST, scores), count)
        chosen = jnp.take_along_axis(token, kept, 1).reshape(-1)
        source = (jnp.arange(rows)[:, None] * count + jnp.take_along_axis(beam, kept, 1)).reshape(-1)
        seen = self.seen[source]
        if seen.shape[-1]:
            seen = seen.at[jnp.arange(rows * count), chosen].set(True)
        extended = self._replace(
            step=step,
            cache=self.cache._replace(keys=self.cache.keys[:, source], values=self.cache.values[:, source]),
            position=self.position + 1,
            seen=seen,
            live=jnp.take_along_axis(hypotheses, kept[:, :, None], 1),
            live_scores=live_scores,
            done=done,
            done_scores=done_scores,
        )
        return extended._replace(unsettled=self.unsettled & extended._can_improve(sampling))

    def _can_improve(self, sampling: Sampling) -> jax.Array:
        """bool [rows]: whether an unfinished hypothesis may still overtake the worst finished one."""
        longer = sampling.early_stopping == "never" and sampling.length_penalty > 0
        length = (self.limit if longer else self.step).astype(jnp.float32)
        reachable = self.live_scores[:, 0] / length**sampling.length_penalty
        improvable = ~self.full | (reachable > self.done_scores.min(1))
        # transformers looks at all rows together here: one goes on as long as any has too few finished hypotheses.
        return improvable & ~self.full.all() if sampling.early_stopping is True else improvable

    def answers(self, sampling: Sampling) -> jax.Array:
        """int32 [rows * num_return_sequences, room]: the best finished hypotheses of each row."""
        return self.done[:, : sampling.num_return_sequences].reshape(-1, self.done.shape[-1])
