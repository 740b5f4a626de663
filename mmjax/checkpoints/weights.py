"""The weights of a directory, whatever files they are in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mmjax import hub
from mmjax.checkpoints import pickles, safetensors
from mmjax.checkpoints.safetensors import Stored
from mmjax.errors import UserError

NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "checkpoint.pt",
)


def read(path: str | Path, names: tuple[str, ...] = NAMES) -> dict[str, Stored]:
    """The tensors of a weight file, or of the first of `names` that a directory has (without any, of its only .pth file). Nothing is
    read yet but the headers.
    """
    path = Path(path)
    if path.is_dir():
        present = files(path, names)
        if not present:
            raise UserError(f"{path} has no weights: none of {', '.join(names)} is there. {hub.remedy(path)}")
        path = present[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    is_safetensors = path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
    return safetensors.read(path) if is_safetensors else pickles.read(path)


def files(directory: Path, names: tuple[str, ...] = NAMES) -> list[Path]:
    """The weight files of a directory, by these names; else those that llm-awq wrote beside a config.json, or the only .pth file,
    whatever it is called."""
    found = [directory / name for name in names if (directory / name).is_file()] or sorted(directory.glob("*awq*.pt"))
    freely = sorted(directory.glob("*.pth")) if names == NAMES else []
    return found or (freely if len(freely) == 1 else [])


def is_finite(array: np.ndarray) -> bool:
    """Whether floating-point numbers are all finite, told from their bits in two passes without a temporary: several times as fast
    as numpy.isfinite where the processor has no instructions for the type (bfloat16)."""
    if not array.size:
        return True
    bits, info = array.dtype.itemsize * 8, ml_dtypes.finfo(array.dtype)
    infinity = ((1 << info.nexp) - 1) << info.nmant
    signed, unsigned = (array.view(np.dtype(f"{kind}{bits // 8}")) for kind in "iu")
    return bool(signed.max() < infinity and unsigned.max() < infinity | 1 << (bits - 1))


def refuse_broken(names: list[str], where: str | Path, dtype: Any) -> None:
    """Raises UserError: tensors of these names hold a NaN or an infinity, read in `dtype`."""
    listed = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    narrow = " (or numbers too large for float16)" if np.dtype(dtype) == np.float16 else ""
    raise UserError(
        f"{where or 'the weights'}: {len(names)} tensors hold NaN or infinity{narrow}: {listed}. Copy or download the files again; "
        "mmjax.load(..., check_finite=False) takes them as they are."
    )
