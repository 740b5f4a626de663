"""SigLIP (arXiv 2303.15343) in transformers' layout: two towers, a scale and a bias."""

from __future__ import annotations

from typing import Callable

from mmjax.families import siglip_vision, vision
from mmjax.families.clip_vision import block_rules
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, leading, linear, norm, rule
from mmjax.families.towers import architecture, read_block, tower, write_block
from mmjax.models.config import ModelConfig, TextTowerConfig, ViTConfig


def read(config: Config, where: str, read_tower: Callable[[Fields], ViTConfig]) -> ModelConfig:
    """A model of SigLIP's kind around the vision tower that `read_tower` makes of vision_config."""
    fields = Fields(config, where)
    fields.only("quantization_config")
    architecture(fields)
    image = Fields(fields.part("vision_config", "siglip_vision_model"), f"{where}: vision_config")
    text = Fields(fields.part("text_config", "siglip_text_model"), f"{where}: text_config")
    block = read_block(text, 768, 12, 3072, "gelu_pytorch_tanh", 1e-6)
    return ModelConfig(
        vision=read_tower(image),
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


def write(config: ModelConfig, base: Config, image: Config, model_type: str, architecture: str) -> Config:
    """`image`: the vision_config."""
    assert config.text is not None
    text, before = config.text, base.get("text_config", {})
    return {
        **base,
        "architectures": [architecture],
        "model_type": model_type,
        "vision_config": image,
        "text_config": {
            **before,
            "model_type": f"{model_type}_text_model",
            **write_block(text.block, text.layers, before),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_positions,
            "projection_size": text.projection,
        },
    }


def _read(config: Config, where: str) -> ModelConfig:
    return read(config, where, siglip_vision.read_tower)


def _write(config: ModelConfig, base: Config) -> Config:
    image = siglip_vision.write(tower(config), base.get("vision_config", {}))
    return write(config, base, image, "siglip", "SiglipModel")


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
    return [
        *siglip_vision.tower_rules(tower(config)),
        *text_rules(linear("text_model.head", "text/projection")),
        rule("logit_scale", "logit_scale", form=leading(1)),
        rule("logit_bias", "logit_bias", form=leading(1)),
    ]


FAMILY = Family(
    model_types=("siglip",),
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=(*vision.INPUTS, *vision.TEXT_INPUTS),
    outputs=vision.two_tower_outputs,
)
