"""Short answers: right or wrong after normalisation, counted by kind of question, with 95 % intervals."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_ARTICLES = ("a", "an", "the")


def normalise(text: str) -> str:
    """An answer as it is compared: lower case, words apart by one space, without punctuation and articles, and with
    "zero" to "ten" as digits. A point or comma between digits stays ("3.5"); an answer of nothing but articles stays ("A").
    """
    words = re.findall(r"\d+(?:[.,]\d+)*|\w+(?:['’]\w+)*", text.lower())
    words = [str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in words]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer equals one of the accepted ones after normalisation."""
    return normalise(answer) in {normalise(text) for text in accepted}


def same_letter(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer names the option of one of the accepted ones: "The answer is B. BECAUSE: ...", "(B)" or "B"."""
    return letter(answer) in {letter(text) for text in accepted} - {""}


def letter(text: str) -> str:
    """The letter of the option that a text names; "" where it names none."""
    found = re.search(r"\banswer is:? \(?([A-Z])\b", text) or re.fullmatch(r"\(?([A-Z])\)?[.:]?", text.strip())
    return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Score:
    """So many right of so many."""

    right: int
    total: int

    def __add__(self, other: Score) -> Score:
        return Score(self.right + other.right, self.total + other.total)

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson score interval that holds the true share with 95 % confidence."""
        if not self.total:
            return 0.0, 1.0
        z, n, p = 1.959964, self.total, self.share
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)


def by_kind(kinds: Iterable[str], right: Iterable[bool]) -> dict[str, Score]:
    """The score of each kind of question, in the order in which the kinds first come."""
    scores: dict[str, Score] = {}
    for kind, good in zip(kinds, right, strict=True):
        scores[kind] = scores.get(kind, Score(0, 0)) + Score(int(good), 1)
    return scores


def total(scores: dict[str, Score], apart: Sequence[str] = ()) -> Score:
    """All kinds together, but those reported apart."""
    return sum((score for kind, score in scores.items() if kind not in apart), Score(0, 0))
