"""Leaves from files, by a key table: each process reads the parts that its own devices hold, a layer at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from mmjax import tree
from mmjax.checkpoints import weights
from mmjax.checkpoints.awq import Packed
from mmjax.checkpoints.safetensors import Stored
from mmjax.errors import UserError
from mmjax.families.keys import Piece, Rule, Shape, counter, pieces, transposed
from mmjax.models import number_formats, quantised
from mmjax.models.quantised import Quantisation
from mmjax.parallel import cluster, placement
from mmjax.parallel.placement import Parts
from mmjax.tree import Params

COLUMNS = 32
Broken = dict[str, None] | None
"""Names of tensors whose numbers are not all finite, in the order in which they were read; None = nobody asks."""


def load(
    stored: Mapping[str, Stored],
    rules: list[Rule],
    shapes: Params,
    *,
    dtype: Any,
    shardings: Params | None = None,
    copies: Mapping[str, str] = {},
    unused: Iterable[str] = (),
    where: str | Path = "",
    check_finite: bool = True,
    quantisation: Quantisation | None = None,
) -> Params:
    """The leaves that the rules name, filled from the stored tensors.

    Leaves are made one at a time, the largest first while memory is emptiest, each filled in place row by row and handed straight to
    its devices. With shardings (a tree like `shapes`) a process makes the parts of its own devices alone, and reads of the files what
    they need. Where they are of several processes, all of them must call.

    quantisation   of the kernels that it chooses, each layer's as it is read; `shapes` are dense, `shardings` as the leaves are held
    copies    foreign names that may be stored as well, as copies of others (tied weights); they must be equal
    unused    regular expressions of foreign names that carry nothing (buffers)
    Raises UserError with the lists of tensors that are missing, unexpected or of another shape, and, with `check_finite`, of those
    that hold a NaN or an infinity, whichever process has read it.
    """
    flat = tree.flatten(shapes)
    found = pieces(rules, flat)
    check(stored, rules, shapes, copies=copies, unused=unused, where=where)
    places = tree.flatten(shardings) if shardings is not None else {}
    leaves, broken = dict[str, jax.Array](), dict[str, None]() if check_finite else None
    chosen = set(quantised.chosen(shapes, quantisation)) if quantisation is not None else set()
    order = sorted(found, key=lambda p: (-flat[p].size, p))
    for path in order:
        shape = tuple(flat[path].shape)
        if path in chosen:
            assert quantisation is not None
            own = {p.removeprefix(f"{path}/"): place for p, place in places.items() if p.startswith(f"{path}/")}
            made = _quantised(stored, found[path], shape, quantisation, own, broken)
            leaves |= {f"{path}/{name}": leaf for name, leaf in made.items()}
        else:
            leaves[path] = _dense(stored, found[path], shape, np.dtype(dtype), places.get(path), broken)
    if broken is not None and any(map(placement.crosses, leaves.values())):
        anywhere = {name for text in cluster.gathered("broken", json.dumps(list(broken))) for name in json.loads(text)}
        broken = {piece.name: None for path in order for piece in found[path] if piece.name in anywhere}
    if broken:
        weights.refuse_broken([stored[name].name for name in broken], where, dtype)
    place = {path: number for number, path in enumerate(flat)}
    return tree.unflatten({path: leaves[path] for path in sorted(leaves, key=lambda p: place[quantised.kernel_of(p)])})


def check(
    stored: Mapping[str, Stored],
    rules: list[Rule],
    shapes: Params,
    *,
    copies: Mapping[str, str] = {},
    unused: Iterable[str] = (),
    where: str | Path = "",
) -> None:
    """Raises UserError unless the stored tensors are exactly those that the rules need, in the right shapes."""
    needed = {piece.name: piece.shape for row in pieces(rules, tree.flatten(shapes)).values() for piece in row}
    silent = [
        re.compile(pattern) for pattern in (*unused, *(re.escape(r.name) + "$" for r in rules if r.form is counter))
    ]
    missing = sorted(name for name in needed if name not in stored)
    extra = sorted(
        tensor.name
        for name, tensor in stored.items()
        if name not in needed and name not in copies and not any(p.search(name) for p in silent)
    )
    wrong = sorted(
        f"{stored[name].name} is {list(stored[name].shape)}, the config asks for {list(shape)}"
        for name, shape in needed.items()
        if name in stored and stored[name].shape != shape
    )
    integers = sorted(
        f"{stored[name].name} holds {stored[name].dtype}"
        for name in needed
        if name in stored and stored[name].dtype.kind in "biu"
    )
    untied = sorted(
        f"{name} (the config ties it to {original})"
        for name, original in copies.items()
        if name in stored and original in stored and not same_tensor(stored[name], stored[original])
    )
    problems = [
        f"  {title} ({len(names)}): " + "; ".join(names[:40]) + (" ..." if len(names) > 40 else "")
        for title, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", wrong),
            ("integers, as in a quantised checkpoint, which is not supported", integers),
            ("different from the weight they copy", untied),
        )
        if names
    ]
    if problems:
        raise UserError("\n".join([f"the weights {f'in {where} ' if where else ''}do not fit the config:", *problems]))


def same_tensor(a: Stored, b: Stored) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a.read(), b.read())


def _dense(
    stored: Mapping[str, Stored], rows: list[Piece], shape: Shape, dtype: np.dtype, sharding: Sharding | None, broken: Broken
) -> jax.Array:
    """A leaf on its devices."""
    leaf = Parts(shape, sharding)
    for at, piece in zip(np.ndindex(*shape[: rows[0].rule.stacked]), rows):
        if leaf.holding(at):
            whole = _read(stored, piece)
            for row, part in leaf.rows(at, dtype):
                _fill(row, whole[part])
                if broken is not None and not weights.is_finite(row):
                    broken[piece.name] = None
    return leaf.placed()


def _quantised(
    stored: Mapping[str, Stored],
    rows: list[Piece],
    shape: Shape,
    spec: Quantisation,
    places: Mapping[str, Sharding],
    broken: Broken,
) -> dict[str, jax.Array]:
    """The leaves of a kernel of this shape, each row quantised as a whole (or taken over, where the file holds its codes)."""
    shapes = quantised.leaf_shapes(shape, spec)
    leaves = {name: Parts(leaf.shape, places.get(name)) for name, leaf in shapes.items()}
    for at, piece in zip(np.ndindex(*shape[: rows[0].rule.stacked]), rows):
        if any(leaf.holding(at) for leaf in leaves.values()):
            for name, row in _quantised_row(stored, piece, spec, broken).items():
                leaves[name].fill(at, row)
    return {name: leaf.placed() for name, leaf in leaves.items()}


def _quantised_row(stored: Mapping[str, Stored], piece: Piece, spec: Quantisation, broken: Broken) -> dict[str, np.ndarray]:
    tensor = stored[piece.name]
    if isinstance(tensor, Packed) and piece.rule.form is transposed and spec.format == "int4":
        parts = {name: piece.cut(part).T for name, part in tensor.parts().items()}  # outputs are the first axis of each
        parts["codes"] = np.asarray(number_formats.packed(jnp.asarray(parts["codes"])))
        if broken is not None and not weights.is_finite(np.ascontiguousarray(parts["scales"])):
            broken[piece.name] = None
        return parts
    row = np.ascontiguousarray(_read(stored, piece))
    if broken is not None and not weights.is_finite(row):
        broken[piece.name] = None
    return {name: np.asarray(part) for name, part in quantised.on_host(row, spec).items()}


def _fill(to: np.ndarray, array: np.ndarray) -> None:
    """to[...] = array, a few columns at a time where that turns a matrix over: so its lines stay in the processor's cache (a third
    of the time for a 4096 x 11008 kernel in bfloat16)."""
    if array.ndim == 2 and array.strides[0] < array.strides[1]:
        for start in range(0, array.shape[1], COLUMNS):
            to[:, start : start + COLUMNS] = array[:, start : start + COLUMNS]
    else:
        to[...] = array


def _read(stored: Mapping[str, Stored], piece: Piece) -> np.ndarray:
    return piece.rule.form.ours(piece.cut(stored[piece.name].read()))
