"""The blind twin: what the questions alone give away.

It is the best of three: the same weights with the images shuffled between the samples, the same weights with the images
withheld, and for each kind of question the most frequent answer of the training data. A model that sees must beat it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mmjax.data.messages import Sample

TWINS = ("shuffled", "withheld", "most_frequent")


def shuffled(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """The samples with each image replaced by another one of theirs: the distinct images, in a random circle, move one on."""
    images = {_identity(part): part for sample in samples for part in _images(sample)}
    names = list(images)
    circle = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    following = {name: images[circle[(i + 1) % len(circle)]] for i, name in enumerate(circle)}
    return [_with_content(sample, lambda part: following[_identity(part)]) for sample in samples]


def withheld(samples: Sequence[Sample]) -> list[Sample]:
    """The samples without their images."""
    return [_with_content(sample, lambda part: None) for sample in samples]


def most_frequent(training: Iterable[Sample]) -> dict[str, str]:
    """For each kind of question the answer that the training data give most often; "" is the answer over all kinds."""
    counts: dict[str, Counter[str]] = {"": Counter()}
    for sample in training:
        for message in sample.messages:
            if message["role"] == "assistant":
                answer = _text(message)
                counts[""][answer] += 1
                if sample.kind:
                    counts.setdefault(sample.kind, Counter())[answer] += 1
    return {kind: count.most_common(1)[0][0] for kind, count in counts.items() if count}


def _with_content(sample: Sample, replace: Any) -> Sample:
    """A copy of the sample; `replace` gives for each image part another one, or None to leave it out."""
    messages = []
    for message in sample.messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = [replace(part) if part["type"] == "image" else part for part in content]
            content = [part for part in parts if part is not None]
        messages.append({**message, "content": content})
    return dataclasses.replace(sample, messages=messages)


def _images(sample: Sample) -> list[dict[str, Any]]:
    return [
        part
        for message in sample.messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


def _identity(part: dict[str, Any]) -> Any:
    return part["path"] if "path" in part else id(part["image"])


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
