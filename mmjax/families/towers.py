"""What vision transformers share in transformers' layouts: fields of their blocks, sizes, heads, names of tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

from mmjax.errors import UserError
from mmjax.families.family import Config
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, leading, linear, norm, patches, prefixed, rule
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tower(config: ModelConfig) -> ViTConfig:
    """The vision transformer of a model of such a family."""
    assert isinstance(config.vision, ViTConfig)
    return config.vision


def read_block(fields: Fields, width: int, heads: int, mlp_width: int, activation: str, eps: float) -> BlockConfig:
    """The block of a vision or text tower; the arguments are what absent fields mean."""
    fields.only("quantization_config")
    width, heads = fields.get("hidden_size", width), fields.get("num_attention_heads", heads)
    if width % heads:
        raise UserError(f"{fields.where}: hidden_size = {width} is not a multiple of num_attention_heads = {heads}")
    return BlockConfig(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=fields.get("intermediate_size", mlp_width),
        activation=fields.activation("hidden_act", activation),
        norm="layer",
        norm_eps=fields.get("layer_norm_eps", eps),
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def with_attention(block: BlockConfig, fields: Fields) -> BlockConfig:
    """The block with ViT's and DINOv2's fields of attention."""
    head_dim = fields.get("head_dim", block.head_dim)
    return dataclasses.replace(block, head_dim=head_dim, qkv_bias=fields.get("qkv_bias", True))


def write_block(block: BlockConfig, layers: int, base: Config) -> Config:
    return {
        "hidden_size": block.width,
        "intermediate_size": block.mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": block.heads,
        "hidden_act": activation_name(block.activation, base.get("hidden_act")),
        "layer_norm_eps": block.norm_eps,
    }


def write_attention(block: BlockConfig) -> Config:
    own = {} if block.head_dim * block.heads == block.width else {"head_dim": block.head_dim}
    return {"qkv_bias": block.qkv_bias, **own}


def write_tower(vision: ViTConfig, base: Config, model_type: str) -> Config:
    return {
        **base,
        "model_type": model_type,
        **write_block(vision.block, vision.layers, base),
        "image_size": _sized(vision.native_size or vision.image_size, base.get("image_size")),
        "patch_size": _sized(vision.patch_size, base.get("patch_size")),
        "num_channels": vision.channels,
    }


def _sized(size: int, before: Any) -> Any:
    """A size in pixels, as two equal numbers where it was written so."""
    return [size, size] if isinstance(before, (list, tuple)) else size


def architecture(fields: Fields, classifier: str = "") -> bool:
    """Whether `architectures` names the classifier. Raises UserError for any other head, and for backbones."""
    names = fields.get("architectures", [])
    for name in names:
        if name != classifier and ("For" in name or name.endswith("Backbone")):
            known = f"{classifier}, and the model" if classifier else "the model"
            raise UserError(f"{fields.where}: architectures = {names!r} is not supported (only {known} without a head)")
    return classifier in names


def read_classes(fields: Fields) -> int:
    """transformers counts the labels where they are named; a config that names none means two."""
    labels = fields.get("id2label")
    return len(labels) if labels is not None else fields.get("num_labels", 2)


def write_classes(classes: int, base: Config) -> Config:
    """The fields for so many labels; their names where `base` has them."""
    if not classes or len(base.get("id2label") or ()) == classes:
        return {}
    names = {str(i): f"LABEL_{i}" for i in range(classes)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def classifier_rules(vision: ViTConfig, prefix: str, rules: list[Rule]) -> list[Rule]:
    """The rules of a tower, which stands at `prefix` beside its classifier where it has one."""
    return [*prefixed(f"{prefix}.", rules), *linear("classifier", "vision/head")] if vision.classes else rules


def embedding_rules(vision: ViTConfig, mask_axes: int = 2) -> list[Rule]:
    """`embeddings.` of ViT, DINOv2 and InternVL. mask_axes: of size 1, in front of the mask token."""
    table = [rule("embeddings.cls_token", "vision/class_embedding", form=leading(2))]
    if vision.mask_token:
        table.append(rule("embeddings.mask_token", "vision/mask_token", form=leading(mask_axes)))
    if vision.registers:
        table.append(rule("embeddings.register_tokens", "vision/registers", form=leading(1)))
    if vision.learned_positions:
        table.append(rule("embeddings.position_embeddings", "vision/positions", form=leading(1)))
    name = "embeddings.patch_embeddings.projection"
    return table + [
        rule(f"{name}.weight", "vision/patch/kernel", form=patches(vision.channels)),
        rule(f"{name}.bias", "vision/patch/bias"),
    ]


def attention_rules(theirs: str, ours: str, bias: bool) -> list[Rule]:
    """`attention.` of ViT and DINOv2."""
    table: list[Rule] = []
    for name in ("query", "key", "value"):
        table += linear(f"{theirs}attention.attention.{name}", f"{ours}attention/{name}", bias)
    return table + linear(f"{theirs}attention.output.dense", f"{ours}attention/output")


def norm_rules(theirs: str, ours: str, names: tuple[str, str], bias: bool = True) -> list[Rule]:
    """The two norms of a block."""
    return norm(theirs + names[0], f"{ours}attention_norm", bias) + norm(theirs + names[1], f"{ours}mlp_norm", bias)


def block_rules(theirs: str, ours: str) -> list[Rule]:
    """The layers of a CLIP or SigLIP tower, vision or text."""
    table = norm_rules(theirs, ours, ("layer_norm1", "layer_norm2"))
    for name, path in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "output")):
        table += linear(f"{theirs}self_attn.{name}", f"{ours}attention/{path}")
    return table + linear(theirs + "mlp.fc1", ours + "mlp/up") + linear(theirs + "mlp.fc2", ours + "mlp/down")
