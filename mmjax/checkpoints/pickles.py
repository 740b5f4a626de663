"""Tensors from files of torch.save (`.bin`, `.pt`, `.pth`) without torch and without trusting them.

Such a file is a zip archive: `data.pkl`, a pickle that describes the tensors, and one raw file a storage. A pickle
may call any function it names, so this reader knows a handful of names that describe tensors and refuses every other
one.
"""

from __future__ import annotations

import dataclasses
import io
import math
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable

import ml_dtypes
import numpy as np

from mmjax.checkpoints.safetensors import Stored, check_index, read_index
from mmjax.errors import UserError

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


def read(path: str | Path) -> dict[str, Stored]:
    """The tensors of a file of torch.save, or of the shards that an index (`*.bin.index.json`) names.

    The file must hold one dict of names to tensors. Raises UserError for anything else, by name.
    """
    path = Path(path)
    if path.suffix != ".json":
        return _read_file(path)
    index = read_index(path)
    found: dict[str, Stored] = {}
    for shard in sorted(set(index.values())):
        for name, stored in _read_file(path.parent / shard).items():
            if name in found:
                raise UserError(f"{path.parent}: tensor {name} is in both {found[name].file.name} and {shard}")
            found[name] = stored
    check_index(path, index, found)
    return found


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    view: Callable[[], np.ndarray]
    count: int


@dataclasses.dataclass(frozen=True)
class _Described:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> np.ndarray:
        item = self.storage.dtype.itemsize
        flat = self.storage.view()[self.offset :]
        return np.lib.stride_tricks.as_strided(flat, self.shape, [s * item for s in self.strides], writeable=False)


def _read_file(path: Path) -> dict[str, Stored]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            [pickled] = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
            root = pickled[: -len("data.pkl")]
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise UserError(f"{path} was written on a big-endian machine; save it again as safetensors")
            description = archive.read(pickled)
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise UserError(
            f"{path} is not a file of torch.save in its zip format ({error}). Files older than torch 1.6, and damaged "
            "ones, cannot be read; load it in torch and save its tensors as safetensors."
        ) from error

    def storage(kind: _Kind, key: str, count: int) -> _Storage:
        info = entries.get(f"{root}data/{key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path} lacks the raw data of storage {key}")
        # The central directory does not say how long the local header is: it is padded to align the data.
        name, extra = struct.unpack("<HH", buffer[info.header_offset + 26 : info.header_offset + 30])
        start = info.header_offset + 30 + name + extra
        if count * kind.dtype.itemsize > info.file_size or start + info.file_size > len(buffer):
            raise UserError(f"{path}: storage {key} is shorter than the tensors in it")
        return _Storage(kind.dtype, lambda: np.frombuffer(buffer, kind.dtype, count, start), count)

    unpickler = _Unpickler(io.BytesIO(description), path, storage)
    try:
        content = unpickler.load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not describe tensors in a way this reader knows: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    others = [str(name) for name, value in content.items() if not isinstance(value, _Described)]
    if others:
        raise UserError(f"{path} holds entries that are not tensors: {', '.join(others[:20])}")
    return {
        str(name): Stored(str(name), value.shape, value.storage.dtype, path, value.read)
        for name, value in content.items()
    }


@dataclasses.dataclass(frozen=True)
class _Kind:
    dtype: np.dtype


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: Path, storage: Callable[[_Kind, str, int], _Storage]):
        super().__init__(file)
        self._path = path
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Kind(STORAGES[name])
        if (module, name) in known:
            return known[module, name]
        raise UserError(
            f"{self._path} asks for {module}.{name} while being read. Only plain tensors are accepted from such files; "
            "if you trust it, load it in torch and save its tensors as safetensors."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        what, kind, key, _, count = pid
        if what != "storage" or not isinstance(kind, _Kind):
            raise pickle.UnpicklingError(f"unknown reference {what!r}")
        return self._storage(kind, str(key), int(count))

    def _tensor(self, storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> _Described:
        shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides)) if math.prod(shape) else offset
        if offset < 0 or len(shape) != len(strides) or min((*shape, *strides, 0)) < 0 or last >= max(storage.count, 1):
            raise UserError(f"{self._path} describes a tensor that reaches outside its storage")
        return _Described(storage, int(offset), shape, strides)


def _parameter(tensor: _Described, requires_grad: bool = False, hooks: Any = None) -> _Described:
    return tensor
