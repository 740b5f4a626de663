"""BLIP-2's vision tower (arXiv 2301.12597; EVA-CLIP's ViT-g, arXiv 2211.07636) in transformers' layout.

A picture of another size has its positions interpolated, as transformers does it where asked to; unasked it gives a smaller one the
first rows of the table, which is never wanted and not done here.
"""

from __future__ import annotations

import dataclasses

from mmjax.families import vision
from mmjax.families.clip_vision import MEAN, STD
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, leading, linear, norm, patches, rule, transposed
from mmjax.families.towers import architecture, norm_rules, read_block, tower, write_tower
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig

KINDS = {"blip_2_vision_model": "Blip2VisionModel", "instructblip_vision_model": "InstructBlipVisionModel"}


def read_tower(fields: Fields) -> ViTConfig:
    """BLIP-2's vision_config."""
    fields.only("num_channels", 3)
    return ViTConfig(
        image_size=fields.square("image_size", 224),
        patch_size=fields.square("patch_size", 14),
        layers=fields.get("num_hidden_layers", 39),
        block=dataclasses.replace(
            read_block(fields, 1408, 16, 6144, "gelu", 1e-6), qkv_bias=fields.get("qkv_bias", True)
        ),
        class_token=True,
        post_norm="both",
        pooling="class_token",
    )


def expressible(encoder: ViTConfig) -> str:
    """Why transformers' layout cannot hold an encoder as BLIP-2's; "" if it can."""
    if encoder.post_norm_eps not in (0.0, encoder.block.norm_eps):
        return "all norms of its vision tower have one epsilon"
    fits = encoder.class_token and not encoder.registers and not encoder.pre_norm and encoder.patch_bias
    block = encoder.block
    fits = fits and block.norm == "layer" and block.norm_place == "before" and block.key_bias and not block.gated_mlp
    return "" if fits and encoder.learned_positions and encoder.post_norm else "its vision tower is EVA's, with a bias on the keys"


def write(encoder: ViTConfig, base: Config) -> Config:
    kind = base.get("model_type", "blip_2_vision_model")
    written = {**write_tower(encoder, base, kind), "qkv_bias": encoder.block.qkv_bias}
    del written["num_channels"]
    return written


def tower_rules(encoder: ViTConfig) -> list[Rule]:
    theirs, ours = "encoder.layers.{i}.", "vision/layers/"
    query_key_value = [f"{ours}attention/{name}" for name in ("query", "key", "value")]
    table = [
        rule("embeddings.class_embedding", "vision/class_embedding", form=leading(2)),
        rule("embeddings.patch_embedding.weight", "vision/patch/kernel", form=patches(encoder.channels)),
        rule("embeddings.patch_embedding.bias", "vision/patch/bias"),
        rule("embeddings.position_embedding", "vision/positions", form=leading(1)),
        *norm_rules(theirs, ours, ("layer_norm1", "layer_norm2")),
        rule(theirs + "self_attn.qkv.weight", *(f"{path}/kernel" for path in query_key_value), form=transposed),
        *linear(theirs + "self_attn.projection", ours + "attention/output"),
        *linear(theirs + "mlp.fc1", ours + "mlp/up"),
        *linear(theirs + "mlp.fc2", ours + "mlp/down"),
        *norm("post_layernorm", "vision/post_norm"),
    ]
    if encoder.block.qkv_bias:
        table.append(rule(theirs + "self_attn.qkv.bias", *(f"{path}/bias" for path in query_key_value)))
    return table


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    return tower_rules(tower(config))


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    architecture(fields)
    return ModelConfig(vision=read_tower(fields), image_mean=MEAN, image_std=STD)


def _write(config: ModelConfig, base: Config) -> Config:
    written = write(tower(config), base)
    return {**written, "architectures": [KINDS[written["model_type"]]]}


FAMILY = Family(
    model_types=tuple(KINDS),
    about="EVA ViT-g of BLIP-2 and InstructBLIP (arXiv 2301.12597)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=vision.INPUTS,
    outputs=vision.outputs,
)
