"""The global order of the data: which samples an epoch shows, in which order, and which of them share a row.

Everything here is a function of (seed, epoch) and the stored lengths alone. It knows nothing of devices or processes, so the
same rows come in the same order however many of them there are.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

OPEN_ROWS = 64  # rows that are being filled at the same time: the look-ahead of the packing


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows: row r holds the samples `samples[starts[r]:starts[r + 1]]`."""

    samples: np.ndarray  # int64 [samples]
    starts: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.samples[self.starts[row] : self.starts[row + 1]]


def plan(
    lengths: np.ndarray,
    tiles: np.ndarray,
    order: np.ndarray,
    length: int,
    tiles_per_row: int,
    packing: bool = True,
    answers: np.ndarray | None = None,
    answer_length: int = 0,
) -> Rows:
    """Rows of whole samples, each within `length` tokens, `tiles_per_row` image tiles and, of an encoder-decoder,
    `answer_length` tokens of its decoder.

    lengths, tiles, answers   int [samples]: what each sample takes of them; order   int [any]: the samples in the order they come

    Greedy best fit: a sample goes to the fullest of the open rows that has room for it. Where none has, the fullest row is
    closed (rows come out in the order in which they are closed). Raises ValueError for a sample that fits no row.
    """
    tokens_of, tiles_of = lengths[order], tiles[order]
    answers_of = np.zeros_like(tokens_of) if answers is None else answers[order]
    if (tokens_of > length).any() or (tiles_of > tiles_per_row).any() or (answers_of > answer_length).any():
        raise ValueError(f"a sample is larger than a row of {length} tokens and {tiles_per_row} tiles")
    if not packing:
        return Rows(np.asarray(order, np.int64), np.arange(len(order) + 1))
    contents: list[list[int]] = [[] for _ in range(OPEN_ROWS)]
    tokens_left = np.full(OPEN_ROWS, length)
    tiles_left = np.full(OPEN_ROWS, tiles_per_row)
    answers_left = np.full(OPEN_ROWS, answer_length)
    closed: list[list[int]] = []
    for sample, tokens, pictures, written in zip(*(each.tolist() for each in (order, tokens_of, tiles_of, answers_of))):
        fits = (tokens_left >= tokens) & (tiles_left >= pictures) & (answers_left >= written)
        rank = np.where(fits, tokens_left * (tiles_per_row + 1) + tiles_left, np.iinfo(np.int64).max)
        row = int(rank.argmin())
        if not fits[row]:
            row = int(np.argmin(tokens_left * (tiles_per_row + 1) + tiles_left))
            closed.append(contents[row])
            contents[row], tokens_left[row], tiles_left[row], answers_left[row] = [], length, tiles_per_row, answer_length
        contents[row].append(sample)
        tokens_left[row] -= tokens
        tiles_left[row] -= pictures
        answers_left[row] -= written
    closed += [row for row in contents if row]
    starts = np.cumsum([0, *map(len, closed)])
    return Rows(np.array([sample for row in closed for sample in row], np.int64), starts)


def order(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """The samples of an epoch, int64 [samples], numbered through all sources one after the other.

    An epoch has as many samples as there are. Without weights (all 0) it has each of them once. A source of weight w has the
    share w / (sum of weights) of what the sources without a weight, which keep their size, leave; it is walked through in
    shuffled passes that go on where the epoch before stopped, so that no sample comes twice before all have come once.
    """
    counts = _counts(sizes, weights)
    chosen = []
    for source, (size, count) in enumerate(zip(sizes, counts)):
        first = sum(sizes[:source])
        draws = np.arange(epoch * count, (epoch + 1) * count)
        for turn in np.unique(draws // size) if count else ():
            shuffled = np.random.default_rng((seed, source, int(turn))).permutation(size)
            chosen.append(first + shuffled[draws[draws // size == turn] % size])
    mixed = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    return mixed[np.random.default_rng((seed, len(sizes), epoch)).permutation(len(mixed))]


def _counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many samples of each source an epoch has."""
    if not any(weights):
        return list(sizes)
    shared = sum(size for size, weight in zip(sizes, weights) if weight)
    total = sum(weights)
    return [max(1, round(shared * weight / total)) if weight else size for size, weight in zip(sizes, weights)]
