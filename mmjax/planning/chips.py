"""The machines a plan can be made for: what their makers publish, and how a name such as v5e:16x16 becomes devices."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Sequence

import jax

from mmjax.errors import UserError
from mmjax.flops import peak


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is published of one device.

    kind       as jax names it (`device_kind`); its peak FLOP/s stand in mmjax.flops.PEAK
    hbm        bytes that a program may use
    hbm_speed  bytes/s
    clock      Hz of a TPU's TensorCore: the compiler counts its cycles. 0 = nothing is counted for this device. The vendor does not print it:
               it is the peak over what the chip's matrix units do in a cycle (TensorCores x units x side^2 x 2)
    links, link_speed    a TPU's links to its neighbours, and bytes/s of one in one direction: "bidirectional bandwidth per chip" / links / 2.
               A GPU has one, to the switch of its machine
    cores      how libtpu calls it that a chip's cores are one device, where that is not what it takes for granted
    """

    kind: str
    hbm: int
    hbm_speed: float
    clock: float = 0.0
    links: int = 1
    link_speed: float = 0.0
    cores: str = "default"

    @property
    def flops(self) -> float:
        """Dense bfloat16 peak, FLOP/s; 0 where it is not known."""
        return peak(self.kind) or 0.0


# TPUs: "Key specifications" of https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (HBM: what of it XLA lets a program use). v5e: 4
# units of 128 x 128; v4 and v5p: 2 cores with 4 of these; v6e: 2 units of 256 x 256, which do two products a cycle. GPUs: data sheets of A100 SXM
# 80 GB, H100 SXM and H200, NVLink in one direction.
CHIPS = {
    "v5e": Chip("TPU v5 lite", int(15.75 * 2**30), 819e9, 1.5e9, 4, 50e9),
    "v5p": Chip("TPU v5", int(95.74 * 2**30), 2765e9, 1.75e9, 6, 100e9),
    "v6e": Chip("TPU v6 lite", int(31.25 * 2**30), 1638e9, 1.75e9, 4, 100e9),
    "v4": Chip("TPU v4", int(30.75 * 2**30), 1228e9, 1.05e9, 6, 50e9, cores="megacore"),
    "a100": Chip("NVIDIA A100", 80 * 10**9, 2039e9, 0.0, 1, 300e9),
    "h100": Chip("NVIDIA H100", 80 * 10**9, 3350e9, 0.0, 1, 450e9),
    "h200": Chip("NVIDIA H200", 141 * 10**9, 4800e9, 0.0, 1, 450e9),
    "cpu": Chip("cpu", 0, 0.0),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A slice of a pod, or so many devices of a kind. `shape` is the slice's, in chips; `devices` are what the compiler compiles for, None
    where there is no compiler for them here."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: Sequence[jax.Device] | None

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def target(name: str) -> Target:
    """v5e:16x16, v5p:4x4x8, v6e:16x16, v4:4x4x4 (a slice by its shape in chips), h100:8, cpu:8 (devices by their number).

    Raises UserError for another name, and for a shape that libtpu does not know. Without libtpu (pip install libtpu) a slice has no
    compiler: `devices` is None.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found or found[1] not in CHIPS:
        raise UserError(f"plan.topology = {name!r}: it is KIND:SHAPE, such as v5e:16x16 or h100:8; kinds: {', '.join(CHIPS)}")
    chip, shape = CHIPS[found[1]], tuple(map(int, found[2].split("x")))
    if not chip.clock:
        return Target(name, chip, shape, _here(chip, math.prod(shape)))
    return Target(name, chip, shape, _slice(name, chip.cores, math.prod(shape)))


def leave_cloud_alone() -> None:
    """Keeps libtpu, on a machine without a TPU, from asking the cloud's metadata server who it is and complaining of no answer."""
    if not any(Path("/dev").glob("accel*")) and not any(Path("/dev/vfio").glob("[0-9]*")):
        for key, value in _ALONE.items():
            os.environ.setdefault(key, value)


_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans may be made at once
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def _slice(name: str, cores: str, count: int) -> Sequence[jax.Device] | None:
    """The devices of a slice that nobody needs to own: libtpu describes it, and compiles for it."""
    if importlib.util.find_spec("libtpu") is None:
        return None
    from jax.experimental import topologies

    leave_cloud_alone()
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, chip_config_name=cores).devices
    except Exception as error:  # libtpu's own classes of errors are many
        raise UserError(f"plan.topology = {name!r} is no slice that libtpu knows: {error}") from error
    if len(devices) != count:
        raise UserError(f"plan.topology = {name!r} has {len(devices)} devices for {count} chips, which is not supported")
    return devices


def _here(chip: Chip, count: int) -> Sequence[jax.Device] | None:
    """So many devices of this machine of that kind; None where it has not. A processor is divided into as many as are wanted."""
    if chip.kind == "cpu":
        with contextlib.suppress(RuntimeError):  # jax has looked for its devices already
            jax.config.update("jax_num_cpu_devices", count)
    found = [device for device in jax.devices() if device.device_kind.startswith(chip.kind)]
    return found[:count] if len(found) >= count else None
