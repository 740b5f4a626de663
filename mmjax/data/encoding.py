"""From a sample to token ids and labels. Labels come from the character offsets of the template's supervised segments:
nothing is tokenised twice and no length is guessed, so a template and its mask cannot drift apart."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from mmjax.data.messages import BadSample, Sample
from mmjax.data.templates import Segment, Template, starts_with_bos
from mmjax.errors import UserError

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Example:
    """One encoded sample of n positions.

    ids     int32 [n]   0 at image positions
    labels  int32 [n]   the id itself where it is supervised, else -100
    media   bool [n]    image positions; every image has the same number of them
    images  the image parts, in order
    pixels  what is fed for the images: uint8 [images, height, width, 3], or float features [images, positions, width]
    category   the class of its one image (classification), -1 = none
    """

    id: str
    ids: np.ndarray
    labels: np.ndarray
    media: np.ndarray
    images: tuple[dict[str, Any], ...] = ()
    pixels: np.ndarray | None = None
    category: int = -1


@dataclasses.dataclass(frozen=True)
class Encoder:
    """tokens_per_image      positions an image takes
    image_start, image_end   text around each image, e.g. "<im_start>"
    max_length               longer samples are cut, never inside an image; 0 = no limit

    The text between two images is tokenised on its own, and the tokenizer's start token is put once, as LLaVA does.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    tokens_per_image: int
    image_start: str = ""
    image_end: str = ""
    max_length: int = 0

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {type(self.tokenizer).__name__} gives no character offsets; a tokenizer.json is needed"
            )

    def encode(self, sample: Sample, generation_prompt: bool = False) -> Example:
        """The sample's ids and labels; with `generation_prompt` its messages end where the model is to answer.

        Raises BadSample if nothing in it is supervised (also when cutting left nothing), or if a prompt is too long.
        """
        try:
            segments = self.template.segments(sample.messages, generation_prompt)
        except UserError as error:
            raise BadSample(sample.id, str(error)) from error
        ids, labels, media, shown = [], [], [], []  # of each chunk; shown: the image parts
        if self._adds_bos and not (segments and segments[0].text.startswith(self.tokenizer.bos_token)):
            ids.append(np.array([self.tokenizer.bos_token_id]))
            labels.append(np.array([IGNORED]))
            media.append(np.zeros(1, bool))
        for chunk in self._chunks(segments):
            if isinstance(chunk, dict):
                shown.append(chunk)
                ids.append(np.zeros(self.tokens_per_image, int))
                labels.append(np.full(self.tokens_per_image, IGNORED))
            else:
                new_ids, new_labels = self._tokenise(chunk)
                ids.append(new_ids)
                labels.append(new_labels)
            media.append(np.full(len(ids[-1]), isinstance(chunk, dict)))
        example = Example(
            sample.id,
            np.concatenate(ids).astype(np.int32),
            np.concatenate(labels).astype(np.int32),
            np.concatenate(media),
            tuple(shown),
        )
        if self.max_length and len(example.ids) > self.max_length:
            if generation_prompt:
                raise BadSample(
                    sample.id, f"the prompt has {len(example.ids)} tokens; there is room for {self.max_length}"
                )
            example = self._cut(example)
        if not generation_prompt and not (example.labels[1:] != IGNORED).any():
            limit = f" within {self.max_length} tokens" if self.max_length else ""
            raise BadSample(sample.id, f"nothing in it is supervised{limit} under the template {self.template.name!r}")
        return example

    def _cut(self, example: Example) -> Example:
        """The first max_length positions, less an image that would not be whole."""
        images = int(example.media[: self.max_length].sum()) // self.tokens_per_image if self.tokens_per_image else 0
        cut = self.max_length
        if example.media[:cut].sum() > images * self.tokens_per_image:
            cut = int(np.flatnonzero(example.media)[images * self.tokens_per_image])
        return dataclasses.replace(
            example,
            ids=example.ids[:cut],
            labels=example.labels[:cut],
            media=example.media[:cut],
            images=example.images[:images],
        )

    @functools.cached_property
    def _adds_bos(self) -> bool:
        return self.template.adds_bos and starts_with_bos(self.tokenizer)

    def _chunks(self, segments: Sequence[Segment]) -> list[dict[str, Any] | list[Segment]]:
        """Image parts, and the runs of text segments between them with the delimiters joined on."""
        chunks: list[dict[str, Any] | list[Segment]] = []
        run: list[Segment] = []
        for segment in segments:
            if segment.image is None:
                run.append(segment)
                continue
            chunks += [[*run, Segment(self.image_start)], segment.image]
            run = [Segment(self.image_end)]
        return [*chunks, run]

    def _tokenise(self, run: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of adjacent text segments. A token belongs to the segment in which its last character lies."""
        text = "".join(segment.text for segment in run)
        if not text:
            return np.zeros(0, int), np.zeros(0, int)
        supervised = np.repeat([segment.supervised for segment in run], [len(segment.text) for segment in run])
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoded["input_ids"], int)
        starts, ends = np.array(encoded["offset_mapping"], int).reshape(-1, 2).T
        # A token without characters is a prefix put in by the tokenizer, or a space that its offsets leave out.
        reached = np.maximum.accumulate(np.append(0, ends))[:-1]
        last = np.where(ends > starts, ends - 1, np.minimum(np.minimum(reached, starts), len(text) - 1))
        return ids, np.where(supervised[last], ids, IGNORED)
