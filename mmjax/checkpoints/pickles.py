"""Tensors from files of torch.save (`.bin`, `.pt`, `.pth`) without torch and without trusting them.

Such a file is a zip archive: `data.pkl`, a pickle that describes the tensors, and one raw file a storage. A pickle may call any
function it names. Nothing that it names is ever called here but what describes tensors: names of what training scripts leave
beside the weights (settings, paths) stand for an object that does nothing, and every other name is refused.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, NamedTuple

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
    "UntypedStorage": np.dtype(np.uint8),
}
# Kinds without a storage of their own, which lie in an UntypedStorage.
KINDS = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
}
# Under what entry published training files keep the weights.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
# What else such files hold: packages whose objects are only settings and figures, and single names of others.
_SETTINGS = ("argparse", "datetime", "easydict", "lightning", "numpy", "omegaconf", "pathlib", "pytorch_lightning", "types", "typing")
_PLAIN = {
    "collections": ("Counter", "defaultdict", "deque"),
    "_codecs": ("encode",),
    **dict.fromkeys(("builtins", "__builtin__"), ("bytearray", "complex", "float", "frozenset", "int", "long", "set", "slice")),
    "torch": ("Size", "device", "float16", "float32", "float64", "bfloat16", "int64", "int32"),
}


def read(path: str | Path) -> dict[str, Stored]:
    """The tensors of a file of torch.save, or of the shards that an index (`*.bin.index.json`) names.

    The file must hold a dict of names to tensors, by itself or as one of its entries WRAPPERS; entries beside the tensors that
    are none (an epoch, settings) are passed over. Raises UserError for anything else, by name.
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


# Tuples, because a pickle can set the attributes of any other object that it has made, after it was checked.
class _Storage(NamedTuple):
    dtype: np.dtype
    view: Callable[[], np.ndarray]
    size: int


class _Described(NamedTuple):
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
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, EOFError, zlib.error) as error:
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
        # The unpickler makes room for as many entries as the largest number under which one is put away.
        if any("PUT" in op.name and int(arg or 0) > len(description) for op, arg, _ in pickletools.genops(description)):
            raise pickle.UnpicklingError("it numbers more objects than it could hold")
        tensors = _tensors(unpickler.load(), path)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may do anything that its instructions can do
        raise UserError(f"{path} does not describe tensors in a way this reader knows: {error}") from error
    return {
        str(name): Stored(str(name), value.shape, value.storage.dtype, path, value.read)
        for name, value in tensors.items()
    }


def _tensors(content: Any, path: Path) -> dict[Any, _Described]:
    """The dict of tensors in what a file holds. Raises UserError where there is none, or more than one."""
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {_kind_of(content)}, not a dict of tensors")
    content = dict(content)  # a pickle may have given an OrderedDict other methods
    within = [name for name in WRAPPERS if isinstance(content.get(name), dict) and _holds_tensors(content[name])]
    if len(within) > 1:
        raise UserError(f"{path} holds several sets of tensors: {', '.join(within)}. Save the one you mean by itself.")
    if within:
        return _tensors(content[within[0]], path)
    found = {name: value for name, value in content.items() if isinstance(value, _Described)}
    nested = [str(name) for name, value in content.items() if name not in found and _holds_tensors(value)]
    if nested:
        raise UserError(
            f"{path} holds tensors inside of its entries {', '.join(nested[:20])}. Only a dict of tensors is read, also as "
            f"the entry {', '.join(WRAPPERS)} of a dict; save the one you mean by itself."
        )
    if content and not found:
        others = ", ".join(f"{name} ({_kind_of(value)})" for name, value in list(content.items())[:20])
        raise UserError(f"{path} holds no tensors, but {others}")
    return found


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)) and not isinstance(value, _Described):
        return any(map(_holds_tensors, dict(value).values() if isinstance(value, dict) else value))
    return isinstance(value, _Described)


def _kind_of(value: Any) -> str:
    return getattr(type(value), "named", type(value).__name__)


class _Kind(NamedTuple):
    dtype: np.dtype


class _Maker(NamedTuple):
    make: Callable[..., _Described]

    def __call__(self, *args: Any) -> _Described:
        return self.make(*args)


class _Inert(dict):
    """Stands for an object of a class that is not looked up: takes whatever the pickle does to it, keeps items, and does nothing."""

    named = ""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    extend = add = append


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: Path, storage: Callable[[_Kind, str, int], _Storage]):
        super().__init__(file)
        self._path = path
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor"): _Maker(self._tensor),
            ("torch._utils", "_rebuild_tensor_v2"): _Maker(self._tensor),
            ("torch._utils", "_rebuild_tensor_v3"): _Maker(self._untyped_tensor),
            ("torch._utils", "_rebuild_parameter"): _Maker(_parameter),
            ("torch._utils", "_rebuild_parameter_with_state"): _Maker(_parameter),
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Kind(STORAGES[name])
        if module == "torch" and name in KINDS:
            return _Kind(KINDS[name])
        if module == "torch" and name.endswith("Storage"):
            raise UserError(f"{self._path} holds tensors of kind {name.removesuffix('Storage')}, which are not supported")
        if module.split(".")[0] in _SETTINGS or name in _PLAIN.get(module, ()):
            return type("_Inert", (_Inert,), {"named": f"{module}.{name}"})
        raise UserError(
            f"{self._path} asks for {module}.{name} while being read. Only tensors and plain settings are accepted from such "
            "files; if you trust it, load it in torch and save its tensors as safetensors."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        what, kind, key, _, count = pid
        if what != "storage" or not isinstance(kind, _Kind):
            raise pickle.UnpicklingError(f"unknown reference {what!r}")
        return self._storage(kind, str(key), int(count))

    def _tensor(self, storage, offset, shape, strides, *_) -> _Described:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides)) if math.prod(shape) else offset
        if offset < 0 or len(shape) != len(strides) or min((*shape, *strides, 0)) < 0 or last >= max(storage.size, 1):
            raise UserError(f"{self._path} describes a tensor that reaches outside its storage")
        return _Described(storage, int(offset), shape, strides)

    def _untyped_tensor(self, storage, offset, shape, strides, grad, hooks, kind, *_) -> _Described:
        if not isinstance(storage, _Storage) or not isinstance(kind, _Kind):
            raise pickle.UnpicklingError(f"a tensor of kind {_kind_of(kind)}")
        count = storage.size // kind.dtype.itemsize
        view = storage.view
        typed = _Storage(kind.dtype, lambda: view()[: count * kind.dtype.itemsize].view(kind.dtype), count)
        return self._tensor(typed, offset, shape, strides)


def _parameter(tensor: _Described, *_: Any) -> _Described:
    return tensor
