"""From a compiled step to seconds: the compiler's cycles, published clocks and links, and what of it is our own arithmetic.

compute         the compiler's cycles over the published clock, and Pallas kernels, which carry none, at a share of the peak (share_of)
communication   bytes of the collectives over the links of one axis of the torus (the slow end), or of all (the fast end)
step            between the larger of both (all communication beside the computation) and their sum (none)
"""

from __future__ import annotations

import collections
import dataclasses
import math

from mmjax.planning.chips import Chip, Target
from mmjax.planning.hlo import Kernel, Program

KERNEL_SHARE = 0.5  # of the peak, at which a Pallas kernel is counted unless a source says more
# Megablox on v5p: MaxText publishes 2,909 tokens/s a chip for Mixtral 8x7B ("Optimized models tiering" of its documentation: 256 chips, bfloat16, 4,096
# tokens) with these kernels and full rematerialisation (mixtral_8x7b_dropless_v5p_512 of its benchmarks). In each layer that is 3 products of
# the chosen experts forwards, at least 2 again, 6 backwards: 240 of 459 TFLOP/s. Were all the rest, 48 TFLOP/s, as fast as the peak, and
# nothing waited for, they would run at 58 % of it; so that is the least they reach.
MEASURED_SHARES = {("TPU v5", "%gmm"): 0.58, ("TPU v5", "%tgmm"): 0.58}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one step on one device; seconds, shares of the peak from 0 to 1.

    model_flops   of all devices: the convention of mmjax.flops (frozen-aware, nothing that is computed twice)
    compiler_seconds, kernel_seconds   the two parts of compute; kernel_flops: what Pallas kernels do
    half_seconds    kernel_seconds if every kernel ran at KERNEL_SHARE
    communication   (all links, one axis of the torus)
    collectives     kind -> (number, bytes that a device receives)
    """

    model_flops: float
    peak: float
    devices: int
    compiler_seconds: float
    kernel_seconds: float
    half_seconds: float
    kernel_flops: float
    communication: tuple[float, float]
    collectives: dict[str, tuple[int, float]]

    @property
    def compute(self) -> float:
        return self.compiler_seconds + self.kernel_seconds

    @property
    def step(self) -> tuple[float, float]:
        return max(self.compute, self.communication[0]), self.compute + self.communication[1]

    def mfu(self, seconds: float) -> float:
        """Model FLOPs over what the devices could do in that time."""
        return self.model_flops / (self.peak * self.devices * seconds) if seconds and self.peak else math.nan


def estimate(program: Program, target: Target, model_flops: float) -> Estimate:
    """What a step of the program takes on the target."""
    chip = target.chip
    kernel_flops = sum(map(flops_of, program.kernels()))
    kernel_seconds = sum(flops_of(kernel) / (share_of(kernel, chip) * chip.flops) for kernel in program.kernels())
    received: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
    for collective in program.collectives():
        count, moved = received[collective.kind]
        received[collective.kind] = count + collective.count, moved + collective.moved
    total = sum(moved for _, moved in received.values())
    axis = min(2, chip.links) * chip.link_speed  # a ring in both directions
    return Estimate(
        model_flops=model_flops,
        peak=chip.flops,
        devices=target.count,
        compiler_seconds=program.cycles() / chip.clock,
        kernel_seconds=kernel_seconds,
        half_seconds=kernel_flops / (KERNEL_SHARE * chip.flops),
        kernel_flops=kernel_flops,
        communication=(total / (chip.links * chip.link_speed), total / axis),
        collectives=dict(received),
    )


def share_of(kernel: Kernel, chip: Chip) -> float:
    """The share of the chip's peak at which a Pallas kernel is counted."""
    return MEASURED_SHARES.get((chip.kind, kernel.name.split(".")[0]), KERNEL_SHARE)


def flops_of(kernel: Kernel) -> float:
    """FLOPs of a Pallas kernel in all its runs, from its name and the shapes of its operands. Raises ValueError for one that is not known here."""
    shapes = [shape for kind, shape in kernel.operands if kind in ("bf16", "f32")]
    if kernel.name.startswith("%splash"):
        return _attention(kernel, *[shape for shape in shapes if len(shape) >= 3][:2])
    if kernel.name.startswith("%ragged-dot-metadata"):
        return 0.0
    if kernel.name.startswith(("%ragged-dot", "%gmm")):  # [n, in] times [experts, in, out] or [experts, out, in], each row with one expert's
        return 2.0 * shapes[0][0] * math.prod(shapes[1][1:]) * kernel.count
    if kernel.name.startswith("%tgmm"):  # [n, in] and [n, out]: the gradient of experts [in, out]
        return 2.0 * math.prod(shapes[0]) * shapes[1][-1] * kernel.count
    raise ValueError(f"the Pallas kernel {kernel.name} is not known to mmjax.planning.estimate.flops_of: say there what it computes")


def _attention(kernel: Kernel, query: tuple[int, ...], key: tuple[int, ...]) -> float:
    """Of the splash kernel: so many products of scores' size, as its name says: forwards 2, gradients of the queries 3, of keys and values
    4. Where it computes its mask from positions, which it is then handed beside the segments, it is causal, and blocks above the
    diagonal are left out."""
    products = 4 if "dkv" in kernel.name else 3 if "dq" in kernel.name else 2
    integers = sum(kind == "s32" for kind, _ in kernel.operands)
    grids = [shape for kind, shape in kernel.operands if kind == "s8" and len(shape) == 3]
    share = 1.0
    if grids and integers > (2 if "segmented" in kernel.name else 0):
        blocks = max(grids[0][1:])
        share = (blocks + 1) / (2 * blocks)
    return 2.0 * products * math.prod(query[:-2]) * query[-2] * key[-2] * query[-1] * share * kernel.count
