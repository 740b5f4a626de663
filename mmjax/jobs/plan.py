"""--job=plan: what a recipe would take. From shapes alone: parameters, what each stage trains, bytes, FLOPs; and with
--config.plan.topology=v5e:16x16 the training step compiled for that slice: bytes per device, collectives, seconds. Reads no weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Sequence

import jax
import jax.numpy as jnp

from mmjax import config as recipes
from mmjax import flops, tree
from mmjax.assembly import model_config
from mmjax.config import Recipe, Stage
from mmjax.data.picture_tokens import PictureTokens
from mmjax.data.tiling import of_recipe
from mmjax.errors import UserError
from mmjax.models import multimodal, quantised
from mmjax.models.config import ModelConfig
from mmjax.planning import report
from mmjax.planning.chips import Target, target
from mmjax.planning.decoding import plan_decoding
from mmjax.planning.search import search
from mmjax.planning.stages import StagePlan, plan_stage
from mmjax.results import record
from mmjax.training.optimizer import make_optimizer
from mmjax.training.state import state_shapes
from mmjax.training.trainable import select, shapes
from mmjax.tree import Params


def run(recipe: Recipe, workdir: Path) -> None:
    """Prints the tables and writes their figures to WORKDIR/results.json. Raises UserError for what does not fit together."""
    if recipe.plan.stage and recipe.plan.stage not in recipe.run:
        raise UserError(f"plan.stage = {recipe.plan.stage!r} is not among the stages that are run: {', '.join(recipe.run)}")
    slice = target(recipe.plan.topology) if recipe.plan.topology else None
    config = model_config(recipe)
    params = multimodal.shapes(config)
    figures: dict[str, float] = {"parameters": quantised.count(params)}
    figures |= {f"parameters_{part}": n for part, n in _parts(params).items()}
    print(f"{recipe.name}: {figures['parameters']:,} parameters\n")
    print(_table(["part", "parameters", f"bytes in {recipe.model.dtype}"], _part_rows(params, recipe.model.dtype)))
    rows = []
    for name in recipe.run:
        figured = stage_figures_of(recipe, config, name)
        figures |= {f"{key}_{name}": value for key, value in figured.items()}
        rows.append([name, *(_shown(key, value) for key, value in figured.items())])
    print(_table(["stage", *(key.replace("_", " ") for key in _COLUMNS)], rows))
    print(f"FLOPs: {flops.CONVENTION}. A sample is a picture and its text: a row, or its share of a packed row full of pictures.")
    record(workdir, figures)
    if slice is not None:
        record(workdir, _on(slice, recipe, config, figures, workdir))


def _on(slice: Target, recipe: Recipe, config: ModelConfig, known: dict[str, float], workdir: Path) -> dict[str, float]:
    """Compiles for a slice: prints what comes of each stage, draws WORKDIR/plan.png, and returns the figures: each with its stage's name
    behind it; without one, those of the last stage, but that everything must fit and the largest bytes count."""
    names = [recipe.plan.stage] if recipe.plan.stage else recipe.run
    plans, found = [], dict[str, float]()
    print(f"\n{report.NOTES}\n")
    for name in names:

        def plan(recipe: Recipe, mesh: recipes.Mesh, name: str = name) -> StagePlan:
            per_row = known[f"flops_per_step_{name}"] / recipe.stages[name].rows
            return plan_stage(recipe, name, config, slice, mesh, per_row)

        per_row = known[f"flops_per_step_{name}"] / known[f"flops_per_sample_{name}"] / recipe.stages[name].rows
        if recipe.plan.search and slice.devices is not None:
            tried = search(recipe, name, config, slice, plan)
            print(_table(["mesh, rows, rematerialisation, micro-batches", "GiB", "s a step", "MFU"], [_tried_row(t) for t in tried]))
            best = tried[0]
            print(f"{name}: " + (f"recommended: {best.flags}" if best.plan.fits else "nothing that was tried fits") + "\n")
            plans.append(best.plan)
        else:
            plans.append(plan(recipe, recipe.mesh))
        if plans[-1].stage.rows != recipe.stages[name].rows:
            print(f"{name}: {recipe.stages[name].rows} rows cannot be divided over this mesh: planned with --config.stages.{name}.rows={plans[-1].stage.rows}")
        print(report.text(plans[-1], per_row) + "\n")
        last = report.figures(plans[-1], per_row)
        found |= {f"{key}_{name}": value for key, value in last.items()} | last
    if recipe.plan.decode and slice.devices is not None:
        decoding = plan_decoding(recipe, config, slice)
        print(decoding.text + "\n")
        found |= decoding.figures
    verdicts = [plan.fits for plan in plans]
    if False in verdicts or None not in verdicts:
        found["fits"] = False not in verdicts
    found["bytes_per_device"] = max(plan.needed for plan in plans)
    report.draw(workdir / "plan.png", plans)
    print(f"drawn: {workdir / 'plan.png'}")
    return found


def _tried_row(tried: Any) -> list[str]:
    plan = tried.plan
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    settings = f"{mesh}, {plan.stage.rows} rows, {tried.remat}, {tried.accumulate}"
    found = plan.estimate
    if found is None or not plan.fits:
        return [settings, f"{plan.needed / 2**30:.2f}", "does not fit", ""]
    return [settings, f"{plan.needed / 2**30:.2f}", f"{found.step[0]:.2f} - {found.step[1]:.2f}", f"{found.mfu(found.compute):.1%}"]


_COLUMNS = (
    "trainable",
    "bytes_parameters",
    "bytes_gradients",
    "bytes_optimizer",
    "tokens_per_sample",
    "flops_per_sample",
    "flops_per_step",
)


def stage_figures_of(recipe: Recipe, config: ModelConfig, name: str) -> dict[str, float]:
    """`stage_figures` of a recipe's stage."""
    stage, beside = recipe.stages[name], recipe.model.connector.text_length
    picture = _picture(recipe, config) if stage.tiled else None
    return stage_figures(config.without(stage.idle), multimodal.shapes(config), stage, recipe.model.dtype, f"stages.{name}", picture, beside)


def _picture(recipe: Recipe, config: ModelConfig) -> tuple[int, int] | None:
    """Tiles and tokens of a large square picture; None where pictures are one tile."""
    tiling = of_recipe(recipe.model.image)
    if tiling is None or config.connector is None:
        return None
    side = config.picture_size
    pictures = PictureTokens(config.connector.tokens, (side, side), tiling, config.merge)
    return pictures.tiles((4 * side, 4 * side)), len(pictures.order((4 * side, 4 * side)))


def stage_figures(
    config: ModelConfig,
    params: Params,
    stage: Stage,
    dtype: str,
    key: str,
    picture: tuple[int, int] | None = None,
    beside: int = 0,
) -> dict[str, float]:
    """The figures of `_COLUMNS` for one stage. `dtype`: of frozen weights; `key` names the stage in errors; `picture`: tiles and
    tokens of a picture, one tile where not given; `beside`: tokens of text that a Q-Former reads beside a tile.

    Every position that is not the picture's is taken to be supervised, and every row to be full. An encoder-decoder's encoder
    reads the row, and its decoder writes a row of answers (stage.answer_length, or as much as is not the picture's).
    """
    selection = select(params, stage.trainable, f"{key}.trainable")
    trainable = shapes(params, selection, stage.param_dtype)
    # the number of steps bends the schedule, not the state
    optimizer = make_optimizer(stage.optimizer, trainable, stage.steps or 1, f"{key}.optimizer")
    state = state_shapes(trainable, optimizer)
    trained = selection.count(params)
    tiles, tokens = picture or (1, config.tokens_per_tile)
    per_row = max(1, stage.tiles // tiles) if stage.packing else 1
    length = stage.length / per_row
    media = tokens if stage.objective == "language" and stage.tiles else 0
    cost = flops.training_flops(config, selection, stage.objective, stage.length if stage.objective == "contrastive" else beside)
    encoded = not stage.cache_features
    if stage.objective != "language":
        length, per_row = float(stage.length) if stage.objective == "contrastive" else 0.0, 1
        parts = cost.count([], 0, 1, encoded)
    else:
        supervised, tiles = max(0.0, length - media), tiles if stage.tiles else 0
        sequence_to_sequence = config.llm is not None and config.llm.encoder is not None
        if sequence_to_sequence and stage.answer_length:
            supervised = stage.answer_length / per_row
        lengths, sources = ([supervised], [length]) if sequence_to_sequence else ([length], [])
        parts = cost.count(lengths, supervised, tiles, encoded, sources)
    per_sample = sum(parts.values())
    figures = (
        trained,
        _held(params, dtype) - trained * jnp.dtype(dtype).itemsize + _bytes(state.trainable),
        _bytes(state.trainable),
        _bytes(state.optimizer),
        length,
        per_sample,
        per_sample * per_row * stage.rows,
    )
    return dict(zip(_COLUMNS, figures, strict=True))


def _parts(params: Params) -> dict[str, int]:
    """Part -> parameters, adapters apart."""
    return {part: quantised.count(leaves) for part, leaves in _apart(params).items()}


def _apart(params: Params) -> dict[str, Params]:
    """Part -> its leaves by path, adapters apart."""
    parts: dict[str, Params] = {}
    for path, leaf in tree.flatten(params).items():
        parts.setdefault("adapters" if tree.adapter_of(path) else path.split("/")[0], {})[path] = leaf
    return {part: tree.unflatten(leaves) for part, leaves in parts.items()}


def _part_rows(params: Params, dtype: str) -> list[list[str]]:
    parts = _apart(params)
    return [[part, f"{quantised.count(leaves):,}", _shown("bytes", _held(leaves, dtype))] for part, leaves in parts.items()]


def _held(params: Params, dtype: str) -> int:
    """Bytes of frozen parameters: quantised kernels as they are held, the rest in `dtype`."""
    size = jnp.dtype(dtype).itemsize
    flat = tree.flatten(params)
    return sum(_bytes(leaf) if quantised.is_part(path) else math.prod(leaf.shape) * size for path, leaf in flat.items())


def _bytes(leaves: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))


def _shown(key: str, value: float) -> str:
    if "bytes" in key:
        return f"{value / 2**30:,.2f} GiB" if value >= 2**27 else f"{value / 2**20:,.2f} MiB"
    if "flops" in key:
        return f"{value / 1e12:,.2f} T" if value >= 1e11 else f"{value / 1e9:,.4f} G"
    return f"{value:,.0f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in line, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [[cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))] for row in (header, *rows)]
    return "\n".join("  ".join(line).rstrip() for line in lines) + "\n"
