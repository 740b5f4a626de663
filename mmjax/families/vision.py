"""Inputs and outputs of vision towers, and of two-tower models, as transformers names them.

Towers: `pixel_values` [images, channels, height, width] (normalised) to `last_hidden_state`, and as far as the tower
has them `pooler_output`, `image_embeds` and `logits`; `hidden_states_i` on request. Pictures of another size than the
tower's own have its positions interpolated, as transformers does it with `interpolate_pos_encoding` (which may be
given, and forbids it where it is false). A NaFlex tower takes pictures cut into patches instead: `pixel_values`
[images, patches, pixels of a patch], `spatial_shapes` [images, 2] and `pixel_attention_mask` [images, patches]; its
states are 0 at padding.

Two towers: also `input_ids`; outputs of one tower bear its name, and a tower's `pooler_output` is then its embedding
before it is normalised.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import UserError
from mmjax.families import text_towers
from mmjax.families.family import Config, Inputs
from mmjax.models import adapters, multimodal, plugged, vit
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ViTConfig
from mmjax.tree import Params

INPUTS = ("pixel_values", "interpolate_pos_encoding")
NAFLEX_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


def pixels(inputs: Inputs, name: str = "pixel_values") -> np.ndarray:
    """Foreign pixels [images, channels, height, width] as ours [images, height, width, channels]."""
    if name not in inputs:
        raise UserError(f"{name} are missing")
    if inputs[name].ndim != 4:
        raise UserError(f"{name} are [images, channels, height, width], not {list(inputs[name].shape)}")
    return np.asarray(inputs[name], np.float32).transpose(0, 2, 3, 1)


def pictures(config: ViTConfig, inputs: Inputs) -> np.ndarray | vit.Patches:
    """Foreign pictures as ours. Raises UserError for those that the tower cannot take."""
    if config.naflex:
        return _patches(config, inputs)
    found, side = pixels(inputs), config.native_side
    height, width = found.shape[1:3]
    other = (height // config.patch_size, width // config.patch_size) != (side, side)
    if other and not inputs.get("interpolate_pos_encoding", True):
        raise UserError(
            f"pixel_values of {height} x {width} need interpolated positions, "
            "which interpolate_pos_encoding = False forbids"
        )
    return found


def _patches(config: ViTConfig, inputs: Inputs) -> vit.Patches:
    for name in ("pixel_values", "spatial_shapes"):
        if name not in inputs:
            raise UserError(f"{name} are missing")
    values, shapes = np.asarray(inputs["pixel_values"], np.float32), inputs["spatial_shapes"].astype(np.int32)
    size = config.patch_size**2 * config.channels
    if values.ndim != 3 or values.shape[2] != size:
        raise UserError(f"pixel_values are [images, patches, {size}], not {list(values.shape)}")
    images, length = values.shape[:2]
    if shapes.shape != (images, 2) or (shapes < 1).any() or (shapes.prod(1) > length).any():
        raise UserError(
            f"spatial_shapes are the rows and columns of each of {images} images, of {length} patches at most; "
            f"not {shapes.tolist()}"
        )
    real = np.arange(length) < shapes.prod(1)[:, None]
    seen = np.asarray(inputs.get("pixel_attention_mask", real), np.int32)
    if seen.shape != (images, length):
        raise UserError(f"pixel_attention_mask is [{images}, {length}], not {list(seen.shape)}")
    return vit.Patches(values, shapes, seen)  # type: ignore[arg-type]


def outputs(params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool) -> dict:
    assert isinstance(config.vision, ViTConfig)
    found = _tower(adapters.merge(params, config)[0]["vision"], pictures(config.vision, inputs), config=config, run=run)
    hidden = found.pop("states")
    return {**found, **numbered("hidden_states", hidden)} if states else found


def two_tower_outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict:
    assert isinstance(config.vision, ViTConfig) and config.text is not None
    ids, mask = text_towers.inputs_of(config.text, inputs)
    found = _two_tower(adapters.merge(params, config)[0], pictures(config.vision, inputs), ids, mask, config=config, run=run)
    kept = {name: found[name] for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds")}
    kept.update(
        vision_last_hidden_state=found["vision_last"],
        vision_pooler_output=found["image_projected"],
        text_last_hidden_state=found["text_last"],
        text_pooler_output=found["text_embedding"],
    )
    if states:
        kept.update(numbered("vision_hidden_states", found["vision_states"]))
        kept.update(numbered("text_hidden_states", found["text_states"]))
    return kept


def numbered(name: str, states: jax.Array) -> dict[str, jax.Array]:
    return {f"{name}_{i}": states[i] for i in range(len(states))}


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _tower(params: Params, images: Any, *, config: ModelConfig, run: Execution) -> dict[str, jax.Array]:
    vision = config.vision
    assert isinstance(vision, ViTConfig)
    states = vit.hidden_states(params, vision, images, run, config.adapters, plugged.plugs(config, "vision"))
    found = {
        "states": _real(images, states),
        "last_hidden_state": _real(images, vit.last_state(params, vision, states[-1])),
    }
    if vision.pooling == "none":
        return found
    pooled = vit.pooled(params, vision, states[-1], images)
    if vision.classes:
        return {**found, "logits": vit.logits(params, vision, pooled)}
    found["pooler_output"] = vit.pooler(params, vision, pooled)
    if vision.projection:
        found["image_embeds"] = vit.project(params, vision, pooled)
    return found


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _two_tower(
    params: Params, images: Any, ids: jax.Array, mask: jax.Array | None, *, config: ModelConfig, run: Execution
) -> dict[str, jax.Array]:
    vision = config.vision
    assert isinstance(vision, ViTConfig)
    found = multimodal.two_tower(params, config, images, ids, run, mask)
    last = vit.last_state(params["vision"], vision, found["vision_states"][-1])
    found["vision_last"] = _real(images, last)
    found["vision_states"] = _real(images, found["vision_states"])
    found["image_projected"] = vit.project(params["vision"], vision, found["vision_pooled"])
    return found


def _real(images: vit.Pictures, states: jax.Array) -> jax.Array:
    """States [..., n, tokens, width] with 0 at padding."""
    return jnp.where(images.seen[..., None] > 0, states, 0) if isinstance(images, vit.Patches) else states
