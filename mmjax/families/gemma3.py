"""Gemma 3 with pictures (arXiv 2503.19786) in transformers' layout: a SigLIP tower in front of its text model.

A picture's features are averaged to `mm_tokens_per_image`, normed and projected. `token_type_ids` mark image tokens by 1: each unbroken
run of them sees itself both ways, in sliding layers within the window. Without them all is causal, as in transformers.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families import language, llama, llava, paligemma, parts
from mmjax.families.family import Config, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, norm, rule
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, ViTConfig
from mmjax.spans import runs
from mmjax.tree import Params

FEATURES = FeatureSpec((-1,), post_norm=True)
PLACEHOLDER = 262144  # where a config names none


def _parts(config: Config, where: str) -> tuple[Config, Config]:
    """text_config and vision_config; whether the head is tied, the whole says."""
    fields = Fields(config, where)
    text = fields.part("text_config", "gemma3_text")
    Fields(text, f"{where}: text_config").only("final_logit_softcapping", None)
    return {**text, "tie_word_embeddings": fields.get("tie_word_embeddings", True)}, fields.part("vision_config", paligemma.TOWER)


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("quantization_config")
    text, image = _parts(config, where)
    llm = parts.language(text, f"{where}: text_config").read_config(text, f"{where}: text_config").language
    tower = parts.vision(image, f"{where}: vision_config").read_config(image, f"{where}: vision_config")
    assert isinstance(tower.vision, ViTConfig)
    return dataclasses.replace(
        tower,
        llm=llm,
        connector=_projector(tower.vision, llm.input_width, fields.get("mm_tokens_per_image", 256), where),
        features=FEATURES,
        mask="media",
    )


def _projector(tower: ViTConfig, width: int, tokens: int, where: str) -> ConnectorConfig:
    grid, side = math.isqrt(tokens), math.isqrt(tower.positions)
    if grid**2 != tokens or not grid or side % grid:
        raise UserError(f"{where}: mm_tokens_per_image = {tokens} are no square that divides the {side} x {side} patches of a picture")
    return ConnectorConfig(
        "linear",
        tower.feature_width,
        width,
        tower.positions,
        bias=False,
        grid=grid,
        input_norm=True,
        norm="rms_plus_one",
        norm_eps=tower.block.norm_eps,
    )


def _write(config: ModelConfig, base: Config) -> Config:
    c = config.connector
    fits = config.llm is not None and isinstance(config.vision, ViTConfig) and c is not None and bool(c.grid)
    fits = fits and c == _projector(config.vision, config.llm.input_width, c.grid**2, "the model")  # type: ignore[arg-type, union-attr]
    llama.require(fits and config.features == FEATURES and config.mask == "media", "Gemma 3", "its connector or its mask is another")
    assert c is not None
    text, image = _parts(base, "the model's config")
    return {
        **base,
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": parts.language(text, "text_config").write_config(config, text),
        "vision_config": parts.vision(image, "vision_config").write_config(config, image),
        "image_token_index": paligemma.placeholder(base, PLACEHOLDER),
        "mm_tokens_per_image": c.tokens,
        "tie_word_embeddings": config.language.tied_head,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    return [
        *paligemma.part_rules(config, *_parts(foreign, "the model's config")),
        *norm("multi_modal_projector.mm_soft_emb_norm", "connector/input_norm", bias=False),
        rule("multi_modal_projector.mm_input_projection_weight", "connector/layers_0/kernel"),
    ]


def _batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    found, kinds = paligemma.batch(config, inputs, paligemma.placeholder(foreign, PLACEHOLDER))
    return dataclasses.replace(found, spans=None if kinds is None else runs(kinds == 1, np.asarray(found.segments)))


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    ids = inputs.get("input_ids", np.zeros((0, 0), int))
    slots = np.broadcast_to(np.arange(ids.shape[-1]), ids.shape)
    batch = _batch(config, foreign, {"position_ids": slots, **inputs})
    return language.run_language(params, batch, config=config, run=run, states=states)


FAMILY = dataclasses.replace(
    llava.FAMILY,
    model_types=("gemma3",),
    about="Gemma 3 with pictures (arXiv 2503.19786)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=paligemma.INPUTS,
    outputs=_outputs,
    prompt=_batch,
)
