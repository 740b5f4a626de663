"""The recipes fully expanded, one JSON file each, so that a changed default shows in review.

python -m tests.configs.expand      writes tests/configs/expanded/*.json anew
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[2]
EXPANDED = Path(__file__).parent / "expanded"
ARGUMENTS = {
    "flamingo": ("", "9b", "80b"),
    "idefics": ("", "80b"),
    "openflamingo": ("", "4b", "3b"),
    "otter": ("", "llama"),
    "anymal": ("", "13b", "70b", "flamingo"),
    "git": ("", "large"),
    "llama_adapter": ("", "v1_multimodal", "v2", "v2_early", "v2_chat"),
    "robust_ger": ("", "plain", "lora"),
    "llava15": ("", "13b", "lora", "qlora", "dora", "ia3", "prompt", "ptuning", "prefix", "adapter"),
    "llava_next": ("", "13b", "mistral"),
    "llava_v1": ("", "7b"),
    "vila": ("", "13b", "3b", "3b,s2", "8b", "40b", "frozen", "visual"),
    "moondream": ("", "v2"),
    "doubutsu": ("", "concat", "pooled", "tiles", "token"),
    "continue_from_hf": ("", "full"),
    "blip2": ("", "flan_t5_xl"),
    "instructblip": ("", "flan_t5_xl"),
    "minigpt4": ("", "llama2_7b"),
    "lavin": ("", "13b", "chat"),
}


OTHERS = {"continue_from_hf", "flickr8k", "gallery_base", "quickstart", "ways_of_tuning"}  # not published systems


def systems() -> list[str]:
    """The recipes that are published systems."""
    return sorted({name for name, _ in variants()} - OTHERS)


def variants() -> list[tuple[str, str]]:
    """(recipe, config argument) of every file in configs/, with the arguments that change more than a size of data."""
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
    return [(name, argument) for name in names for argument in ARGUMENTS.get(name, ("",))]


def module(name: str) -> ModuleType:
    """The recipe's file."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "configs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def config(name: str, argument: str) -> ConfigDict:
    """What the recipe's file hands to the command."""
    return module(name).get_config(argument)


def path(name: str, argument: str) -> Path:
    return EXPANDED / (f"{name}__{argument}.json" if argument else f"{name}.json")


def text(name: str, argument: str) -> str:
    return json.dumps(config(name, argument).to_dict(), indent=1) + "\n"


if __name__ == "__main__":
    EXPANDED.mkdir(exist_ok=True)
    for old in EXPANDED.glob("*.json"):
        old.unlink()
    for variant in variants():
        path(*variant).write_text(text(*variant))
        print(path(*variant).relative_to(ROOT))
