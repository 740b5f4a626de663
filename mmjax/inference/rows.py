"""One answer to each row: greedy, or drawn."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.inference.sampling import Sampling, choose, penalised
from mmjax.models.decoder import Cache


class Rows(NamedTuple):
    """Between two tokens. `room` is max_new_tokens or more."""

    step: jax.Array  # int32 []: tokens chosen so far
    key: jax.Array  # of the draws
    tokens: jax.Array  # int32 [rows, room]
    finished: jax.Array  # bool [rows]
    scores: jax.Array  # float32 [rows, room, vocab], or [rows, 0, vocab] when not asked for
    limit: jax.Array  # int32 []: tokens at most
    cache: Cache  # of all that stands before the last token chosen
    position: jax.Array  # int32 [rows], or [rows, axes]: of the last token
    segment: jax.Array  # int32 [rows]
    seen: jax.Array  # bool [rows, vocab], or [rows, 0] without a repetition penalty

    @classmethod
    def start(cls, sampling: Sampling, key: jax.Array, scores: jax.Array, position: jax.Array, **prompt: jax.Array) -> Rows:
        """Before the first token; `prompt` are the fields that the prompts give."""
        rows = position.shape[0]
        blank = jnp.full((rows, sampling.max_new_tokens), sampling.pad, jnp.int32)
        more: Any = prompt
        return cls(jnp.int32(0), key, blank, jnp.zeros(rows, bool), scores, position=position, **more)

    @property
    def open(self) -> jax.Array:
        """Whether any answer goes on."""
        return (self.step < self.limit) & ~self.finished.all()

    @property
    def written(self) -> jax.Array:
        """The tokens behind the prompts, int32 [rows of the cache, room]."""
        return self.tokens

    def take(self, logits: jax.Array, sampling: Sampling) -> Rows:
        """With one token more, chosen by its logits, float32 [rows, vocab]."""
        chosen = choose(penalised(logits, self.seen, self.step, self.limit, sampling), self.step, self.key, sampling)
        token = jnp.where(self.finished, sampling.pad, chosen)
        finished, seen, scores = self.finished, self.seen, self.scores
        if sampling.end:
            finished = finished | jnp.isin(token, jnp.array(sampling.end))
        if seen.shape[-1]:
            seen = seen.at[jnp.arange(seen.shape[0]), token].set(True)
        if scores.shape[1]:
            scores = jax.lax.dynamic_update_slice(scores, logits[:, None], (0, self.step, 0))
        return self._replace(
            step=self.step + 1,
            position=self.position + 1,
            seen=seen,
            finished=finished,
            tokens=jax.lax.dynamic_update_slice(self.tokens, token[:, None], (0, self.step)),
            scores=scores,
        )

    def answers(self, sampling: Sampling) -> jax.Array:
        """int32 [rows, room], `pad` behind an end."""
        return self.tokens
