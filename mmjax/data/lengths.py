"""The stored table of lengths from which packing is planned: tokens and image tiles of every sample, and which samples cannot
be used and why. It is measured once, by several workers, without opening a picture, and kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import numpy as np

from mmjax.data.encoding import Encoder, Example
from mmjax.data.messages import BadSample
from mmjax.data.sources import Dataset

CHUNK = 512  # samples a worker measures at a time


@dataclasses.dataclass(frozen=True)
class Table:
    """tokens, tiles   int32 [samples]
    answers         int32 [samples]: tokens of an encoder-decoder's decoder, beside `tokens`, which its encoder reads
    dropped         the samples that cannot be used: index -> (id, reason)
    """

    tokens: np.ndarray
    tiles: np.ndarray
    answers: np.ndarray
    dropped: dict[int, tuple[str, str]]


Prepare = Callable[[Dataset, int], Example]


def measure(dataset: Dataset, prepare: Prepare, workers: int, threads: int, cache: Path | None = None) -> Table:
    """The table of a data set; `prepare(dataset, index)` makes an Example or raises BadSample.

    cache   the file it is kept in. Its name must change with whatever changes the table (see `key`).
    """
    if cache is not None and cache.exists():
        stored = _read(cache)
        if stored is not None and len(stored.tokens) == len(dataset):
            return stored
    chunks = [range(at, min(at + CHUNK, len(dataset))) for at in range(0, len(dataset), CHUNK)]
    if workers and len(chunks) > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _set_up, (dataset, prepare)) as pool:
            measured = list(pool.map(_measure_here, chunks))
    else:
        with ThreadPoolExecutor(max(1, threads)) as pool:
            measured = list(pool.map(lambda chunk: _measure(dataset, prepare, chunk), chunks))
    table = Table(
        np.concatenate([part.tokens for part in measured]),
        np.concatenate([part.tiles for part in measured]),
        np.concatenate([part.answers for part in measured]),
        {index: why for part in measured for index, why in part.dropped.items()},
    )
    if cache is not None:
        _write(cache, table)
    return table


def key(source: str, encoder: Encoder | None, *more: object) -> str:
    """The name of a table: it changes with the source's fingerprint, the tokenizer, the template and the encoder's settings."""
    digest = hashlib.blake2b(repr((source, more)).encode(), digest_size=16)
    if encoder is not None:
        settings = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(encoder)}
        tokenizer = settings.pop("tokenizer")
        settings.pop("beside")  # takes no room in a row
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
        digest.update(repr((sorted(settings.items()), tokenizer.bos_token)).encode())
    return digest.hexdigest()


def _measure(dataset: Dataset, prepare: Prepare, chunk: range) -> Table:
    tokens, tiles, answers = (np.zeros(len(chunk), np.int32) for _ in range(3))
    dropped = {}
    for place, index in enumerate(chunk):
        try:
            example = prepare(dataset, index)
        except BadSample as error:
            dropped[index] = (error.id, error.reason)
        else:
            tokens[place], tiles[place] = len(example.ids), example.tile_count
            answers[place] = len(example.decoder_ids) if example.decoder_ids is not None else 0
    return Table(tokens, tiles, answers, dropped)


_here: tuple[Dataset, Prepare]  # of a worker process


def _set_up(dataset: Dataset, prepare: Prepare) -> None:
    global _here
    _here = dataset, prepare


def _measure_here(chunk: range) -> Table:
    return _measure(*_here, chunk)


def _read(path: Path) -> Table | None:
    """The stored table; None if the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            pairs = zip(stored["dropped"].tolist(), zip(stored["ids"].tolist(), stored["reasons"].tolist()))
            return Table(stored["tokens"], stored["tiles"], stored["answers"], dict(pairs))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _write(path: Path, table: Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        np.savez(
            file,
            tokens=table.tokens,
            tiles=table.tiles,
            answers=table.answers,
            dropped=np.array(list(table.dropped), np.int64),
            ids=np.array([id for id, _ in table.dropped.values()], str),
            reasons=np.array([reason for _, reason in table.dropped.values()], str),
        )
    os.replace(partial, path)
