"""The weights of a directory, whatever files they are in."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmjax.checkpoints import pickles, safetensors
from mmjax.checkpoints.safetensors import Stored
from mmjax.errors import UserError

NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def read(path: str | Path, names: tuple[str, ...] = NAMES) -> dict[str, Stored]:
    """The tensors of a weight file, or of the first of `names` that a directory has. Nothing is read yet but the
    headers.
    """
    path = Path(path)
    if path.is_dir():
        present = [path / name for name in names if (path / name).is_file()]
        if not present:
            raise UserError(f"{path} has no weights: none of {', '.join(names)} is there")
        path = present[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    is_safetensors = path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
    return safetensors.read(path) if is_safetensors else pickles.read(path)


def require_finite(stored: dict[str, Stored]) -> None:
    """Raises UserError with the names of all floating-point tensors that hold a NaN or an infinity."""
    bad = []
    for name, tensor in stored.items():
        if np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.kind == "V":
            array = tensor.read()
            if not np.isfinite(array).all():
                bad.append(name)
    if bad:
        file = stored[bad[0]].file
        raise UserError(f"{file.parent}: {len(bad)} tensors hold NaN or infinity: {', '.join(bad[:20])}")
