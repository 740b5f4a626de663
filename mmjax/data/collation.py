"""From rows of encoded samples to the one typed Batch: for training, evaluation and generation alike."""

from __future__ import annotations

from typing import Sequence

import numpy as np
from numpy.typing import DTypeLike

from mmjax.batch import Batch
from mmjax.data.encoding import IGNORED, Example
from mmjax.data.picture_tokens import NEWLINE
from mmjax.models.config import MaskKind
from mmjax.spans import spans_of


def collate(
    rows: Sequence[Sequence[Example]],
    *,
    length: int = 0,
    groups: int = 1,
    tiles: int = 0,
    media_shape: tuple[int, ...] = (),
    media_dtype: DTypeLike = np.uint8,
    audio_shape: tuple[int, ...] = (),
    mask: MaskKind = "causal",
    media_positions: bool = True,
    row_media: int | None = None,
    answer_length: int = 0,
    stitched: bool = False,
    beside_length: int = 0,
    virtual: int = 0,
    media_apart: bool = False,
) -> Batch:
    """A Batch of these rows, each with one or several samples, padded on the right.

    length        tokens of a row; 0 = as many as the longest row has
    groups        row r of R goes to group r // (R // groups), and so do its images
    tiles         image tiles of a group, dummies included; 0 = as many as the fullest group has
    media_shape, media_dtype   of one tile's `pixels`, for the dummies of a batch without images; () = taken from the images
    audio_shape   of what stands beside one noise embedding, for those that have none; () = taken from them
    mask          who sees whom beside what stands before (see mmjax.spans)
    media_positions   whether media tokens are counted in positions; else the text alone (GIT)
    row_media     images that a row has room for, of a model whose blocks read them by cross-attention; 0 = as many as the fullest row
                  has; None = their tokens stand in the text
    answer_length   positions of an encoder-decoder's decoder; 0 = as many as the longest row of answers has
    stitched      whether the tiles of an image are stitched into one map: two of them at least, an overview and a grid
    media_apart     images stand beside the text: `row_media` says which are a row's, and nothing in the text does
    beside_length   tokens of the text that a Q-Former reads beside a tile; 0 = it reads none
    virtual       places in front of every sample that are virtual tokens' (Encoder.virtual)

    Without any token (classification) the token fields are None, without any tile the image fields.
    Raises ValueError where something does not fit.
    """
    if len(rows) % groups:
        raise ValueError(f"{len(rows)} rows cannot be shared by {groups} groups")
    grouped = [rows[at : at + len(rows) // groups] for at in range(0, len(rows), len(rows) // groups)]
    fed = [[example for row in group for example in row if example.images] for group in grouped]
    tiles = tiles or max(sum(example.tile_count for example in group) for group in fed)
    length = length or max((sum(len(example.ids) for example in row) for row in rows), default=0)
    fields = _tokens(grouped, length, tiles, mask, media_positions) if length else {}
    if virtual and length:
        fields |= _virtual(rows, length, virtual)
    if row_media is not None and length and tiles:
        fields |= (_apart if media_apart else _crossed)(grouped, fields["media"], row_media)
    answers = [sum(len(e.decoder_ids) for e in row if e.decoder_ids is not None) for row in rows]
    if answer_length or any(answers):
        fields |= _answers(rows, answer_length or max(answers))
    if tiles:
        fields |= _media(fed, tiles, media_shape, media_dtype) | _audio(fed, tiles, audio_shape) | ({"grids": _grids(fed, tiles)} if stitched else {})
    if tiles and beside_length:
        fields |= _beside(fed, tiles, beside_length)
    return Batch(**fields)


def _tokens(
    grouped: Sequence[Sequence[Sequence[Example]]], length: int, tiles: int, mask: MaskKind, media_positions: bool
) -> dict[str, np.ndarray]:
    shape = sum(map(len, grouped)), length
    fields = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments", "positions", "targets")}
    fields |= {"media": np.full(shape, -1, np.int32), "weights": np.zeros(shape, np.float32)}
    number = 0
    for group in grouped:
        before = 0  # tiles (or images whose tiles are stitched) of the group so far
        for row in group:
            at = 0
            for segment, example in enumerate(row, 1):
                here = number, slice(at, at + len(example.ids))
                at += len(example.ids)
                if at > length:
                    raise ValueError(f"a row holds {at} tokens, more than {length}; its last sample is {example.id}")
                fields["tokens"][here] = example.ids
                fields["segments"][here] = segment
                media = np.where(example.media >= 0, example.media + before * example.tile_tokens, -1)
                fields["media"][here] = np.where(example.media == NEWLINE, tiles * example.tile_tokens, media)
                before += example.media_count
                counted = media_positions | (fields["media"][here] < 0)
                fields["positions"][here] = np.maximum(np.cumsum(counted) - 1, 0)
                following = np.append(example.labels[1:], IGNORED)
                fields["targets"][here] = np.where(following == IGNORED, 0, following)
                fields["weights"][here] = example.weight * (following != IGNORED)
            number += 1
    spans = spans_of(mask, fields["segments"], fields["media"] >= 0, fields["weights"] > 0)
    return fields if spans is None else {**fields, "spans": spans}


def _virtual(rows: Sequence[Sequence[Example]], length: int, count: int) -> dict[str, np.ndarray]:
    """Where the virtual tokens stand, and the task of each position's sample."""
    fields = {"virtual": np.full((len(rows), length), -1, np.int32), "task": np.zeros((len(rows), length), np.int32)}
    for number, row in enumerate(rows):
        at = 0
        for example in row:
            fields["virtual"][number, at : at + count] = np.arange(count)
            fields["task"][number, at : at + len(example.ids)] = example.task
            at += len(example.ids)
    return fields


def _crossed(grouped: Sequence[Sequence[Sequence[Example]]], media: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """The fields of a batch whose images are read between blocks; `media` are where their tokens stand, [rows, length]."""
    rows = [row for group in grouped for row in group]
    count = count or max(1, max(sum(example.tile_count for example in row) for row in rows))
    fields = {
        "media": np.full_like(media, -1),
        "begun": np.zeros_like(media),
        "row_media": np.full((len(rows), count), -1, np.int32),
        "media_segments": np.zeros((len(rows), count), np.int32),
    }
    for number, row in enumerate(rows):
        at = slot = 0
        for segment, example in enumerate(row, 1):
            if slot + example.tile_count > count:
                raise ValueError(f"a row holds {slot + example.tile_count} images, more than {count}; the last is of sample {example.id}")
            here = number, slice(at, at + len(example.ids))
            standing = media[here] >= 0
            seen = np.cumsum(standing)
            fields["begun"][here] = np.where(seen > 0, seen + slot, 0)
            those = number, slice(slot, slot + example.tile_count)
            fields["row_media"][those] = media[here][standing] // max(1, example.tile_tokens)
            fields["media_segments"][those] = segment
            at += len(example.ids)
            slot += example.tile_count
    return fields


def _apart(grouped: Sequence[Sequence[Sequence[Example]]], media: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """The fields of a batch whose images stand beside the text."""
    rows = [row for group in grouped for row in group]
    count = count or max(1, max(sum(example.tile_count for example in row) for row in rows))
    fields = {name: np.full((len(rows), count), fill, np.int32) for name, fill in (("row_media", -1), ("media_segments", 0))}
    number = 0
    for group in grouped:
        tile = 0  # of the group
        for row in group:
            slot = 0
            for segment, example in enumerate(row, 1):
                if slot + example.tile_count > count:
                    raise ValueError(f"a row holds {slot + example.tile_count} images, more than {count}; the last is of sample {example.id}")
                those = number, slice(slot, slot + example.tile_count)
                fields["row_media"][those] = np.arange(tile, tile + example.tile_count)
                fields["media_segments"][those] = segment
                slot, tile = slot + example.tile_count, tile + example.tile_count
            number += 1
    return fields


def _answers(rows: Sequence[Sequence[Example]], length: int) -> dict[str, np.ndarray]:
    """What an encoder-decoder's decoder reads and predicts; samples have the segments that they have in `tokens`."""
    fields = {name: np.zeros((len(rows), length), np.int32) for name in ("decoder_tokens", "decoder_segments", "targets")}
    fields["weights"] = np.zeros((len(rows), length), np.float32)
    for number, row in enumerate(rows):
        at = 0
        for segment, example in enumerate(row, 1):
            assert example.decoder_ids is not None and example.decoder_labels is not None
            here = number, slice(at, at + len(example.decoder_ids))
            at += len(example.decoder_ids)
            if at > length:
                raise ValueError(f"a row's answers have {at} tokens, more than {length}; its last sample is {example.id}")
            fields["decoder_tokens"][here] = example.decoder_ids
            fields["decoder_segments"][here] = segment
            fields["targets"][here] = np.where(example.decoder_labels == IGNORED, 0, example.decoder_labels)
            fields["weights"][here] = example.weight * (example.decoder_labels != IGNORED)
    return fields


def _grids(fed: Sequence[Sequence[Example]], tiles: int) -> np.ndarray:
    """Batch.grids. As many images as there can be, so that the shape does not depend on them."""
    grids = np.zeros((len(fed), max(1, tiles // 2), 3), np.int32)
    for group, examples in enumerate(fed):
        shown = [(count, grid) for example in examples for count, grid in zip(example.tiles, example.grids)]
        firsts = np.cumsum([0] + [count for count, _ in shown])
        for number, (first, (_, grid)) in enumerate(zip(firsts, shown)):
            grids[group, number] = first, *grid
    return grids


def _beside(fed: Sequence[Sequence[Example]], tiles: int, length: int) -> dict[str, np.ndarray]:
    """Text beside each tile of an image."""
    tokens = np.zeros((len(fed), tiles, length), np.int32)
    segments = np.zeros_like(tokens)
    for group, examples in enumerate(fed):
        at = 0
        for example in examples:
            for count, ids in zip(example.tiles, example.beside):
                here = group, slice(at, at + count), slice(len(ids))
                tokens[here], segments[here] = ids, 1
                at += count
    return {"connector_tokens": tokens, "connector_segments": segments}


def _media(fed: Sequence[Sequence[Example]], tiles: int, shape: tuple[int, ...], dtype: DTypeLike) -> dict[str, np.ndarray]:
    found = next((example.pixels for group in fed for example in group if example.pixels is not None), None)
    shape = shape or (found.shape[1:] if found is not None else ())
    if not shape:
        raise ValueError("a batch without images needs media_shape to make its dummies")
    pixels = np.zeros((len(fed), tiles, *shape), dtype if found is None else found.dtype)
    real = np.zeros((len(fed), tiles), bool)
    classes = np.full((len(fed), tiles), -1, np.int32)
    for group, examples in enumerate(fed):
        at = 0
        for example in examples:
            here = group, slice(at, at + example.tile_count)
            at += example.tile_count
            if at > tiles:
                raise ValueError(f"a group holds {at} tiles, more than {tiles}; the last is of sample {example.id}")
            pixels[here], real[here], classes[here] = example.pixels, True, example.category
    fields = {"images" if len(shape) == 3 else "features": pixels, "tiles": real}
    return fields | {"classes": classes} if (classes >= 0).any() else fields


def _audio(fed: Sequence[Sequence[Example]], tiles: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Audio features beside noise embeddings; nothing where there are none."""
    found = next((example.audio for group in fed for example in group if example.audio is not None), None)
    shape = shape or (found.shape[1:] if found is not None else ())
    if not shape:
        return {}
    audio = np.zeros((len(fed), tiles, *shape), np.float32)
    for group, examples in enumerate(fed):
        at = 0
        for example in examples:
            if example.audio is not None:
                audio[group, at : at + example.tile_count] = example.audio
            at += example.tile_count
    return {"audio": audio}
