"""InternVL's vision tower (arXiv 2312.14238) in transformers' layout."""

from __future__ import annotations

import dataclasses

from mmjax.families import vision
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, norm, rule
from mmjax.families.towers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    architecture,
    embedding_rules,
    norm_rules,
    read_block,
    tower,
    write_tower,
)
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig


def read_tower(fields: Fields) -> ViTConfig:
    """InternVL's vision_config."""
    mean = fields.get("use_mean_pooling", True)
    return ViTConfig(
        image_size=fields.square("image_size", 448),
        patch_size=fields.square("patch_size", 14),
        channels=fields.get("num_channels", 3),
        layers=fields.get("num_hidden_layers", 24),
        block=_block(fields),
        class_token=True,
        mask_token=fields.get("use_mask_token", False),
        learned_positions=fields.get("use_absolute_position_embeddings", True),
        post_norm="" if mean else "states",
        pooling="mean" if mean else "class_token",
    )


def _block(fields: Fields) -> BlockConfig:
    fields.only("norm_type", "layer_norm", "rms_norm")
    return dataclasses.replace(
        read_block(fields, 1024, 16, 4096, "gelu", 1e-6),
        norm="rms" if fields.get("norm_type", "layer_norm") == "rms_norm" else "layer",
        qkv_bias=fields.get("attention_bias", False),
        qk_norm="rms" if fields.get("use_qk_norm", False) else "",
        qk_norm_over="width",
        qk_norm_eps=1e-6,  # whatever the config's is
        layer_scale=True,
    )


def write(encoder: ViTConfig, base: Config) -> Config:
    block = encoder.block
    return {
        **write_tower(encoder, base, "internvl_vision"),
        "norm_type": "rms_norm" if block.norm == "rms" else "layer_norm",
        "attention_bias": block.qkv_bias,
        "use_qk_norm": bool(block.qk_norm),
        "use_mask_token": encoder.mask_token,
        "use_absolute_position_embeddings": encoder.learned_positions,
        "use_mean_pooling": encoder.pooling == "mean",
    }


def tower_rules(encoder: ViTConfig) -> list[Rule]:
    block, theirs, ours = encoder.block, "encoder.layer.{i}.", "vision/layers/"
    table = [
        *embedding_rules(encoder),
        *norm_rules(theirs, ours, ("layernorm_before", "layernorm_after"), bias=block.norm == "layer"),
        rule(theirs + "lambda_1", ours + "attention_scale"),
        rule(theirs + "lambda_2", ours + "mlp_scale"),
        *linear(theirs + "attention.projection_layer", ours + "attention/output"),
        *linear(theirs + "mlp.fc1", ours + "mlp/up"),
        *linear(theirs + "mlp.fc2", ours + "mlp/down"),
    ]
    for name, path in (("q", "query"), ("k", "key"), ("v", "value")):
        table += linear(f"{theirs}attention.{name}_proj", f"{ours}attention/{path}", block.qkv_bias)
        if block.qk_norm and name != "v":
            table += norm(f"{theirs}attention.{name}_norm", f"{ours}attention/{path}_norm", bias=False)
    return table + norm("layernorm", "vision/post_norm") if encoder.post_norm else table


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    return tower_rules(tower(config))


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    architecture(fields)
    return ModelConfig(vision=read_tower(fields), image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)


def _write(config: ModelConfig, base: Config) -> Config:
    return {**write(tower(config), base), "architectures": ["InternVLVisionModel"]}


FAMILY = Family(
    model_types=("internvl_vision",),
    about="InternViT (arXiv 2312.14238)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=vision.INPUTS,
    outputs=vision.outputs,
)
