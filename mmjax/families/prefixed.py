"""Rows that begin with a picture's tokens: what the reference's own code puts together before the language model reads it."""

from __future__ import annotations

import dataclasses

import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families import language
from mmjax.families.family import Inputs
from mmjax.models.config import ModelConfig


def rows(
    config: ModelConfig, inputs: Inputs, tokens: int, begin: tuple[int, ...] = ()
) -> tuple[Batch, np.ndarray | None]:
    """The batch of rows [`begin`, `tokens` media tokens, `input_ids`], and its labels (-100 in front of the text) if there are
    `labels`. Row r takes the media tokens from r * tokens on.

    Raises UserError without input_ids.
    """
    if "input_ids" not in inputs:
        raise UserError("input_ids are missing")
    count, first = len(inputs["input_ids"]), len(begin)

    def behind(name: str, fill: int, fallback: int | None = None) -> np.ndarray | None:
        if name not in inputs and fallback is None:
            return None
        text = inputs.get(name, np.full_like(inputs["input_ids"], fallback or 0))
        return np.concatenate([np.full((count, first + tokens), fill, text.dtype), text], 1)

    ids = behind("input_ids", 0)
    assert ids is not None
    ids[:, :first] = begin
    labels = behind("labels", language.IGNORED)
    given = {"input_ids": ids, "attention_mask": behind("attention_mask", 1, 1), "labels": labels}
    text = language.text_batch(config, {name: value for name, value in given.items() if value is not None})
    media = np.full(ids.shape, -1, np.int32)
    media[:, first : first + tokens] = np.arange(count * tokens).reshape(count, tokens)
    return dataclasses.replace(text, media=media), labels
