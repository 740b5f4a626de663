"""The README's table of families: `python -m tests.families.table` writes it anew from the registry and from what the tests compare."""

from __future__ import annotations

from pathlib import Path

from mmjax.families import FAMILIES, parts
from mmjax.families.family import Family
from tests.families import test_language_zoo, test_vision_zoo

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"

# What is compared with transformers (or, where it has no such model, with recorded outputs of the reference), by test.
CHECKS: dict[str, tuple[str, set[str]]] = {
    "test_language_zoo": (
        "logits, 64 greedy tokens, files both ways",
        {kind.model_type for kind, _ in test_language_zoo.FAMILIES.values()},
    ),
    "test_vision_zoo": (
        "features at several picture sizes, files both ways",
        {build().config.model_type for build in test_vision_zoo.TOWERS.values()}
        | {"siglip2_vision_model", "clip", "siglip", "siglip2"},
    ),
    "test_t5": ("logits, loss, 64 greedy tokens, beams, files both ways", {"t5", "mt5"}),
    "test_bert": ("states, logits, loss, files both ways", {"bert"}),
    "test_parts": ("embeddings, files both ways", {"clip_text_model", "siglip_text_model", "siglip2_text_model"}),
    "test_mobilenet_v2": ("features and classes, files both ways", {"mobilenet_v2"}),
    "test_llava_next": ("logits, loss, greedy tokens, files both ways", {"llava_next", "internvl"}),
    "test_llava": ("logits, loss, greedy tokens, files both ways", {"llava"}),
    "test_prefix_and_image_masks": ("logits, loss, greedy tokens, files both ways", {"paligemma", "gemma3", "git"}),
    "test_blip_2": ("logits, loss, queries, greedy tokens, files both ways", {"blip-2", "instructblip"}),
    "test_minigpt4": ("logits, loss, greedy tokens, files both ways", {"minigpt4"}),
    "test_lavis": (
        "embeddings, matching, losses and captions recorded from LAVIS's own code; states against transformers' Q-Former, files both ways",
        {"lavis_qformer"},
    ),
    "test_qwen2_vl": ("logits, loss, greedy tokens, files both ways", {"qwen2_vl"}),
    "test_golden": (
        "logits and greedy tokens recorded from LLaVA's own code around a Llama",
        {"llava_llama", "llava", "llava_mistral", "llava_qwen"},
    ),
    "test_vila": ("logits and greedy tokens around transformers' parts, folders both ways; recorded ones of VILA's code", {"vila"}),
    "test_doubutsu": (
        "logits and greedy tokens around transformers' parts, files both ways; recorded ones of doubutsu's code",
        {"doubutsu", "doubutsu_next", "doubutsu_pooled"},
    ),
    "test_moondream": ("logits and greedy tokens recorded from moondream's own code, files both ways", {"moondream"}),
    "test_idefics": ("logits, loss, greedy tokens, files both ways", {"idefics"}),
    "test_open_flamingo": (
        "logits against its parts in torch, and recorded from OpenFlamingo's own code; files both ways",
        {"openflamingo", "otter"},
    ),
    "test_lavin": ("states, logits and loss recorded from LaVIN's own code, files both ways", {"lavin"}),
    "test_llama_adapter": (
        "logits, loss and greedy tokens recorded from the authors' own code, files both ways",
        {"llama_adapter_v1", "llama_adapter_v2", "robust_ger"},
    ),
    "test_any_language_model": ("what is written is read back with equal logits", {"mmjax", "git_text"}),
}


def kind(family: Family) -> str:
    if family in parts.LANGUAGE or family.model_types == ("bert",):
        return "language model"
    if family in parts.VISION:
        return "vision encoder"
    if family.keeps_adapters:
        return "with adapters"
    if not {"pixel_values", "image"} & set(family.inputs) and family.prompt is None:
        return "text encoder"
    return "two towers" if family.prompt is None else "multimodal"


def verified(family: Family) -> str:
    """What the first test that has all types of this family compares. Raises KeyError where none has."""
    for what, types in CHECKS.values():
        if set(family.model_types) <= types:
            return what
    raise KeyError(f"no test compares {family.model_types}")


def table() -> str:
    lines = ["| `model_type` | models | part | compared with the reference |", "|---|---|---|---|"]
    for family in sorted(FAMILIES, key=lambda family: (kind(family), family.model_types)):
        types = ", ".join(f"`{name}`" for name in dict.fromkeys(family.model_types))
        lines.append(f"| {types} | {family.about} | {kind(family)} | {verified(family)} |")
    return "\n".join(lines) + "\n"


def written(readme: str) -> str:
    """The README with the table in its place."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
