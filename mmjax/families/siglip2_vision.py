"""SigLIP 2's NaFlex vision tower (arXiv 2502.14786) in transformers' layout.

The towers of one resolution are published as SigLIP's. In a multimodal model this one, too, reads square pictures of
one size; without another it is the square of `num_patches` patches.
"""

from __future__ import annotations

import dataclasses
import math

from mmjax.errors import UserError
from mmjax.families import siglip_vision, vision
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule
from mmjax.families.siglip_vision import MEAN, STD, tower_rules
from mmjax.families.towers import architecture, tower
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig


def read_tower(fields: Fields) -> ViTConfig:
    """SigLIP 2's vision_config."""
    patches = fields.get("num_patches", 256)
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UserError(f"{fields.where}: num_patches = {patches} is not supported (only squares)")
    encoder = siglip_vision.read_tower(fields)
    return dataclasses.replace(
        encoder, image_size=side * encoder.patch_size, interpolation="bilinear_antialias", naflex=True
    )


def write(encoder: ViTConfig, base: Config) -> Config:
    written = {**siglip_vision.write(encoder, base), "model_type": "siglip2_vision_model"}
    del written["image_size"]
    return {**written, "num_patches": encoder.native_side**2}


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    return tower_rules(tower(config))


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    architecture(fields)
    return ModelConfig(vision=read_tower(fields), image_mean=MEAN, image_std=STD)


def _write(config: ModelConfig, base: Config) -> Config:
    return {**write(tower(config), base), "architectures": ["Siglip2VisionModel"]}


FAMILY = Family(
    model_types=("siglip2_vision_model",),
    about="SigLIP 2's vision tower for pictures of any shape (arXiv 2502.14786)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=vision.NAFLEX_INPUTS,
    outputs=vision.outputs,
    spellings=siglip_vision.FAMILY.spellings,
)
