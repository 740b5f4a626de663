"""doubutsu (qtnx and yeswondwerr, 2024; github.com/qrsch/doubutsu): SigLIP, a two-layer MLP, Qwen2; a row begins with its picture.

doubutsu         a picture for each row
doubutsu_next    the tiles of a picture, the overview first, share the rows equally; their tokens follow one another
doubutsu_pooled  a picture for each row, whose pooled state becomes one token
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families import language, llava, parts, prefixed, sequential, vision
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule
from mmjax.families.keys import prefixed as named_below
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, ViTConfig
from mmjax.tree import Params

FEATURES = {
    "doubutsu": FeatureSpec((-2,), keep_class_token=True),
    "doubutsu_next": FeatureSpec((-2,), keep_class_token=True),
    "doubutsu_pooled": FeatureSpec(pooled=True),
}


def _parts(config: Config, where: str) -> tuple[Config, Config]:
    fields = Fields(config, where)
    image = fields.part("vision_config", "siglip_vision_model")
    return fields.part("text_config", "qwen2"), {k: v for k, v in image.items() if k != "architectures"}


def _read(config: Config, where: str) -> ModelConfig:
    text, image = _parts(config, where)
    llm = parts.language(text, f"{where}: text_config").read_config(text, f"{where}: text_config").llm
    tower = parts.vision(image, f"{where}: vision_config").read_config(image, f"{where}: vision_config")
    assert llm is not None and isinstance(tower.vision, ViTConfig)
    spec = FEATURES[config["model_type"]]
    connector = ConnectorConfig("mlp", tower.vision.feature_width, llm.input_width, spec.positions(tower.vision))
    return ModelConfig(
        llm=llm,
        vision=tower.vision,
        connector=connector,
        features=spec,
        image_mean=tower.image_mean,
        image_std=tower.image_std,
        image_aspect=tower.image_aspect,
    )


def _write(config: ModelConfig, base: Config) -> Config:
    text, image = _parts(base, "the model's config")
    connector, vision_config = config.connector, config.vision
    assert connector is not None and isinstance(vision_config, ViTConfig)
    plain = ConnectorConfig("mlp", connector.in_width, connector.out_width, connector.positions)
    if connector != plain or config.features != FEATURES[base["model_type"]]:
        raise UserError(
            f"the model does not fit the layout of {base['model_type']}: there a two-layer MLP as wide as the language model reads "
            f"{FEATURES[base['model_type']]}"
        )
    return {
        **base,
        "text_config": parts.language(text, "text_config").write_config(config, text),
        "vision_config": parts.vision(image, "vision_config").write_config(config, image),
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.connector is not None
    text, image = _parts(foreign, "the model's config")
    return [
        *named_below("text_model.", parts.language(text, "text_config").rules(config, text)),
        *named_below("vision_model.", parts.vision(image, "vision_config").rules(config, image)),
        *sequential.rules("mm_projector.model", config.connector),
    ]


def batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    return splice(config, foreign, inputs)[0]


def splice(config: ModelConfig, foreign: Config, inputs: Inputs) -> tuple[Batch, Any]:
    """The batch, and its labels if there are any. Raises UserError where pictures and rows do not agree in number."""
    images, ids = vision.pixels(inputs), inputs.get("input_ids", ())
    config = config.for_pictures(*images.shape[1:3])
    tiles, over = divmod(len(images), len(ids) or 1)
    several = foreign["model_type"] == "doubutsu_next"
    if over or not tiles or (tiles > 1 and not several):
        takes = "equally many tiles for each" if several else "one for each"
        raise UserError(
            f"pixel_values are {len(images)} pictures for {len(ids)} rows of input_ids; a {foreign['model_type']} takes {takes}"
        )
    text, labels = prefixed.rows(config, inputs, tiles * config.tokens_per_tile)
    return llava.with_images(text, images), labels


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    whole, labels = splice(config, foreign, inputs)
    slots = np.broadcast_to(np.arange(whole.tokens.shape[1], dtype=np.int32), whole.tokens.shape)
    whole = dataclasses.replace(whole, positions=slots)  # as transformers counts where it is not told
    found: dict[str, Any] = language.run_language(params, whole, config=config, run=run, states=states)
    rows = len(inputs["input_ids"])
    for name in ("image_features", "connector_output"):
        found[name] = found[name].reshape(rows, -1, found[name].shape[-1])
    found["spliced_attention_mask"] = jnp.asarray(whole.segments)
    return found if labels is None else {**found, "spliced_labels": labels}


FAMILY = Family(
    model_types=tuple(FEATURES),
    about="doubutsu (qtnx and yeswondwerr, 2024)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=("input_ids", "attention_mask", "labels", "pixel_values"),
    outputs=_outputs,
    prompt=batch,
    spellings=((r"^vision_model\." + llava.TOWER, "vision_model.vision_model."),),
    copies=lambda config: (
        {"text_model.lm_head.weight": "text_model.model.embed_tokens.weight"} if config.language.tied_head else {}
    ),
    unneeded=("vision/head/**", "vision/projection/**"),
)
