"""Any encoder x connector x port x language model, by configuration alone.

    python -m tests.matrix          shapes of every combination, then a pairwise cover of them run; exit code 0 if all did
    python -m tests.matrix shapes   the shapes alone
    python -m tests.matrix cover    the runs alone

To run a combination is to assemble it from parts that are published separately, to take a step that lowers the loss, to save it
in the first layout that holds it (transformers' llava, else ours, with the reason), to load that again and to generate the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from PIL import Image as Picture
from tqdm import tqdm

import mmjax
from mmjax import architecture, assembly, export, vocabulary
from mmjax.batch import Batch
from mmjax.config import Connector, CrossAttention, Image, Model, Part, Recipe, Tokenizer
from mmjax.data.collation import collate
from mmjax.data.messages import Sample, validated
from mmjax.errors import UserError
from mmjax.families import composed
from mmjax.model import Model as Assembled
from mmjax.models import multimodal
from mmjax.models.config import Execution
from mmjax.training.loss import language_loss, total_weight
from tests import CHEAP_COMPILES, CHEAP_XLA_FLAGS

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = {"image_size": 28, "patch_size": 7}
TOWER = {**SIZE, **PICTURE}
TEXT = {**SIZE, "max_position_embeddings": 256}
ENCODERS: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", **TOWER},
    "siglip": {"model_type": "siglip_vision_model", **TOWER},
    "siglip2": {"model_type": "siglip2_vision_model", **SIZE, "patch_size": 7, "num_patches": 16},
    "vit": {"model_type": "vit", **TOWER},
    "dinov2": {"model_type": "dinov2", **TOWER, "mlp_ratio": 2},
    "dinov2 with registers": {"model_type": "dinov2_with_registers", **TOWER, "mlp_ratio": 2, "num_register_tokens": 4},
    "internvit": {"model_type": "internvl_vision", **TOWER},
    "eva": {"model_type": "blip_2_vision_model", **TOWER},
    "mobilenet": {"model_type": "mobilenet_v2", "image_size": 128, "depth_multiplier": 0.35},
}
CONNECTORS = {
    "linear": Connector(kind="linear"),
    "mlp": Connector(kind="mlp2x_gelu"),
    "averaged mlp": Connector(kind="mlp2x_gelu", grid=2),
    "norm + mlp": Connector(kind="mlp3x_gelu", input_norm=True),
    "pooled": Connector(kind="pooled_mlp", pooled_tokens=3),
    "concat": Connector(kind="concat", group=4, depth=1),
    "space to depth": Connector(kind="space_to_depth", group=2, input_norm=True),
    "space to depth, columns": Connector(kind="space_to_depth", group=3, token_order="columns"),
    "residual mlp": Connector(kind="residual_mlp", hidden_width=48),
    "perceiver": Connector(kind="perceiver", depth=2, latents=4, heads=2, head_dim=8, bias=False),
    "cross-self perceiver": Connector(kind="cross_self_perceiver", depth=1, latents=5, heads=2, hidden_width=32),
    "q-former": Connector(kind="qformer", depth=2, latents=4, heads=2, hidden_width=24),
}
PORTS = ("embeddings", "between blocks")
LANGUAGE: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **TEXT, "num_key_value_heads": 2},
    "mistral": {"model_type": "mistral", **TEXT, "num_key_value_heads": 2, "sliding_window": 64},
    "mixtral": {"model_type": "mixtral", **TEXT, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"model_type": "qwen2", **TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **TEXT, "num_key_value_heads": 2, "head_dim": 8},
    "gemma": {"model_type": "gemma", **TEXT, "num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {"model_type": "gemma2", **TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64},
    "phi": {"model_type": "phi", **TEXT},
    "phi3": {"model_type": "phi3", **TEXT, "num_key_value_heads": 2},
    "opt": {"model_type": "opt", "ffn_dim": 48, "do_layer_norm_before": True, "word_embed_proj_dim": 32, **TEXT},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {"model_type": "gpt_neox", **TEXT},
    "mpt": {"model_type": "mpt", "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "t5": {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}
ANSWERS = ("red", "green", "blue")


class Combination(NamedTuple):
    encoder: str
    connector: str
    port: str
    llm: str


def combinations() -> list[Combination]:
    """Every combination that makes sense."""
    every = itertools.starmap(Combination, itertools.product(ENCODERS, CONNECTORS, PORTS, LANGUAGE))
    return [combination for combination in every if not senseless(combination)]


def senseless(combination: Combination) -> str:
    """Why nobody would join these; "" where they would."""
    if combination.port == "between blocks" and combination.llm == "t5":
        return "the blocks of a T5's decoder read a memory already"
    return ""


def cover(rows: list[Combination]) -> list[Combination]:
    """Some of the combinations, in which every pair of values that occurs in any of them occurs (greedily, so not the fewest)."""
    left = {pair for row in rows for pair in _pairs(row)}
    chosen = []
    while left:
        best = max(rows, key=lambda row: len(left & _pairs(row)))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


def once(rows: list[Combination]) -> list[Combination]:
    """A few combinations in which every value occurs."""
    left = {(place, value) for row in rows for place, value in enumerate(row)}
    chosen = []
    while left:
        best = max(rows, key=lambda row: len(left & set(enumerate(row))))
        chosen.append(best)
        left -= set(enumerate(best))
    return chosen


def recipe(combination: Combination, tokenizer: Path) -> Recipe:
    """The recipe of a combination; all that it says is which parts."""
    between = combination.port == "between blocks"
    return Recipe(
        model=Model(
            llm=Part(config=LANGUAGE[combination.llm]),
            vision=Part(config=ENCODERS[combination.encoder]),
            connector=CONNECTORS[combination.connector],
            cross_attention=CrossAttention(every=2, heads=2, head_dim=8) if between else CrossAttention(),
            feature_layers=(-1,),
            image=Image(aspect="squash"),
            tokenizer=Tokenizer(path=str(tokenizer)),
            template="plain",
        )
    )


def check_shapes(combination: Combination, tokenizer: Path) -> None:
    """By shapes alone: the parameters, and that the connector's tokens are what the port reads."""
    config = architecture.model_config(recipe(combination, tokenizer), 64)
    params = multimodal.shapes(config)
    assert config.vision is not None and config.connector is not None
    side = config.vision.image_size
    batch = Batch(images=jax.ShapeDtypeStruct((1, 2, side, side, 3), jnp.uint8))
    media = jax.eval_shape(lambda p, b: multimodal.encode_media(p, config, b, Execution()), params, batch)
    between = config.cross_attention
    assert ("plugs" in params["llm"]) == (between is not None) == (combination.port == "between blocks")
    assert media.shape == (1, 2, config.connector.tokens, between.block.memory_width if between else config.language.input_width)


def run(combination: Combination, tokenizer: Path, workdir: Path) -> str:
    """Assembles, trains a step, saves, loads and generates; returns the layout in which it was saved, with the reason."""
    model = assembly.assemble(recipe(combination, tokenizer), workdir)
    model, before, after = _step(model)
    assert after < before, f"a step took the loss from {before} to {after}"
    messages = [{"role": "user", "content": [{"type": "image", "image": _picture(0)}]}]
    said = model.chat(messages, max_new_tokens=4)
    model.save_pretrained(workdir / "saved")
    again = mmjax.load(workdir / "saved", template="plain")
    assert again.chat(messages, max_new_tokens=4) == said
    if again.family is not composed.FAMILY:
        return again.family.model_types[0]
    return f"ours, since: {export._hf(model, *export._part_configs(model))}"


def _step(model: Assembled) -> tuple[Assembled, float, float]:
    """The model after one step of gradient descent over all parameters, and the loss before and after it."""
    batch = _batch(model)

    def loss(params: Any) -> jax.Array:
        return language_loss(params, model.config, batch, model.run, groups=1).sum() / total_weight(batch)

    graded = jax.jit(jax.value_and_grad(loss), compiler_options=CHEAP_COMPILES)
    before, gradient = graded(model.params)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
    params = jax.tree.map(lambda p, g: p - 0.05 / norm * g, model.params, gradient)
    return dataclasses.replace(model, params=params), float(before), float(graded(params)[0])


def _batch(model: Assembled) -> Batch:
    """Three pictures, each with the name of its colour, in two rows."""
    assert model.image_processor is not None
    encoder, examples = model.encoder(), []
    for i, answer in enumerate(ANSWERS):
        content = [{"type": "image", "image": _picture(i)}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        example = encoder.encode(Sample(answer, validated(turns)))
        examples.append(dataclasses.replace(example, pixels=model.image_processor.pixels(_picture(i))[None]))
    return collate([examples[:2], examples[2:]])


def _picture(i: int) -> Picture.Image:
    return Picture.new("RGB", (40, 40), ANSWERS[i])


def _pairs(row: Combination) -> set[tuple]:
    return set(itertools.combinations(enumerate(row), 2))


def tokenizer(path: Path) -> Path:
    """A tokenizer of a few words, saved at the path."""
    vocabulary.train(["the picture is red green blue <image>"], kind="word").save_pretrained(path)
    return path


def main(arguments: list[str]) -> int:
    os.environ.setdefault("XLA_FLAGS", CHEAP_XLA_FLAGS)
    rows, failed = combinations(), 0
    with tempfile.TemporaryDirectory() as folder:
        words = tokenizer(Path(folder) / "words")
        if arguments != ["cover"]:
            for row in tqdm(rows, "shapes", disable=None):
                failed += not _tried(check_shapes, row, words)
            print(f"{len(rows)} combinations, {failed} without sensible shapes")
        chosen, wrong = [] if arguments == ["shapes"] else cover(rows), 0
        for row in chosen:
            with tempfile.TemporaryDirectory() as workdir:
                wrong += not _tried(run, row, words, Path(workdir))
            jax.clear_caches()
        print(f"{len(chosen)} of them run, {wrong} failed")
    return int(bool(failed or wrong))


def _tried(check: Any, row: Combination, *given: Any) -> bool:
    try:
        if found := check(row, *given):
            print(" x ".join(row), "->", found, flush=True)
        return True
    except (UserError, AssertionError, ValueError, TypeError) as error:
        print(" x ".join(row), "FAILED:", " ".join(str(error).split())[:300], flush=True)
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
