"""The one device mesh."""

from __future__ import annotations

import contextlib
import os
from typing import Sequence

import jax
from jax.sharding import AxisType

from mmjax import config
from mmjax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence", "expert")
DATA_AXES = ("data", "fsdp")  # what rows are divided over


def make_mesh(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with the axes of AXES. Raises UserError where the sizes do not fit the number of devices."""
    devices = jax.devices() if devices is None else list(devices)
    shape = {axis: getattr(sizes, axis) for axis in AXES}
    given = 1
    for size in shape.values():
        given *= size if size != -1 else 1
    rest = [axis for axis, size in shape.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise UserError(f"mesh: sizes are 1 or more, and one of them may be -1; not {shape}.")
    if len(devices) % given or (not rest and given != len(devices)):
        raise UserError(f"mesh: {shape} does not fit {len(devices)} devices.")
    for axis in rest:
        shape[axis] = len(devices) // given
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def data_shards(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    shards = 1
    for axis in DATA_AXES:
        shards *= mesh.shape[axis]
    return shards


def divide_processor(sizes: config.Mesh) -> None:
    """Makes `sizes.cpu_devices` devices of the processor. Nothing happens where XLA_FLAGS say how many there are, or once jax
    has looked for its devices."""
    if sizes.cpu_devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", sizes.cpu_devices)
