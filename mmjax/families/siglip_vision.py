"""SigLIP's vision tower (arXiv 2303.15343) in transformers' layout."""

from __future__ import annotations

from mmjax.families import vision
from mmjax.families.clip_vision import block_rules, read_block, write_tower
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, leading, linear, norm, patches, rule, transposed
from mmjax.models.config import ModelConfig, ViTConfig

MEAN = STD = (0.5, 0.5, 0.5)


def read_tower(fields: Fields) -> ViTConfig:
    """SigLIP's vision_config."""
    fields.only("quantization_config")
    return ViTConfig(
        image_size=fields.square("image_size", 224),
        patch_size=fields.square("patch_size", 16),
        channels=fields.get("num_channels", 3),
        layers=fields.get("num_hidden_layers", 12),
        block=read_block(fields, 768, 12, 3072, "gelu_pytorch_tanh", 1e-6),
        pooling="attention" if fields.get("vision_use_head", True) else "none",
    )


def write(tower: ViTConfig, base: Config) -> Config:
    written = write_tower(tower, base, "siglip_vision_model")
    return {**written, "vision_use_head": tower.pooling == "attention"}


def tower_rules(tower: ViTConfig) -> list[Rule]:
    table = [
        rule("vision_model.embeddings.patch_embedding.weight", "vision/patch/kernel", form=patches(tower.channels)),
        rule("vision_model.embeddings.patch_embedding.bias", "vision/patch/bias"),
        rule("vision_model.embeddings.position_embedding.weight", "vision/positions"),
        *block_rules("vision_model.encoder.layers.{i}.", "vision/layers/"),
        *norm("vision_model.post_layernorm", "vision/post_norm"),
    ]
    if tower.pooling != "attention":
        return table
    theirs, ours = "vision_model.head.", "vision/pool/"
    query_key_value = [f"{ours}attention/{name}" for name in ("query", "key", "value")]
    return table + [
        rule(theirs + "probe", ours + "probe", form=leading(2)),
        rule(theirs + "attention.in_proj_weight", *(f"{path}/kernel" for path in query_key_value), form=transposed),
        rule(theirs + "attention.in_proj_bias", *(f"{path}/bias" for path in query_key_value)),
        *linear(theirs + "attention.out_proj", ours + "attention/output"),
        *norm(theirs + "layernorm", ours + "norm"),
        *linear(theirs + "mlp.fc1", ours + "mlp/up"),
        *linear(theirs + "mlp.fc2", ours + "mlp/down"),
    ]


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert isinstance(config.vision, ViTConfig)
    return tower_rules(config.vision)


def _read(config: Config, where: str) -> ModelConfig:
    return ModelConfig(vision=read_tower(Fields(config, where)), image_mean=MEAN, image_std=STD)


def _write(config: ModelConfig, base: Config) -> Config:
    assert isinstance(config.vision, ViTConfig)
    return {**write(config.vision, base), "architectures": ["SiglipVisionModel"]}


FAMILY = Family(
    model_types=("siglip_vision_model",),
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=vision.INPUTS,
    outputs=vision.outputs,
    spellings=((r"^(?=(embeddings|encoder|post_layernorm|head)\.)", "vision_model."),),
)
