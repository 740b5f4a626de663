"""LLaVA-NeXT (LLaVA 1.6) in transformers' layout: LLaVA's, with pictures in tiles and a learned newline.

`pixel_values` [images, most tiles, channels, height, width] hold the overview and the tiles of each picture, padded on tiles (or
[tiles, channels, height, width], those of all pictures), and `image_sizes` the pictures' own (height, width). From these follow
the grid, chosen from the config's `image_grid_pinpoints`, and how many placeholders each picture has in `input_ids`.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.batch import Batch
from mmjax.data.picture_tokens import order, together
from mmjax.data.tiling import AnyRes
from mmjax.errors import UserError
from mmjax.families import language, llava
from mmjax.families.family import Config, Inputs
from mmjax.families.keys import Rule, rule
from mmjax.models.config import Execution, ModelConfig
from mmjax.tree import Params

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _read(config: Config, where: str) -> ModelConfig:
    read = llava.FAMILY.read_config(config, where)
    assert read.connector is not None
    if read.connector.positions != read.encoder.positions:
        raise UserError(
            f"{where}: the connector reads this vision tower's class token or registers (vision_feature_select_strategy = "
            f"{config.get('vision_feature_select_strategy')!r}), but the tokens of tiles are put together as square maps, which have "
            "no place for them"
        )
    tiling(config, read, where)
    return dataclasses.replace(read, connector=dataclasses.replace(read.connector, merge="spatial_unpad"))


def tiling(foreign: Config, config: ModelConfig, where: str = "config.json") -> AnyRes:
    """How the config says that pictures are cut. Raises UserError for canvases that are not in whole tiles."""
    canvases, side = foreign.get("image_grid_pinpoints") or PINPOINTS, config.encoder.image_size
    return AnyRes(grids(canvases, side, f"{where}: image_grid_pinpoints"))


def grids(canvases: Sequence[Sequence[int]], side: int, name: str) -> tuple[tuple[int, int], ...]:
    """Canvases in pixels as grids of tiles of this side. Raises UserError for one that is not in whole tiles."""
    if not canvases or any(pixels % side or pixels < side for canvas in canvases for pixels in canvas):
        raise UserError(f"{name} = {canvases} are not in whole tiles of {side} pixels")
    return tuple((first // side, second // side) for first, second in canvases)


def expressible(config: ModelConfig, text: Config, image: Config) -> str:
    """Why this layout cannot hold a model; "" if it can."""
    if config.connector is not None and config.connector.positions != config.encoder.positions:
        return "its tokens are square maps without a class token"
    return llava.expressible(config, text, image, "spatial_unpad")


def _write(config: ModelConfig, base: Config) -> Config:
    return {
        **llava.written(config, base, "spatial_unpad"),
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_grid_pinpoints": base.get("image_grid_pinpoints") or PINPOINTS,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    return [*llava.FAMILY.rules(config, foreign), rule("image_newline", "connector/newline")]


def _batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    return _placed(config, foreign, inputs)[0]


def _placed(config: ModelConfig, foreign: Config, inputs: Inputs) -> tuple[Batch, list[np.ndarray]]:
    """The batch of foreign inputs, and the media tokens of each picture. Raises UserError where they do not agree in number."""
    rows = language.text_batch(config, inputs, llava.placeholder(foreign))
    found = int((np.asarray(rows.media) >= 0).sum())
    if "pixel_values" not in inputs:
        if found:
            raise UserError(f"input_ids hold {found} image tokens, but no pixel_values are given")
        return rows, []
    if "image_sizes" not in inputs:
        raise UserError("image_sizes are missing: the height and width of each picture before it was cut into tiles")
    sizes, side = np.asarray(inputs["image_sizes"]).reshape(-1, 2).tolist(), config.encoder.image_size
    cut = tiling(foreign, config)
    layouts = [cut.layout(height, width, (side, side)) for height, width in sizes]
    counts = [layout.tiles for layout in layouts]
    images = tiles_of(inputs["pixel_values"], counts, side, "pixel_values")
    per_tile = config.tokens_per_tile
    merge = config.connector.merge if config.connector else "flat"
    orders = [order(layout, tuple(size), per_tile, merge, cut.rounded) for layout, size in zip(layouts, sizes)]
    places = together(orders, counts, per_tile, len(images))
    if found != len(places):
        each = ", ".join(f"{len(o)} of {height} x {width}" for o, (height, width) in zip(orders, sizes))
        raise UserError(f"input_ids hold {found} image tokens, but the pictures have {len(places)}: {each}")
    media = np.asarray(rows.media)
    media = np.where(media >= 0, np.append(places, 0)[media], -1).astype(np.int32)
    ends = np.cumsum([len(o) for o in orders])[:-1]
    return llava.with_images(dataclasses.replace(rows, media=media), images), np.split(places, ends) if orders else []


def tiles_of(pixels: np.ndarray, counts: Sequence[int], side: int, name: str) -> np.ndarray:
    """The tiles of all pictures, float32 [tiles, height, width, channels], of foreign pixels that are padded on tiles, or stand
    one behind another. Raises UserError where they are too few, or of another size."""
    pixels = np.asarray(pixels, np.float32)
    if pixels.ndim not in (4, 5) or pixels.shape[-2:] != (side, side):
        raise UserError(
            f"{name} are [images, tiles, channels, {side}, {side}] or [tiles, channels, {side}, {side}], not {list(pixels.shape)}"
        )
    if pixels.ndim == 5:
        if len(pixels) != len(counts) or max(counts, default=0) > pixels.shape[1]:
            raise UserError(f"{name} hold {len(pixels)} pictures of {pixels.shape[1]} tiles; their sizes say {list(counts)} tiles")
        pixels = np.concatenate([picture[:count] for picture, count in zip(pixels, counts)]) if counts else pixels[:0, 0]
    elif len(pixels) != sum(counts):
        raise UserError(f"{name} hold {len(pixels)} tiles; the sizes of the pictures say {list(counts)}")
    return pixels.transpose(0, 2, 3, 1)


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    """Beside LLaVA's outputs the tokens of each picture, `connector_output_k`, and how many they are, `feature_lengths`."""
    batch, places = _placed(config, foreign, inputs)
    found = language.run_language(params, batch, config=config, run=run, states=states)
    if "connector_output" in found:
        connected = found.pop("connector_output")
        newline = params["connector"]["newline"].astype(connected.dtype)
        tokens = jnp.concatenate([connected.reshape(-1, connected.shape[-1]), newline[None]])
        found.update({f"connector_output_{k}": tokens[place] for k, place in enumerate(places)})
        found["image_hidden_states"] = tokens[np.concatenate(places)]
        found["feature_lengths"] = jnp.array([len(place) for place in places])
    return found


FAMILY = dataclasses.replace(
    llava.FAMILY,
    model_types=("llava_next",),
    about="LLaVA-NeXT, that is LLaVA 1.6 (https://llava-vl.github.io/blog/2024-01-30-llava-next)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=(*llava.FAMILY.inputs, "image_sizes"),
    outputs=_outputs,
    prompt=_batch,
    tiling=tiling,
    spellings=((r"^model\.image_newline$", "image_newline"), *llava.FAMILY.spellings),
    modules=((r"^image_newline$", "model.image_newline"), *llava.FAMILY.modules),
)
