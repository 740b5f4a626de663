"""Recipes at their `tiny` size learn eight handwriting scenes by heart, through all of their stages.

    python -m tests.configs.overfit DIR NAME [NAME ...]    the losses go to DIR/losses.json, each recipe's workdir to DIR/NAME

Only the number of samples, the steps and the learning rates differ from `:tiny`: published rates are made for other sizes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from pathlib import Path

import jax

from mmjax.config import Mesh, Recipe, Source, Stage, from_config_dict
from mmjax.jobs import train
from tests.configs import expand

STEPS, RATE = 30, 5e-3
FASTER = {"llama_adapter": 20, "robust_ger": 20}  # prompts behind closed gates, of a language model that knows nothing


def run(name: str, workdir: Path) -> dict[str, list[float]]:
    """The losses of each stage, step by step."""
    recipe = by_heart(from_config_dict(expand.config(name, "tiny")), RATE * FASTER.get(name, 1))
    train.run(recipe, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {stage: [line["loss"] for line in lines if line["stage"] == stage] for stage in recipe.run}


def by_heart(recipe: Recipe, rate: float = RATE) -> Recipe:
    return dataclasses.replace(
        recipe,
        stages={name: _stage(stage, rate) for name, stage in recipe.stages.items()},
        evaluations={},
        mesh=Mesh(),
        checkpoint=dataclasses.replace(recipe.checkpoint, every=0, keep_best=0, asynchronous=False),
        logging=dataclasses.replace(recipe.logging, every=1, tensorboard=False),
    )


def _stage(stage: Stage, rate: float) -> Stage:
    return dataclasses.replace(
        stage,
        sources={name: _few(source) for name, source in stage.sources.items()},
        validation=dataclasses.replace(stage.validation, sources={}, every=0),
        rows=2,
        steps=STEPS,
        optimizer=dataclasses.replace(stage.optimizer, learning_rate=rate, warmup_steps=0, warmup_ratio=0.1),
        dtype="float32",
        remat="none",
    )


def _few(source: Source) -> Source:
    return dataclasses.replace(source, options={**source.options, "size": 8})


def main(directory: Path, names: list[str]) -> None:
    """First loss and mean of the last three, for every stage of every recipe; or what went wrong."""
    found: dict[str, dict] = {}
    for name in names:
        try:
            losses = run(name, directory / name)
            found[name] = {stage: [losses[stage][0], sum(losses[stage][-3:]) / 3] for stage in losses}
        except Exception:
            found[name] = {"failed": traceback.format_exc()}
        jax.clear_caches()
    (directory / "losses.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
