"""Word error rate: how many words must be put in, left out or exchanged, of those that were said (Levenshtein, 1966).

    word_error_rate(["the cat sat"], ["the cat sits"])        -> 1/3, over all sentences together
    plain("It's fine.")                                       -> "its fine", as RobustGER's authors compare a second time
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DROPPED = str.maketrans("", "", ".,-?'")


def word_error_rate(written: Sequence[str], said: Sequence[str]) -> float:
    """Errors over the words that were said. Raises ValueError where nothing was."""
    words = sum(len(text.split()) for text in said)
    if not words:
        raise ValueError("nothing was said: there are no words to count errors against")
    return sum(distance(a.split(), b.split()) for a, b in zip(written, said, strict=True)) / words


def distance(written: Sequence[str], said: Sequence[str]) -> int:
    """The least number of words put in, left out or exchanged."""
    row = np.arange(len(said) + 1)
    for i, word in enumerate(written, 1):
        kept = row[:-1] + np.array([word != other for other in said], int)
        after = np.concatenate([[i], np.minimum(kept, row[1:] + 1)])
        # A word may also be missing: the cheapest of all places before, plus one for each word since.
        row = np.minimum.accumulate(after - np.arange(len(after))) + np.arange(len(after))
    return int(row[-1])


def plain(text: str) -> str:
    """Lower case, without marks."""
    return text.lower().translate(DROPPED)
