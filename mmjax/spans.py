"""Which positions of a sample see each other both ways: the spans of a batch, from a model's kind of mask."""

from __future__ import annotations

import numpy as np

from mmjax.models.config import MaskKind


def spans_of(mask: MaskKind, segments: np.ndarray, is_media: np.ndarray, supervised: np.ndarray) -> np.ndarray | None:
    """int32 [rows, length]: positions of one sample with equal numbers above 0 see each other; None where the mask is causal.

    segments     int [rows, length], 0 = padding
    is_media     bool [rows, length]
    supervised   bool [rows, length]: whether the next token is predicted from here

    "media": an unbroken run of media tokens is a span, be it one image, its tiles, or the frames of a video (as transformers has it
    for Gemma 3 and GIT). "opening": a sample's first such run, and what stands in front of it. "prefix": what stands before a sample's first supervised token; all of it where there is none (a prompt).
    """
    if mask == "causal":
        return None
    if mask == "media":
        return runs(is_media, segments)
    if mask == "opening":
        return np.where(_opening(segments, is_media), segments, 0).astype(np.int32)
    return np.where(_prefix(segments, supervised), segments, 0).astype(np.int32)


def runs(marked: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """int32 [rows, length]: the number of the unbroken run of marked positions of a sample, from 1; 0 where unmarked."""
    follows = np.zeros_like(marked)
    follows[:, 1:] = marked[:, :-1] & (segments[:, 1:] == segments[:, :-1])
    return np.where(marked, np.cumsum(marked & ~follows, 1), 0).astype(np.int32)


def _opening(segments: np.ndarray, is_media: np.ndarray) -> np.ndarray:
    """bool [rows, length]: real positions up to the end of their sample's first run of media tokens; none where it has no media."""
    number, inside = runs(is_media, segments), np.zeros(segments.shape, bool)
    for row, sample in ((row, sample) for row in range(len(segments)) for sample in np.unique(segments[row]) if sample):
        own = segments[row] == sample
        if (is_media[row] & own).any():
            first = number[row][own & is_media[row]][0]
            inside[row] |= own & (np.arange(len(own)) <= np.flatnonzero(number[row] == first)[-1])
    return inside


def _prefix(segments: np.ndarray, supervised: np.ndarray) -> np.ndarray:
    """bool [rows, length]: real positions behind none of their sample's supervised ones."""
    behind = np.zeros(segments.shape, bool)  # a position of its sample before it is supervised
    for at in range(1, segments.shape[1]):
        same = segments[:, at] == segments[:, at - 1]
        behind[:, at] = same & (behind[:, at - 1] | supervised[:, at - 1])
    return (segments > 0) & ~behind
