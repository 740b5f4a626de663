"""One file for each published checkpoint family: its config, its tensor names and its inputs and outputs, each read both ways."""

from __future__ import annotations

from mmjax.families import (
    bert,
    blip_2,
    blip_2_retrieval,
    clip,
    composed,
    doubutsu,
    gemma3,
    git,
    idefics,
    internvl,
    lavin,
    lavis,
    llama_adapter,
    llava,
    llava_llama,
    llava_next,
    minigpt4,
    moondream,
    open_flamingo,
    otter,
    paligemma,
    parts,
    qwen2_vl,
    robust_ger,
    siglip,
    siglip2,
    text_towers,
    vila,
)
from mmjax.families.family import Config, Family

FAMILIES = (
    llava.FAMILY,
    vila.FAMILY,
    doubutsu.FAMILY,
    moondream.FAMILY,
    llava_llama.FAMILY,
    llava_next.FAMILY,
    internvl.FAMILY,
    blip_2.BLIP_2,
    blip_2.INSTRUCTBLIP,
    blip_2_retrieval.FAMILY,
    lavis.FAMILY,
    minigpt4.FAMILY,
    clip.FAMILY,
    siglip.FAMILY,
    siglip2.FAMILY,
    text_towers.CLIP,
    text_towers.SIGLIP,
    paligemma.FAMILY,
    gemma3.FAMILY,
    git.FAMILY,
    qwen2_vl.FAMILY,
    open_flamingo.FAMILY,
    otter.FAMILY,
    idefics.FAMILY,
    lavin.FAMILY,
    llama_adapter.V1,
    llama_adapter.V2,
    robust_ger.FAMILY,
    composed.FAMILY,
    bert.FAMILY,
    *parts.LANGUAGE,
    *parts.VISION,
)


def find(config: Config, where: str = "config.json") -> Family:
    """The family that a config.json names. Raises UserError for an unknown one."""
    claimed = (family for family in FAMILIES if family.claims(config))
    return next(claimed, None) or parts.choose(FAMILIES, config, where)
