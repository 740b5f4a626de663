"""A stage's plan as text, as figures and as a picture. What the compiler says and what is our arithmetic is told apart everywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Sequence

from matplotlib.figure import Figure

from mmjax.drawing import BLUE, GREEN, INK, ORANGE, PALE, RED, RULE
from mmjax.parallel.mesh import DATA_AXES
from mmjax.planning.chips import Target
from mmjax.planning.estimate import KERNEL_SHARE, MEASURED_SHARES
from mmjax.planning.stages import StagePlan

GIB = 2**30
MEGABLOX = MEASURED_SHARES["TPU v5", "%gmm"]

NOTES = f"""\
The compiler's word: bytes, the collectives and their sizes, the cycles of all operations but Pallas kernels.
Our arithmetic: seconds (cycles over the published clock), Pallas kernels at {KERNEL_SHARE:.0%} of the peak (megablox on v5p at {MEGABLOX:.0%}, the least that
follows from what MaxText publishes), communication (bytes over published link speeds: all links at once, or those of one axis of the torus), hours. Nothing was run. By the same cycles one product of two 8192 x 8192 bfloat16
matrices reaches 88 % of the peak on v5e, 90 % on v5p, 93 % on v4 and 70 % on v6e: nothing here can be above that."""


def text(plan: StagePlan, samples_per_row: float) -> str:
    """The lines that are printed."""
    chip, lines = plan.target.chip, []
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lines.append(f"{plan.name} on {plan.target.name} ({plan.target.count} x {chip.kind}), mesh {mesh}, {plan.stage.rows} rows a step")
    held = ", ".join(f"{part} {_gib(size)}" for part, size in plan.held.items())
    if plan.compiled is None:
        lines.append(f"  per device: {held} GiB; activations: not known, since {_why_not(plan.target)}")
        lines.append(_verdict(plan))
        return "\n".join(lines)
    temporaries = plan.compiled.memory.get("temporaries", 0)
    rest = f"temporaries (activations, gradients, gathered weights) {_gib(temporaries)}" if temporaries else "does not compile: see below"
    lines.append(f"  per device: {held}, {rest}; together {_gib(plan.needed)}" + (f" of {_gib(chip.hbm)} GiB" if chip.hbm else " GiB"))
    lines.append(_verdict(plan))
    lines.append(f"  compiled in {plan.compiled.seconds:.0f} s")
    if (found := plan.estimate) is not None:
        sent = "; ".join(f"{kind} {count:,} x, {moved / 1e9:,.2f} GB" for kind, (count, moved) in sorted(found.collectives.items()))
        fast, slow = found.step
        lines += [
            f"  FLOPs of the model: {found.model_flops:.3e} a step, {found.model_flops / found.devices:.3e} a device",
            f"  collectives a step, bytes that a device receives: {sent or 'none'}",
            f"  computation: {found.compute:.3f} s = {found.compiler_seconds:.3f} s of cycles"
            + (f" + {found.kernel_seconds:.3f} s of Pallas kernels ({found.kernel_flops:.2e} FLOPs)" if found.kernel_flops else ""),
            f"  communication: {found.communication[0]:.3f} to {found.communication[1]:.3f} s",
            f"  MFU: {found.mfu(found.compute):.1%} of the computation alone; {found.mfu(slow):.1%} to {found.mfu(fast):.1%} with communication "
            "(none to all of it beside the computation)"
            + (f"; {found.mfu(found.compiler_seconds + found.half_seconds):.1%} with all kernels at half of the peak" if found.half_seconds > 1.001 * found.kernel_seconds else ""),
            *([_without_kernels(plan)] if plan.plain else []),
            f"  {samples_per_row * plan.stage.rows / slow:,.1f} to {samples_per_row * plan.stage.rows / fast:,.1f} samples/s",
        ]
        if hours := hours_of(plan, samples_per_row):
            lines.append(f"  the stage: {hours[0]:,.1f} to {hours[1]:,.1f} hours, {hours[0] * found.devices:,.0f} to {hours[1] * found.devices:,.0f} chip hours")
        lines.append("  dearest: " + "; ".join(f"{_short(op)} {share:.1%}" for op, share in plan.costs[:5]))
    for why in dict.fromkeys(item.why for item in plan.large if item.why):
        alike = [item for item in plan.large if item.why == why]
        lines.append(f"  buffers as large as a stacked weight: {len(alike)} x up to {_gib(max(item.bytes for item in alike))} GiB, {why}")
    for item in plan.large:
        if not item.why:
            lines.append(f"  A LARGE BUFFER THAT IS NOT EXPLAINED: {item.type}, {_gib(item.bytes)} GiB ({_short(item.op)})")
    for loop in plan.open_loops:
        lines.append(f"  counted as one turn, since the data decide: {_short(loop)}")
    return "\n".join(lines)


def figures(plan: StagePlan, samples_per_row: float) -> dict[str, float]:
    """What goes to results.json; a `fits` that nobody knows is left out."""
    found: dict[str, float] = {"bytes_per_device": plan.needed, "hbm_bytes": plan.target.chip.hbm, "devices": plan.target.count, "rows": plan.stage.rows}
    found |= {f"bytes_{part}_per_device": size for part, size in plan.held.items()}
    if plan.fits is not None:
        found["fits"] = plan.fits
    if plan.compiled is not None:
        found["compile_seconds"] = plan.compiled.seconds
        found |= {f"bytes_{part}_per_device": size for part, size in plan.compiled.memory.items() if part == "temporaries"}
    if (e := plan.estimate) is not None:
        fast, slow = e.step
        found |= {
            "model_flops": e.model_flops,
            "predicted_compute_seconds": e.compute,
            "predicted_compiler_seconds": e.compiler_seconds,
            "predicted_kernel_seconds": e.kernel_seconds,
            "kernel_flops": e.kernel_flops,
            "predicted_communication_seconds_least": e.communication[0],
            "predicted_communication_seconds_most": e.communication[1],
            "predicted_step_seconds_least": fast,
            "predicted_step_seconds_most": slow,
            "predicted_mfu": e.mfu(e.compute),
            "predicted_mfu_kernels_at_half": e.mfu(e.compiler_seconds + e.half_seconds),
            "predicted_mfu_with_communication_least": e.mfu(slow),
            "predicted_mfu_with_communication_most": e.mfu(fast),
            "predicted_samples_per_second_least": samples_per_row * plan.stage.rows / slow,
            "predicted_samples_per_second_most": samples_per_row * plan.stage.rows / fast,
            "unexplained_large_buffers": sum(not item.why for item in plan.large),
        }
        if plan.plain is not None:
            found["bytes_per_device_without_pallas"] = plan.plain[0]
            if (other := plan.plain[1]) is not None:
                found |= {"predicted_compute_seconds_without_pallas": other.compute, "predicted_mfu_without_pallas": other.mfu(other.compute)}
        found |= {f"bytes_{kind.replace('-', '_')}": moved for kind, (_, moved) in e.collectives.items()}
        if hours := hours_of(plan, samples_per_row):
            found |= {"predicted_hours_least": hours[0], "predicted_hours_most": hours[1], "predicted_chip_hours_most": hours[1] * e.devices}
    return found


def hours_of(plan: StagePlan, samples_per_row: float) -> tuple[float, float] | None:
    """(least, most) hours of the stage; None where neither its steps nor its data set's size are known."""
    steps: float = plan.stage.steps
    sizes = [source.samples for source in plan.stage.sources.values()]
    if not steps and sizes and all(sizes):
        steps = plan.stage.epochs * sum(sizes) / (samples_per_row * plan.stage.rows)
    if not steps or plan.estimate is None:
        return None
    return plan.estimate.step[0] * steps / 3600, plan.estimate.step[1] * steps / 3600


def draw(path: Path, plans: Sequence[StagePlan]) -> None:
    """Bytes and seconds of each stage, beside what a device has."""
    figure = Figure(figsize=(10, 1.6 + 0.55 * len(plans)), dpi=120, layout="constrained")
    memory, time = figure.subplots(1, 2)
    colours = {"trained": BLUE, "frozen": PALE, "optimizer": GREEN, "batch": INK, "temporaries": ORANGE}
    for row, plan in enumerate(plans):
        parts = dict(plan.held)
        if plan.compiled is not None:
            parts["temporaries"] = max(0, plan.needed - sum(parts.values()))
        left = 0.0
        for part, size in parts.items():
            memory.barh(row, size / GIB, left=left, color=colours[part], height=0.6)
            left += size / GIB
        if plan.target.chip.hbm:
            memory.plot([plan.target.chip.hbm / GIB] * 2, [row - 0.4, row + 0.4], color=RED, linewidth=2)
        if (e := plan.estimate) is not None:
            time.barh(row, e.compiler_seconds, color=BLUE, height=0.6)
            time.barh(row, e.kernel_seconds, left=e.compiler_seconds, color=GREEN, height=0.6)
            time.barh(row, e.communication[1], left=e.compute, color=RULE, height=0.6)
            time.barh(row, e.communication[0], left=e.compute, color=ORANGE, height=0.6)
            time.text(e.compute + e.communication[1], row, f"  MFU {e.mfu(e.step[1]):.0%} to {e.mfu(e.compute):.0%}", va="center", color=INK)
    names = [f"{plan.name}\n{plan.target.name}" for plan in plans]
    memory.set_yticks(range(len(plans)), names)
    time.set_yticks([])
    memory.set_xlabel("GiB per device; red: what it has")
    time.set_xlabel("seconds a step: cycles, kernels, communication (all links, one axis)")
    time.set_xlim(0, time.get_xlim()[1] * 1.25)
    for part, colour in colours.items():
        memory.barh(0, 0, color=colour, label=part)
    memory.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.45 / (0.5 + 0.3 * len(plans))), ncols=5, frameon=False, fontsize=8)
    for axes in (memory, time):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _without_kernels(plan: StagePlan) -> str:
    """The same step with attention as XLA has it."""
    assert plan.plain is not None
    size, other = plan.plain
    if other is None:
        return f"  without Pallas attention it does not fit: {_gib(size)} GiB"
    return f"  without Pallas attention: {_gib(size)} GiB, computation {other.compute:.3f} s, MFU {other.mfu(other.compute):.1%} of it"


def _verdict(plan: StagePlan) -> str:
    if plan.fits:
        return "  it fits"
    if plan.fits is None:
        return "  whether it fits nobody has said" + ("" if plan.target.chip.hbm else ": how much memory the device has is not known")
    short = plan.needed - plan.target.chip.hbm
    return f"  IT DOES NOT FIT: {_gib(short)} GiB too many. {advice(plan)}"


def advice(plan: StagePlan) -> str:
    """What to change where a step does not fit, the mildest first."""
    held, hbm = sum(plan.held.values()), plan.target.chip.hbm
    key, words = f"--config.stages.{plan.name}", []
    if held > 0.8 * hbm:
        if "data" in plan.mesh and plan.mesh["data"] > 1:
            words.append("divide weights over all devices (--config.mesh.data=1 --config.mesh.fsdp=-1)")
        if plan.held["trained"] + plan.held["optimizer"] > plan.held["frozen"]:
            words.append("train fewer weights (LoRA), or keep moments in fewer bits (" + key + ".optimizer.moment_dtype=bfloat16)")
        else:
            words.append("hold frozen weights in few bits (--config.model.quantise.format=nf4)")
        words.append("take a larger slice")
        return "Weights and optimizer alone fill it: " + ", or ".join(words) + "."
    if plan.stage.remat != "full":
        words.append(f"{key}.remat=full")
    if plan.stage.rows // math.prod(plan.mesh.get(axis, 1) for axis in DATA_AXES) > plan.stage.accumulate:
        words.append(f"{key}.accumulate={2 * plan.stage.accumulate}")
    if plan.mesh.get("tensor", 1) < 8:
        words.append(f"--config.mesh.tensor={2 * plan.mesh.get('tensor', 1)}")
    return "Activations fill it: " + ", or ".join(words) + "; --config.plan.search=true tries them."


def _why_not(target: Target) -> str:
    return "libtpu, which has the compiler, is not installed (pip install libtpu)" if target.chip.clock else "no such devices are here to compile for"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= 0.005 * GIB or not size else f"{size / GIB:.4f}"


def _short(op: str) -> str:
    """The end of an operation's name, without what every name has."""
    for word in ("jit(train_step)/", "while/body/", "closed_call/", "checkpoint/", "rematted_computation/"):
        op = op.replace(word, "")
    op = op.replace("transpose(jvp())", "backward").replace("jvp()", "forward").replace("transpose(jvp(", "backward((")
    return op if len(op) <= 90 else "..." + op[-87:]


