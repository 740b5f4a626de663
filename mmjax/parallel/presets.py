"""Meshes by name, and what `--config.mesh=...` may say."""

from __future__ import annotations

from mmjax.config import Mesh
from mmjax.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor", "sequence")

# Weights are divided over fsdp, which wants a row of the batch for each part; where a slice has more chips than a step has rows, `tensor`
# takes the rest of them, along the fastest links.
PRESETS = {
    "auto": Mesh(data=0, fsdp=-1),  # weights divided over all devices of a slice, rows over the slices as well
    "1": Mesh(data=1),
    "8": Mesh(data=1, fsdp=8),  # GPUs of one machine
    "v5e:2x4": Mesh(data=1, fsdp=8),
    "v5e:16x16": Mesh(data=1, fsdp=64, tensor=4),
    "v5p:4x4x8": Mesh(data=1, fsdp=64, tensor=2),
    "v6e:16x16": Mesh(data=1, fsdp=64, tensor=4),
}


def mesh_sizes(text: str) -> dict[str, int]:
    """The size of each axis for a preset's name or axis sizes such as "fsdp=64,tensor=4", where `data` takes the devices left and any
    other axis is 1. Raises UserError for anything else."""
    preset = PRESETS.get(text) or Mesh()
    sizes = {axis: getattr(preset, axis) for axis in AXES}
    for item in () if text in PRESETS else text.split(","):
        axis, _, size = item.strip().partition("=")
        if axis not in AXES or not size.removeprefix("-").isdecimal():
            raise UserError(
                f"--config.mesh={text}: {item!r} is neither the size of an axis ({', '.join(AXES)}), as in fsdp=64,tensor=4, nor is this "
                f"a mesh known by name ({', '.join(PRESETS)})."
            )
        sizes[axis] = int(size)
    return sizes
