"""CLIP's vision tower (arXiv 2103.00020) in transformers' layout."""

from __future__ import annotations

from mmjax.families import vision
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, norm, patches, rule
from mmjax.families.towers import architecture, block_rules, read_block, tower, write_tower
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def read_tower(fields: Fields, projection: int = 0) -> ViTConfig:
    """CLIP's vision_config."""
    return ViTConfig(
        image_size=fields.square("image_size", 224),
        patch_size=fields.square("patch_size", 32),
        channels=fields.get("num_channels", 3),
        layers=fields.get("num_hidden_layers", 12),
        block=read_block(fields, 768, 12, 3072, "quick_gelu", 1e-5),
        class_token=True,
        patch_bias=False,
        pre_norm=True,
        post_norm="pooled",
        pooling="class_token",
        projection=projection,
    )


def tower_rules(encoder: ViTConfig) -> list[Rule]:
    """The names of the tower alone, without the projection."""
    return [
        rule("vision_model.embeddings.class_embedding", "vision/class_embedding"),
        rule("vision_model.embeddings.patch_embedding.weight", "vision/patch/kernel", form=patches(encoder.channels)),
        rule("vision_model.embeddings.position_embedding.weight", "vision/positions"),
        *norm("vision_model.pre_layrnorm", "vision/pre_norm"),
        *block_rules("vision_model.encoder.layers.{i}.", "vision/layers/"),
        *norm("vision_model.post_layernorm", "vision/post_norm"),
    ]


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    encoder = tower(config)
    table = tower_rules(encoder)
    return table + linear("visual_projection", "vision/projection", bias=False) if encoder.projection else table


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    architecture(fields)
    projected = "CLIPVisionModelWithProjection" in fields.get("architectures", [])
    encoder = read_tower(fields, fields.get("projection_dim", 512) if projected else 0)
    return ModelConfig(vision=encoder, image_mean=MEAN, image_std=STD, image_aspect="crop")


def _write(config: ModelConfig, base: Config) -> Config:
    encoder = tower(config)
    written = write_tower(encoder, base, "clip_vision_model")
    if encoder.projection:
        written["projection_dim"] = encoder.projection
    return {**written, "architectures": ["CLIPVisionModelWithProjection" if encoder.projection else "CLIPVisionModel"]}


FAMILY = Family(
    model_types=("clip_vision_model",),
    about="CLIP's vision tower, with or without its projection (arXiv 2103.00020)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=vision.INPUTS,
    outputs=vision.outputs,
    spellings=((r"^(?=(embeddings|pre_layrnorm|encoder|post_layernorm)\.)", "vision_model."),),
)
