"""Ordered path rules that give every leaf its PartitionSpec, and the sharding of batches and optimizer state."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from mmjax import tree
from mmjax.batch import Batch
from mmjax.models import quantised
from mmjax.parallel.mesh import AXES, DATA_AXES, data_shards, own_shards
from mmjax.tree import Params

Axes = str | tuple[str, ...] | None  # of the mesh, for a dimension of a leaf
FSDP = ("fsdp", "expert")  # what belongs to no expert is divided over the experts' axis as well: it has rows of its own

# The first rule whose glob matches a leaf gives the axes of its last dimensions; those before them (the layer axis)
# stay whole. Several axes divide a dimension one after another, or as many of them as do. Linears that widen are divided on their output, those that narrow back on their input, so that a block
# needs one reduction over `tensor` in attention and one in the MLP. Of a LoRA the rank is divided over what its kernel's side leaves.
RULES: tuple[tuple[str, tuple[Axes, ...]], ...] = (
    ("**/embed/embedding", ("tensor", FSDP)),
    ("**/head/kernel", (FSDP, "tensor")),
    ("**/{query,key,value,gate,up}/kernel", (FSDP, "tensor")),
    ("**/{query,key,value,gate,up}/bias", ("tensor",)),
    ("**/{query,key,value,gate,up}/adapters/**/lora_a", (FSDP, None)),
    ("**/{query,key,value,gate,up}/adapters/**/lora_b", (FSDP, "tensor")),
    ("**/{query,key,value,gate,up}/adapters/**/{lora_magnitude,lora_bias,ia3,affine_bias,bias}", ("tensor",)),
    ("**/{query,key,value,gate,up}/adapters/*/kernel", (FSDP, "tensor")),
    ("**/embed/adapters/*/embedding", ("tensor", FSDP)),
    ("**/embed/adapters/**/lora_a", ("tensor", FSDP)),
    ("**/embed/adapters/**/lora_b", (None, FSDP)),
    ("**/head/adapters/*/kernel", (FSDP, "tensor")),
    ("**/head/adapters/**/lora_a", (FSDP, None)),
    ("**/head/adapters/**/lora_b", (FSDP, "tensor")),
    ("**/{output,down}/kernel", ("tensor", FSDP)),
    ("**/{output,down}/adapters/**/lora_a", ("tensor", FSDP)),
    ("**/{output,down}/adapters/**/lora_b", (None, FSDP)),
    ("**/{output,down}/adapters/**/ia3_input", ("tensor",)),
    ("**/{output,down}/adapters/*/kernel", ("tensor", FSDP)),
    ("**/layers/**/experts_{gate,up}/kernel", ("expert", "fsdp", "tensor")),
    ("**/layers/**/experts_down/kernel", ("expert", ("tensor", "fsdp"), None)),
    ("llm/**/{pooler,transform}/kernel", (FSDP, "tensor")),
    ("**/{kernel,positions}", (FSDP, None)),
    ("**", ()),
)

# Fields of a batch that stand in groups of media, not in rows.
MEDIA_FIELDS = ("images", "features", "audio", "tiles", "frames", "grids", "classes", "connector_tokens", "connector_segments")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the sharding table. `note` says where an axis was left out because it does not divide the dimension."""

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    rule: str
    note: str


def table(params: Params, mesh: Mesh) -> list[Row]:
    """Every leaf's PartitionSpec; `params` may be shapes. The parts of a quantised kernel are divided as the kernel would be, where
    that cuts no block in two."""
    rows = []
    flat = tree.flatten(params)
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    for path, shape in shapes.items():
        glob, axes = rule(quantised.kernel_of(path))
        axes = (None,) * max(8, len(shape)) + axes
        along = [(i - len(shape), size) for i, size in enumerate(shape)]
        if quantised.is_part(path):
            along = [found or (0, 1) for found in quantised.axes_of(path, shapes)]
        fitting, notes = [], []
        for end, size in along:
            wanted = axes[end] if end else None
            fitting.append(dividing(wanted, size, mesh))
            if wanted is not None and fitting[-1] is None:
                first = _present(wanted, mesh)[0]
                notes.append(f"{size} is not divisible by {first}={mesh.shape[first]}: whole there")
        rows.append(Row(path, shape, PartitionSpec(*fitting), glob, "; ".join(notes)))
    return rows


def rule(path: str) -> tuple[str, tuple[Axes, ...]]:
    """The glob and the axes of RULES for a leaf."""
    return next((glob, axes) for glob, axes in RULES if tree.matches(path, glob))


def names_of(axes: Axes) -> tuple[str, ...]:
    """The axes that divide one dimension."""
    return (axes,) if isinstance(axes, str) else axes or ()


def _present(axes: Axes, mesh: Mesh) -> tuple[str, ...]:
    """Of these axes those of several devices, or else the first."""
    return tuple(name for name in names_of(axes) if mesh.shape[name] > 1) or names_of(axes)[:1]


def dividing(axes: Axes, size: int, mesh: Mesh) -> Axes:
    """Of these axes as many, from the first, as together divide a dimension of this size; None if not even the first does."""
    names = _present(axes, mesh)
    while names and size % math.prod(mesh.shape[name] for name in names):
        names = names[:-1]
    return names if len(names) > 1 else names[0] if names else None


def format_table(rows: list[Row]) -> str:
    """The table as text, a line for each leaf."""
    width = max(len(row.path) for row in rows)
    return "\n".join(
        f"{row.path:{width}}  {str(list(row.shape)):24}  {_axes(row.spec):28}  {row.rule}"
        + (f"  ({row.note})" if row.note else "")
        for row in rows
    )


def param_shardings(params: Params, mesh: Mesh) -> Params:
    """A NamedSharding for every leaf; `params` may be shapes."""
    return tree.unflatten({row.path: NamedSharding(mesh, row.spec) for row in table(params, mesh)})


def optimizer_shardings(state: Any, trainable: Params, mesh: Mesh) -> Any:
    """For an optax state (or its shapes): what has the path and shape of a trainable leaf is sharded like it; counters
    and factored moments are whole on every device."""
    shardings = tree.flatten(param_shardings(trainable, mesh))
    sizes = {path: tuple(leaf.shape) for path, leaf in tree.flatten(trainable).items()}

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        for start in range(len(names)):
            path = "/".join(map(str, names[start:]))
            if sizes.get(path) == tuple(leaf.shape):
                return shardings[path]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
    """Rows and media groups over the data axes, positions over `sequence`."""
    in_rows = NamedSharding(mesh, PartitionSpec(DATA_AXES, "sequence"))
    in_groups = NamedSharding(mesh, PartitionSpec(DATA_AXES))
    whole = (*MEDIA_FIELDS, "row_media", "media_segments")
    shardings: dict[str, Any] = {
        field.name: in_groups if field.name in whole else in_rows
        for field in dataclasses.fields(Batch)
        if getattr(batch, field.name) is not None
    }
    return Batch(**shardings)


def from_own_rows(batch: Batch, mesh: Mesh) -> Batch:
    """The batch on the devices of all processes, each of which brings the rows and media groups of its own data shards, in their order
    (see own_shards), with all of their positions."""
    own, shards = own_shards(mesh), data_shards(mesh)

    def placed(sharding: NamedSharding, leaf: np.ndarray) -> jax.Array:
        rows = len(leaf) // len(own)  # of a shard

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first = own.index((index[0].start or 0) // rows) * rows
            return leaf[(slice(first, first + rows), *index[1:])]

        return jax.make_array_from_callback((rows * shards, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(placed, batch_shardings(batch, mesh), batch)


def placed(leaf: Any, sharding: Sharding) -> jax.Array:
    """An array that every process has as a whole, or that is spread already, where it belongs.

    Of a local array jax.device_put would compare all processes' copies, and where it is to be whole everywhere make (jax 0.10) one that
    cannot be read back."""
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def shards_of(params: Params, rows: int) -> tuple[Mesh | None, int]:
    """The mesh that parameters live on and into how many parts `rows` rows can be divided over it; (None, 1) where they are
    not on a mesh, or the rows cannot be divided."""
    mesh = mesh_of(params)
    if mesh is None or rows % data_shards(mesh) or mesh.shape["sequence"] > 1:
        return None, 1
    return mesh, data_shards(mesh)


def mesh_of(params: Params) -> Mesh | None:
    """The mesh that parameters live on, None where they are not on one with our axes."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)
    return mesh if mesh is not None and set(mesh.axis_names) == set(AXES) else None


def _axes(spec: PartitionSpec) -> str:
    return "(" + ", ".join("*".join(names_of(axes)) or "-" for axes in spec) + ")"
