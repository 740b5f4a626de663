"""Compares the ways of tuning: what each trains, what its optimizer keeps, what a step costs, what it reaches.

    python -m tests.ways_of_tuning              # every way in configs/ways_of_tuning.py, and their base before them where it is not there
    python -m tests.ways_of_tuning lora ia3     # some of them

Leaves WORKDIRS/ways_of_tuning.{json,md,png}. The time of a step is that of the same batches without their first one, which compiles;
it is given as a ratio to LoRA's in the same run of this command.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from configs import ways_of_tuning
from configs.ways_of_tuning import WAYS
from mmjax import tree
from mmjax.architecture import model_config
from mmjax.config import Recipe
from mmjax.drawing import BLUE, INK, PALE, RULE
from mmjax.jobs import train
from mmjax.models import multimodal
from mmjax.training.optimizer import make_optimizer
from mmjax.training.state import state_shapes
from mmjax.training.trainable import select, shapes

AGAINST = "lora"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ways_of_tuning", description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", choices=[[], *WAYS], help="some of them; none = all")
    parser.add_argument("--out", type=Path, default=Path("workdirs"), help="where workdirs, table and picture go")
    chosen = parser.parse_args(arguments)
    began = time.perf_counter()
    base = chosen.out / "ways_of_tuning_base"
    if not (base / "results.json").exists():
        train.run(ways_of_tuning.base(), base)
    rows = [measure(way, base, chosen.out / f"ways_of_tuning_{way}") for way in chosen.ways or WAYS]
    against = next((row["step_seconds"] for row in rows if row["way"] == AGAINST), float("nan"))
    for row in rows:
        row["step_ratio"] = row["step_seconds"] / against
    (chosen.out / "ways_of_tuning.json").write_text(json.dumps(rows, indent=1) + "\n")
    (chosen.out / "ways_of_tuning.md").write_text(table(rows))
    draw(rows, chosen.out / "ways_of_tuning.png")
    print(f"\n{table(rows)}\n{time.perf_counter() - began:.0f} s")
    return 0


def measure(way: str, base: Path, workdir: Path) -> dict[str, Any]:
    """Trains one way of tuning on the base, anew."""
    shutil.rmtree(workdir, ignore_errors=True)
    recipe = ways_of_tuning.tuned(way, str(base))
    train.run(recipe, workdir)
    jax.clear_caches()
    found = json.loads((workdir / "results.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "way": way,
        **held(recipe),
        "step_seconds": statistics.median(line["step_seconds"] for line in lines[1:]),
        "accuracy": found["accuracy"],
        "low": found["accuracy_low"],
        "high": found["accuracy_high"],
    }


def held(recipe: Recipe) -> dict[str, float]:
    """Parameters that are trained, their share of the model's, and the bytes that the optimizer keeps for them."""
    stage = recipe.stages["instruct"]
    params = multimodal.shapes(model_config(recipe))
    selection = select(params, stage.trainable, "stages.instruct.trainable")
    trainable = shapes(params, selection, stage.param_dtype)
    state = state_shapes(trainable, make_optimizer(stage.optimizer, trainable, stage.steps, "stages.instruct.optimizer"))
    count = selection.count(params)
    base = sum(leaf.size for path, leaf in tree.flatten(params).items() if not {"adapters", "plugs", "prompts"} & set(path.split("/")))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.optimizer))
    return {"trainable": count, "share": count / base, "optimizer_bytes": size}


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    head = "| way | trained parameters | share of the model | optimizer state | time of a step / LoRA's | right answers, with 95 % interval |"
    lines = [head, "|" + " --- |" * head.count(" | ") + " --- |"]
    for row in rows:
        right = f"{row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"
        cells = [row["way"], f"{row['trainable']:,}", f"{row['share']:.2%}", f"{row['optimizer_bytes'] / 1024:,.0f} KiB", f"{row['step_ratio']:.2f}", right]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    """Right answers over trained parameters, one point a way."""
    figure = Figure((8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    labelled: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: -row["accuracy"]):
        x, y = max(row["trainable"], 1), 100 * row["accuracy"]
        axes.errorbar([x], [y], [[y - 100 * row["low"]], [100 * row["high"] - y]], fmt="o", color=BLUE, ecolor=PALE, capsize=2)
        near = any(0.7 < x / other < 1.4 and above - y < 1.2 for other, above in labelled)  # its name goes to the other side
        axes.annotate(row["way"], (x, y), (-5, -8) if near else (5, 4), textcoords="offset points", ha="right" if near else "left", color=INK, fontsize=8)
        labelled.append((x, y))
    axes.set(xscale="log", xlabel="trained parameters", ylabel="right answers, %")
    axes.grid(color=RULE)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
