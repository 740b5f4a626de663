"""SigLIP (arXiv 2303.15343) in transformers' layout: two towers, a scale and a bias."""

from __future__ import annotations

from mmjax.families import siglip_vision, vision
from mmjax.families.clip_vision import block_rules, read_block, write_block
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, leading, linear, norm, rule
from mmjax.models.config import ModelConfig, TextTowerConfig, ViTConfig


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    tower = siglip_vision.read_tower(
        Fields(fields.part("vision_config", "siglip_vision_model"), f"{where}: vision_config")
    )
    text = Fields(fields.part("text_config", "siglip_text_model"), f"{where}: text_config")
    block = read_block(text, 768, 12, 3072, "gelu_pytorch_tanh", 1e-6)
    return ModelConfig(
        vision=tower,
        text=TextTowerConfig(
            vocab_size=text.get("vocab_size", 32000),
            layers=text.get("num_hidden_layers", 12),
            block=block,
            max_positions=text.get("max_position_embeddings", 64),
            causal=False,
            pooling="last",
            projection=text.get("projection_size", block.width),
            projection_bias=True,
        ),
        logit_bias=True,
        image_mean=siglip_vision.MEAN,
        image_std=siglip_vision.STD,
    )


def _write(config: ModelConfig, base: Config) -> Config:
    assert isinstance(config.vision, ViTConfig) and config.text is not None
    text, before = config.text, base.get("text_config", {})
    return {
        **base,
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": siglip_vision.write(config.vision, base.get("vision_config", {})),
        "text_config": {
            **before,
            "model_type": "siglip_text_model",
            **write_block(text.block, text.layers, before),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_positions,
            "projection_size": text.projection,
        },
    }


def text_rules(head: list[Rule]) -> list[Rule]:
    """The text tower of SigLIP and of CLIP, which differ in their projection."""
    return [
        rule("text_model.embeddings.token_embedding.weight", "text/embed/embedding"),
        rule("text_model.embeddings.position_embedding.weight", "text/positions"),
        *block_rules("text_model.encoder.layers.{i}.", "text/layers/"),
        *norm("text_model.final_layer_norm", "text/final_norm"),
        *head,
    ]


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert isinstance(config.vision, ViTConfig)
    return [
        *siglip_vision.tower_rules(config.vision),
        *text_rules(linear("text_model.head", "text/projection")),
        rule("logit_scale", "logit_scale", form=leading(1)),
        rule("logit_bias", "logit_bias", form=leading(1)),
    ]


FAMILY = Family(
    model_types=("siglip",),
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=vision.TWO_TOWER_INPUTS,
    outputs=vision.two_tower_outputs,
)
