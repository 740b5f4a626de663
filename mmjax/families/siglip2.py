"""SigLIP 2 (arXiv 2502.14786) with a NaFlex vision tower, in transformers' layout. Beside that tower it is SigLIP."""

from __future__ import annotations

import dataclasses

from mmjax.families import siglip, siglip2_vision, text_towers, vision
from mmjax.families.family import Config
from mmjax.families.siglip import read, write
from mmjax.families.towers import tower
from mmjax.models.config import ModelConfig


def _read(config: Config, where: str) -> ModelConfig:
    return read(config, where, siglip2_vision.read_tower)


def _write(config: ModelConfig, base: Config) -> Config:
    image = siglip2_vision.write(tower(config), base.get("vision_config", {}))
    return write(config, base, image, "siglip2", "Siglip2Model")


FAMILY = dataclasses.replace(
    siglip.FAMILY,
    model_types=("siglip2",),
    about="SigLIP 2 with pictures of any shape (arXiv 2502.14786)",
    read_config=_read,
    write_config=_write,
    inputs=(*vision.NAFLEX_INPUTS, *text_towers.INPUTS),
)
