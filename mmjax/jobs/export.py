"""--job=export: the model of a workdir as others load it, read back and compared before it is believed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mmjax
from mmjax import tree
from mmjax.batch import Batch
from mmjax.config import Recipe
from mmjax.data.messages import Sample, validated
from mmjax.errors import UserError
from mmjax.export import save_adapters, without_adapters
from mmjax.jobs.trained import trained
from mmjax.model import Model
from mmjax.models import multimodal, prompts
from mmjax.models.adapters import leaves_of
from mmjax.models.config import ModelConfig
from mmjax.models.tuning_config import NoisePromptConfig
from mmjax.parallel import cluster
from mmjax.parallel.placement import on_host
from mmjax.parallel.sharding import mesh_of, param_shardings
from mmjax.results import record
from mmjax.training.trainable import select

# Largest difference of logits, as a share of the largest logit: rounding of merged adapters and of the written dtype.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def run(recipe: Recipe, workdir: Path) -> None:
    """Writes the directory that the recipe's `export` section describes."""
    export(trained(recipe, workdir), recipe, workdir)


def export(model: Model, recipe: Recipe, workdir: Path) -> Path:
    """Writes the model, reads it back, compares logits and prompts, and returns the directory.

    An adapter alone (format "peft") is written over the published model that the recipe extends; where there is none, or where
    more than adapters was trained, the rest of the model goes to `base` below it. Of several processes all must call; process 0 writes.
    Raises UserError where the layout cannot hold the model, or where what comes back is not what went out.
    """
    settings = recipe.export
    path = Path(settings.path or workdir / "export")
    model = model.dequantised() if settings.dequantise else model
    quantise = model.config.quantisation or ""
    if settings.format == "peft":
        base = recipe.model.path
        if not base or model.config.language.new_rows or not _only_adapters_trained(model, recipe):
            base = "base"
            without_adapters(model).dequantised().save_pretrained(path / base, dtype=settings.dtype)
            quantise = ""
        save_adapters(model, path, base=base, dtype=settings.dtype)
    else:
        layout, dtype = settings.format, settings.dtype
        model.save_pretrained(path, layout=layout, dtype=dtype, merge_adapters=settings.merge_adapters)
    cluster.wait("exported")
    mesh = mesh_of(model.params) if cluster.several() else None
    again = mmjax.load(path, "float32", quantise=quantise, shardings=param_shardings(model.params, mesh) if mesh else None)
    difference = logit_difference(model, again)
    allowed = TOLERANCE[settings.dtype or model.run.dtype]
    if not difference <= allowed:
        raise UserError(
            f"{path} was written, but read back its logits differ by {difference:.2g} of the largest (allowed: {allowed:g}): "
            "do not use it, and report this"
        )
    if (ours := _prompt(model)) != (theirs := _prompt(again)):
        raise UserError(
            f"{path} was written, but read back a prompt becomes the ids {theirs} instead of {ours}: do not use it"
        )
    if jax.process_index() == 0:
        record(workdir, {"export_logit_difference": difference})
        print(f"{path}: {settings.format} layout; read back, the logits differ by at most {difference:.1e} of the largest")
    return path


def _only_adapters_trained(model: Model, recipe: Recipe) -> bool:
    """Whether everything the stages train is a leaf of an adapter."""
    trained = [select(model.params, recipe.stages[name].trainable, name).leaves for name in recipe.run]
    own = tree.flatten(leaves_of(model.params, [adapter.name for adapter in model.config.adapters]))
    return all(path in own for leaves in trained for path in leaves)


def logit_difference(model: Model, other: Model) -> float:
    """The largest difference of two models' logits, over the largest logit, on random tokens around a random image."""
    assert model.config.llm is not None and other.config.llm is not None
    rng = np.random.default_rng(0)
    vocab = min(model.config.llm.vocab_size, other.config.llm.vocab_size)
    tower, media = model.config.vision, model.config.tokens_per_tile
    media += bool(model.config.connector and model.config.connector.newline)
    length = media + 8
    tokens = rng.integers(0, vocab, (1, length))
    places = np.full((1, length), -1)
    places[0, 4 : 4 + media] = np.arange(media)
    images = rng.integers(0, 256, (1, 1, tower.image_size, tower.image_size, 3)) if tower and media else None
    batch = Batch(
        tokens=tokens.astype(np.int32),
        segments=np.ones((1, length), np.int32),
        positions=np.arange(length, dtype=np.int32)[None],
        media=places.astype(np.int32),
        images=None if images is None else images.astype(np.uint8),
        task=np.zeros((1, length), np.int32),
    )
    if model.config.media_beside:
        batch = _with_medium_beside(model.config, batch, rng)
    first, second = (_logits(m, batch)[..., :vocab] for m in (model, other))
    return float(np.abs(first - second).max() / np.abs(first).max())


def _with_medium_beside(config: ModelConfig, batch: Batch, rng: np.random.Generator) -> Batch:
    """The batch with a random picture, or a noise embedding, beside its text."""
    noise = next((a for a in config.adapters if isinstance(a, NoisePromptConfig)), None)
    if noise is not None:
        medium: dict[str, Any] = {"features": rng.normal(size=(1, 1, noise.length, noise.channels)).astype(np.float32)}
    else:
        side = config.encoder.image_size
        medium = {"images": rng.integers(0, 256, (1, 1, side, side, 3)).astype(np.uint8)}
    rows = {"row_media": np.zeros((1, 1), np.int32), "media_segments": np.ones((1, 1), np.int32)}
    return dataclasses.replace(batch, **medium, **rows)


def _logits(model: Model, batch: Batch) -> np.ndarray:
    batch = prompts.prepended(model.config, batch)
    states = multimodal.hidden(model.params, model.config, batch, model.run)
    return on_host(multimodal.head(model.params, model.config, states))


def _prompt(model: Model) -> list[int] | None:
    """The ids of a question about an image, -1 at the image's places; None where the model takes no messages."""
    if model.tokenizer is None or model.template is None:
        return None
    image = [{"type": "image", "path": "x"}] if model.config.connector else []
    asked = validated([{"role": "user", "content": [*image, {"type": "text", "text": "What is this?"}]}])
    example = model.encoder().encode(Sample("the probe", asked), generation_prompt=True, size_of=lambda part: (48, 64))
    return np.where(example.media != -1, -1, example.ids).tolist()
