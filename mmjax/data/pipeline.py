"""From data sets to batches: planned globally, loaded by Grain, restartable at any step from its number alone.

The rows of a step are decided by (seed, epoch) and the stored lengths (mmjax.data.packing). Global row g of the run belongs to
step g // stage.rows, and the rows of a step to its data shards, one run of them each: the same batch, row by row, whatever the mesh and
however many processes there are, so that what is drawn by a row's place (dropout, negatives) is the same as well. A process loads the
rows of the data shards that it has devices of. A sample that breaks when it is loaded leaves its place in the row empty.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import threading
from pathlib import Path
from typing import Any, Iterator, Mapping, Protocol, Sequence

import grain
import numpy as np
from absl import flags

from mmjax import config
from mmjax.batch import Batch
from mmjax.data import images, lengths, packing, sources
from mmjax.data.collation import collate
from mmjax.data.encoding import Encoder, Example
from mmjax.data.messages import LEFT_OUT, BadSample
from mmjax.data.messages import images as image_parts
from mmjax.data.messages import text as text_of
from mmjax.data.sources import Dataset
from mmjax.data.text_beside import TextBeside
from mmjax.errors import UserError

__all__ = ["Features", "Info", "Pipeline", "Skipped", "collate"]

_SETTLED = 1000  # samples after which the share of broken ones is judged by what was seen


class Features(Protocol):
    """Cached encoder features in place of pictures; `shape` is (positions, width) of a tile."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> type[np.generic]: ...

    def lookup(self, dataset: str, image: str, flipped: bool = False) -> np.ndarray:
        """Those of all tiles of a picture, [tiles, positions, width]."""
        ...


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A sample that was not trained on."""

    source: str
    id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Info:
    """What a step holds, for the log; of this process's rows.

    share        of the step's rows, how many those are
    ids          ids of the samples of each row
    tokens       positions that are not padding; supervised: of these, the ones predicted from; answers: those of an
                 encoder-decoder's decoder
    padding      share of positions that are padding
    tiles        of the images
    epoch        how many epochs are done after the step
    """

    step: int
    epoch: float
    ids: tuple[tuple[str, ...], ...]
    tokens: int
    supervised: int
    padding: float
    images: int
    tiles: int
    skipped: tuple[Skipped, ...]
    answers: int = 0
    share: float = 1.0

    @property
    def samples(self) -> int:
        return sum(map(len, self.ids))


class Pipeline:
    """The batches of a stage.

    datasets        by the names of stage.sources
    encoder         its limits are set to stage.length and stage.answer_length; None for the objective "classify". For "contrastive"
                    its `beside` says how captions are read
    shards          of the data axes, over all processes. A shard's rows are in stage.accumulate groups of media; micro-batch m is the
                    m-th part of every shard's rows and groups, so that no row changes its device (see mmjax.training.step)
    own             the shards whose rows and groups are yielded here, one after the other; None = all of them
    workdir         where the table of lengths is kept; None = nowhere

    `skipped` lists every sample that was not trained on so far: the unusable ones as soon as the table is made, the ones
    that broke at loading with the step that would have shown them. Raises UserError where they are more than loader.max_broken.
    """

    def __init__(
        self,
        stage: config.Stage,
        datasets: Mapping[str, Dataset],
        encoder: Encoder | None,
        image_processor: images.ImageProcessor | None,
        *,
        seed: int,
        loader: config.Loader,
        shards: int = 1,
        own: Sequence[int] | None = None,
        features: Features | None = None,
        workdir: str | Path | None = None,
    ):
        if stage.rows % (shards * stage.accumulate):
            raise UserError(
                f"rows = {stage.rows} must be a multiple of data shards x accumulate = {shards} x {stage.accumulate}: change the "
                "stage's rows, or the mesh's data and fsdp"
            )
        if unknown := [flag for flag in stage.augment if flag != "flip"]:
            raise UserError(f"unknown augmentation {unknown[0]!r}; there is flip")
        self.stage, self.datasets, self.loader, self.seed = stage, dict(datasets), loader, seed
        # positions of an encoder-decoder's decoder; 0 where there is none
        writes = encoder is not None and encoder.start_token is not None and stage.objective == "language"
        self.answer_length = (stage.answer_length or stage.length) if writes else 0
        self.encoder = encoder and dataclasses.replace(encoder, max_length=stage.length, max_answer=self.answer_length)
        self.image_processor, self.features = image_processor, features
        each, self.own = stage.rows // shards, tuple(range(shards) if own is None else own)
        self.rows, self.groups = each * len(self.own), stage.accumulate * len(self.own)
        self._places = [shard * each + i for shard in self.own for i in range(each)]  # among the step's rows
        self.skipped: list[Skipped] = []
        self._reported: set[tuple[str, str]] = set()
        self._seen = self._broken = 0
        self._names = list(datasets)
        self._sizes = [len(dataset) for dataset in datasets.values()]
        self._weights = [stage.sources[name].weight for name in self._names]
        self._tokens, self._tiles, self._answers, self._usable = self._table(Path(workdir) if workdir else None)
        if self._tiles.any() and image_processor is None and features is None:
            raise UserError(f"the sources {', '.join(self._names)} have images, but the model has no vision encoder")
        self._plans: dict[int, packing.Rows] = {}
        self._ends: list[int] = []  # global rows up to the end of each epoch
        self._lock = threading.RLock()

    @functools.cached_property
    def steps(self) -> int:
        """Steps of the stage: stage.steps, or those of its epochs (a last, incomplete step is filled up from the next epoch)."""
        if self.stage.steps:
            return self.stage.steps
        whole = int(self.stage.epochs)
        total = (self._end(whole - 1) if whole else 0) + (self.stage.epochs - whole) * len(self._plan(whole))
        return max(1, math.ceil(total / self.stage.rows))

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[tuple[Batch, Info]]:
        """The batches of the steps from `start_step` on: the same ones wherever one starts."""
        stop = self.steps if stop_step is None else stop_step
        if start_step >= stop:
            return
        self._row(start_step * self.stage.rows)  # plans, so that a mistake is said here and not in a thread
        loaded = grain.MapDataset.range(start_step, stop).map(self._load)
        options = grain.ReadOptions(num_threads=self.loader.threads, prefetch_buffer_size=self.loader.prefetch)
        iterable = loaded.to_iter_dataset(options)
        if self.loader.workers:
            if not flags.FLAGS.is_parsed():  # Grain reads flags of its own, also where no command line was
                flags.FLAGS.mark_as_parsed()
            iterable = iterable.mp_prefetch(grain.MultiprocessingOptions(self.loader.workers))
        for fields, info in iterable:
            self._count(info)
            yield Batch(**fields), info

    def _load(self, step: int) -> tuple[dict[str, np.ndarray], Info]:
        """The fields of a step's Batch, and what is in it."""
        rows: list[list[Example]] = []
        skipped = []
        for place in self._places:
            epoch, samples = self._row(int(step) * self.stage.rows + place)
            rows.append([])
            for sample in samples.tolist():
                try:
                    rows[-1].append(self._example(epoch, sample))
                except BadSample as error:
                    skipped.append(Skipped(self._locate(sample)[0], error.id, error.reason))
        source = self.features if self.features is not None else self.image_processor
        fed = source if source is not None and self._tiles.any() else None
        shape: tuple[int, ...] = fed.shape if fed else ()
        language = self.stage.objective == "language"
        batch = collate(
            rows,
            length=self.stage.length if language else 0,
            groups=self.groups,
            tiles=self.stage.tiles * self.rows // self.groups if shape else 0,
            media_shape=shape,
            media_dtype=fed.dtype if fed else np.uint8,
            audio_shape=self._audio_shape,
            **(self.encoder.collation if self.encoder else {}),
            row_media=self.stage.tiles if self.encoder and (self.encoder.placeholder is not None or self.encoder.media_apart) else None,
            answer_length=self.answer_length,
        )
        if self.stage.objective == "classify" and batch.classes is None and batch.tiles is not None:
            batch = dataclasses.replace(batch, classes=np.full(batch.tiles.shape, -1, np.int32))
        answers = sum(len(e.decoder_ids) for row in rows for e in row if e.decoder_ids is not None)
        tokens = sum(len(example.ids) for row in rows for example in row) + answers
        positions = self.rows * (self.stage.length + self.answer_length)
        if self.stage.objective == "contrastive":  # its text stands beside the tiles, and there is no other
            tokens = sum(len(ids) for row in rows for example in row for ids in example.beside)
            positions = self.rows * self.stage.tiles * self.stage.length
        end_of_step = (step + 1) * self.stage.rows - 1
        info = Info(
            step=int(step),
            epoch=self._progress(int(end_of_step)),
            ids=tuple(tuple(example.id for example in row) for row in rows),
            tokens=tokens,
            supervised=int(np.count_nonzero(batch.weights)) if batch.weights is not None else 0,
            padding=1 - tokens / positions if tokens or language else 0.0,
            images=sum(len(example.images) for row in rows for example in row),
            tiles=sum(example.tile_count for row in rows for example in row),
            skipped=tuple(skipped),
            answers=answers,
            share=self.rows / self.stage.rows,
        )
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return {name: value for name, value in fields.items() if value is not None}, info

    def _example(self, epoch: int, sample: int) -> Example:
        """Sample number `sample` of the mixture with its pictures. Raises BadSample, BrokenImage."""
        name, index = self._locate(sample)
        example = self._prepare(self.datasets[name], index)
        example = dataclasses.replace(example, weight=self.stage.sources[name].loss_weight)
        if not example.images:
            return example
        pixels = []
        for number, (part, tiles) in enumerate(zip(example.images, example.tiles)):
            flipped = "flip" in self.stage.augment and _coin(self.seed, epoch, sample, number)
            try:
                pixels.append(self._pixels(name, part, flipped))
            except images.BrokenImage as error:
                raise BadSample(example.id, str(error)) from error
            if len(pixels[-1]) != tiles:
                raise BadSample(example.id, f"its picture {number + 1} has {len(pixels[-1])} tiles, not {tiles} as its size says")
        return dataclasses.replace(example, pixels=np.concatenate(pixels), audio=self._audio(name, example))

    def _audio(self, name: str, example: Example) -> np.ndarray | None:
        """What the source has of audio beside a sample's noise embedding."""
        dataset: Any = self.datasets[name]
        if not self.stage.noise_distillation or not getattr(dataset, "audio_shape", ()):
            return None
        return dataset.audio(example.images[0]["path"])[None]

    @property
    def _audio_shape(self) -> tuple[int, ...]:
        """Of that, the same in all batches: () where no source has any."""
        found = (getattr(dataset, "audio_shape", ()) for dataset in self.datasets.values())
        return next(filter(None, found), ()) if self.stage.noise_distillation else ()

    def _pixels(self, name: str, part: dict[str, Any], flipped: bool) -> np.ndarray:
        """What is fed for one image part of source `name`: its tiles."""
        if self.features is not None:
            return self.features.lookup(name, part["path"], flipped)
        assert self.image_processor is not None
        picture = self.datasets[name].image(part["path"]) if "path" in part else images.decode(part["image"])
        return self.image_processor.tiles(picture, flipped)

    @property
    def _prepare(self) -> lengths.Prepare:
        if self.stage.objective == "classify":
            return functools.partial(_classified, tiles=self.stage.tiles)
        if self.encoder is None:
            raise UserError(f'the objective "{self.stage.objective}" needs a tokenizer')
        if self.stage.objective == "contrastive":
            assert self.encoder.beside is not None
            return functools.partial(_paired, beside=self.encoder.beside, tiles=self.stage.tiles)
        return functools.partial(_encoded, encoder=self.encoder, tiles=self.stage.tiles)

    def _table(self, workdir: Path | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, tiles and answers of every sample of the mixture, and which are usable; the others go into `skipped`."""
        tables = []
        for name, dataset in self.datasets.items():
            cache = None
            if workdir is not None:
                key = (
                    sources.fingerprint(self.stage.sources[name]),
                    self.encoder,
                    self.stage.objective,
                    self.stage.tiles,
                    sources.stamp(self.stage.sources[name]) if self.encoder and self.encoder.pictures else "",
                )
                cache = workdir / "lengths" / f"{lengths.key(*key)}.npz"
            table = lengths.measure(dataset, self._prepare, self.loader.workers, self.loader.threads, cache)
            tables.append(table)
            self.skipped += [Skipped(name, id, reason) for id, reason in table.dropped.values()]
        measured = (np.concatenate([getattr(table, field) for table in tables]) for field in ("tokens", "tiles", "answers"))
        tokens, tiles, answers = measured
        usable = np.ones(len(tokens), bool)
        for first, table in zip(np.cumsum([0, *self._sizes]).tolist(), tables):
            usable[[first + index for index in table.dropped]] = False
        broken = [item for item in self.skipped if not item.reason.startswith(LEFT_OUT)]
        if len(broken) > self.loader.max_broken * len(tokens) or not usable.any():
            listed = broken or self.skipped
            raise UserError(f"{len(listed)} of {len(tokens)} samples cannot be used: {_listed(listed)}")
        return tokens, tiles, answers, usable

    def _plan(self, epoch: int) -> packing.Rows:
        """The rows of an epoch."""
        with self._lock:
            if epoch not in self._plans:
                order = packing.order(self._sizes, self._weights, self.seed, epoch)
                order, stage = order[self._usable[order]], self.stage
                budgets = stage.length, stage.tiles, stage.packing, self._answers, self.answer_length
                self._plans[epoch] = packing.plan(self._tokens, self._tiles, order, *budgets)
                for old in sorted(set(self._plans) - {epoch})[:-2]:
                    del self._plans[old]
            return self._plans[epoch]

    def _end(self, epoch: int) -> int:
        """The number of rows up to the end of an epoch."""
        with self._lock:
            while len(self._ends) <= epoch:
                self._ends.append((self._ends[-1] if self._ends else 0) + len(self._plan(len(self._ends))))
            return self._ends[epoch]

    def _row(self, number: int) -> tuple[int, np.ndarray]:
        """The epoch and the samples of global row `number`."""
        epoch, start, _ = self._place(number)
        return epoch, self._plan(epoch)[number - start]

    def _progress(self, number: int) -> float:
        """Epochs done after global row `number`."""
        epoch, start, end = self._place(number)
        return epoch + (number + 1 - start) / (end - start)

    def _place(self, number: int) -> tuple[int, int, int]:
        """The epoch of a global row, and the first and the end of the rows of that epoch."""
        with self._lock:
            while not self._ends or self._ends[-1] <= number:
                self._end(len(self._ends))
            epoch = bisect.bisect_right(self._ends, number)
            return epoch, self._ends[epoch - 1] if epoch else 0, self._ends[epoch]

    def _locate(self, sample: int) -> tuple[str, int]:
        """The source of a sample of the mixture, and its number there."""
        ends = np.cumsum(self._sizes).tolist()
        source = bisect.bisect_right(ends, sample)
        return self._names[source], sample - (ends[source - 1] if source else 0)

    def _count(self, info: Info) -> None:
        self._seen += info.samples + len(info.skipped)
        self._broken += len(info.skipped)
        for skipped in info.skipped:
            if (skipped.source, skipped.id) not in self._reported:
                self._reported.add((skipped.source, skipped.id))
                self.skipped.append(skipped)
        if self._broken > self.loader.max_broken * max(self._seen, min(int(self._usable.sum()), _SETTLED)):
            raise UserError(
                f"{self._broken} of {self._seen} samples could not be loaded, more than loader.max_broken = "
                f"{self.loader.max_broken:g} allows: {_listed(self.skipped)}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


def _encoded(dataset: Dataset, index: int, *, encoder: Encoder, tiles: int) -> Example:
    """A sample of the objective "language"."""
    example = encoder.encode(dataset[index], size_of=functools.partial(sources.size_of, dataset))
    if example.tile_count > tiles:
        number, kind = (len(example.images), "images") if set(example.tiles) == {1} else (example.tile_count, "tiles")
        raise BadSample(example.id, f"it has {number} {kind}; a row holds {tiles} (the stage's `tiles`)")
    return example


def _classified(dataset: Dataset, index: int, *, tiles: int) -> Example:
    """A sample of the objective "classify": one image, and its class as the one answer."""
    sample = dataset[index]
    shown, answer = image_parts(sample.messages), sample.answers[0] if sample.answers else ""
    if len(shown) != 1 or not tiles:
        raise BadSample(sample.id, f"it has {len(shown)} images; to be classified it must have one")
    if not answer.isdecimal():
        raise BadSample(sample.id, f"its answer {answer!r} is not the number of a class")
    empty = np.zeros(0, np.int32)
    return Example(sample.id, empty, empty, empty, tuple(shown), category=int(answer))


def _paired(dataset: Dataset, index: int, *, beside: TextBeside, tiles: int) -> Example:
    """A sample of the objective "contrastive": one image, and its caption as the text beside it."""
    sample = dataset[index]
    shown, caption = image_parts(sample.messages), text_of(sample.messages[-1]).strip()
    if len(shown) != 1 or not tiles:
        raise BadSample(sample.id, f"it has {len(shown)} images; to be compared with its text it must have one")
    if sample.messages[-1]["role"] != "assistant" or not caption:
        raise BadSample(sample.id, "it has no caption: its last message is no text by the assistant")
    empty = np.zeros(0, np.int32)
    return Example(sample.id, empty, empty, empty, tuple(shown), beside=(beside.caption(caption),))


def _coin(*key: int) -> bool:
    return bool(np.random.default_rng(key).random() < 0.5)


def _listed(skipped: Sequence[Skipped], count: int = 5) -> str:
    shown = [f"{item.source}/{item.id} ({item.reason})" for item in skipped[:count]]
    return "; ".join(shown) + (f"; and {len(skipped) - count} more" if len(skipped) > count else "")
