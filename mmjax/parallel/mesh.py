"""The one device mesh."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from mmjax import config
from mmjax.errors import UserError
from mmjax.parallel.presets import AXES

DATA_AXES = ("data", "fsdp", "expert")  # what rows are divided over


def make_mesh(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with the axes of AXES, on TPUs in the order of their links; several slices, joined by a slower network, are parts of `data`.
    `devices` may be those of a topology that is only described. Raises UserError where the sizes do not fit the number of devices."""
    devices = jax.devices() if devices is None else list(devices)
    slices = len({_slice(device) for device in devices})
    shape = axis_sizes(sizes, len(devices), slices)
    return jax.sharding.Mesh(arranged(tuple(shape.values()), devices, slices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(sizes: config.Mesh, devices: int, slices: int = 1) -> dict[str, int]:
    """The sizes of all axes on so many devices in so many slices. Raises UserError where they do not fit."""
    shape = {axis: getattr(sizes, axis) for axis in AXES}
    shape["data"] = shape["data"] or slices
    given = 1
    for size in shape.values():
        given *= size if size != -1 else 1
    rest = [axis for axis, size in shape.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise UserError(f"mesh: sizes are 1 or more, and one of them may be -1; not {shape}.")
    if devices % given or (not rest and given != devices):
        raise UserError(f"mesh: {shape} does not fit {devices} devices.")
    for axis in rest:
        shape[axis] = devices // given
    if shape["data"] % slices:
        raise UserError(f"mesh: the devices are in {slices} slices, which do not divide data={shape['data']}.")
    return shape


def arranged(shape: tuple[int, ...], devices: Sequence[jax.Device], slices: int = 1) -> np.ndarray:
    """The devices as an array of this shape, whose first axis is divided over the slices."""
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    inner, outer = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def _slice(device: jax.Device) -> int:
    """The number of a TPU's slice. GPUs have one for each machine, which says nothing about how to divide what."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def data_shards(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    shards = 1
    for axis in DATA_AXES:
        shards *= mesh.shape[axis]
    return shards


def own_shards(mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    """The data shards of which this process has devices: it brings their rows. Where another axis (`tensor`, `sequence`, ...) goes
    over several processes, these have the same shards and bring the same rows."""
    by_shard = mesh.devices.reshape(data_shards(mesh), -1)  # the data axes are the first of AXES
    own = jax.process_index()
    return tuple(shard for shard, devices in enumerate(by_shard) if any(device.process_index == own for device in devices))


@functools.lru_cache
def of_rows_alone(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The same devices, all of which divide rows: `tensor` and `sequence` are counted to the last of DATA_AXES."""
    shape = mesh.shape["data"], mesh.shape["fsdp"], -1, 1, 1
    return jax.sharding.Mesh(mesh.devices.reshape(shape), AXES, axis_types=mesh.axis_types)


def divide_processor(sizes: config.Mesh) -> None:
    """Makes `sizes.cpu_devices` devices of the processor. Nothing happens where XLA_FLAGS say how many there are, or once jax
    has looked for its devices."""
    if sizes.cpu_devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", sizes.cpu_devices)
