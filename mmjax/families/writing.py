"""Foreign tensors from leaves, by a key table: each made when it is written, and dropped after that."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Callable, Mapping

import jax
import ml_dtypes
import numpy as np

from mmjax import tree
from mmjax.checkpoints import awq, safetensors
from mmjax.checkpoints.safetensors import SHARD_BYTES, Tensor
from mmjax.errors import UserError
from mmjax.families.keys import Piece, Rule, counter, joined, pieces, transposed
from mmjax.models import quantised
from mmjax.parallel import cluster
from mmjax.parallel.placement import row
from mmjax.tree import Params

# (path of a leaf, layer or None, that row of it) -> what is written in its place
Change = Callable[[str, int | None, np.ndarray], np.ndarray]


def tensors(
    params: Params, rules: list[Rule], dtype: Any = None, change: Change = lambda path, i, row: row
) -> list[Tensor]:
    """The foreign tensors of these leaves, made one at a time when they are written; in `dtype`, or as they are held. Kernels in int4
    become AWQ's packed tensors (mmjax.checkpoints.awq.gemm), whose scales are float16.

    Raises ValueError for a leaf that no rule names: nothing may be left out of a file silently.
    """
    held_as, flat = tree.flatten(params), tree.flatten(quantised.dense_shapes(params))
    found = pieces(rules, flat)
    homeless = sorted(set(flat) - set(found))
    if homeless:
        raise ValueError(f"no key for the leaves {', '.join(homeless)}")
    made: list[Tensor] = []
    for r in rules:
        if r.form is counter:
            made.append(Tensor(r.name, (), np.dtype(np.int64), lambda: np.zeros((), np.int64)))
            continue
        for k, at in enumerate(r.index(flat[r.paths[0]].shape)):
            piece = found[r.paths[0]][k]
            if f"{r.paths[0]}/zeros" in held_as:
                made += _packed_tensors(r, piece, at, held_as)
                continue
            held = np.dtype(flat[r.paths[0]].dtype)
            kind = np.dtype(dtype or (ml_dtypes.bfloat16 if held == np.uint16 else held))

            def make(r=r, at=at, kind=kind) -> np.ndarray:
                layer = at[0] if at else None
                rows = [r.form.foreign(change(path, layer, row(held_as[path], *at))) for path in r.paths]
                return np.asarray(joined(r, rows), kind)

            made.append(Tensor(piece.name, piece.shape, kind, make))
    return made


def write(
    tensors: list[Tensor], directory: Path, *, stem: str = "model", shard_bytes: int = SHARD_BYTES, together: bool = False
) -> None:
    """safetensors.write; `together`, by the first process, while all make the same tensors at the same time, since each holds but
    parts of them."""
    if jax.process_index() == 0 or not together:
        safetensors.write(tensors, directory, stem=stem, shard_bytes=shard_bytes)
    else:
        for tensor in safetensors.in_order(tensors, shard_bytes):
            tensor.make()
    if together:
        cluster.wait("written")


def write_adapter(tensors: list[Tensor], directory: Path, name: str, config: str, *, together: bool = False) -> None:
    """An adapter's directory: its one file of tensors, called `name`, and its adapter_config.json."""
    if jax.process_index() == 0 or not together:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(config)
    write(tensors, directory, stem=name.removesuffix(".safetensors"), shard_bytes=sys.maxsize, together=together)


def _packed_tensors(r: Rule, piece: Piece, at: tuple[int, ...], flat: Mapping[str, Any]) -> list[Tensor]:
    """One row of int4 kernels as AutoAWQ's tensors. Raises UserError where outputs do not simply follow one another there."""
    if r.form is not transposed or r.groups != 1 or r.axis != 0:
        raise UserError(f"{piece.name} cannot be written in AWQ's layout: dequantise first (model.dequantised())")

    def make() -> dict[str, np.ndarray]:
        rows = {name: [row(flat[f"{path}/{name}"], *at) for path in r.paths] for name in ("codes", "scales", "zeros")}
        rows["codes"] = [np.stack([codes >> 4, codes & 15], 1).reshape(-1, codes.shape[1]) for codes in rows["codes"]]
        codes, scales, zeros = (np.concatenate([part.T for part in rows[name]]) for name in rows)
        return awq.gemm(codes, scales.astype(np.float16), zeros)

    outputs, inputs = piece.shape
    groups = flat[f"{r.paths[0]}/scales"].shape[-2]
    kinds = {"qweight": ((inputs, outputs // 8), np.int32), "qzeros": ((groups, outputs // 8), np.int32), "scales": ((groups, outputs), np.float16)}
    linear = piece.name.removesuffix(".weight")
    return [
        Tensor(f"{linear}.{name}", shape, np.dtype(kind), lambda name=name: make()[name])  # type: ignore[misc]
        for name, (shape, kind) in kinds.items()
    ]
