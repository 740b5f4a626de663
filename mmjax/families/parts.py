"""The families that other families are made of: language models, and vision encoders that a connector can read."""

from __future__ import annotations

from typing import Mapping

from mmjax.errors import UserError
from mmjax.families import (
    blip_2_vision,
    clip_vision,
    dinov2,
    gemma,
    gemma3_text,
    git,
    gpt2,
    gpt_neox,
    internvl_vision,
    llama,
    mistral,
    mixtral,
    mobilenet_v2,
    mpt,
    opt,
    phi,
    phi3,
    qwen2,
    qwen3,
    siglip2_vision,
    siglip_vision,
    t5,
    vit,
)
from mmjax.families.family import Config, Family

LANGUAGE = (
    llama.FAMILY,
    mistral.FAMILY,
    mixtral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma.FAMILY,
    gemma.SECOND,
    gemma3_text.FAMILY,
    phi.FAMILY,
    phi3.FAMILY,
    opt.FAMILY,
    gpt2.FAMILY,
    git.TEXT,
    gpt_neox.FAMILY,
    mpt.FAMILY,
    t5.FAMILY,
)
VISION = (
    clip_vision.FAMILY,
    siglip_vision.FAMILY,
    siglip2_vision.FAMILY,
    vit.FAMILY,
    dinov2.FAMILY,
    blip_2_vision.FAMILY,
    internvl_vision.FAMILY,
    mobilenet_v2.FAMILY,
)


def language(config: Config, where: str) -> Family:
    """The family of a language model's configuration. Raises UserError for one that is not known."""
    return choose(LANGUAGE, config, where)


def vision(config: Config, where: str) -> Family:
    """The family of a vision encoder's configuration. Raises UserError for one that is not known."""
    return choose(VISION, config, where)


def choose(families: tuple[Family, ...], config: Mapping, where: str) -> Family:
    """The one of `families` that the config names, by `hf_model_type` if it has one, else by `model_type`."""
    name = config.get("hf_model_type") or config.get("model_type")
    for family in families:
        if name in family.model_types:
            return family
    known = ", ".join(sorted({kind for family in families for kind in family.model_types}))
    raise UserError(f"{where}: model_type {name!r} is not supported here; known are {known}")
