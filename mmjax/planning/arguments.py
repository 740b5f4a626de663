"""What a compiled step takes, as shapes with their places on a mesh: no weights are read and no data set is opened."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import DTypeLike

from mmjax import tree
from mmjax.batch import Batch
from mmjax.config import Stage
from mmjax.data.collation import collate
from mmjax.models import prompts, quantised
from mmjax.models.config import ModelConfig
from mmjax.models.tuning_config import NoisePromptConfig
from mmjax.parallel.mesh import data_shards
from mmjax.parallel.sharding import MEDIA_FIELDS, batch_shardings
from mmjax.tree import Params


def fitting(stage: Stage, shards: int) -> Stage:
    """The stage as so many data shards can divide it: as many micro-batches as a shard has rows, if they are fewer than the stage's, and the
    next number of rows that goes with both."""
    parts = min(stage.accumulate, math.ceil(stage.rows / shards))
    return dataclasses.replace(stage, rows=math.ceil(stage.rows / (shards * parts)) * shards * parts, accumulate=parts)


def batch(config: ModelConfig, stage: Stage, mesh: Mesh, beside: int = 0) -> Batch:
    """The shapes of a step's batch, as mmjax.data.pipeline makes it. `beside`: tokens of text that a Q-Former reads beside a tile.
    `stage.rows` must be a multiple of data shards x accumulate (see `fitting`)."""
    groups = data_shards(mesh) * stage.accumulate
    one = _one_row(config, stage, beside)
    fields: dict[str, jax.ShapeDtypeStruct] = {}
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if value is None:
            continue
        shape = (stage.rows, *value.shape[1:])
        if field.name in MEDIA_FIELDS:
            tiles = stage.tiles * stage.rows // groups
            # of pictures whose tiles are stitched there is room for one for every two tiles
            shape = (groups, max(1, tiles // 2) if field.name == "grids" else tiles, *value.shape[2:])
        fields[field.name] = jax.ShapeDtypeStruct(shape, value.dtype)
    return placed(Batch(**fields), batch_shardings(Batch(**fields), mesh))


def _one_row(config: ModelConfig, stage: Stage, beside: int) -> Batch:
    """A batch of one empty row, by the function that makes those of training."""
    language, contrastive = stage.objective == "language", stage.objective == "contrastive"
    reads_beside = config.cross_attention is not None or config.media_beside
    shape: tuple[int, ...] = ()
    dtype: DTypeLike = np.uint8
    if stage.tiles and config.vision is not None:
        side = config.picture_size
        shape = (side, side, 3)
        if stage.cache_features:
            shape, dtype = (config.features.positions(config.vision), config.features.width(config.vision)), np.float16
    noise = next((adapter for adapter in config.adapters if isinstance(adapter, NoisePromptConfig)), None)
    if noise is not None:
        shape, dtype = (noise.length, noise.channels), np.float32
    writes = language and config.llm is not None and config.llm.encoder is not None
    one = collate(
        [[]],
        length=stage.length if language else 0,
        tiles=stage.tiles if shape else 0,
        media_shape=shape,
        media_dtype=dtype,
        audio_shape=(2, noise.audio) if noise is not None and stage.noise_distillation else (),
        mask=config.mask,
        media_positions=config.llm is None or not config.llm.media_as_they_are,
        row_media=stage.tiles if reads_beside and language else None,
        answer_length=(stage.answer_length or stage.length) if writes else 0,
        stitched=config.features.stitching is not None,
        virtual=prompts.count(config) if language else 0,
        media_apart=config.media_beside,
        beside_length=stage.length if contrastive else beside,
    )
    if stage.objective == "classify" and one.tiles is not None:
        one = dataclasses.replace(one, classes=np.zeros(one.tiles.shape, np.int32))
    return one


def frozen(params: Params, dtype: str) -> Params:
    """The shapes of frozen leaves as a step takes them: floating-point ones in `dtype`, quantised kernels as they are held."""

    def held(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        kept = quantised.is_part(path) or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if kept else np.dtype(dtype))

    return tree.unflatten({path: held(path, leaf) for path, leaf in tree.flatten(params).items()})


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with the places where they are to be."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings)



