"""Plans every recipe at its published size for slices of TPUs, and keeps what comes of it in launch/plans.json and launch/plans.md.

    python -m tests.plans                     # what is not in launch/plans.json yet (hours on a small machine; it may be stopped at any time)
    python -m tests.plans llava15 "vila:40b v5p:4x4x8"    # some recipes, or one on one slice, anew
    python -m tests.plans --table             # launch/plans.md from launch/plans.json

The last stage of each recipe is compiled with libtpu for v5e:16x16 and v5p:4x4x8, small ones for v5e:2x4, and some for slices that suit
their batches; nothing is run. The mesh is `fsdp` over all chips (half of them, and `data`, on v5p:4x4x8), and as much `tensor` (at most 8) as
it takes for the step's rows to be not much more than the recipe's; a mixture's experts take their part of `fsdp`. What does not fit is
tried in 2 and 4 micro-batches, where there are rows for them, then with full rematerialisation, then with more `tensor`. Some recipes are also planned without Pallas attention, and with texts of 16,384 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mmjax import config as recipes
from mmjax.architecture import model_config
from mmjax.config import Recipe, from_config_dict
from mmjax.models.config import ModelConfig
from mmjax.planning import chips, report
from mmjax.planning.figures import stage_figures
from mmjax.planning.search import ROWS
from mmjax.planning.stages import plan_stage
from tests.configs import expand

ROOT = Path(__file__).resolve().parents[1]
DATA, TABLE = ROOT / "launch" / "plans.json", ROOT / "launch" / "plans.md"
SLICES = ("v5e:16x16", "v5p:4x4x8")
SMALL = ("git", "moondream", "doubutsu", "blip2", "minigpt4", "paligemma")  # on v5e:2x4 as well
MORE = (  # sizes beside each recipe's usual one
    ("llava15", "13b"),
    ("vila", "40b"),
    ("idefics", "80b"),
    ("flamingo", "80b"),
    ("anymal", "70b"),
)
COMPARED = ("llava15", "llava15:13b", "llava15@16k", "vila:40b", "idefics:80b", "mixtral")  # also without Pallas


@dataclasses.dataclass(frozen=True)
class Case:
    """`name`: recipe:argument, and @16k where its texts have 16,384 tokens; or mixtral, a language model alone."""

    name: str
    topology: str


def cases() -> list[Case]:
    systems = [(name, "") for name in expand.systems()]
    names = [f"{name}:{argument}".rstrip(":") for name, argument in (*systems, *MORE)]
    fewer = [Case(name, "v5p:2x4x4") for name in ("vila:40b", "idefics:80b")]  # of a size that suits their batches
    large = fewer + [Case(name, topology) for name in ("mixtral", *names, "llava15@16k") for topology in SLICES]
    return large + [Case(name, "v5e:2x4") for name in SMALL]


def recipe_of(name: str) -> Recipe:
    """The recipe of a case."""
    if name == "mixtral":
        return _mixtral()
    name, long = name.removesuffix("@16k"), name.endswith("@16k")
    recipe = from_config_dict(expand.config(*(name.split(":") + [""])[:2]))
    if long:
        last = recipe.run[-1]
        recipe.stages[last] = dataclasses.replace(recipe.stages[last], length=16384, rows=64)
    return recipe


def plan(case: Case) -> dict[str, Any]:
    """The figures of a case's last stage."""
    recipe, target = recipe_of(case.name), chips.target(case.topology)
    name, config = recipe.run[-1], model_config(recipe)
    known = stage_figures(recipe, config, name)
    per_row = known["flops_per_step"] / recipe.stages[name].rows
    mesh = mesh_of(recipe, config, name, case.topology, target.count)
    stage, found = recipe.stages[name], None
    for parts, remat, mesh in tries(stage, mesh):  # the first that fits
        recipe.stages[name] = dataclasses.replace(stage, accumulate=parts, remat=remat)
        found = plan_stage(recipe, name, config, target, mesh, per_row, compare=case.name in COMPARED)
        if found.fits is not False:
            break
    assert found is not None
    samples = known["flops_per_step"] / known["flops_per_sample"] / recipe.stages[name].rows
    print(report.text(found, samples), flush=True)
    unexplained = [f"{item.type} {item.op}" for item in found.large if not item.why]
    return {
        "stage": name,
        "mesh": found.mesh,
        "recipe_rows": recipe.stages[name].rows,
        "length": recipe.stages[name].length,
        "accumulate": recipe.stages[name].accumulate,
        "remat": recipe.stages[name].remat,
        "figures": report.figures(found, samples),
        "dearest": [[op, share] for op, share in found.costs[:5]],
        "unexplained": unexplained,
    }


def tries(stage: recipes.Stage, mesh: recipes.Mesh) -> Iterator[tuple[int, Any, recipes.Mesh]]:
    """Micro-batches, rematerialisation and mesh, one after the other until a step fits."""
    shards = mesh.data * mesh.fsdp * mesh.expert
    parts = [n for n in (1, 2, 4) if n == 1 or -(-stage.rows // (shards * n)) * shards * n <= ROWS * stage.rows]
    for n in parts:
        yield n, stage.remat, mesh
    if stage.remat != "full":
        yield parts[-1], "full", mesh
    while mesh.tensor < 8 and mesh.fsdp % 2 == 0:
        mesh = dataclasses.replace(mesh, fsdp=mesh.fsdp // 2, tensor=mesh.tensor * 2)
        yield parts[-1], "full", mesh


def mesh_of(recipe: Recipe, config: ModelConfig, name: str, topology: str, devices: int) -> recipes.Mesh:
    """See the module's docstring. On v5p:4x4x8 weights are divided over half of the chips: what all 128 together gather, in three dimensions,
    the compiler makes a sum over zeros."""
    rows, most = recipe.stages[name].rows, 64 if topology == "v5p:4x4x8" else devices
    for tensor in (1, 2, 4, 8):
        shards = devices // tensor
        if -(-rows // shards) * shards <= ROWS * rows:
            break
    fsdp = min(most, shards)
    experts = config.llm.block.experts.count if config.llm and config.llm.block.experts else 1
    return recipes.Mesh(data=shards // fsdp, fsdp=fsdp // experts, expert=experts, tensor=tensor)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.plans", description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help="recipes, with arguments after a colon; none = what is not there yet")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    chosen = parser.parse_args(arguments)
    known = json.loads(DATA.read_text()) if DATA.exists() else {"versions": {}, "plans": {}}
    for case in cases() if not chosen.table else ():
        key = f"{case.name} {case.topology}"
        if (chosen.recipes and not {case.name, key} & set(chosen.recipes)) or (not chosen.recipes and key in known["plans"]):
            continue
        print(f"\n{key}", flush=True)
        began = time.perf_counter()
        try:
            known["plans"][key] = plan(case)
        except Exception as error:  # a step that does not compile is a row of the table
            known["plans"][key] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
            print(known["plans"][key]["error"])
        jax.clear_caches()
        known["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
        DATA.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{time.perf_counter() - began:.0f} s", flush=True)
    TABLE.write_text(table(known))
    return 0


def table(known: dict[str, Any]) -> str:
    """launch/plans.md."""
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    lines = [
        "# Recipes on slices of TPUs",
        "",
        f"Written by `python -m tests.plans` ({versions}) from plans.json beside it. The last stage of a recipe at its published size, compiled "
        "for the slice; nothing was run.",
        "",
        *(f"    {line}" for line in report.NOTES.splitlines()),
        "",
        "MFU: of the computation alone; in brackets with communication, from none of it beside the computation to all of it. Without Pallas: the "
        "same step with attention as XLA has it. Recipes of small batches have few tokens for each chip of these slices; the dearest operations of each row "
        "are in plans.json.",
        "",
        "| recipe, stage | slice | mesh | rows x tokens | GiB of a chip's | fits | MFU | MFU without Pallas | large buffers unexplained |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = {f"{case.name} {case.topology}": number for number, case in enumerate(cases())}
    for key, found in sorted(known["plans"].items(), key=lambda item: order.get(item[0], len(order))):
        name, topology = key.split(" ")
        if "error" in found:
            lines.append(f"| {name} | {topology} | | | | does not compile: {found['error'][:120]} | | | |")
            continue
        f = found["figures"]
        mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
        size = f"{f['bytes_per_device'] / 2**30:.1f} of {f['hbm_bytes'] / 2**30:.1f}"
        rows = f"{f['rows']:.0f} x {found['length']:,}" + (f" (recipe: {found['recipe_rows']})" if f["rows"] != found["recipe_rows"] else "")
        rows += f", in {found['accumulate']} parts" if found.get("accumulate", 1) > 1 else ""
        mfu = plain = ""
        if "predicted_mfu" in f:
            low, high = f["predicted_mfu_with_communication_least"], f["predicted_mfu_with_communication_most"]
            mfu = f"{f['predicted_mfu']:.0%} ({low:.0%} - {high:.0%})"
            if (half := f.get("predicted_mfu_kernels_at_half", f["predicted_mfu"])) < f["predicted_mfu"] - 1e-3:
                mfu += f"; all kernels at 50%: {half:.0%}"
        if "bytes_per_device_without_pallas" in f:
            mean = f.get("predicted_mfu_without_pallas")
            plain = f"{mean:.0%}, {f['bytes_per_device_without_pallas'] / 2**30:.1f} GiB" if mean else f"does not fit: {f['bytes_per_device_without_pallas'] / 2**30:.0f} GiB"
        lines.append(
            f"| {name}, {found['stage']} | {topology} | {mesh} | {rows} | {size} | {'yes' if f.get('fits') else 'NO'} | {mfu} | {plain} "
            f"| {len(found['unexplained']) or ''} |"
        )
    return "\n".join(lines) + "\n"


def _mixtral() -> Recipe:
    """Mixtral 8x7B's shapes, all of it trained on text."""
    fields = {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }
    stage = recipes.Stage(
        trainable=("llm/**",),
        sources={"text": recipes.Source(kind="messages", path="text.jsonl")},
        steps=1000,
        rows=128,
        length=4096,
        tiles=0,
        router_loss=0.02,
        dtype="bfloat16",
        remat="dots",
    )
    model = recipes.Model(llm=recipes.Part(config=fields), dtype="bfloat16", connector=recipes.Connector())
    return Recipe(name="mixtral_8x7b", model=model, stages={"train": stage}, run=("train",))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
