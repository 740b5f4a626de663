"""DINOv2 (arXiv 2304.07193), also with registers (arXiv 2309.16588), in transformers' layout, with a classifier or not.

The two differ in how positions are interpolated: with registers against aliasing, without them not.
"""

from __future__ import annotations

import dataclasses

from mmjax.errors import UserError
from mmjax.families import vision
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, norm, rule, transposed
from mmjax.families.towers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
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
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig

PLAIN, WITH_REGISTERS = "dinov2", "dinov2_with_registers"
CLASSES = {PLAIN: "Dinov2", WITH_REGISTERS: "Dinov2WithRegisters"}


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    kind = config.get("hf_model_type") or config["model_type"]
    registers = fields.get("num_register_tokens", 4) if kind == WITH_REGISTERS else 0
    classes = read_classes(fields) if architecture(fields, CLASSES[kind] + "ForImageClassification") else 0
    encoder = ViTConfig(
        image_size=fields.square("image_size", 224),
        patch_size=fields.square("patch_size", 16 if kind == WITH_REGISTERS else 14),
        channels=fields.get("num_channels", 3),
        layers=fields.get("num_hidden_layers", 12),
        block=_block(fields),
        interpolation="bicubic_antialias" if kind == WITH_REGISTERS else "bicubic",
        class_token=True,
        registers=registers,
        mask_token=kind == WITH_REGISTERS or fields.get("use_mask_token", True),
        pooling="class_and_mean" if classes else "class_token",
        classes=classes,
    )
    return ModelConfig(vision=encoder, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, image_aspect="crop")


def _block(fields: Fields) -> BlockConfig:
    block = with_attention(read_block(fields, 768, 12, 0, "gelu", 1e-6), fields)
    gated = fields.get("use_swiglu_ffn", False)
    return dataclasses.replace(
        block,
        mlp_width=_mlp_width(block.width, fields.get("mlp_ratio", 4), gated),
        gated_mlp=gated,
        activation="silu" if gated else block.activation,
        layer_scale=True,
    )


def _mlp_width(width: int, ratio: float, gated: bool) -> int:
    """A gated MLP has two thirds of the width of another, rounded up to a multiple of 8."""
    hidden = int(width * ratio)
    return -(-int(hidden * 2 / 3) // 8) * 8 if gated else hidden


def _write(config: ModelConfig, base: Config) -> Config:
    encoder = tower(config)
    block, kind = encoder.block, _kind(encoder)
    written = {
        **write_tower(encoder, base, kind),
        **write_attention(block),
        **write_classes(encoder.classes, base),
        "architectures": [CLASSES[kind] + ("ForImageClassification" if encoder.classes else "Model")],
        "mlp_ratio": _ratio(block, base.get("mlp_ratio", 4)),
        "use_swiglu_ffn": block.gated_mlp,
    }
    del written["intermediate_size"]
    if block.gated_mlp:
        written["hidden_act"] = base.get("hidden_act", "gelu")
    if kind == WITH_REGISTERS:
        return {**written, "num_register_tokens": encoder.registers}
    return {**written, "use_mask_token": encoder.mask_token}


def _kind(encoder: ViTConfig) -> str:
    return WITH_REGISTERS if encoder.interpolation == "bicubic_antialias" else PLAIN


def _ratio(block: BlockConfig, before: float) -> float:
    """The `mlp_ratio` that means this MLP: the one from before where it does. Raises UserError where none does."""
    for ratio in (before, *range(1, 17)):
        if _mlp_width(block.width, ratio, block.gated_mlp) == block.mlp_width:
            return ratio
    raise UserError(f"no mlp_ratio of DINOv2's config means an MLP of {block.mlp_width} channels on {block.width}")


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    encoder = tower(config)
    theirs, ours = "encoder.layer.{i}.", "vision/layers/"
    table = [
        *embedding_rules(encoder, mask_axes=1),
        *attention_rules(theirs, ours, encoder.block.qkv_bias),
        *norm_rules(theirs, ours, ("norm1", "norm2")),
        rule(theirs + "layer_scale1.lambda1", ours + "attention_scale"),
        rule(theirs + "layer_scale2.lambda1", ours + "mlp_scale"),
        *norm("layernorm", "vision/post_norm"),
    ]
    if encoder.block.gated_mlp:
        both = ours + "mlp/gate", ours + "mlp/up"
        table += [
            rule(theirs + "mlp.weights_in.weight", *(f"{path}/kernel" for path in both), form=transposed),
            rule(theirs + "mlp.weights_in.bias", *(f"{path}/bias" for path in both)),
            *linear(theirs + "mlp.weights_out", ours + "mlp/down"),
        ]
    else:
        table += linear(theirs + "mlp.fc1", ours + "mlp/up") + linear(theirs + "mlp.fc2", ours + "mlp/down")
    return classifier_rules(encoder, _kind(encoder), table)


FAMILY = Family(
    model_types=(PLAIN, WITH_REGISTERS),
    about="DINOv2, with registers or without (arXiv 2304.07193)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=vision.INPUTS,
    outputs=vision.outputs,
)
