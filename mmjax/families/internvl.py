"""InternVL (arXiv 2404.16821 and later) in transformers' layout: tiles of a picture are pictures of their own.

`pixel_values` [tiles, channels, height, width] hold the tiles of all pictures one behind another, and `input_ids` as many
placeholders as they have tokens. The tower's patches are put together 2 x 2 on channels, in front of a norm and a two-layer MLP.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families import internvl_vision, language, llava, parts
from mmjax.families.family import Config, Inputs
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, norm
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, ViTConfig
from mmjax.tree import Params

PLACEHOLDER = 151667


def _parts(config: Config, where: str) -> tuple[Config, Config]:
    """text_config and vision_config. Whether the head is tied the whole says, and by default it is."""
    fields = Fields(config, where)
    tied = fields.get("tie_word_embeddings", True)
    image = fields.part("vision_config", "internvl_vision")
    return {**fields.part("text_config", "qwen2"), "tie_word_embeddings": tied}, image


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("quantization_config")
    text, image = _parts(config, where)
    llm = parts.language(text, f"{where}: text_config").read_config(text, f"{where}: text_config").llm
    tower = parts.vision(image, f"{where}: vision_config").read_config(image, f"{where}: vision_config")
    layer = fields.get("vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise UserError(f"{where}: vision_feature_layer = {layer!r} is not supported (only one layer)")
    vision = tower.vision
    if llm is None or not isinstance(vision, ViTConfig) or not vision.class_token:
        raise UserError(f"{where}: vision_config is not an encoder with a class token, which this layout drops")
    fields.only("vision_feature_select_strategy", "default")
    group = int(1 / fields.get("downsample_ratio", 0.5))
    side = math.isqrt(vision.positions)
    if side % group:
        raise UserError(f"{where}: downsample_ratio puts {group} x {group} patches together, but a tile has {side} x {side}")
    # The output of the last block is read behind the tower's norm, if it has one; other layers in front of it.
    spec = FeatureSpec((layer,), post_norm=layer == -1 and vision.post_norm == "states")
    return ModelConfig(
        llm=llm,
        vision=vision,
        connector=ConnectorConfig(
            kind="space_to_depth",
            in_width=vision.feature_width,
            out_width=llm.input_width,
            positions=spec.positions(vision),
            group=group,
            input_norm=True,
            activation=fields.activation("projector_hidden_act", "gelu"),
        ),
        features=spec,
        image_mean=tower.image_mean,
        image_std=tower.image_std,
        image_aspect=tower.image_aspect,
    )


def expressible(config: ModelConfig, text: Config, image: Config) -> str:
    """Why this layout cannot hold a model; "" if it can."""
    c, vision, features = config.connector, config.vision, config.features
    if config.llm is None or not isinstance(vision, ViTConfig) or c is None:
        return "it needs a language model, a vision transformer and a connector"
    if config.mask != "causal" or config.cross_attention is not None:
        return "its language model reads media as tokens of the text, under a causal mask"
    if image["model_type"] not in internvl_vision.FAMILY.model_types:
        return f"transformers has no internvl around a {image['model_type']}"
    plain = c.depth == 2 and c.input_norm and c.bias and c.hidden_width in (0, c.out_width) and c.token_order == "rows"
    if c.kind != "space_to_depth" or not plain or c.squeeze_width or c.grid or c.merge != "flat":
        return "its connector puts patches together row by row, in front of a norm and a two-layer MLP as wide as the language model"
    read = len(features.layers) == 1 and features.post_norm == (features.layers[0] == -1 and vision.post_norm == "states")
    if not read or features.keep_class_token or features.joined or features.scales != (1,):
        return "its connector reads one of the encoder's states, the last one behind the encoder's norm, without the class token"
    return llava.unsuited(config.llm, text)


def _write(config: ModelConfig, base: Config) -> Config:
    text, image = _parts(base, "the model's config")
    if why := expressible(config, text, image):
        raise UserError(f"the model does not fit the Hugging Face internvl layout: {why}")
    assert config.connector is not None
    text = parts.language(text, "text_config").write_config(config, text)
    return {
        **{key: value for key, value in base.items() if key != "image_token_index"},
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text,
        "vision_config": parts.vision(image, "vision_config").write_config(config, image),
        "image_token_id": _placeholder(base),
        "image_seq_length": config.connector.tokens,
        "downsample_ratio": 1 / config.connector.group,
        "projector_hidden_act": activation_name(config.connector.activation, base.get("projector_hidden_act")),
        "vision_feature_layer": config.features.layers[0],
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    return [
        *llava.FAMILY.rules(config, {**foreign, **dict(zip(("text_config", "vision_config"), _parts(foreign, "the model's config")))}),
        *norm("multi_modal_projector.layer_norm", "connector/input_norm"),
    ]


def _placeholder(config: Config) -> int:
    named = any(config.get(name) is not None for name in ("image_token_index", "image_token_id"))
    return llava.placeholder(config) if named else PLACEHOLDER


def _batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    return llava.batch(config, {"image_token_id": _placeholder(foreign)}, inputs)


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    found = language.run_language(params, _batch(config, foreign, inputs), config=config, run=run, states=states)
    if "connector_output" in found:
        found["image_hidden_states"] = found["connector_output"]
    return found


FAMILY = dataclasses.replace(
    llava.FAMILY,
    model_types=("internvl",),
    about="InternVL (arXiv 2404.16821)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    outputs=_outputs,
    prompt=_batch,
    modules=(*llava.FAMILY.modules, (r"^vision_tower\.", "model.vision_tower.")),
)
