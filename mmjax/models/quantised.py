"""Frozen kernels held in few bits: which of a model's they are, and their place in its tree.

A quantised kernel is a node where an array was: `PATH/kernel/codes`, `PATH/kernel/scales` and so on (mmjax.models.number_formats), each
leaf with the layers on axis 0 as the kernel had them. mmjax.models.layers.matmul makes one layer's numbers of them when that
layer runs, and again in the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import tree
from mmjax.errors import UserError
from mmjax.models import number_formats
from mmjax.models.number_formats import Format, Leaves
from mmjax.parallel import placement
from mmjax.parallel.placement import Parts

Params = dict[str, Any]
UNMERGED = (
    "{names} cannot be merged into {linear}, which is quantised: what it adds would be lost in rounding. Dequantise first "
    "(model.dequantised(); export.dequantise in a recipe), or write the adapter alone (export.format 'peft')"
)


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """format    see mmjax.models.number_formats
    targets   globs over Linear paths (a path ends before `/kernel`), of stacked blocks, plugs and the LLM's head
    double    of nf4: whether the maxima of blocks are quantised, too
    block     inputs that share a maximum (nf4) or a scale and a zero (int4)
    """

    format: Format
    targets: tuple[str, ...] = ("llm/layers/**",)
    double: bool = True
    block: int = 64


NAMED = {"int8": Quantisation("int8"), "nf4": Quantisation("nf4"), "int4": Quantisation("int4", block=128)}


def named(name: str) -> Quantisation | None:
    """A format with its usual settings, for the Linears of the LLM's blocks; None for "". Raises UserError for an unknown name."""
    if name and name not in NAMED:
        raise UserError(f"quantise = {name!r} is unknown; there are {', '.join(map(repr, NAMED))}")
    return NAMED[name] if name else None


def chosen(shapes: Mapping[str, Any], spec: Quantisation) -> list[str]:
    """The paths of the kernels, among those of dense parameters or their shapes, that are to be quantised: of a model's part, those
    that are there.

    Routers are chosen only by a target without wildcards. Raises UserError for a kernel that does not fit the format.
    """
    flat, known = tree.flatten(shapes), _known(shapes)
    found = {known[linear] for target in spec.targets for linear in _matching(known, target)}
    for path in found:
        inputs = flat[path].shape[-2]
        if spec.format == "int4" and inputs % spec.block or spec.format != "int8" and inputs % 2:
            groups = f"groups of {spec.block}" if spec.format == "int4" else "pairs of 4 bits"
            raise UserError(f"quantisation: the {inputs} inputs of {path} do not fall into {groups}")
    return [path for path in flat if path in found]


def require(shapes: Mapping[str, Any], spec: Quantisation) -> None:
    """Raises UserError for a target that chooses none of a whole model's kernels."""
    known = _known(shapes)
    for target in spec.targets:
        if not _matching(known, target):
            raise UserError(f"quantisation: {target!r} matches no linear layer that can be quantised; there are {', '.join(known) or 'none'}")


def quantise(kernel: jax.Array, spec: Quantisation) -> Leaves:
    """A kernel [..., in, out] -> its leaves, [..., their own axes]."""
    for _ in range(kernel.ndim - 2):
        return jax.vmap(lambda row: quantise(row, spec))(kernel)
    if spec.format == "int8":
        return number_formats.to_int8(kernel)
    if spec.format == "int4":
        return number_formats.to_int4(kernel, spec.block)
    return number_formats.to_nf4(kernel, spec.block, spec.double)


@functools.partial(jax.jit, static_argnums=1)
def _quantised(kernel: jax.Array, spec: Quantisation) -> Leaves:
    return quantise(kernel, spec)


def on_host(kernel: Any, spec: Quantisation) -> Leaves:
    """`quantise` of one kernel [in, out] on the processor, whatever accelerators there are: the same bits on every machine."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return _quantised(jnp.asarray(kernel), spec)


def quantise_all(params: Params, spec: Quantisation) -> Params:
    """The parameters (or, traced, what becomes of them) with the chosen kernels quantised."""
    return _replaced(params, {path: quantise(tree.flatten(params)[path], spec) for path in chosen(params, spec)})


def converted(params: Params, spec: Quantisation, places: Mapping[str, Any] = {}) -> Params:
    """The parameters with the chosen kernels, where they are dense, quantised on the processor, row by row; `places` are the shardings of
    what they become, by path."""
    flat = tree.flatten(params)
    made: dict[str, Leaves] = {}
    for path in chosen(params, spec):
        shape = tuple(flat[path].shape)
        leaves = {name: Parts(leaf.shape, places.get(f"{path}/{name}")) for name, leaf in leaf_shapes(shape, spec).items()}
        for at in np.ndindex(*shape[:-2]):
            for name, part in on_host(placement.row(flat[path], *at), spec).items():
                leaves[name].fill(at, np.asarray(part))
        made[path] = {name: leaf.placed() for name, leaf in leaves.items()}
    return _replaced(params, made)


def count(params: Params) -> int:
    """How many parameters these leaves, or their shapes, stand for."""
    return sum(math.prod(leaf.shape) for leaf in tree.flatten(dense_shapes(params)).values())


def shapes(params: Params, spec: Quantisation) -> Params:
    """The shapes of a whole model's parameters with the chosen kernels quantised, from those of dense ones. Raises UserError as
    `require` does."""
    require(params, spec)
    flat = tree.flatten(params)
    return _replaced(params, {path: leaf_shapes(flat[path].shape, spec) for path in chosen(params, spec)})


def leaf_shapes(shape: tuple[int, ...], spec: Quantisation) -> Leaves:
    """The shapes of the leaves of a kernel of this shape."""
    return jax.eval_shape(lambda k: quantise(k, spec), jax.ShapeDtypeStruct(shape, jnp.float32))


def kernels(params: Mapping[str, Any]) -> list[str]:
    """The paths of quantised kernels."""
    return sorted({kernel_of(path) for path in tree.flatten(params) if is_part(path)})


def is_part(path: str) -> bool:
    """Whether a leaf is part of a quantised kernel."""
    return "/kernel/" in path


def kernel_of(path: str) -> str:
    """The kernel whose part a leaf is; any other leaf's own path."""
    return path.rsplit("/", 1)[0] if is_part(path) else path


def axes_of(path: str, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, int] | None]:
    """For each axis of a leaf that is part of a quantised kernel: (which axis of the kernel it lies along, counted from its end, and
    into how many parts that may be cut without cutting a block in two); None along none. `shapes` are all leaves', by path."""
    shape, kernel = shapes[path], kernel_of(path)
    rank = len(shapes[f"{kernel}/codes"])
    names = ("absmax", "absmax_codes", "scales")
    blocks = next(shapes[f"{kernel}/{name}"][-2] for name in names if f"{kernel}/{name}" in shapes)
    if len(shape) < rank:  # of a whole layer's (or expert's) kernel
        return [(i - rank, size) if i < rank - 2 else None for i, size in enumerate(shape)]
    return [(i - rank, size if i != rank - 2 or blocks == 1 else blocks) for i, size in enumerate(shape)]


def is_quantised(node: Any) -> bool:
    """Whether what stands at PATH/kernel is quantised."""
    return isinstance(node, Mapping)


def inputs_of(leaves: Mapping[str, Any]) -> int:
    """How many inputs a quantised kernel has."""
    return leaves["codes"].shape[-2] * (1 if leaves["codes"].dtype == jnp.int8 else 2)


def node(params: Mapping[str, Any], path: str) -> Any:
    """What stands at a path."""
    for name in path.split("/"):
        params = params[name]
    return params


def dense(leaves: Mapping[str, Any]) -> jax.Array:
    """The numbers float32 [..., in, out] of a quantised kernel."""
    return number_formats.dense(leaves, inputs_of(leaves))


def dense_shapes(params: Params) -> Params:
    """The parameters with the shape (float32) of each quantised kernel in its place; other leaves as they are."""
    return _dense(params, lambda node: jax.eval_shape(dense, jax.tree.map(_shape, dict(node))))


def dequantised(params: Params, dtype: Any = jnp.float32) -> Params:
    """The parameters with dense kernels in the place of quantised ones, made one after another."""
    return _dense(params, lambda node: dense(node).astype(dtype))


def _dense(params: Params, made: Any) -> Params:
    flat = tree.flatten(params)
    found: dict[str, Any] = {}
    for path, leaf in flat.items():
        if not is_part(path):
            found[path] = leaf
        elif (kernel := kernel_of(path)) not in found:
            found[kernel] = made({p.rsplit("/", 1)[1]: other for p, other in flat.items() if p.startswith(f"{kernel}/")})
    return tree.unflatten(found)


def _replaced(params: Params, made: Mapping[str, Leaves]) -> Params:
    found: dict[str, Any] = {}
    for path, leaf in tree.flatten(params).items():
        found |= {f"{path}/{name}": part for name, part in made[path].items()} if path in made else {path: leaf}
    return tree.unflatten(found)


def _known(shapes: Mapping[str, Any]) -> dict[str, str]:
    """Linears that can be quantised -> their kernels."""
    return {path.removesuffix("/kernel"): path for path in tree.flatten(shapes) if may_be_quantised(path)}


def _matching(known: Mapping[str, str], target: str) -> list[str]:
    return [linear for linear in known if tree.matches(linear, target) and ("/router" not in linear or linear == target)]


def may_be_quantised(path: str) -> bool:
    """Whether what reads the kernel at a path reads quantised ones: Linears of blocks and plugs, experts, and the LLM's head."""
    return path.endswith("/kernel") and (tree.is_stacked(path) or path == "llm/head/kernel")


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
