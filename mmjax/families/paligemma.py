"""PaliGemma (arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555) in transformers' layout: a SigLIP tower, one Linear, a Gemma.

`token_type_ids` tell prompt (0: image and question, which see each other both ways) from answer (1, causal). Without them all of a row
is prompt, padded or not. (There transformers 5 depends on the attention kernel: nothing is masked for rows without padding, all is
causal with it.) Text embeddings are scaled, image tokens are not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families import language, llava, parts
from mmjax.families.family import Config, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, prefixed
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, ViTConfig
from mmjax.tree import Params

TOWER = "siglip_vision_model"
FEATURES = FeatureSpec((-1,), post_norm=True)
PLACEHOLDER = 256000  # where a config names none
INPUTS = (*language.INPUTS, "token_type_ids", "pixel_values")


def _parts(config: Config, where: str) -> tuple[Config, Config]:
    """text_config and vision_config, of which the whole says whether the head is tied and what prompts see."""
    fields = Fields(config, where)
    text = fields.part("text_config", "gemma")
    Fields(text, f"{where}: text_config").only("use_bidirectional_attention", True)
    text = {name: value for name, value in text.items() if name != "use_bidirectional_attention"}
    return {**text, "tie_word_embeddings": fields.get("tie_word_embeddings", True)}, fields.part("vision_config", TOWER)


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("quantization_config")
    text, image = _parts(config, where)
    llm = parts.language(text, f"{where}: text_config").read_config(text, f"{where}: text_config").language
    tower = parts.vision(image, f"{where}: vision_config").read_config(image, f"{where}: vision_config")
    assert tower.vision is not None
    width = fields.get("projection_dim", 2048)
    if width != llm.input_width:
        raise UserError(f"{where}: projection_dim = {width}, but the language model's embeddings have {llm.input_width} channels")
    return dataclasses.replace(
        tower,
        llm=llm,
        connector=ConnectorConfig("linear", tower.vision.feature_width, width, tower.vision.positions),
        features=FEATURES,
        mask="prefix",
    )


def unfit(config: ModelConfig) -> str:
    """Why transformers' PaliGemma cannot hold a model; "" if it can."""
    c = config.connector
    if config.llm is None or not isinstance(config.vision, ViTConfig) or c is None:
        return "it needs a language model, a vision transformer and a connector"
    if c != ConnectorConfig("linear", config.vision.feature_width, config.llm.input_width, config.vision.positions):
        return "its connector is one Linear over every position"
    if config.features != FEATURES or config.mask != "prefix":
        return "its connector reads the encoder's last states behind the norm, and its mask is 'prefix'"
    return ""


def _write(config: ModelConfig, base: Config) -> Config:
    if why := unfit(config):
        raise UserError(f"the model does not fit the Hugging Face paligemma layout: {why}")
    text, image = _parts(base, "the model's config")
    written = parts.language(text, "text_config").write_config(config, text)
    before = {name: value for name, value in base["text_config"].items() if name == "use_bidirectional_attention"}
    llm = config.language
    return {
        **base,
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "text_config": {**written, **before},
        "vision_config": parts.vision(image, "vision_config").write_config(config, image),
        "image_token_index": placeholder(base),
        "projection_dim": llm.input_width,
        "tie_word_embeddings": llm.tied_head,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    return [*part_rules(config, *_parts(foreign, "the model's config")), *linear("multi_modal_projector.linear", "connector/layers_0")]


def part_rules(config: ModelConfig, text: Config, image: Config) -> list[Rule]:
    """The rules of language model and tower."""
    return [
        *prefixed("language_model.", parts.language(text, "text_config").rules(config, text)),
        *prefixed("vision_tower.", parts.vision(image, "vision_config").rules(config, image)),
    ]


def placeholder(config: Config, default: int = PLACEHOLDER) -> int:
    """The id that stands for one image token."""
    names = ("image_token_index", "image_token_id")
    return int(next((config[name] for name in names if config.get(name) is not None), default))


def batch(config: ModelConfig, inputs: Inputs, placeholder: int) -> tuple[Batch, np.ndarray | None]:
    """The batch of foreign inputs, and their token_type_ids if there are any."""
    given = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    found, kinds = llava.batch(config, {"image_token_index": placeholder}, given), inputs.get("token_type_ids")
    if kinds is not None and kinds.shape != inputs["input_ids"].shape:
        raise UserError(f"token_type_ids {list(kinds.shape)} and input_ids {list(inputs['input_ids'].shape)} differ in shape")
    return found, kinds


def _batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    found, kinds = batch(config, inputs, placeholder(foreign))
    segments = np.asarray(found.segments)
    return dataclasses.replace(found, spans=segments if kinds is None else np.where(kinds == 0, segments, 0).astype(np.int32))


def _prompt(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    """Positions count from 1."""
    found = _batch(config, foreign, inputs)
    return dataclasses.replace(found, positions=found.positions + 1)


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    ids = inputs.get("input_ids", np.zeros((0, 0), int))
    slots: Any = np.broadcast_to(np.arange(ids.shape[-1]) + 1, ids.shape)
    rows = _batch(config, foreign, {"position_ids": slots, **inputs})
    return language.run_language(params, rows, config=config, run=run, states=states)


FAMILY = dataclasses.replace(
    llava.FAMILY,
    model_types=("paligemma",),
    about="PaliGemma and PaliGemma 2 (arXiv 2407.07726, 2412.03555)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=INPUTS,
    outputs=_outputs,
    prompt=_prompt,
)
