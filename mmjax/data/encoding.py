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
        ids: list[int] = []
        labels: list[int] = []
        starts: list[int] = []  # of the images
        shown: list[dict[str, Any]] = []
        if self._adds_bos and not (segments and segments[0].text.startswith(self.tokenizer.bos_token)):
            ids, labels = [self.tokenizer.bos_token_id], [IGNORED]
        for chunk in self._chunks(segments):
            if isinstance(chunk, dict):
                starts.append(len(ids))
                shown.append(chunk)
                ids += [0] * self.tokens_per_image
                labels += [IGNORED] * self.tokens_per_image
            else:
                new_ids, new_labels = self._tokenise(chunk)
                ids += new_ids
                labels += new_labels
        if self.max_length and len(ids) > self.max_length:
            if generation_prompt:
                raise BadSample(
                    sample.id, f"the prompt has {len(ids)} tokens, more than the {self.max_length} there is room for"
                )
            cut = next((at for at in starts if at < self.max_length < at + self.tokens_per_image), self.max_length)
            ids, labels, starts = ids[:cut], labels[:cut], [at for at in starts if at < cut]
        media = np.zeros(len(ids), bool)
        for at in starts:
            media[at : at + self.tokens_per_image] = True
        targets = np.array(labels, np.int32)
        if not generation_prompt and not (targets[1:] != IGNORED).any():
            cut_off = f" within {self.max_length} tokens" if self.max_length else ""
            raise BadSample(
                sample.id, f"nothing in it is supervised{cut_off} under the template {self.template.name!r}"
            )
        return Example(sample.id, np.array(ids, np.int32), targets, media, tuple(shown[: len(starts)]))

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

    def _tokenise(self, run: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """Ids and labels of adjacent text segments. A token belongs to the segment in which its last character lies."""
        text = "".join(segment.text for segment in run)
        if not text:
            return [], []
        supervised = np.repeat([segment.supervised for segment in run], [len(segment.text) for segment in run])
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, labels, previous = encoded["input_ids"], [], 0
        for id, (start, end) in zip(ids, encoded["offset_mapping"]):
            # A token without characters is a prefix put in by the tokenizer, or a space that its offsets leave out.
            last = end - 1 if end > start else min(previous, start, len(text) - 1)
            previous = max(previous, end)
            labels.append(id if supervised[last] else IGNORED)
        return ids, labels
