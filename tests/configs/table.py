"""The README's gallery of recipes: `python -m tests.configs.table` writes it anew from the recipes themselves, at published size.

A row says what a recipe's docstring begins with, its connector and port, how many parameters each stage trains (counted from
shapes alone), and what its parts have been compared with.
"""

from __future__ import annotations

import functools

from mmjax.architecture import model_config
from mmjax.config import Recipe, from_config_dict
from mmjax.errors import UserError
from mmjax.models import multimodal, plugged
from mmjax.models.config import ModelConfig
from mmjax.training.trainable import select
from tests.configs import expand

README = expand.ROOT / "README.md"
BEGIN, END = "<!-- recipes: begin -->\n", "<!-- recipes: end -->\n"

# By recipe: what the forward pass of its parts is compared with in the tests or by recorded outputs (python -m tests.golden).
# That every recipe learns is in tests/configs/test_overfit.py, and against its blind twin in tests/gallery.py.
LLAVA = "transformers and LLaVA's own code"
VERIFIED: dict[str, str] = {
    "anymal": "an open code base's resampler, recorded; transformers (encoder, LLM)",
    "blip2": "transformers, LAVIS's code, recorded",
    "continue_from_hf": "the family it continues",
    "doubutsu": "doubutsu's code, recorded",
    "gemma3": "transformers",
    "git": "transformers",
    "paligemma": "transformers",
    "flamingo": "two open implementations' blocks, recorded; transformers (encoder, LLM)",
    "flickr8k": "transformers (encoder, LLM)",
    "idefics": "transformers",
    "instructblip": "transformers",
    "lavin": "LaVIN's code, recorded",
    "llama_adapter": "LLaMA-Adapter's code, recorded (V1 with pictures: nothing was released)",
    "llava15": LLAVA,
    "llava_next": LLAVA,
    "llava_v1": LLAVA,
    "minigpt4": "transformers and LAVIS's code (its parts); MiniGPT-4's labels, recorded",
    "moondream": "moondream's code, recorded",
    "openflamingo": "OpenFlamingo's code, recorded",
    "otter": "Otter's and OpenFlamingo's code, recorded",
    "robust_ger": "RobustGER's code, recorded",
    "quickstart": "transformers (the export)",
    "vila": "VILA's code, recorded",
}


def table() -> str:
    """The gallery in Markdown."""
    lines = ["| recipe | what it is | arguments | connector | port | parameters trained, by stage | compared with |", "|---|---|---|---|---|---|---|"]
    for name in sorted({name for name, _ in expand.variants()} - {"gallery_base", "ways_of_tuning"}):
        cells = [f"[`{name}`](configs/{name}.py)", about(name), arguments(name), *_shape(name), VERIFIED[name]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def about(name: str) -> str:
    """The first sentence of a recipe's docstring."""
    doc = expand.module(name).__doc__ or ""
    return " ".join(doc.split("\n\n")[0].split()).rstrip(".")


def arguments(name: str) -> str:
    """The words that a recipe's config argument takes, without `tiny`."""
    try:
        expand.config(name, "no-such-word")
    except UserError as error:
        known = str(error).partition("It knows: ")[2].rstrip(".").split("; ")
        return "; ".join(_argument(word) for word in known if word != "tiny")
    raise AssertionError(f"configs/{name}.py takes any argument")


def _argument(known: str) -> str:
    """Of "size=7b|13b (or the bare word)" the words, of "data='...'" the name."""
    name, _, values = known.removesuffix(" (or the bare word)").partition("=")
    if not known.endswith(")"):
        return f"`{name}=`" if values else f"`{name}`"
    return ", ".join(f"`{value}`" for value in values.split("|"))


def written(readme: str) -> str:
    """The README with the gallery in its place."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def trained(recipe: Recipe, config: ModelConfig) -> dict[str, int]:
    """Parameters that each stage trains."""
    params = shapes(config)
    return {name: select(params, recipe.stages[name].trainable, name).count(params) for name in recipe.run}


@functools.lru_cache
def shapes(config: ModelConfig) -> multimodal.Params:
    return multimodal.shapes(config)


def _shape(name: str) -> tuple[str, str, str]:
    """Connector, port and what is trained; of a recipe that goes on from any checkpoint, its stages."""
    values = expand.config(name, "").to_dict()
    if not (values["model"]["path"] or values["model"]["llm"]["path"] or values["model"]["llm"]["config"]):
        return "the checkpoint's", "the checkpoint's", ", ".join(values["run"])
    recipe = from_config_dict(values)
    config = model_config(recipe)
    counts = [f"{stage} {count:,}" for stage, count in trained(recipe, config).items()]
    return _connector(config), _port(config), "; ".join(counts)


def _connector(config: ModelConfig) -> str:
    c = config.connector
    if c is None:
        return "none"
    kind = c.kind.replace("_", " ")
    return f"{kind}, {c.tokens} tokens"


def _port(config: ModelConfig) -> str:
    between = getattr(config, "cross_attention", None)
    if plugs := plugged.plugs(config, "llm"):
        return "; ".join(f"prompts in {len(plug.layers)} of {config.language.layers} layers" for plug in plugs)
    if config.connector is None:
        return "linear"
    where = f"gated cross-attention before {len(between.layers)} of {config.language.layers} blocks" if between else "spliced"
    mask = getattr(config, "mask", "causal")
    return where if mask == "causal" else f"{where}, {mask} bidirectional"


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
