"""Strings that end an answer: found in the text of its ids, on the host, every few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Sequence

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stopper(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> Callable[[np.ndarray], int | None] | None:
    """From a row's new ids to the length of its answer: up to the token with which the first of `stops` is complete, which may
    say more than it; None where none of them is there yet. No function without stops.

    As in transformers a stop string may begin and end inside of tokens; it must lie in the answer as a whole.
    """
    stops = [stop for stop in stops if stop]
    if not stops:
        return None
    # Behind other text, so that a first token keeps its space.
    before = tokenizer("a", add_special_tokens=False)["input_ids"]

    def stopped(ids: np.ndarray) -> bool:
        text = str(tokenizer.decode([*before, *map(int, ids)], clean_up_tokenization_spaces=False))
        return any(stop in text[1:] for stop in stops)

    def length(ids: np.ndarray) -> int | None:
        if not stopped(ids):
            return None
        low, high = 0, len(ids)  # not stopped with the first `low`, stopped with the first `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if stopped(ids[:middle]) else (middle, high)
        return high

    return length


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text in front of the first of the stops."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]
