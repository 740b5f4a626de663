"""CLIP (arXiv 2103.00020) in transformers' layout: two towers and a scale. LLaVA's vision tower is published inside of
it.
"""

from __future__ import annotations

from mmjax.families import clip_vision, vision
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, rule
from mmjax.families.siglip import text_rules
from mmjax.families.towers import architecture, read_block, tower, write_block, write_tower
from mmjax.models.config import ModelConfig, TextTowerConfig


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("quantization_config")
    architecture(fields)
    projection = fields.get("projection_dim", 512)
    image = Fields(fields.part("vision_config", "clip_vision_model"), f"{where}: vision_config")
    text = Fields(fields.part("text_config", "clip_text_model"), f"{where}: text_config")
    return ModelConfig(
        vision=clip_vision.read_tower(image, projection),
        text=TextTowerConfig(
            vocab_size=text.get("vocab_size", 49408),
            layers=text.get("num_hidden_layers", 12),
            block=read_block(text, 512, 8, 2048, "quick_gelu", 1e-5),
            max_positions=text.get("max_position_embeddings", 77),
            causal=True,
            pooling="end_of_text",
            projection=projection,
            projection_bias=False,
            end_of_text=text.get("eos_token_id", 49407),
        ),
        image_mean=clip_vision.MEAN,
        image_std=clip_vision.STD,
        image_aspect="crop",
    )


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.text is not None
    encoder, text, before = tower(config), config.text, base.get("text_config", {})
    return {
        **base,
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": encoder.projection,
        "vision_config": write_tower(encoder, base.get("vision_config", {}), "clip_vision_model"),
        "text_config": {
            **before,
            "model_type": "clip_text_model",
            **write_block(text.block, text.layers, before),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_positions,
            "eos_token_id": text.end_of_text,
        },
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    return [
        *clip_vision.tower_rules(tower(config)),
        *linear("visual_projection", "vision/projection", bias=False),
        *text_rules(linear("text_projection", "text/projection", bias=False)),
        rule("logit_scale", "logit_scale"),
    ]


FAMILY = Family(
    model_types=("clip",),
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=(*vision.INPUTS, *vision.TEXT_INPUTS),
    outputs=vision.two_tower_outputs,
)
