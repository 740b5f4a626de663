"""One file for each published checkpoint family: its config, its tensor names and its inputs and outputs, each read both ways."""

from __future__ import annotations

from mmjax.families import bert, clip, composed, llava, llava_llama, parts, siglip, siglip2, text_towers
from mmjax.families.family import Config, Family

FAMILIES = (
    llava.FAMILY,
    llava_llama.FAMILY,
    clip.FAMILY,
    siglip.FAMILY,
    siglip2.FAMILY,
    text_towers.CLIP,
    text_towers.SIGLIP,
    composed.FAMILY,
    bert.FAMILY,
    *parts.LANGUAGE,
    *parts.VISION,
)


def find(config: Config, where: str = "config.json") -> Family:
    """The family that a config.json names. Raises UserError for an unknown one."""
    # The first LLaVA files called their own layout by the name that transformers took later.
    if config.get("model_type") == "llava" and "mm_vision_tower" in config and "text_config" not in config:
        return llava_llama.FAMILY
    return parts.choose(FAMILIES, config, where)
