"""What a stage takes, from shapes alone: what it trains, bytes, FLOPs."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from mmjax import flops, tree
from mmjax.config import Recipe
from mmjax.data.picture_tokens import PictureTokens
from mmjax.data.tiling import of_recipe
from mmjax.models import multimodal, quantised
from mmjax.models.config import ModelConfig
from mmjax.training.optimizer import make_optimizer
from mmjax.training.state import state_shapes
from mmjax.training.trainable import select, shapes
from mmjax.tree import Params

FIGURES = (  # of a stage, in this order
    "trainable",
    "bytes_parameters",
    "bytes_gradients",
    "bytes_optimizer",
    "tokens_per_sample",
    "flops_per_sample",
    "flops_per_step",
)


def stage_figures(recipe: Recipe, config: ModelConfig, name: str) -> dict[str, float]:
    """FIGURES of a stage of a recipe, whose model this is: numbers of parameters, bytes of all devices together, FLOPs by the convention of
    mmjax.flops. Raises UserError where the stage trains what the model does not have.

    Every position that is not the picture's is taken to be supervised, and every row to be full. An encoder-decoder's encoder
    reads the row, and its decoder writes a row of answers (stage.answer_length, or as much as is not the picture's).
    """
    stage, dtype, key = recipe.stages[name], recipe.model.dtype, f"stages.{name}"
    params, used = multimodal.shapes(config), config.without(stage.idle)
    selection = select(params, stage.trainable, f"{key}.trainable")
    trainable = shapes(params, selection, stage.param_dtype)
    # the number of steps bends the schedule, not the state
    optimizer = make_optimizer(stage.optimizer, trainable, stage.steps or 1, f"{key}.optimizer")
    state = state_shapes(trainable, optimizer)
    trained = selection.count(params)
    tiles, tokens = (_picture(recipe, config) if stage.tiled else None) or (1, used.tokens_per_tile)
    per_row = max(1, stage.tiles // tiles) if stage.packing else 1
    length = stage.length / per_row
    media = tokens if stage.objective == "language" and stage.tiles else 0
    beside = stage.length if stage.objective == "contrastive" else recipe.model.connector.text_length
    cost = flops.training_flops(used, selection, stage.objective, beside)
    encoded = not stage.cache_features
    if stage.objective != "language":
        length, per_row = float(stage.length) if stage.objective == "contrastive" else 0.0, 1
        parts = cost.count([], 0, 1, encoded)
    else:
        supervised, tiles = max(0.0, length - media), tiles if stage.tiles else 0
        sequence_to_sequence = config.llm is not None and config.llm.encoder is not None
        if sequence_to_sequence and stage.answer_length:
            supervised = stage.answer_length / per_row
        lengths, sources = ([supervised], [length]) if sequence_to_sequence else ([length], [])
        parts = cost.count(lengths, supervised, tiles, encoded, sources)
    per_sample = sum(parts.values())
    figures = (
        trained,
        held_bytes(params, dtype) - trained * jnp.dtype(dtype).itemsize + _bytes(state.trainable),
        _bytes(state.trainable),
        _bytes(state.optimizer),
        length,
        per_sample,
        per_sample * per_row * stage.rows,
    )
    return dict(zip(FIGURES, figures, strict=True))


def _picture(recipe: Recipe, config: ModelConfig) -> tuple[int, int] | None:
    """Tiles and tokens of a large square picture; None where pictures are one tile."""
    tiling = of_recipe(recipe.model.image)
    if tiling is None or config.connector is None:
        return None
    side = config.picture_size
    pictures = PictureTokens(config.connector.tokens, (side, side), tiling, config.merge)
    return pictures.tiles((4 * side, 4 * side)), len(pictures.order((4 * side, 4 * side)))


def held_bytes(params: Params, dtype: str) -> int:
    """Bytes of frozen parameters: quantised kernels as they are held, the rest in `dtype`."""
    size = jnp.dtype(dtype).itemsize
    flat = tree.flatten(params)
    return sum(_bytes(leaf) if quantised.is_part(path) else math.prod(leaf.shape) * size for path, leaf in flat.items())


def _bytes(leaves: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))
