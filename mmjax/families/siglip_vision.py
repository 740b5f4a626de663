"""SigLIP's vision tower (arXiv 2303.15343) in transformers' layout."""

from __future__ import annotations

from mmjax.families import vision
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, leading, linear, norm, patches, rule, transposed
from mmjax.families.towers import architecture, block_rules, read_block, tower, write_tower
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig

MEAN = STD = (0.5, 0.5, 0.5)


def read_tower(fields: Fields) -> ViTConfig:
    """SigLIP's vision_config."""
    return ViTConfig(
        image_size=fields.square("image_size", 224),
        patch_size=fields.square("patch_size", 16),
        channels=fields.get("num_channels", 3),
        layers=fields.get("num_hidden_layers", 12),
        block=read_block(fields, 768, 12, 3072, "gelu_pytorch_tanh", 1e-6),
        pooling="attention" if fields.get("vision_use_head", True) else "none",
    )


def write(encoder: ViTConfig, base: Config) -> Config:
    written = write_tower(encoder, base, "siglip_vision_model")
    return {**written, "vision_use_head": encoder.pooling == "attention"}


def tower_rules(encoder: ViTConfig) -> list[Rule]:
    """The names of the tower, alone and among two. NaFlex pictures come cut: a Linear takes their patches."""
    patch = transposed if encoder.naflex else patches(encoder.channels)
    table = [
        rule("vision_model.embeddings.patch_embedding.weight", "vision/patch/kernel", form=patch),
        rule("vision_model.embeddings.patch_embedding.bias", "vision/patch/bias"),
        rule("vision_model.embeddings.position_embedding.weight", "vision/positions"),
        *block_rules("vision_model.encoder.layers.{i}.", "vision/layers/"),
        *norm("vision_model.post_layernorm", "vision/post_norm"),
    ]
    if encoder.pooling != "attention":
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
    return tower_rules(tower(config))


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    architecture(fields)
    return ModelConfig(vision=read_tower(fields), image_mean=MEAN, image_std=STD)


def _write(config: ModelConfig, base: Config) -> Config:
    return {**write(tower(config), base), "architectures": ["SiglipVisionModel"]}


FAMILY = Family(
    model_types=("siglip_vision_model",),
    about="SigLIP's vision tower, and SigLIP 2's at a fixed size (arXiv 2303.15343)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=vision.INPUTS,
    outputs=vision.outputs,
    spellings=((r"^(?=(embeddings|encoder|post_layernorm|head)\.)", "vision_model."),),
)
