"""Where activations live, said at the few places from which XLA works out the rest."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax.parallel.mesh import DATA_AXES

ROWS = DATA_AXES  # of a batch, or groups of tiles
POSITIONS = "sequence"  # of a text
STREAM = ("sequence", "tensor")  # positions between sublayers, which are alike in all of them (arXiv 2205.05198, sequence parallelism)
ANY: Any = PartitionSpec.UNCONSTRAINED  # however XLA has it


def constrain(x: jax.Array, mesh: Mesh | None, *axes: Any) -> jax.Array:
    """x with its first dimensions divided over these axes of the mesh, and all others whole. An axis that does not divide its dimension
    is left out. Without a mesh of several devices x as it is."""
    if mesh is None or mesh.size == 1:
        return x
    spec = [axis if axis is ANY or axis is None or _divides(mesh, axis, size) else None for axis, size in zip(axes, x.shape)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def _divides(mesh: Mesh, axis: str | tuple[str, ...], size: int) -> bool:
    return size % math.prod(mesh.shape[name] for name in ([axis] if isinstance(axis, str) else axis)) == 0
