"""--job=plan: what a recipe would take. From shapes alone: parameters, what each stage trains, bytes, FLOPs; and with
--config.plan.topology=v5e:16x16 the training step compiled for that slice: bytes per device, collectives, seconds. Reads no weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Sequence

from mmjax import config as recipes
from mmjax import flops, tree
from mmjax.architecture import model_config
from mmjax.config import Recipe, Stage
from mmjax.errors import UserError
from mmjax.models import multimodal, quantised
from mmjax.models.config import ModelConfig
from mmjax.planning import report
from mmjax.planning.chips import Target, target
from mmjax.planning.decoding import plan_decoding
from mmjax.planning.figures import FIGURES, held_bytes, stage_figures
from mmjax.planning.search import search
from mmjax.planning.stages import StagePlan, plan_stage
from mmjax.results import record
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
        figured = stage_figures(recipe, config, name)
        figures |= {f"{key}_{name}": value for key, value in figured.items()}
        rows.append([name, *(_shown(key, value) for key, value in figured.items())])
    print(_table(["stage", *(key.replace("_", " ") for key in FIGURES)], rows))
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

        def plan(changed: Recipe, mesh: recipes.Mesh, name: str = name, compare: bool = False) -> StagePlan:
            per_row = known[f"flops_per_step_{name}"] / recipe.stages[name].rows
            return plan_stage(changed, name, config, slice, mesh, per_row, compare)

        per_row = known[f"flops_per_step_{name}"] / known[f"flops_per_sample_{name}"] / recipe.stages[name].rows
        if recipe.plan.search and slice.devices is not None:
            tried = search(recipe, name, config, slice, plan)
            print(_table(["mesh, rows, rematerialisation, micro-batches", "GiB", "s a step", "MFU"], [_tried_row(t) for t in tried]))
            best = tried[0]
            print(f"{name}: " + (f"recommended: {best.flags}" if best.plan.fits else "nothing that was tried fits") + "\n")
            stage = dataclasses.replace(recipe.stages[name], remat=best.remat, accumulate=best.accumulate)
            plans.append(plan(dataclasses.replace(recipe, stages={**recipe.stages, name: stage}), best.mesh, compare=True))
        else:
            plans.append(plan(recipe, recipe.mesh, compare=True))
            _say_changes(name, recipe.stages[name], plans[-1].stage)
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


def _say_changes(name: str, asked: Stage, planned: Stage) -> None:
    if changed := [key for key in ("rows", "accumulate") if getattr(asked, key) != getattr(planned, key)]:
        said = " ".join(f"--config.stages.{name}.{key}={getattr(planned, key)}" for key in changed)
        parts = f" in {asked.accumulate} parts" if asked.accumulate > 1 else ""
        print(f"{name}: {asked.rows} rows{parts} cannot be divided over this mesh: planned with {said}")


def _tried_row(tried: Any) -> list[str]:
    plan = tried.plan
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    settings = f"{mesh}, {plan.stage.rows} rows, {tried.remat}, {tried.accumulate}"
    found = plan.estimate
    if found is None or not plan.fits:
        return [settings, f"{plan.needed / 2**30:.2f}", "does not fit", ""]
    return [settings, f"{plan.needed / 2**30:.2f}", f"{found.step[0]:.3g} - {found.step[1]:.3g}", f"{found.mfu(found.compute):.1%}"]


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
    return [[part, f"{quantised.count(leaves):,}", _shown("bytes", held_bytes(leaves, dtype))] for part, leaves in parts.items()]


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
