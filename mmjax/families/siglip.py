"""SigLIP (arXiv 2303.15343) in transformers' layout: two towers, a scale and a bias."""

from __future__ import annotations

from typing import Callable

from mmjax.families import siglip_vision, text_towers, vision
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, leading, rule
from mmjax.families.towers import architecture, tower
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig


def read(config: Config, where: str, read_tower: Callable[[Fields], ViTConfig]) -> ModelConfig:
    """A model of SigLIP's kind around the vision tower that `read_tower` makes of vision_config."""
    fields = Fields(config, where)
    fields.only("quantization_config")
    architecture(fields)
    image = Fields(fields.part("vision_config", "siglip_vision_model"), f"{where}: vision_config")
    text = Fields(fields.part("text_config", "siglip_text_model"), f"{where}: text_config")
    return ModelConfig(
        vision=read_tower(image),
        text=text_towers.read_siglip(text),
        logit_bias=True,
        image_mean=siglip_vision.MEAN,
        image_std=siglip_vision.STD,
    )


def write(config: ModelConfig, base: Config, image: Config, model_type: str, architecture: str) -> Config:
    """`image`: the vision_config."""
    assert config.text is not None
    return {
        **base,
        "architectures": [architecture],
        "model_type": model_type,
        "vision_config": image,
        "text_config": text_towers.write(config.text, base.get("text_config", {}), f"{model_type}_text_model"),
    }


def _read(config: Config, where: str) -> ModelConfig:
    return read(config, where, siglip_vision.read_tower)


def _write(config: ModelConfig, base: Config) -> Config:
    image = siglip_vision.write(tower(config), base.get("vision_config", {}))
    return write(config, base, image, "siglip", "SiglipModel")


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    return [
        *siglip_vision.tower_rules(tower(config)),
        *text_towers.rules(config),
        rule("logit_scale", "logit_scale", form=leading(1)),
        rule("logit_bias", "logit_bias", form=leading(1)),
    ]


FAMILY = Family(
    model_types=("siglip",),
    about="SigLIP, and SigLIP 2 at a fixed size (arXiv 2303.15343)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=(*vision.INPUTS, *text_towers.INPUTS),
    outputs=vision.two_tower_outputs,
)
