"""What a frozen encoder makes of every picture of a stage, made once and kept on disk.

    features = cached(folder, model.config, params, stage.sources, datasets, processor, flip=True, mesh=mesh)
    features.lookup("train", "a.jpg")                  -> float16 [positions, width]
    features.lookup("train", "a.jpg", flipped=True)    the same of the mirrored picture

There is one file for each source, under a name that changes with the encoder's weights, the image settings and the source. Where
the connector begins by averaging positions (which takes no parameters), that is done before the features are kept: a
photo's 49 positions of 1,280 channels take 125 KB, their mean 2.5 KB.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
import logging
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
from mmjax.parallel.mesh import data_shards
from mmjax.parallel.sharding import batch_shardings
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
    batch       pictures a device encodes at a time
    Raises UserError for a picture that is in no store (it has no name), and where several processes run.
    """
    if config.connector is None or processor is None:
        raise UserError("cache_features: the model has no vision encoder and connector")
    if jax.process_count() > 1:
        raise UserError("cache_features works in one process only; leave it off, or train on one host")
    folder.mkdir(parents=True, exist_ok=True)
    encoder = _encoder_digest(config, params, processor, flip, run)
    encode = functools.partial(_encode, params, mesh=mesh, config=config, run=run)
    shape = config.connector.pooled, config.connector.in_width
    tables = {}
    for name, dataset in datasets.items():
        stem = folder / hashlib.blake2b((encoder + _stamp(described[name])).encode(), digest_size=16).hexdigest()
        names = _names(stem.with_suffix(".json"), dataset, name)
        if names and not stem.with_suffix(".npy").exists():
            pictures = functools.partial(_pictures, names, dataset, processor, batch * data_shards(mesh), threads)
            _fill(stem, (len(names), 1 + flip, *shape), pictures, encode, name)
        tables[name] = Table(stem.with_suffix(".npy"), {image: row for row, image in enumerate(names)})
    return Features(shape, tables)


@dataclasses.dataclass(frozen=True)
class Table:
    """One file of features, float16 [pictures, 1 or 2 (mirrored), positions, width], and the row of each picture."""

    path: Path
    rows: Mapping[str, int]

    @functools.cached_property
    def array(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "rows": self.rows}  # another process maps the file itself


@dataclasses.dataclass(frozen=True)
class Features:
    """`shape` is (positions, width) of one picture."""

    shape: tuple[int, int]
    tables: Mapping[str, Table]

    def lookup(self, dataset: str, image: str, flipped: bool = False) -> np.ndarray:
        """float16 [positions, width]. Raises BrokenImage for a picture that could not be read when the file was made."""
        table = self.tables[dataset]
        found = table.array[table.rows[image], int(flipped)]
        if np.isnan(found[0, 0]):
            raise BrokenImage(f"{image}: could not be read when its features were made")
        return found


def _names(path: Path, dataset: Dataset, source: str) -> list[str]:
    """The different pictures of a data set; kept in `path`, since finding them means reading every sample."""
    if path.exists():
        return json.loads(path.read_text())
    found: dict[str, None] = {}
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
        except BadSample:
            continue
        for part in messages.images(sample.messages):
            if "path" not in part:
                raise UserError(f"cache_features: the pictures of {source} are drawn, not stored; leave it off")
            found[part["path"]] = None
    _replace(path, json.dumps(list(found)))
    return list(found)


def _fill(stem: Path, shape: tuple[int, ...], pictures: Any, encode: Any, label: str) -> None:
    """Makes `stem`.npy: row after row into `stem`.part, with the number of finished rows beside it in `stem`.done."""
    part, done = stem.with_suffix(".part"), stem.with_suffix(".done")
    start = int(done.read_text()) if part.exists() and done.exists() else 0
    array = np.lib.format.open_memmap(part, "r+" if start else "w+", np.float16, shape)
    log.info("%s: features of %d pictures, %.2f GB, in %s", label, shape[0], array.nbytes / 1e9, part.parent)
    bar = tqdm(None, f"{label}: features", shape[0], initial=start, disable=None, unit="picture")
    pending: tuple[int, Any, np.ndarray] | None = None  # the device works on one batch while the next is decoded

    def store(first: int, features: jax.Array, readable: np.ndarray) -> None:
        values = np.clip(np.asarray(features[: len(readable)], np.float32), -65504, 65504)
        values[~readable] = np.nan
        array[first : first + len(readable)] = values
        bar.update(len(readable))

    for number, (first, pixels, readable) in enumerate(pictures(start)):
        views = np.stack([pixels, pixels[:, :, ::-1]][: shape[1]], 1)
        features = encode(views)
        if pending:
            store(*pending)
            if number % FLUSH == 0:
                array.flush()
                _replace(done, str(first))
        pending = first, features, readable
    if pending:
        store(*pending)
    bar.close()
    array.flush()
    os.replace(part, stem.with_suffix(".npy"))
    done.unlink(missing_ok=True)


def _pictures(
    names: list[str], dataset: Dataset, processor: ImageProcessor, batch: int, threads: int, start: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """From row `start` on: first row, pixels uint8 [batch, height, width, 3], and which of the real rows could be read, bool [<= batch]."""

    def pixels(name: str) -> np.ndarray | None:
        try:
            return processor.pixels(dataset.image(name))
        except BrokenImage as error:
            log.warning("%s: %s", name, error)
            return None

    with ThreadPoolExecutor(threads) as pool:
        for first in range(start, len(names), batch):
            found = list(pool.map(pixels, names[first : first + batch]))
            out = np.zeros((batch, *processor.shape), np.uint8)
            for row, picture in enumerate(found):
                if picture is not None:
                    out[row] = picture
            yield first, out, np.array([picture is not None for picture in found])


def _encode(params: Params, views: np.ndarray, *, mesh: Mesh, config: ModelConfig, run: Execution) -> jax.Array:
    """uint8 [batch, views, height, width, 3] -> [batch, views, positions, width]; the batch divided over the mesh."""
    placed = jax.device_put(Batch(images=views), batch_shardings(Batch(images=views), mesh))
    return _features({"vision": params["vision"]}, placed.images, config=config, run=run)


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _features(params: Params, pixels: jax.Array, *, config: ModelConfig, run: Execution) -> jax.Array:
    assert config.connector is not None
    return connectors.pool(config.connector, multimodal.vision_features(params, config, pixels, run))


def _encoder_digest(config: ModelConfig, params: Params, processor: ImageProcessor, flip: bool, run: Execution) -> str:
    """A hash of everything that decides a picture's features."""
    assert config.connector is not None
    kept = config.connector.kind, config.connector.pooled, flip, run.dtype
    settings = config.vision, config.features, config.image_mean, config.image_std, processor, kept
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for path, leaf in sorted(tree.flatten(params["vision"]).items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def _stamp(source: Source) -> str:
    """A source and the state of its store: sizes and times of its tar files, or of the folder."""
    paths = sorted(glob.glob(source.images)) if glob.has_magic(source.images) else [source.images]
    states = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths if os.path.exists(path)]
    return f"{sources.fingerprint(source)} {states}"


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_suffix(path.suffix + ".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)
