"""Examples before a question: k answered samples with their pictures, random or by the likeness of the pictures.

    examples = Examples(evaluation.few_shot, model, workdir)
    asked = examples.before(samples)                   the samples, each behind its examples
    open_image = examples.opener(dataset.image)        their pictures, and the questions' own

An example is a turn of the conversation like any other, so the model's template writes it as it wrote its training rows ("openflamingo":
"<image>Output:a cat<|endofchunk|><image>Output:"). Likeness is the cosine of the vision encoder's features, averaged over positions
(RICES, arXiv 2204.14198): the likest picture stands last, next to the question. Without shots, Flamingo shows two examples without their
pictures (`text_only`), so that the model knows the form of an answer.

A picture that is the question's own, by name or pixel by pixel, is never among the examples, nor is one picture shown twice.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmjax.config import FewShot
from mmjax.data import sources
from mmjax.data.features import encoder_digest
from mmjax.data.images import BrokenImage, ImageProcessor, decode
from mmjax.data.in_context import joined
from mmjax.data.messages import BadSample, Message, Sample, images
from mmjax.errors import UserError
from mmjax.model import Model
from mmjax.models import multimodal
from mmjax.models.config import Execution, ModelConfig
from mmjax.parallel import cluster
from mmjax.parallel.placement import on_host

log = logging.getLogger(__name__)

OpenImage = Callable[[str], Image.Image]

_OWN = "example:"  # begins the name of an example's picture
_BATCH = 32  # pictures that are encoded together
_TRIES = 64  # random samples that are looked at for each one that is shown


class Examples:
    """The examples of an evaluation.

    model     its encoder judges likeness; may be None where examples are random
    workdir   where the encoded pictures are kept
    Raises UserError where the source has no samples that can be examples.
    """

    def __init__(self, settings: FewShot, model: Model | None, workdir: Path):
        self.settings, self.model, self.workdir = settings, model, workdir
        self.dataset = sources.open(settings.source)
        self.count = settings.shots or settings.text_only
        self._digest = functools.lru_cache(maxsize=4096)(self._digest_of)

    def before(
        self, samples: Sequence[Sample], open_image: OpenImage, own: Sequence[Sample] | None = None
    ) -> list[Sample]:
        """The samples behind their examples.

        own   the samples as they were before their pictures were changed (the blind twin): their pictures are no examples either,
              while likeness is to the pictures that are shown
        """
        asked = []
        for number, (sample, original) in enumerate(zip(samples, own or samples, strict=True)):
            chosen = self._chosen(number, sample, original, open_image)
            asked.append(dataclasses.replace(sample, messages=_behind(chosen, sample, bool(self.settings.shots))))
        return asked

    def opener(self, open_image: OpenImage) -> OpenImage:
        """From the name of a picture, an example's or a question's, to the picture."""

        def opened(name: str) -> Image.Image:
            return self.dataset.image(name.removeprefix(_OWN)) if name.startswith(_OWN) else open_image(name)

        return opened

    def _chosen(self, number: int, sample: Sample, original: Sample, open_image: OpenImage) -> list[Sample]:
        """The examples of sample `number`, the likest last."""
        rng = np.random.default_rng((self.settings.seed, number))
        shown = [part for one in (sample, original) for part in images(one.messages)]
        names = {part["path"] for part in shown if "path" in part}
        digests = {digest for part in shown if (digest := _digest(functools.partial(_opened, part, open_image)))}
        chosen: list[Sample] = []
        for candidate in self._candidates(sample, rng, open_image):
            own = _names(candidate)
            found = {digest for name in own if (digest := self._digest(name))}
            if names & set(own) or digests & found:
                continue
            chosen.append(candidate)
            names |= set(own)
            digests |= found
            if len(chosen) == self.count:
                return chosen[::-1]
        raise UserError(
            f"few_shot: {self.count} examples with pictures of their own are wanted before {sample.id}, and the source has {len(chosen)}"
        )

    def _candidates(self, sample: Sample, rng: np.random.Generator, open_image: OpenImage) -> Iterator[Sample]:
        """Samples that may be examples, the best first."""
        if self.settings.choose == "similar" and self.settings.shots and images(sample.messages):
            features, groups = self._support
            try:
                query = self._encoded([_opened(part, open_image) for part in images(sample.messages)]).mean(0)
            except BrokenImage:
                return  # the question itself is reported as broken when it is asked
            for place in np.argsort(-(features @ query), kind="stable").tolist():
                found = self._usable(int(rng.choice(groups[place])))
                yield from [found] if found else []
            return
        size = len(self.dataset)
        for index in rng.choice(size, min(size, _TRIES * self.count), replace=False).tolist():
            found = self._usable(index)
            yield from [found] if found else []

    def _usable(self, index: int) -> Sample | None:
        """Sample `index` of the source if it is an answered question whose pictures can be read."""
        sample = self._answered(index)
        return sample if sample is not None and all(map(self._digest, _names(sample))) else None

    def _answered(self, index: int) -> Sample | None:
        """Sample `index` of the source if it is an answered question."""
        try:
            sample = self.dataset[index]
        except BadSample:
            return None
        asked, answered = _turns(sample.messages)[0]["role"] == "user", sample.messages[-1]["role"] == "assistant"
        return sample if asked and answered else None

    def _digest_of(self, name: str) -> str:
        return _digest(lambda: self.dataset.image(name))

    @functools.cached_property
    def _support(self) -> tuple[np.ndarray, list[list[int]]]:
        """Features of the source's different pictures, float32 [pictures, width] of length 1, and the samples that show each."""
        by_pictures: dict[tuple[str, ...], list[int]] = {}
        for index in range(len(self.dataset)):
            if (sample := self._answered(index)) is not None and (names := _names(sample)):
                by_pictures.setdefault(names, []).append(index)
        if not by_pictures:
            raise UserError('few_shot: the source has no samples with pictures, by which choose = "similar" could choose')
        cache = self.workdir / "features" / f"similar-{self._key()}.npy"
        if cluster.from_first("similar", cache.exists):
            features = np.load(cache)
        else:
            different = list(dict.fromkeys(name for group in by_pictures for name in group))
            log.info("few_shot: encoding %d pictures", len(different))
            readable: list[str] = []
            encoded = self._encoded(self._pictures(different, readable))
            each = dict(zip(readable, encoded))
            none = np.zeros(encoded.shape[-1], np.float32)  # of a picture that cannot be read, and is like no other
            features = _normalised(np.stack([np.mean([each.get(name, none) for name in group], 0) for group in by_pictures]))
            if jax.process_index() == 0:
                cache.parent.mkdir(parents=True, exist_ok=True)
                np.save(cache, features)
        return features, list(by_pictures.values())

    def _pictures(self, names: Sequence[str], readable: list[str]) -> Iterator[Image.Image]:
        """Those pictures of the source that can be read; `readable` gets their names."""
        for name in names:
            try:
                picture = self.dataset.image(name)
            except BrokenImage as error:
                log.warning("few_shot: %s: %s", name, error)
                continue
            readable.append(name)
            yield picture

    def _encoded(self, pictures: Iterable[Image.Image]) -> np.ndarray:
        """float32 [pictures, width], each of length 1."""
        model, processor = self._seeing
        processor = dataclasses.replace(processor, tiling=None)
        params, found = {"vision": model.params["vision"]}, []
        waiting: list[np.ndarray] = []

        def encode() -> None:
            pixels = np.stack(waiting + waiting[-1:] * (_BATCH - len(waiting)))
            features = _mean_features(params, pixels, config=model.config, run=model.run)
            found.append(on_host(features)[: len(waiting)])
            waiting.clear()

        for picture in pictures:
            waiting.append(processor.pixels(picture))
            if len(waiting) == _BATCH:
                encode()
        if waiting:
            encode()
        return np.concatenate(found)

    @property
    def _seeing(self) -> tuple[Model, ImageProcessor]:
        if self.model is None or self.model.image_processor is None:
            raise UserError('few_shot.choose = "similar" needs a model with a vision encoder')
        return self.model, self.model.image_processor

    def _key(self) -> str:
        model, processor = self._seeing
        encoder = encoder_digest(model.config, model.params, processor, False, model.run)
        return hashlib.blake2b(f"{encoder} {sources.stamp(self.settings.source)}".encode(), digest_size=16).hexdigest()


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _mean_features(params: Any, pixels: jax.Array, *, config: ModelConfig, run: Execution) -> jax.Array:
    """uint8 [pictures, height, width, 3] -> float32 [pictures, width] of length 1"""
    mean = multimodal.vision_features(params, config, pixels, run).astype(jnp.float32).mean(1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def _normalised(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _behind(chosen: Sequence[Sample], sample: Sample, pictured: bool) -> list[Message]:
    """The question behind its examples, without their pictures where they are not shown; the system's text stays the question's."""
    examples = [[_example(message, pictured) for message in _turns(example.messages)] for example in chosen]
    system = sample.messages[: len(sample.messages) - len(_turns(sample.messages))]
    return [*system, *joined([*examples, _turns(sample.messages)], sample.id)]


def _example(message: Message, pictured: bool) -> Message:
    parts = []
    for part in message["content"]:
        if part["type"] != "image":
            parts.append(part)
        elif pictured:
            parts.append({"type": "image", "path": _OWN + part["path"]} if "path" in part else part)
    return {**message, "content": parts}


def _turns(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message["role"] != "system"]


def _names(sample: Sample) -> tuple[str, ...]:
    """The names of a sample's pictures."""
    return tuple(part["path"] for part in images(sample.messages) if "path" in part)


def _opened(part: dict[str, Any], open_image: OpenImage) -> Image.Image:
    return open_image(part["path"]) if "path" in part else decode(part["image"])


def _digest(open_picture: Callable[[], Image.Image]) -> str:
    """A hash of a picture's pixels; "" where it cannot be read."""
    try:
        picture = open_picture()
    except BrokenImage:
        return ""
    return hashlib.blake2b(repr(picture.size).encode() + picture.tobytes(), digest_size=16).hexdigest()
