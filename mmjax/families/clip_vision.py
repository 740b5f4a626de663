"""CLIP's vision tower (arXiv 2103.00020) in transformers' layout."""

from __future__ import annotations

from mmjax.families import vision
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, linear, norm, patches, rule
from mmjax.models.config import BlockConfig, ModelConfig, ViTConfig

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def read_tower(fields: Fields, projection: int = 0) -> ViTConfig:
    """CLIP's vision_config."""
    fields.only("quantization_config")
    return ViTConfig(
        image_size=fields.square("image_size", 224),
        patch_size=fields.square("patch_size", 32),
        channels=fields.get("num_channels", 3),
        layers=fields.get("num_hidden_layers", 12),
        block=read_block(fields, 768, 12, 3072, "quick_gelu", 1e-5),
        class_token=True,
        patch_bias=False,
        pre_norm=True,
        post_norm=True,
        pooling="class_token",
        projection=projection,
    )


def read_block(fields: Fields, width: int, heads: int, mlp_width: int, activation: str, eps: float) -> BlockConfig:
    """The block of a CLIP or SigLIP tower; the arguments are what absent fields mean."""
    width, heads = fields.get("hidden_size", width), fields.get("num_attention_heads", heads)
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


def write_block(block: BlockConfig, layers: int, base: Config) -> Config:
    return {
        "hidden_size": block.width,
        "intermediate_size": block.mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": block.heads,
        "hidden_act": activation_name(block.activation, base.get("hidden_act")),
        "layer_norm_eps": block.norm_eps,
    }


def write_tower(tower: ViTConfig, base: Config, model_type: str) -> Config:
    return {
        **base,
        "model_type": model_type,
        **write_block(tower.block, tower.layers, base),
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "num_channels": tower.channels,
    }


def block_rules(theirs: str, ours: str) -> list[Rule]:
    """The layers of a CLIP or SigLIP tower, vision or text."""
    table = norm(theirs + "layer_norm1", ours + "attention_norm") + norm(theirs + "layer_norm2", ours + "mlp_norm")
    for name, path in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "output")):
        table += linear(f"{theirs}self_attn.{name}", f"{ours}attention/{path}")
    return table + linear(theirs + "mlp.fc1", ours + "mlp/up") + linear(theirs + "mlp.fc2", ours + "mlp/down")


def tower_rules(tower: ViTConfig) -> list[Rule]:
    """The names of the tower alone, without the projection."""
    return [
        rule("vision_model.embeddings.class_embedding", "vision/class_embedding"),
        rule("vision_model.embeddings.patch_embedding.weight", "vision/patch/kernel", form=patches(tower.channels)),
        rule("vision_model.embeddings.position_embedding.weight", "vision/positions"),
        *norm("vision_model.pre_layrnorm", "vision/pre_norm"),
        *block_rules("vision_model.encoder.layers.{i}.", "vision/layers/"),
        *norm("vision_model.post_layernorm", "vision/post_norm"),
    ]


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert isinstance(config.vision, ViTConfig)
    table = tower_rules(config.vision)
    return table + linear("visual_projection", "vision/projection", bias=False) if config.vision.projection else table


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    projected = "CLIPVisionModelWithProjection" in fields.get("architectures", [])
    tower = read_tower(fields, fields.get("projection_dim", 512) if projected else 0)
    return ModelConfig(vision=tower, image_mean=MEAN, image_std=STD)


def _write(config: ModelConfig, base: Config) -> Config:
    assert isinstance(config.vision, ViTConfig)
    tower = config.vision
    written = write_tower(tower, base, "clip_vision_model")
    if tower.projection:
        written["projection_dim"] = tower.projection
    return {**written, "architectures": ["CLIPVisionModelWithProjection" if tower.projection else "CLIPVisionModel"]}


FAMILY = Family(
    model_types=("clip_vision_model",),
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=vision.INPUTS,
    outputs=vision.outputs,
    spellings=((r"^(?=(embeddings|pre_layrnorm|encoder|post_layernorm)\.)", "vision_model."),),
)
