"""Inputs and outputs of models whose language model reads media between its blocks: each row has its pictures beside its text."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families import language
from mmjax.families.family import Inputs
from mmjax.models.config import Execution, ModelConfig
from mmjax.tree import Params


def grid(inputs: Inputs, name: str, axes: str) -> np.ndarray | None:
    """Foreign pixels [rows, media, ..., channels, height, width] with these `axes`, ours [..., height, width, channels]; None where
    there are none. Raises UserError."""
    if name not in inputs:
        return None
    if inputs[name].ndim != axes.count(",") + 1:
        raise UserError(f"{name} are [{axes}], not {list(inputs[name].shape)}")
    return np.moveaxis(np.asarray(inputs[name], np.float32), -3, -1)


def with_grid(
    rows: Batch, images: np.ndarray | None, begun: np.ndarray, seen: np.ndarray | None = None
) -> Batch:
    """The rows with the media [rows, media, ...] that stand beside them, each row a group of its own.

    begun   int [rows, length]: which of its row's media a position belongs to, from 1; 0 = none
    seen    bool [rows, length, media]: which it sees, in the place of `begun`
    Raises UserError where text asks for media that are not there.
    """
    if images is None:
        if begun.any():
            raise UserError(f"the text holds {int(begun.max())} media, but none are given")
        return rows
    count, length = images.shape[:2]
    if count != len(begun):
        raise UserError(f"there are media for {count} rows, and {len(begun)} rows of text")
    if begun.max(initial=0) > length:
        row = int(np.argmax(begun.max(1)))
        raise UserError(f"row {row} of the text holds {int(begun[row].max())} media, but {length} are given for each row")
    fields: dict[str, Any] = {
        "images": images,
        "tiles": np.ones((count, length), bool),
        "begun": begun.astype(np.int32),
        "row_media": np.tile(np.arange(length, dtype=np.int32), (count, 1)),
        "media_segments": np.ones((count, length), np.int32),
    }
    if seen is not None:
        fields["media_seen"] = seen.astype(np.int32)
    return dataclasses.replace(rows, **fields)


def with_one_each(rows: Batch, **media: np.ndarray) -> Batch:
    """The rows with one medium for each, without a place in the text: `images` or `features`, [rows, ...]."""
    count = len(rows.tokens)
    return dataclasses.replace(
        rows,
        tiles=np.ones((count, 1), bool),
        row_media=np.zeros((count, 1), np.int32),
        media_segments=np.ones((count, 1), np.int32),
        **{name: found[:, None] for name, found in media.items()},
    )


def with_list(rows: Batch, images: np.ndarray | None, locations: np.ndarray) -> Batch:
    """The rows with the pictures [pictures, height, width, channels] of all of them, in the order in which they stand in the text.

    locations   bool [rows, length]: the tokens that stand for a picture. Raises UserError unless they are as many.
    """
    counts = locations.sum(1)
    if counts.sum() != (0 if images is None else len(images)):
        given = 0 if images is None else len(images)
        raise UserError(f"input_ids hold {int(counts.sum())} placeholders of images, but {given} images are given")
    if images is None:
        return rows
    slots = np.arange(max(1, int(counts.max())))
    first = (np.cumsum(counts) - counts)[:, None]
    return dataclasses.replace(
        rows,
        images=images[None],
        tiles=np.ones((1, len(images)), bool),
        begun=np.cumsum(locations, 1).astype(np.int32),
        row_media=np.where(slots < counts[:, None], first + slots, -1).astype(np.int32),
        media_segments=np.ones((len(counts), len(slots)), np.int32),
    )


def outputs(params: Params, config: ModelConfig, rows: Batch, run: Execution, states: bool) -> dict[str, jax.Array]:
    """All outputs; `image_features` are [rows, media, ..., positions, width] of what the connector reads, `connector_output`
    [rows, media, tokens, width]."""
    found = language.run_language(params, rows, config=config, run=run, states=states)
    if rows.images is None:
        return found
    before = rows.images.shape[:-3]
    features, skipped = found["image_features"], 0
    if config.vision is not None and not config.features.keep_class_token:
        skipped = getattr(config.vision, "prefix", 0)
    found["image_features"] = features[:, skipped:].reshape(*before, -1, features.shape[-1])
    connected = found["connector_output"]
    found["connector_output"] = connected.reshape(*before[:2], *connected.shape[1:])
    return found
