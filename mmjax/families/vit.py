"""ViT (arXiv 2010.11929) in transformers' layout, with its pooler, without it, or with a classifier in its place.

transformers' config does not say whether a file has the pooler: its tensors do, and a field of our own, `has_pooler`,
where we write one without.
"""

from __future__ import annotations

from typing import Mapping

from mmjax.checkpoints.safetensors import Stored
from mmjax.families import vision
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, linear, norm
from mmjax.families.towers import (
    architecture,
    attention_rules,
    classifier_rules,
    embedding_rules,
    norm_rules,
    read_block,
    read_classes,
    tower,
    with_attention,
    write_attention,
    write_classes,
    write_tower,
)
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig

CLASSIFIER = "ViTForImageClassification"
MEAN = STD = (0.5, 0.5, 0.5)


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    classes = read_classes(fields) if architecture(fields, CLASSIFIER) else 0
    block = with_attention(read_block(fields, 768, 12, 3072, "gelu", 1e-12), fields)
    pools = not classes and fields.get("has_pooler", True)
    act = fields.get("pooler_act", "tanh")
    encoder = ViTConfig(
        image_size=fields.square("image_size", 224),
        patch_size=fields.square("patch_size", 16),
        channels=fields.get("num_channels", 3),
        layers=fields.get("num_hidden_layers", 12),
        block=block,
        class_token=True,
        pooling="class_token",
        pooler=(fields.get("pooler_output_size", 0) or block.width) if pools else 0,
        pooler_activation="tanh" if act == "tanh" else fields.activation("pooler_act", "tanh"),
        classes=classes,
    )
    return ModelConfig(vision=encoder, image_mean=MEAN, image_std=STD)


def _write(config: ModelConfig, base: Config) -> Config:
    encoder = tower(config)
    written = {
        **write_tower(encoder, base, "vit"),
        **write_attention(encoder.block),
        **write_classes(encoder.classes, base),
        "architectures": [CLASSIFIER if encoder.classes else "ViTModel"],
    }
    if encoder.pooler:
        act = activation_name(encoder.pooler_activation, base.get("pooler_act"))
        return {**written, "pooler_output_size": encoder.pooler, "pooler_act": act}
    return written if encoder.classes else {**written, "has_pooler": False}


def _complete(config: Config, stored: Mapping[str, Stored]) -> Config:
    bare = "embeddings.cls_token" in stored and "pooler.dense.weight" not in stored
    return {**config, "has_pooler": False} if bare else config


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    encoder = tower(config)
    theirs, ours = "encoder.layer.{i}.", "vision/layers/"
    table = [
        *embedding_rules(encoder),
        *attention_rules(theirs, ours, encoder.block.qkv_bias),
        *norm_rules(theirs, ours, ("layernorm_before", "layernorm_after")),
        *linear(theirs + "intermediate.dense", ours + "mlp/up"),
        *linear(theirs + "output.dense", ours + "mlp/down"),
        *norm("layernorm", "vision/post_norm"),
    ]
    if encoder.pooler:
        table += linear("pooler.dense", "vision/pooler")
    return classifier_rules(encoder, "vit", table)


FAMILY = Family(
    model_types=("vit",),
    about="ViT (arXiv 2010.11929)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=vision.INPUTS,
    outputs=vision.outputs,
    complete=_complete,
)
