"""Arrays over the devices of one process or of several: made part by part, seen as another type, read back row by row.

A process can touch only what its own devices hold. A row of which it lacks some it gets in a program that all processes run: who calls
`row` for such an array calls it on every process, in the same order.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Callable, Iterator, Mapping

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from mmjax import tree

ALIGNMENT = 64  # bytes
Bounds = tuple[tuple[int, int], ...]
"""Where a part of an array begins and ends on each axis."""


class Parts:
    """The parts of an array that this process's devices hold, each once however many hold it, to be filled row by row; without a
    sharding the whole."""

    def __init__(self, shape: tuple[int, ...], sharding: Sharding | None):
        self.shape, self.sharding = shape, sharding
        self._made: dict[Bounds, Any] = {tuple((0, size) for size in shape): None}
        if sharding is not None:
            self._made = {_bounds(index, shape): None for index in sharding.addressable_devices_indices_map(shape).values()}

    def holding(self, at: tuple[int, ...]) -> list[Bounds]:
        """The parts that have something of the row at these places on the first axes."""
        return [bounds for bounds in self._made if all(start <= i < stop for i, (start, stop) in zip(at, bounds))]

    def rows(self, at: tuple[int, ...], dtype: Any) -> Iterator[tuple[np.ndarray, tuple[slice, ...]]]:
        """What is to be filled of that row, and which slice of the whole row goes there."""
        for bounds in self.holding(at):
            if (part := self._made[bounds]) is None:
                part = self._made[bounds] = aligned([stop - start for start, stop in bounds], dtype)
            within = tuple(i - start for i, (start, _) in zip(at, bounds))
            yield part[(*within, ...)], tuple(slice(*ends) for ends in bounds[len(at) :])

    def fill(self, at: tuple[int, ...], row: np.ndarray) -> None:
        for to, part in self.rows(at, row.dtype):
            to[...] = row[part]

    def placed(self) -> jax.Array:
        """The array on its devices. A CPU takes the parts over as they are."""
        if self.sharding is None:
            return jax.device_put(*self._made.values())
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self._made[_bounds(index, self.shape)])


def aligned(shape: list[int], dtype: Any) -> np.ndarray:
    """An array to be filled, aligned as XLA wants it: a CPU device then takes it over as it is, instead of a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def crosses(leaf: Any) -> bool:
    """Whether parts of an array, or of a tree's, are on devices of other processes."""
    if isinstance(leaf, Mapping):
        return any(map(crosses, tree.flatten(leaf).values()))
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def viewed(array: jax.Array, dtype: Any) -> jax.Array:
    """The same bytes as a type of the same size: without a copy on a CPU, where both then live in the same memory."""

    def part(shard: Any) -> jax.Array:
        return jax.device_put(np.asarray(shard.data).view(dtype), shard.device)

    if not _on_processor(array):
        return array.view(dtype)
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, [part(shard) for shard in array.addressable_shards])


def row(leaf: Any, *at: int | None) -> np.ndarray:
    """Layer `at[0]` of a stacked leaf (and expert `at[1]` of it), or the whole of another, on the host; bfloat16 that is held as bits
    becomes numbers again."""
    chosen = tuple(i for i in at if i is not None)
    if not isinstance(leaf, jax.Array):
        array = np.asarray(leaf)[chosen]
    elif leaf.sharding.num_devices == 1 and _on_processor(leaf):
        array = np.asarray(leaf.addressable_shards[0].data)[chosen]  # a view
    else:
        if leaf.dtype == ml_dtypes.bfloat16 and _on_processor(leaf):
            leaf = viewed(leaf, np.uint16)  # XLA:CPU would widen a whole stack to take a row of it
        taken = _taken(leaf, tuple(np.int32(i) for i in chosen)) if chosen else leaf
        array = on_host(taken)
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def on_host(array: Any) -> np.ndarray:
    """The whole of an array. Where other processes hold some of it, all of them must call."""
    if not crosses(array):
        return np.asarray(array)
    if not array.is_fully_replicated:
        array = _everywhere(array.sharding.mesh)(array)
    return np.asarray(array.addressable_data(0))


@functools.lru_cache(maxsize=8)
def _everywhere(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec()))


@jax.jit
def _taken(leaf: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
    """The index is data, so that one compiled slice serves all layers."""
    for i in at:
        leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    return leaf


def _on_processor(array: jax.Array) -> bool:
    device: Any = next(iter(array.sharding.device_set))
    return device.platform == "cpu"


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index or (), shape))
