"""What a frozen encoder makes of every picture of a stage, made once and kept on disk.

    features = cached(folder, model.config, params, stage.sources, datasets, processor, flip=True, mesh=mesh)
    features.lookup("train", "a.jpg")                  -> float16 [tiles, positions, width]
    features.lookup("train", "a.jpg", flipped=True)    the same of the mirrored picture

There is one file for each source, under a name that changes with the encoder's weights, the image settings and the source. Where
the connector begins by averaging positions (which takes no parameters), that is done before the features are kept: a
photo's 49 positions of 1,280 channels take 125 KB, their mean 2.5 KB.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from mmjax import tree
from mmjax.batch import Batch
from mmjax.config import Source
from mmjax.data import messages, sources
from mmjax.data.images import BrokenImage, ImageProcessor
from mmjax.data.messages import BadSample
from mmjax.data.sources import Dataset
from mmjax.errors import UserError
from mmjax.models import connectors, multimodal
from mmjax.models.config import Execution, ModelConfig
from mmjax.parallel import cluster
from mmjax.parallel.mesh import data_shards, own_shards
from mmjax.parallel.placement import on_host
from mmjax.parallel.sharding import from_own_rows
from mmjax.tree import Params

log = logging.getLogger(__name__)

FLUSH = 50  # batches between two notes of how far a file is


def cached(
    folder: Path,
    config: ModelConfig,
    params: Params,
    described: Mapping[str, Source],
    datasets: Mapping[str, Dataset],
    processor: ImageProcessor | None,
    *,
    flip: bool,
    mesh: Mesh,
    run: Execution = Execution(),
    batch: int = 32,
    threads: int = 2,
) -> Features:
    """The features of all pictures of these sources. What is not in `folder` yet is made, going on where an earlier start ended.

    described   the sources, by the names of `datasets`
    flip        of the mirrored pictures too
    batch       tiles a device encodes at a time
    Several processes encode together, each the pictures of its own data shards; process 0 writes.
    Raises UserError for a picture that is in no store (it has no name).
    """
    if config.connector is None or processor is None:
        raise UserError("cache_features: the model has no vision encoder and connector")
    folder.mkdir(parents=True, exist_ok=True)
    encoder = encoder_digest(config, params, processor, flip, run)
    encode = functools.partial(_encode, params, mesh=mesh, config=config, run=run)
    shape = config.connector.pooled, config.features.tile_width(config.encoder)
    tables = {}
    for name, dataset in datasets.items():
        stem = folder / hashlib.blake2b((encoder + sources.stamp(described[name])).encode(), digest_size=16).hexdigest()
        with cluster.first_alone("pictures"):
            counts = _counts(stem.with_suffix(".json"), dataset, name, processor)
        tiles = [(image, number) for image, count in counts.items() for number in range(count)]
        if tiles and not cluster.from_first("features", stem.with_suffix(".npy").exists):
            pictures = functools.partial(_tiles, tiles, dataset, processor, batch, mesh, flip, threads)
            _fill(stem, (len(tiles), 1 + flip, *shape), pictures, encode, name)
            cluster.wait("features written")
        ends = np.cumsum(list(counts.values()), dtype=int).tolist()
        rows = {image: (end - count, end) for (image, count), end in zip(counts.items(), ends)}
        tables[name] = Table(stem.with_suffix(".npy"), rows)
    return Features(shape, tables)


@dataclasses.dataclass(frozen=True)
class Table:
    """One file of features, float16 [tiles, 1 or 2 (mirrored), positions, width], and each picture's first row and the one behind
    its last."""

    path: Path
    rows: Mapping[str, tuple[int, int]]

    @functools.cached_property
    def array(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "rows": self.rows}  # another process maps the file itself


@dataclasses.dataclass(frozen=True)
class Features:
    """`shape` is (positions, width) of one tile."""

    shape: tuple[int, int]
    tables: Mapping[str, Table]

    @property
    def dtype(self) -> type[np.generic]:
        """Of what `lookup` returns."""
        return np.float16

    def lookup(self, dataset: str, image: str, flipped: bool = False) -> np.ndarray:
        """float16 [tiles, positions, width]. Raises BrokenImage for a picture that could not be read when the file was made."""
        table = self.tables[dataset]
        found = table.array[slice(*table.rows[image]), int(flipped)]
        if np.isnan(found[:, 0, 0]).any():
            raise BrokenImage(f"{image}: could not be read when its features were made")
        return found


def _counts(path: Path, dataset: Dataset, source: str, processor: ImageProcessor) -> dict[str, int]:
    """The different pictures of a data set and their tiles, one of a broken picture; kept in `path`, since finding them means
    reading every sample."""
    if path.exists():
        return json.loads(path.read_text())
    found: dict[str, int] = {}
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
        except BadSample:
            continue
        for part in messages.images(sample.messages):
            if "path" not in part:
                raise UserError(f"cache_features: the pictures of {source} are drawn, not stored; leave it off")
            if part["path"] not in found:
                found[part["path"]] = _count(dataset, part["path"], processor)
    _replace(path, json.dumps(found))
    return found


def _count(dataset: Dataset, name: str, processor: ImageProcessor) -> int:
    if processor.tiling is None:
        return 1
    try:
        return processor.count(*dataset.picture_size(name))
    except BrokenImage:
        return 1


def _fill(stem: Path, shape: tuple[int, ...], pictures: Any, encode: Any, label: str) -> None:
    """Makes `stem`.npy: row after row into `stem`.part, with the number of finished rows beside it in `stem`.done."""
    part, done, writes = stem.with_suffix(".part"), stem.with_suffix(".done"), jax.process_index() == 0
    start = cluster.from_first("features begun", lambda: int(done.read_text()) if part.exists() and done.exists() else 0)
    array = np.lib.format.open_memmap(part, "r+" if start else "w+", np.float16, shape) if writes else None
    log.info("%s: features of %d tiles, %.2f GB, in %s", label, shape[0], 2 * math.prod(shape) / 1e9, part.parent)
    bar = tqdm(None, f"{label}: features", shape[0], initial=start, disable=None if writes else True, unit="tile")
    pending: tuple[int, Any, Any] | None = None  # the device works on one batch while the next is decoded

    def store(first: int, features: jax.Array, readable: jax.Array) -> None:
        values, whole = on_host(features)[: shape[0] - first], on_host(readable)[: shape[0] - first, 0]
        if array is None:
            return
        values = np.clip(values.astype(np.float32), -65504, 65504)
        values[~whole] = np.nan
        array[first : first + len(values)] = values
        bar.update(len(values))

    for number, (first, views, readable) in enumerate(pictures(start)):
        encoded = encode(views, readable)
        if pending:
            store(*pending)
            if array is not None and number % FLUSH == 0:
                array.flush()
                _replace(done, str(first))
        pending = first, *encoded
    if pending:
        store(*pending)
    bar.close()
    if array is not None:
        array.flush()
        os.replace(part, stem.with_suffix(".npy"))
        done.unlink(missing_ok=True)


def _tiles(
    tiles: list[tuple[str, int]],
    dataset: Dataset,
    processor: ImageProcessor,
    batch: int,
    mesh: Mesh,
    flip: bool,
    threads: int,
    start: int,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """From row `start` on, `batch` of them for each data shard: first row, and of this process's shards pixels uint8 [rows, 1 or 2
    (mirrored), height, width, 3], and which rows could be read, bool [rows, 1]. `tiles` are pictures and the number of a tile."""

    def views(name: str) -> np.ndarray | None:
        try:
            picture = dataset.image(name)
            return np.stack([processor.tiles(picture, flipped) for flipped in (False, True)[: 1 + flip]], 1)
        except BrokenImage as error:
            log.warning("%s: %s", name, error)
            return None

    with ThreadPoolExecutor(threads) as pool:
        own = own_shards(mesh)
        for first in range(start, len(tiles), batch * data_shards(mesh)):
            places = [first + shard * batch + i for shard in own for i in range(batch)]
            rows = [tiles[place] if place < len(tiles) else ("", 0) for place in places]
            names = list(dict.fromkeys(name for name, _ in rows if name))
            found = dict(zip(names, pool.map(views, names)))
            out, readable = np.zeros((len(rows), 1 + flip, *processor.shape), np.uint8), np.zeros((len(rows), 1), bool)
            for row, (name, number) in enumerate(rows):
                picture = found.get(name)
                if picture is not None and number < len(picture):
                    out[row], readable[row] = picture[number], True
            yield first, out, readable


def _encode(
    params: Params, views: np.ndarray, readable: np.ndarray, *, mesh: Mesh, config: ModelConfig, run: Execution
) -> tuple[jax.Array, jax.Array]:
    """Of all processes' rows, divided over the mesh: uint8 [batch, views, height, width, 3] -> [batch, views, positions, width]; and
    which of them could be read."""
    placed = from_own_rows(Batch(images=views, tiles=readable), mesh)
    return _features({"vision": params["vision"]}, placed.images, config=config, run=run), placed.tiles


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _features(params: Params, pixels: jax.Array, *, config: ModelConfig, run: Execution) -> jax.Array:
    assert config.connector is not None
    return connectors.pool(config.connector, multimodal.vision_features(params, config, pixels, run))


def encoder_digest(config: ModelConfig, params: Params, processor: ImageProcessor, flip: bool, run: Execution) -> str:
    """A hash of everything that decides a picture's features."""
    assert config.connector is not None
    kept = config.connector.kind, config.connector.pooled, flip, run.dtype
    settings = config.vision, config.features, config.image_mean, config.image_std, processor, kept
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for path, leaf in sorted(tree.flatten(params["vision"]).items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(on_host(leaf)).view(np.uint8).data)
    return digest.hexdigest()


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_suffix(path.suffix + ".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)
