"""Safetensors files (https://github.com/huggingface/safetensors#format): read tensor by tensor, written in shards.

Reading maps the file into memory: a tensor costs nothing until it is used, and then only the pages that are touched.
Writing takes one tensor at a time as well, so that neither ever holds a second copy of the weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, Callable, Iterable

import ml_dtypes
import numpy as np

from mmjax import hub
from mmjax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the format's own limit
SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: what it is, and `read()` for a read-only view of it (no copy is made)."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written: `make()` is called once, when its turn comes, and the array is dropped after that."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read(path: str | Path) -> dict[str, Stored]:
    """The tensors of a file, or of the shards that an index (`*.safetensors.index.json`) names.

    Raises UserError for a damaged file, a missing shard, and a tensor that is missing from its shard or present in two.
    """
    path = Path(path)
    if path.suffix != ".json":
        return {stored.name: stored for stored in _read_file(path)}
    index = read_index(path)
    found: dict[str, Stored] = {}
    for shard in sorted(set(index.values())):
        for stored in _read_file(path.parent / shard):
            if stored.name in found:
                raise UserError(
                    f"{path.parent}: tensor {stored.name} is in both {found[stored.name].file.name} and {shard}"
                )
            found[stored.name] = stored
    check_index(path, index, found)
    return found


def write(
    tensors: Iterable[Tensor], directory: str | Path, *, stem: str = "model", shard_bytes: int = SHARD_BYTES
) -> None:
    """`stem`.safetensors, or numbered shards of at most `shard_bytes` and their index, as transformers writes them.

    Each file appears under its own name only when it is complete.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards = _divided(tensors, shard_bytes)
    if len(shards) == 1:
        write_file(shards[0], directory / f"{stem}.safetensors")
        return
    where, total = {}, 0
    for k, shard in enumerate(shards, 1):
        name = f"{stem}-{k:05d}-of-{len(shards):05d}.safetensors"
        write_file(shard, directory / name)
        where.update({tensor.name: name for tensor in shard})
        total += sum(tensor.bytes for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def in_order(tensors: Iterable[Tensor], shard_bytes: int = SHARD_BYTES) -> list[Tensor]:
    """The tensors in the order in which `write` makes them."""
    return [tensor for shard in _divided(tensors, shard_bytes) for tensor in _laid_out(shard)]


def _divided(tensors: Iterable[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.bytes
    return shards


def _laid_out(tensors: list[Tensor]) -> list[Tensor]:
    """The format wants alignment: wide types first keeps every tensor at a multiple of its own item size."""
    return sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name))


def write_file(tensors: list[Tensor], path: Path) -> None:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    tensors = _laid_out(tensors)
    for tensor in tensors:
        end = offset + tensor.bytes
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            array = np.asarray(tensor.make(), order="C")
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(
                    f"{tensor.name}: announced {tensor.shape} {tensor.dtype}, made {array.shape} {array.dtype}"
                )
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name, of an index file; shards are plain names in the same folder."""
    try:
        index = json.loads(path.read_text())["weight_map"]
        if not index or not all(isinstance(shard, str) for shard in index.values()):
            raise ValueError("its weight_map does not say which file each tensor is in")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a readable index of shards: {error}") from error
    strange = [shard for shard in set(index.values()) if Path(shard).name != shard]
    if strange:
        raise UserError(f"{path} names shards outside its own folder: {', '.join(sorted(strange))}")
    absent = sorted(shard for shard in set(index.values()) if not (path.parent / shard).is_file())
    if absent:
        raise UserError(
            f"{path.parent} lacks {len(absent)} of its shards: {', '.join(absent)}. {hub.remedy(path.parent, absent)}"
        )
    return index


def check_index(path: Path, index: dict[str, str], found: dict[str, Stored]) -> None:
    """Raises UserError where a tensor is not in the shard that the index names."""
    lost = sorted(name for name, shard in index.items() if name not in found or found[name].file.name != shard)
    if lost:
        raise UserError(f"{path} places tensors in shards that do not hold them: {', '.join(lost[:20])}")


def _read_file(path: Path) -> list[Stored]:
    def broken(why: str) -> UserError:
        return UserError(f"{path} is not a readable safetensors file: {why}. Copy or download it again.")

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER + 1
            if length > min(size - 8, MAX_HEADER):
                raise broken("its header is cut off")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise broken(str(error)) from error
    except ValueError as error:
        raise broken(f"its header is no valid JSON ({error})") from error

    start = 8 + length
    if not isinstance(header, dict):
        raise broken("its header is no list of tensors")
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if isinstance(entry, dict) and entry.get("dtype") not in (None, *DTYPES):
            raise UserError(f"{path}: tensor {name} is stored as {entry['dtype']}, which is not supported")
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            count = math.prod(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise broken(f"the entry of tensor {name} is not understood ({entry})") from error
        if any(not isinstance(n, int) or n < 0 for n in (*shape, begin, end)) or end - begin != count * dtype.itemsize:
            raise broken(f"the shape and the size of tensor {name} do not agree")
        if start + end > size:
            raise broken(f"the file ends before tensor {name} does ({size} bytes, {start + end} needed)")

        def view(dtype=dtype, shape=shape, count=count, offset=start + begin) -> np.ndarray:
            return np.frombuffer(buffer, dtype, count, offset).reshape(shape) if count else np.zeros(shape, dtype)

        tensors.append(Stored(name, shape, dtype, path, view))
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"names that occur twice: {', '.join(twice)}")
    return entries
