"""From a sample to token ids and labels. Labels come from the character offsets of the template's supervised segments:
nothing is tokenised twice and no length is guessed, so a template and its mask cannot drift apart."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from mmjax.data.images import BrokenImage
from mmjax.data.messages import BadSample, Sample
from mmjax.data.picture_tokens import PictureTokens
from mmjax.data.templates import Segment, Template, ends_with_eos, starts_with_bos
from mmjax.data.text_beside import TextBeside
from mmjax.errors import UserError
from mmjax.models.config import MaskKind

IGNORED = -100
SizeOf = Callable[[dict[str, Any]], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Example:
    """One encoded sample of n positions.

    ids     int32 [n]   0 at image positions, or the token that stands for an image (see Encoder.placeholder)
    labels  int32 [n]   the id itself where it is supervised, else -100
    media   int32 [n]   -1 = text, else which of the sample's own media tokens stands here, tile after tile, or
                        mmjax.data.picture_tokens.NEWLINE
    images  the image parts, in order
    pixels  what is fed for the images: uint8 [tiles, height, width, 3], or float features [tiles, positions, width]
    category   the class of its one image (classification), -1 = none
    tiles   tiles of each image; () = one each
    grids   of images whose tiles are stitched (mmjax.models.stitching): rows and columns of the tiles behind each one's overview
    tile_tokens   media tokens of a tile
    weight     of its supervised positions in the loss
    decoder_ids, decoder_labels   int32 [m], of an encoder-decoder, whose encoder reads `ids`: what its decoder reads, and the id
            to be predicted from each of these positions, else -100
    audio      float [tiles, 2, width] beside a noise embedding: means of noisy and clean audio features
    beside     for each image the text that a Q-Former reads beside it, int32 [any]; () = none
    task       the number of its task, which multi-task prompts read
    """

    id: str
    ids: np.ndarray
    labels: np.ndarray
    media: np.ndarray
    images: tuple[dict[str, Any], ...] = ()
    pixels: np.ndarray | None = None
    category: int = -1
    tiles: tuple[int, ...] = ()
    tile_tokens: int = 0
    grids: tuple[tuple[int, int], ...] = ()
    weight: float = 1.0
    decoder_ids: np.ndarray | None = None
    decoder_labels: np.ndarray | None = None
    beside: tuple[np.ndarray, ...] = ()
    task: int = 0
    audio: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.tiles) != len(self.images):
            object.__setattr__(self, "tiles", (1,) * len(self.images))

    @property
    def tile_count(self) -> int:
        return sum(self.tiles)

    @property
    def media_count(self) -> int:
        """How many times `tile_tokens` media tokens it has: for each tile, or for each image whose tiles are stitched."""
        return len(self.grids) or self.tile_count


@dataclasses.dataclass(frozen=True)
class Encoder:
    """tokens_per_image      positions that an image takes, or each of its tiles
    image_start, image_end   text around each image, e.g. "<im_start>"
    max_length               longer samples are cut, never inside an image; 0 = no limit
    pictures                 how many tiles and tokens an image has by its size; None = it is one tile, whatever its size
    mask, media_positions    how its examples are collated (see mmjax.data.collation.collate)
    placeholder              where the blocks read images by cross-attention: the id of the one token that stands for an image in the text
    start_token              of an encoder-decoder: what its decoder begins with; None = the model has no encoder of text
    max_answer               longer answers of an encoder-decoder are cut; 0 = no limit
    media_apart              an image stands beside the text and takes no position in it; a sample has one
    beside                   how a Q-Former is told what the user says; None = it reads no text
    virtual                  places in front of every sample that prompts take (mmjax.models.prompts); ids are 0 there
    tasks                    tasks that multi-task prompts know; 0 = there are none

    The text between two images is tokenised on its own, and the tokenizer's start token is put once, as LLaVA does.
    An encoder-decoder's encoder reads everything before the last answer (images, earlier turns), with the end token where its
    tokenizer puts one behind a text, and its decoder writes that answer and the end token. A prompt is never cut there.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    tokens_per_image: int
    image_start: str = ""
    image_end: str = ""
    max_length: int = 0
    pictures: PictureTokens | None = None
    mask: MaskKind = "causal"
    media_positions: bool = True
    placeholder: int | None = None
    start_token: int | None = None
    max_answer: int = 0
    beside: TextBeside | None = None
    virtual: int = 0
    tasks: int = 0
    media_apart: bool = False

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {type(self.tokenizer).__name__} gives no character offsets; a tokenizer.json is needed"
            )

    def encode(self, sample: Sample, generation_prompt: bool = False, size_of: SizeOf | None = None) -> Example:
        """The sample's ids and labels; with `generation_prompt` its messages end where the model is to answer.

        size_of   (height, width) of an image part's picture; asked where there are `pictures`
        Raises BadSample if nothing in it is supervised (also when cutting left nothing), or if a prompt is too long.
        """
        try:
            segments = self.template.segments(sample.messages, generation_prompt)
        except UserError as error:
            raise BadSample(sample.id, str(error)) from error
        answer = ""
        if self.start_token is not None and not generation_prompt:
            segments, answer = self._parted(sample.id, segments)
        if self.media_apart and sum(segment.image is not None for segment in segments) > 1:
            raise BadSample(sample.id, "it has several images; one that stands beside the text is alone")
        ids, labels, media = [], [], []  # of each chunk
        tiles: list[int] = []
        shown, spans = [], []  # of each image: the part; its first position and the one behind it
        grids: list[tuple[int, int]] = []
        opening = next((segment.text for segment in segments if segment.text), "")
        if self.tasks and sample.task >= self.tasks:
            raise BadSample(sample.id, f"it is of task {sample.task}, and the model's prompts know 0 to {self.tasks - 1}")
        if self.virtual:
            ids.append(np.zeros(self.virtual, int))
            labels.append(np.full(self.virtual, IGNORED))
            media.append(np.full(self.virtual, -1))
        if self._adds_bos and not opening.startswith(self.tokenizer.bos_token):
            ids.append(np.array([self.tokenizer.bos_token_id]))
            labels.append(np.array([IGNORED]))
            media.append(np.full(1, -1))
        for chunk in self._chunks(segments):
            if isinstance(chunk, dict):
                count, order, grid = self._picture(sample, chunk, size_of)
                before = (len(grids) or sum(tiles)) * self.tokens_per_image
                grids += [grid] if grid else []
                media.append(np.where(order >= 0, order + before, order))
                shown.append(chunk)
                tiles.append(count)
                ids.append(np.full(len(order), self.placeholder or 0))
                labels.append(np.full(len(order), IGNORED))
                end = sum(map(len, ids))
                spans.append((end - len(order), end))
            else:
                new_ids, new_labels = self._tokenise(chunk)
                ids.append(new_ids)
                labels.append(new_labels)
                media.append(np.full(len(new_ids), -1))
        if self._adds_eos:
            ids.append(np.array([self.tokenizer.eos_token_id]))
            labels.append(np.array([IGNORED]))
            media.append(np.full(1, -1))
        example = Example(
            sample.id,
            np.concatenate(ids).astype(np.int32),
            np.concatenate(labels).astype(np.int32),
            np.concatenate(media).astype(np.int32),
            tuple(shown),
            tiles=tuple(tiles),
            tile_tokens=self.tokens_per_image,
            grids=tuple(grids),
            beside=self.beside.instructions(sample.messages) if self.beside else (),
            task=sample.task,
        )
        if self.max_length and len(example.ids) > self.max_length:
            if generation_prompt or answer:
                raise BadSample(
                    sample.id, f"the prompt has {len(example.ids)} tokens; there is room for {self.max_length}"
                )
            example = self._cut(example, spans)
        if answer:
            return self._answered(example, answer)
        if not generation_prompt and not (example.labels[1:] != IGNORED).any():
            limit = f" within {self.max_length} tokens" if self.max_length else ""
            raise BadSample(sample.id, f"nothing in it is supervised{limit} under the template {self.template.name!r}")
        return example

    def _picture(
        self, sample: Sample, part: dict[str, Any], size_of: SizeOf | None
    ) -> tuple[int, np.ndarray, tuple[int, int] | None]:
        """Tiles of an image, its media tokens, counted from its own first, and the grid that is to be stitched, if there is one."""
        if self.pictures is None:
            return 1, np.arange(self.tokens_per_image), None
        if size_of is None:
            raise ValueError("pictures in tiles are encoded by their sizes: size_of must be given")
        try:
            size = size_of(part)
        except BrokenImage as error:
            raise BadSample(sample.id, str(error)) from error
        grid = self.pictures.grid(size) if self.stitched else None
        return self.pictures.tiles(size), self.pictures.order(size), grid

    def _parted(self, id: str, segments: Sequence[Segment]) -> tuple[list[Segment], str]:
        """What stands before the last answer, and that answer without the white space around it."""
        supervised = [segment.supervised and bool(segment.text.strip()) for segment in segments]
        if not any(supervised):
            raise BadSample(id, f"nothing in it is supervised under the template {self.template.name!r}")
        end = len(segments) - supervised[::-1].index(True)
        start = end
        while start and segments[start - 1].supervised:
            start -= 1
        return list(segments[:start]), "".join(segment.text for segment in segments[start:end]).strip()

    def _answered(self, example: Example, answer: str) -> Example:
        """The example with what an encoder-decoder's decoder reads and predicts."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise UserError("the tokenizer has no end token, with which an encoder-decoder's answers end")
        ids = self.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        labels = np.array(ids if ids[-1:] == [end] else [*ids, end], np.int32)[: self.max_answer or None]
        read = np.concatenate([[self.start_token], labels[:-1]]).astype(np.int32)
        return dataclasses.replace(example, decoder_ids=read, decoder_labels=labels)

    def _cut(self, example: Example, spans: Sequence[tuple[int, int]]) -> Example:
        """The first max_length positions, less an image that would not be whole and images that no text is left of; `spans` are the
        images' positions."""
        images = sum(end <= self.max_length for _, end in spans)
        cut = self.max_length
        if images < len(spans):
            cut = min(cut, spans[images][0])
        while images and not (example.labels[spans[images - 1][1] : cut] != IGNORED).any():
            images -= 1
            cut = spans[images][0]
        return dataclasses.replace(
            example,
            ids=example.ids[:cut],
            labels=example.labels[:cut],
            media=example.media[:cut],
            images=example.images[:images],
            tiles=example.tiles[:images],
            grids=example.grids[:images],
            beside=example.beside[:images],
        )

    @property
    def collation(self) -> dict[str, Any]:
        """How its examples are collated, as keyword arguments."""
        beside = self.beside.length if self.beside else 0
        known = {"mask": self.mask, "media_positions": self.media_positions, "stitched": self.stitched, "virtual": self.virtual}
        return {**known, "beside_length": beside, "media_apart": self.media_apart}

    @property
    def stitched(self) -> bool:
        """Whether the tiles of an image are stitched into one map."""
        return self.pictures is not None and self.pictures.merge == "stitched"

    @functools.cached_property
    def _adds_bos(self) -> bool:
        return self.template.adds_bos and starts_with_bos(self.tokenizer)

    @functools.cached_property
    def _adds_eos(self) -> bool:
        return self.start_token is not None and ends_with_eos(self.tokenizer)

    def _chunks(self, segments: Sequence[Segment]) -> list[dict[str, Any] | list[Segment]]:
        """Image parts, and the runs of text segments between them with the delimiters joined on."""
        chunks: list[dict[str, Any] | list[Segment]] = []
        run: list[Segment] = []
        if self.media_apart:  # the text is one, wherever in it a template has the image
            chunks += [segment.image for segment in segments if segment.image is not None]
            segments = [segment for segment in segments if segment.image is None]
        for segment in segments:
            if segment.image is None:
                if self.template.apart and run and segment.supervised != run[-1].supervised:
                    chunks.append(run)
                    run = []
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
