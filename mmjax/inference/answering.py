"""Many questions in, their answers out: batches of one shape, so that the model is compiled once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from PIL import Image

from mmjax.data.encoding import Example
from mmjax.data.images import BrokenImage
from mmjax.data.messages import BadSample, Sample, question
from mmjax.inference.generate import generate
from mmjax.model import Model
from mmjax.parallel.sharding import shards_of


def answer(
    model: Model,
    samples: Iterable[Sample],
    open_image: Callable[[str], Image.Image] | None = None,
    *,
    batch: int = 64,
    max_new_tokens: int = 32,
    stop: Sequence[str] = (),
    **sampling: Any,
) -> Iterator[tuple[Sample, str | BadSample]]:
    """Each sample with the model's answer to it, in order; with the reason where it cannot be asked (a broken image).

    A last message by the assistant is not shown to the model.
    open_image   from the `path` of an image part to the picture; without it paths are files
    stop         strings before which an answer ends
    sampling     fields of mmjax.inference.sampling.Sampling
    """
    settings = model.sampling(max_new_tokens, **sampling)
    ended = model.ended((*stop, *model.stops), settings)
    _, groups = shards_of(model.params, batch)
    remaining = iter(samples)
    while chunk := list(itertools.islice(remaining, batch)):
        prepared = [_prompt(model, sample, open_image) for sample in chunk]
        examples = [example for example in prepared if not isinstance(example, BadSample)]
        if not examples:
            yield from zip(chunk, prepared)
            continue
        # The last batch is filled up with a question that is there anyway.
        rows = [[example] for example in examples + examples[-1:] * (batch - len(examples))]
        together = model.collate(rows, groups=groups, tiles=_room(rows, groups))
        tokens = iter(generate(model.params, model.config, together, settings, model.run, ended=ended).tokens)
        for sample, example in zip(chunk, prepared):
            yield sample, example if isinstance(example, BadSample) else model.text(next(tokens), stop)


def _room(rows: Sequence[Sequence[Example]], groups: int) -> int:
    """Tiles of a group: as many as the fullest has, rounded up to a multiple of its rows, so that few shapes occur."""
    each = len(rows) // groups
    counts = [sum(example.tile_count for row in rows[at : at + each] for example in row) for at in range(0, len(rows), each)]
    return -(-max(counts) // each) * each


def _prompt(model: Model, sample: Sample, open_image: Callable[[str], Image.Image] | None) -> Any:
    """The encoded question, or the BadSample that it is."""
    try:
        messages = question(sample.messages)
        if open_image is not None:
            messages = [{**m, "content": [_opened(part, open_image) for part in m["content"]]} for m in messages]
        return model.prompt(dataclasses.replace(sample, messages=messages))
    except BadSample as error:
        return error
    except BrokenImage as error:
        return BadSample(sample.id, str(error))


def _opened(part: dict[str, Any], open_image: Callable[[str], Image.Image]) -> dict[str, Any]:
    return {"type": "image", "image": open_image(part["path"])} if "path" in part else part
