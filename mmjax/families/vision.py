"""Inputs and outputs of vision towers, and of two-tower models, as transformers names them.

Towers: `pixel_values` [images, channels, height, width] (normalised) to `last_hidden_state`, `pooler_output` and
`image_embeds` where the tower has them, and `hidden_states_i` on request. Two towers: also `input_ids`; outputs of
one tower bear its name, and a tower's `pooler_output` is then its embedding before it is normalised.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from mmjax.errors import UserError
from mmjax.families.family import Config, Inputs
from mmjax.models import multimodal, vit
from mmjax.models.config import Execution, ModelConfig, ViTConfig
from mmjax.tree import Params

INPUTS = ("pixel_values",)
TWO_TOWER_INPUTS = ("pixel_values", "input_ids", "attention_mask")


def pixels(inputs: Inputs, name: str = "pixel_values") -> np.ndarray:
    """Foreign pixels [images, channels, height, width] as ours [images, height, width, channels]."""
    if name not in inputs:
        raise UserError(f"{name} are missing")
    if inputs[name].ndim != 4:
        raise UserError(f"{name} are [images, channels, height, width], not {list(inputs[name].shape)}")
    return np.asarray(inputs[name], np.float32).transpose(0, 2, 3, 1)


def outputs(params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool) -> dict:
    found = _tower(params["vision"], pixels(inputs), config=config, run=run)
    kept = {name: found[name] for name in ("last_hidden_state", "pooler_output", "image_embeds") if name in found}
    return {**kept, **numbered("hidden_states", found["states"])} if states else kept


def two_tower_outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict:
    if "input_ids" not in inputs:
        raise UserError("input_ids are missing")
    ids = inputs["input_ids"].astype(np.int32)
    mask = inputs["attention_mask"].astype(np.int32) if "attention_mask" in inputs else None
    found = _two_tower(params, pixels(inputs), ids, mask, config=config, run=run)
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
def _tower(params: Params, images: jax.Array, *, config: ModelConfig, run: Execution) -> dict[str, jax.Array]:
    assert isinstance(config.vision, ViTConfig)
    states = vit.hidden_states(params, config.vision, images, run)
    found = {"states": states, "last_hidden_state": last_state(params, config.vision, states[-1])}
    if config.vision.pooling != "none":
        found["pooler_output"] = vit.pooled(params, config.vision, states[-1])
        if config.vision.projection:
            found["image_embeds"] = vit.project(params, config.vision, found["pooler_output"])
    return found


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _two_tower(
    params: Params, images: jax.Array, ids: jax.Array, mask: jax.Array | None, *, config: ModelConfig, run: Execution
) -> dict[str, jax.Array]:
    assert isinstance(config.vision, ViTConfig) and config.text is not None
    found = multimodal.two_tower(params, config, images, ids, run, mask)
    found["vision_last"] = last_state(params["vision"], config.vision, found["vision_states"][-1])
    found["image_projected"] = vit.project(params["vision"], config.vision, found["vision_pooled"])
    return found


def last_state(params: Params, config: ViTConfig, state: jax.Array) -> jax.Array:
    """transformers' last_hidden_state: CLIP's post-norm is for the class token alone, others' for all positions."""
    return state if config.pooling == "class_token" else vit.post_norm(params, config, state)
