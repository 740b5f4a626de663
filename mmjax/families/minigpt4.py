"""MiniGPT-4 (arXiv 2304.10592) in its authors' own layout: `model_type` minigpt4. An EVA ViT, BLIP-2's Q-Former and one Linear in front
of Vicuna; the Llama-2 variant has no Q-Former, but four neighbouring patches side by side.

Inputs: `image` [n, 3, height, width]; `input_ids` [rows, length] in which -200 stands once for each token of an image, `attention_mask`
and `labels`. Outputs are the language model's, `image_features` [n, positions, width] with the class token and `connector_output`
[n, tokens, LLM width]; with labels also `labels` and `spliced_attention_mask`, as they reach the language model.

The authors' checkpoints hold `llama_proj` alone; a recipe puts it between the parts (model.connector.path).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families import blip_2_vision, eva, language, lavis, llama, llava
from mmjax.families import qformer as names
from mmjax.families.blip_2 import FEATURES
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, prefixed
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, ViTConfig
from mmjax.tree import Params

IMAGE = -200
PATCHES = FeatureSpec(layers=(-1,), post_norm=True)
PROJECTION = "llama_proj"
GROUP = 4  # patches that the variant without a Q-Former puts side by side


def _llama(config: Config) -> Config:
    return Fields(config).part("llama_config", "llama")


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    tower = eva.read(Fields(fields.part("vision_config", "eva"), f"{where}: vision_config"))
    llm = llama.FAMILY.read_config(_llama(config), f"{where}: llama_config").llm
    assert llm is not None
    widths = tower.feature_width, llm.input_width
    if fields.get("has_qformer", True):
        own = Fields(fields.part("qformer_config", "qformer"), f"{where}: qformer_config")
        positions = FEATURES.positions(tower)
        connector = names.read(own, fields.get("num_query_token", 32), *widths, positions, text=False)
    else:
        connector = ConnectorConfig("concat", *widths, PATCHES.positions(tower), depth=1, group=GROUP)
    return ModelConfig(
        llm=llm,
        vision=tower,
        connector=connector,
        features=FEATURES if connector.kind == "qformer" else PATCHES,
        image_mean=blip_2_vision.MEAN,
        image_std=blip_2_vision.STD,
    )


def expressible(config: ModelConfig) -> str:
    """Why this layout cannot hold a model; "" if it can."""
    c, tower = config.connector, config.vision
    if config.llm is None or not isinstance(tower, ViTConfig) or c is None or tower.block.key_bias:
        return "it needs a language model, EVA's ViT and a connector"
    joined = ConnectorConfig("concat", c.in_width, c.out_width, c.positions, depth=1, group=GROUP)
    if c.kind != "qformer" and c != joined:
        return f"its connector is a Q-Former, or a Linear over {GROUP} neighbouring patches"
    if c.kind == "qformer" and (why := names.expressible(c)):
        return why
    if c.text_vocab or c.contrast_width:
        return "its Q-Former reads no text"
    if config.features != (FEATURES if c.kind == "qformer" else PATCHES):
        return "its connector reads the encoder's last states after their norm, a Q-Former with the class token, a Linear without"
    return ""


def _write(config: ModelConfig, base: Config) -> Config:
    if why := expressible(config):
        raise UserError(f"the model does not fit MiniGPT-4's layout: {why}")
    assert config.llm is not None and config.connector is not None and isinstance(config.vision, ViTConfig)
    c = config.connector
    queried = c.kind == "qformer"
    return {
        **base,
        "model_type": "minigpt4",
        "has_qformer": queried,
        "num_query_token": c.latents if queried else None,
        "qformer_config": names.write(c, base.get("qformer_config") or {}) if queried else None,
        "llama_config": llama.FAMILY.write_config(ModelConfig(llm=config.llm), _llama(base)),
        "vision_config": eva.write(config.vision, base.get("vision_config") or {}),
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.connector is not None and isinstance(config.vision, ViTConfig)
    queried = config.connector.kind == "qformer"
    own = lavis.qformer_rules(config.connector, PROJECTION) if queried else linear(PROJECTION, "connector/layers_0")
    return [*eva.rules(config.vision), *own, *prefixed("llama_model.", llama.FAMILY.rules(config, _llama(foreign)))]


def batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    rows = language.text_batch(config, inputs, IMAGE)
    pictures = {"pixel_values": inputs["image"]} if "image" in inputs else {}
    return llava.spliced(config, rows, pictures)


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, Any]:
    rows = batch(config, foreign, inputs)
    found: dict[str, Any] = language.run_language(params, rows, config=config, run=run, states=states)
    if "labels" in inputs:
        found["labels"] = jnp.asarray(inputs["labels"])
        found["spliced_attention_mask"] = np.asarray(rows.segments)
    return found


FAMILY = Family(
    model_types=("minigpt4",),
    about="MiniGPT-4 around Vicuna or Llama 2 (arXiv 2304.10592)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=("image", "input_ids", "attention_mask", "labels"),
    outputs=_outputs,
    prompt=batch,
    copies=lambda config: (
        {"llama_model.lm_head.weight": "llama_model.model.embed_tokens.weight"} if config.llm and config.llm.tied_head else {}
    ),
)
