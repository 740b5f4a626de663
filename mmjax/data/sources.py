"""Data sets with random access: how a recipe's `Source` becomes samples and pictures.

dataset = sources.open(Source(kind="llava", path="llava.json.gz", images="images-*.tar"))
dataset[3]             -> Sample
dataset.image("a.jpg") -> a picture, RGB
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import hashlib
import io
import os
from typing import Any, Callable, Iterator, Mapping, Protocol

import numpy as np
from PIL import Image

from mmjax import config
from mmjax.data import images, in_context, instructions, interleaved, messages, pairs, science_qa, stores
from mmjax.data.messages import PLACEHOLDER, BadSample, Sample
from mmjax.data.rows import open_rows
from mmjax.errors import UserError


class Dataset(Protocol):
    """What the pipeline and evaluation read. Both methods may be called from several threads.

    __getitem__ raises BadSample for a row that is no sample; image and picture_size raise images.BrokenImage.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def image(self, name: str) -> Image.Image: ...

    def picture_size(self, name: str) -> tuple[int, int]:
        """(height, width) of a picture, without decoding it where its header says it."""
        ...


def open(source: config.Source) -> Dataset:
    """The source's data set. Raises UserError for an unknown kind or option, or a file that is not there."""
    rest = {option: value for option, value in source.options.items() if option not in ("prompts", "system", "task_id")}
    if source.kind not in OPENERS:
        near = difflib.get_close_matches(source.kind, OPENERS, 1)
        raise UserError(
            f"unknown kind of source {source.kind!r}{f' (nearest: {near[0]!r})' if near else ''}; "
            f"there are {', '.join(OPENERS)}"
        )
    dataset = OPENERS[source.kind](dataclasses.replace(source, options=rest))
    if not len(dataset):
        raise UserError(f"the source {source.path or source.kind!r} has no samples")
    dataset = First(dataset, source.limit) if 0 < source.limit < len(dataset) else dataset
    dataset = in_context.Prompted(dataset, source.options["prompts"]) if "prompts" in source.options else dataset
    dataset = in_context.Told(dataset, source.options["system"]) if "system" in source.options else dataset
    dataset = in_context.OfTask(dataset, source.options["task_id"]) if "task_id" in source.options else dataset
    return in_context.Joined(dataset, source.join) if source.join > 1 else dataset


def fingerprint(source: config.Source) -> str:
    """A hash of everything that decides the source's samples, the bytes of its file included (of tar and parquet files their sizes
    and times); not of its pictures."""
    described = source.kind, source.limit, source.join, sorted(source.options.items())
    digest = hashlib.blake2b(repr(described).encode(), digest_size=16)
    for path in (sorted(glob.glob(source.path)) or [source.path]) if source.path else ():
        if path.endswith((".tar", ".parquet")):  # too many bytes to read each time
            state = os.stat(path)
            digest.update(repr((path, state.st_size, state.st_mtime_ns)).encode())
            continue
        with io.open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def stamp(source: config.Source) -> str:
    """A source and the state of its pictures: sizes and times of its tar files, or of the folder."""
    paths = sorted(glob.glob(source.images)) if glob.has_magic(source.images) else [source.images]
    states = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths if os.path.exists(path)]
    return f"{fingerprint(source)} {states}"


def size_of(dataset: Dataset, part: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of an image part's picture. Raises images.BrokenImage."""
    return dataset.picture_size(part["path"]) if "path" in part else images.size_of(part["image"])


class RowDataset:
    """Samples made one for one from rows, pictures from a store."""

    def __init__(self, path: str, images: str, convert: Callable[[Mapping[str, Any], str], Sample]):
        self._arguments = path, images, convert
        self._rows, self._store, self._convert = open_rows(path), stores.open_store(images), convert

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self._convert(self._rows[index], self._rows.id(index))

    def image(self, name: str) -> Image.Image:
        return _picture(self._store, name)

    def picture_size(self, name: str) -> tuple[int, int]:
        return _size(self._store, name)

    def __reduce__(self) -> tuple:
        return RowDataset, self._arguments


class Captions:
    """Pictures with one or several captions: rows `{"id", "image", FIELD: "..." or ["...", ...]}`.

    split   "train": one sample for each caption; "eval": one for each picture, all its captions are answers
    prompt  what the user says beside the picture
    prefix  the user says the beginning of the caption instead, none of its words or some (prefix language modelling, BLIP-2's
            way into an encoder-decoder); how many is drawn by the sample's id. In the split "eval" none
    field   where the captions are; "" = the first of `captions`, `caption` and `en` that a row has
    shown   "picture"; or for a language model that is to read before it sees "words", another caption of the same picture in its
            place, or "nothing"
    """

    def __init__(
        self,
        path: str,
        images: str,
        split: str = "train",
        prompt: str = "Describe the image.",
        field: str = "",
        shown: str = "picture",
        prefix: bool = False,
    ):
        if split not in ("train", "eval"):
            raise UserError(f"captions: unknown split {split!r}; there are train and eval")
        if shown not in ("picture", "words", "nothing"):
            raise UserError(f"captions: unknown shown = {shown!r}; there are picture, words and nothing")
        self._arguments = path, images, split, prompt, field, shown, prefix
        self._rows, self._store, self._shown = open_rows(path), stores.open_store(images), shown
        self._prefix = prefix
        self._split, self._prompt, self._fields = split, prompt, (field,) if field else ("captions", "caption", "en")
        self._samples = np.array(list(self._counted()), np.int64).reshape(-1, 2)  # row, caption

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        number, which = self._samples[index].tolist()
        row = self._rows[number]
        id, captions = str(row.get("id", self._rows.id(number))), self._captions(row)
        if not captions or not isinstance(row.get("image"), str):
            raise BadSample(id, f"the row has no `image` or none of {', '.join(self._fields)}")
        caption = captions[which]
        if self._split == "train":
            id = f"{id}#{which}"
        prompt = "" if self._prefix else self._prompt
        if self._prefix and self._split == "train":
            words = caption.split()
            said = _drawn(id, len(words))
            prompt, caption = " ".join(words[:said]), " ".join(words[said:])
        content = [{"type": "image", "path": row["image"]}] if self._shown == "picture" else []
        told = captions[(which + 1) % len(captions)] if self._shown == "words" else ""
        text = " ".join(part for part in (told, prompt) if part)
        content += [{"type": "text", "text": text}] if text or not content else []
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": caption}]
        return Sample(id, messages.validated(turns, id), "caption", tuple(captions))

    def image(self, name: str) -> Image.Image:
        return _picture(self._store, name)

    def picture_size(self, name: str) -> tuple[int, int]:
        return _size(self._store, name)

    def _captions(self, row: Mapping[str, Any]) -> list[str]:
        found: Any = next((row[field] for field in self._fields if row.get(field)), [])
        found = [found] if isinstance(found, str) else found
        return [str(caption).replace(PLACEHOLDER, "") for caption in found]

    def _counted(self) -> Iterator[tuple[int, int]]:
        for number in range(len(self._rows)):
            try:
                count = len(self._captions(self._rows[number]))
            except BadSample:
                count = 0
            yield from ((number, which) for which in range(max(1, count if self._split == "train" else 1)))

    def __reduce__(self) -> tuple:
        return Captions, self._arguments


class First(in_context.Wrapped):
    """The first `count` samples of a data set."""

    def __init__(self, dataset: Dataset, count: int):
        super().__init__(dataset)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.dataset[index]


def _drawn(key: str, count: int) -> int:
    """One of the numbers below `count`, always the same for the same key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % max(count, 1)


def _picture(store: stores.Store, name: str) -> Image.Image:
    return images.decode(store.read(name))


def _size(store: stores.Store, name: str) -> tuple[int, int]:
    return images.size_of(store.read(name))


def _rows_opener(convert: Callable[[Mapping[str, Any], str], Sample]) -> Callable[[config.Source], Dataset]:
    def opened(source: config.Source) -> Dataset:
        _known_options(source, ())
        return RowDataset(source.path, source.images, convert)

    return opened


def _captions(source: config.Source) -> Dataset:
    _known_options(source, ("split", "prompt", "field", "shown", "prefix"))
    return Captions(source.path, source.images, **source.options)


def _digits(source: config.Source, **fixed: Any) -> Dataset:
    from mmjax.data.digits import DigitScenes  # reads scikit-learn's data, which other recipes do not need

    _known_options(source, ("split", "task", "size", "seed", "kinds", "pictures", "canvas"))
    return DigitScenes(**{**source.options, **fixed})


def _digit_facts(source: config.Source) -> Dataset:
    return _digits(source, task="facts")


def _mmc4(source: config.Source) -> Dataset:
    _known_options(source, (*_LAYOUT, "matching", "min_similarity", "min_bytes"))
    options = {"by" if name == "matching" else name: value for name, value in source.options.items()}
    matching = {name: options.pop(name) for name in ("by", "min_similarity", "min_bytes") if name in options}
    layout, matched = interleaved.Layout(**options), interleaved.Matching(**matching)
    return interleaved.Documents(source.path, source.images, layout, matched)


def _obelics(source: config.Source) -> Dataset:
    _known_options(source, _LAYOUT)
    return interleaved.Documents(source.path, source.images, interleaved.Layout(**{"joint": "\n\n", **source.options}))


def _pairs(source: config.Source) -> Dataset:
    _known_options(source, ("image", "pattern", "question", "answer", "within"))
    return pairs.Pairs(source.path, source.images, **source.options)


def _hypotheses(source: config.Source) -> Dataset:
    _known_options(source, ("most", "joint"))
    return instructions.Hypotheses(source.path, source.images, **source.options)  # type: ignore[return-value]


def _drawn_hypotheses(source: config.Source) -> Dataset:
    _known_options(source, ("split", "size", "seed", "embeddings", "width", "audio"))
    return instructions.DrawnHypotheses(**source.options)  # type: ignore[return-value]


def _mimic_it(source: config.Source) -> Dataset:
    _known_options(source, ("shots",))
    return pairs.MimicIt(source.path, source.images, **source.options)


def _science_qa(source: config.Source) -> Dataset:
    _known_options(source, ("split", "splits", "captions", "explained"))
    return science_qa.ScienceQA(source.path, source.images, **source.options)


def _known_options(source: config.Source, known: tuple[str, ...]) -> None:
    """Raises UserError for an option that is neither among these nor one of every kind."""
    known = (*known, "prompts")
    for option in source.options:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            raise UserError(
                f"a source of kind {source.kind!r} has no option {option!r}"
                + (f" (nearest: {near[0]!r})" if near else f"; it has {', '.join(known)}")
            )


_LAYOUT = tuple(field.name for field in dataclasses.fields(interleaved.Layout))
OPENERS: dict[str, Callable[[config.Source], Dataset]] = {
    "llava": _rows_opener(messages.from_llava),
    "messages": _rows_opener(messages.from_messages),
    "captions": _captions,
    "pairs": _pairs,
    "mimic_it": _mimic_it,
    "science_qa": _science_qa,
    "mmc4": _mmc4,
    "obelics": _obelics,
    "alpaca": _rows_opener(instructions.from_alpaca),
    "hypotheses": _hypotheses,
    "drawn_hypotheses": _drawn_hypotheses,
    "digits": _digits,
    "digit_facts": _digit_facts,
}
