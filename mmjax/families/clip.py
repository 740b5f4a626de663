"""CLIP (arXiv 2103.00020) in transformers' layout: two towers and a scale. LLaVA's vision tower is published inside of
it.
"""

from __future__ import annotations

from mmjax.families import clip_vision, text_towers, vision
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, rule
from mmjax.families.towers import architecture, tower, write_tower
from mmjax.models.config import ModelConfig


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("quantization_config")
    architecture(fields)
    projection = fields.get("projection_dim", 512)
    image = Fields(fields.part("vision_config", "clip_vision_model"), f"{where}: vision_config")
    text = Fields(fields.part("text_config", "clip_text_model"), f"{where}: text_config")
    return ModelConfig(
        vision=clip_vision.read_tower(image, projection),
        text=text_towers.read_clip(text, projection),
        image_mean=clip_vision.MEAN,
        image_std=clip_vision.STD,
        image_aspect="crop",
    )


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.text is not None
    encoder = tower(config)
    return {
        **base,
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": encoder.projection,
        "vision_config": write_tower(encoder, base.get("vision_config", {}), "clip_vision_model"),
        "text_config": text_towers.write(config.text, base.get("text_config", {}), "clip_text_model"),
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    return [
        *clip_vision.tower_rules(tower(config)),
        *linear("visual_projection", "vision/projection", bias=False),
        *text_towers.rules(config),
        rule("logit_scale", "logit_scale"),
    ]


FAMILY = Family(
    model_types=("clip",),
    about="CLIP (arXiv 2103.00020)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=(*vision.INPUTS, *text_towers.INPUTS),
    outputs=vision.two_tower_outputs,
)
