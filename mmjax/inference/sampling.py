"""How the next token is chosen from its logits: what changes them, which of them remain, and the draw."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Mapping

import jax
import jax.numpy as jnp

from mmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens, with transformers' meanings.

    min_new_tokens        no end before so many tokens
    temperature           0 is greedy, or with `num_beams` a beam search
    top_k, top_p, min_p   draw from the k best tokens; from the fewest whose mass reaches p (arXiv 1904.09751); from those at least
                          min_p times as probable as the best (arXiv 2407.01082). 0, 1 and 0 leave all
    repetition_penalty    divides positive and multiplies negative logits of ids already there (arXiv 1909.05858)
    num_beams, length_penalty, early_stopping   see mmjax.inference.beams
    num_return_sequences  answers for each prompt, one after another: several draws, or the best beams
    forced_bos_token_id   the first token after a prompt of one (an encoder-decoder's start token); -1 = free
    forced_eos_token_id   the token at `max_new_tokens`, if the answer has not ended before; -1 = free
    end, pad              ids that end an answer (they are kept), and what follows them; no end = always all tokens
    seed                  the same seed gives a row the same draws, whatever stands beside it in the batch at the same place

    Raises ValueError for settings that exclude each other.
    """

    max_new_tokens: int = 16
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    forced_bos_token_id: int = -1
    forced_eos_token_id: int = -1
    end: tuple[int, ...] = ()
    pad: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_beams > 1 and self.temperature:
            raise ValueError("beam search is not sampled: leave temperature at 0 or num_beams at 1")
        if self.num_return_sequences > (self.num_beams if not self.temperature else self.num_return_sequences):
            raise ValueError("several answers to a prompt are draws (temperature) or beams (num_beams), at most all of them")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping is True, False or 'never', not {self.early_stopping!r}")
        if min(self.max_new_tokens, self.min_new_tokens, self.temperature, self.top_k, self.min_p) < 0 or self.top_p <= 0:
            raise ValueError("numbers of tokens, temperature, top_k and min_p are 0 or more, top_p is more than 0")


# What of a generation_config.json is heard besides the ids. Whether to draw, and from what, the caller says alone.
_HEARD = (
    "min_new_tokens",
    "repetition_penalty",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
# What would change greedy answers or beams and is not known here, with the values that change nothing.
_UNKNOWN: dict[str, tuple[Any, ...]] = {
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "watermarking_config": (),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "stop_strings": ([],),
    "token_healing": (False,),
}


def from_file(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a generation_config.json (or an old config.json) asks for. Raises UserError for one that would change the
    answers and is not supported."""
    found = asked(generation)
    for name in found:
        if name in _UNKNOWN:
            raise UserError(f"generation_config.json: {name} = {found[name]!r} is not supported; leave it out")
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        if not isinstance(found.get(name, 0), int):
            raise UserError(f"generation_config.json: {name} = {found[name]!r} is not supported (only one id)")
    return found


def asked(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What of such a file changes greedy answers or beams, supported here or not."""
    found = {name: generation[name] for name in (*_HEARD, *_UNKNOWN) if generation.get(name) is not None}
    return {name: value for name, value in found.items() if value not in _UNKNOWN.get(name, ())}


def penalised(
    scores: jax.Array, seen: jax.Array, step: jax.Array, limit: jax.Array, sampling: Sampling
) -> jax.Array:
    """Logits or log-probabilities, float32 [rows, vocab], with all that changes them whether or not a token is drawn.

    seen   bool [rows, vocab]: ids already there, or [rows, 0] without a repetition penalty
    step   int32 []: tokens chosen so far, of `limit`
    """
    ids = jnp.arange(scores.shape[-1])
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    if sampling.min_new_tokens and sampling.end:
        early = jnp.isin(ids, jnp.array(sampling.end)) & (step < sampling.min_new_tokens)
        scores = jnp.where(early, -jnp.inf, scores)
    for forced, at in ((sampling.forced_bos_token_id, 0), (sampling.forced_eos_token_id, limit - 1)):
        if forced >= 0:
            scores = jnp.where(step == at, jnp.where(ids == forced, 0.0, -jnp.inf), scores)
    return scores


def warped(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits, float32 [rows, vocab], of the distribution to draw from: -inf where nothing may be drawn."""
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
    if sampling.min_p:
        logits = jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(sampling.min_p), -jnp.inf, logits)
    return logits


def choose(scores: jax.Array, step: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each row, int32 [rows], from penalised logits, float32 [rows, vocab]."""
    if not sampling.temperature:
        return jnp.argmax(scores, -1).astype(jnp.int32)
    key = jax.random.fold_in(key, step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(scores.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, warped(scores, sampling)).astype(jnp.int32)
