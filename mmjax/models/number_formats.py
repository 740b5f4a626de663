"""The formats in which a frozen kernel is held in few bits: what its leaves are, how they are made, and the numbers they stand for.

    int8   codes int8 [in, out], scales [1, out]: one scale for each output
    nf4    codes uint8 [in / 2, out] and, for every block of inputs of an output, its largest absolute value:
           absmax [blocks, out], or in 8 bits (double quantisation): absmax_codes uint8 [blocks, out], nested_absmax
           [blocks * out / 256] and offset []  (QLoRA, arXiv 2305.14314; bitsandbytes' numbers)
    int4   codes uint8 [in / 2, out] and, for every group of inputs of an output, scales [groups, out] and zeros uint8 [groups, out]
           (AWQ, arXiv 2306.00978; llm-awq's numbers)

Codes of 4 bits stand two in a byte, of inputs 2i and 2i + 1, the first in the high half. All axes are in the kernel's order, so that
leaves are divided over devices as the kernel would be. A block that the inputs do not fill is a shorter one.
"""

from __future__ import annotations

from typing import Literal, Mapping

import jax
import jax.numpy as jnp
import numpy as np

Format = Literal["int8", "nf4", "int4"]
Leaves = dict[str, jax.Array]

NESTED = 256  # maxima of blocks that share one scale
SMALLEST = 1.2e-38  # what a block of zeros is divided by: the least that processors do not take for 0
# The 16 levels of NF4: quantiles of a normal distribution, as QLoRA's authors published them (arXiv 2305.14314, appendix E).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def dynamic_levels() -> np.ndarray:
    """The 256 levels of 8 bits in which double quantisation holds the maxima of blocks, ascending, float32 (8-bit dynamic numbers, arXiv
    1511.04561, 2110.02861): signs, 7 powers of ten from 1e-6 to 1, and below each power evenly spaced levels, twice as many
    as below the one before it; and 0 and 1."""
    found = [0.0, 1.0]
    for power in range(7):
        bounds = _evenly(2**power + 1)
        levels = (np.float32(10.0 ** (power - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))).tolist()
        found += levels + [-level for level in levels]
    return np.sort(np.array(found, np.float32))


def to_int8(kernel: jax.Array) -> Leaves:
    """[in, out] -> the leaves of "int8": each output scaled by its largest absolute value / 127."""
    kernel = kernel.astype(jnp.float32)
    scales = _divided(jnp.maximum(jnp.abs(kernel).max(0, keepdims=True), SMALLEST), 127)
    return {"codes": jnp.clip(jnp.round(_divided(kernel, scales)), -127, 127).astype(jnp.int8), "scales": scales}


def to_nf4(kernel: jax.Array, block: int = 64, double: bool = True) -> Leaves:
    """[in, out] -> the leaves of "nf4"."""
    kernel = kernel.astype(jnp.float32)
    inputs = kernel.shape[0]
    whole = inputs // block * block
    absmax = jnp.abs(_blocks(kernel, block)).max(1)
    scaled = _blocks(kernel, block) * (1 / jnp.maximum(absmax, SMALLEST))[:, None]
    scaled = scaled.reshape(-1, kernel.shape[1])[:inputs]
    if whole < inputs:  # bitsandbytes divides in a shorter block, and does not let its maximum be 0
        absmax = absmax.at[-1].max(SMALLEST)
        scaled = scaled.at[whole:].set(_divided(kernel[whole:], absmax[-1]))
    scaled = jnp.clip(scaled, -1, 1)
    codes: jax.Array = sum((scaled > value).astype(jnp.uint8) for value in _between(NF4))  # type: ignore[assignment]
    leaves = {"codes": packed(codes, padding=7)}
    return leaves | (_double(absmax) if double else {"absmax": absmax})


def to_int4(kernel: jax.Array, group: int = 128) -> Leaves:
    """[in, out] -> the leaves of "int4": each group's range from its smallest to its largest number in 15 steps."""
    kernel = kernel.astype(jnp.float32)
    grouped = _groups(kernel, group)
    low, high = grouped.min(1), grouped.max(1)
    scales = _divided(jnp.maximum(high - low, 1e-5), 15)
    zeros = jnp.clip(-jnp.round(_divided(low, scales)), 0, 15)
    codes = jnp.clip(jnp.round(_divided(grouped, scales[:, None])) + zeros[:, None], 0, 15)
    return {"codes": packed(codes.astype(jnp.uint8).reshape(kernel.shape)), "scales": scales, "zeros": zeros.astype(jnp.uint8)}


def dense(leaves: Mapping[str, jax.Array], inputs: int) -> jax.Array:
    """The kernel float32 [inputs, out] that the leaves stand for; leading axes (experts) stay."""
    if leaves["codes"].ndim > 2:
        return jax.vmap(lambda row: dense(row, inputs))(dict(leaves))
    codes = leaves["codes"]
    if codes.dtype == jnp.int8:
        return codes.astype(jnp.float32) * leaves["scales"]
    codes = unpacked(codes)[:inputs]
    if "zeros" in leaves:
        scales, zeros = (leaves[name].astype(jnp.float32)[:, None] for name in ("scales", "zeros"))
        grouped = _groups(codes, inputs // scales.shape[0]).astype(jnp.float32)
        return ((grouped - zeros) * scales).reshape(codes.shape)
    absmax = maxima(leaves)
    block = block_size(inputs, absmax.shape[0])
    scaled = _blocks(_level(codes), block) * absmax[:, None]
    return scaled.reshape(-1, codes.shape[1])[:inputs]


def maxima(leaves: Mapping[str, jax.Array]) -> jax.Array:
    """The largest absolute value of each block of "nf4", float32 [blocks, out]."""
    if "absmax" in leaves:
        return leaves["absmax"]
    codes = leaves["absmax_codes"]
    blocks, outputs = codes.shape
    # A nested block is a run of 256 maxima, output after output.
    scales = jnp.repeat(leaves["nested_absmax"], NESTED)[: blocks * outputs].reshape(outputs, blocks).T
    return jnp.asarray(dynamic_levels())[codes] * scales + leaves["offset"]


def block_size(inputs: int, blocks: int) -> int:
    """The power of two into which so many inputs fall into so many blocks. There is one, but for a single block, where any will do."""
    return 1 << (-(-inputs // blocks) - 1).bit_length()


def packed(codes: jax.Array, padding: int = 0) -> jax.Array:
    """uint8 [n, out] of 0..15 -> [n / 2, out], two in a byte; `padding` fills up the last one."""
    codes = jnp.pad(codes, ((0, codes.shape[0] % 2), (0, 0)), constant_values=padding).astype(jnp.uint8)
    return codes[::2] << 4 | codes[1::2]


def unpacked(codes: jax.Array) -> jax.Array:
    """The inverse: [n / 2, out] -> [n, out]."""
    return jnp.stack([codes >> 4, codes & 15], 1).reshape(-1, codes.shape[1])


def _double(absmax: jax.Array) -> Leaves:
    """Maxima [blocks, out] in 8 bits: without their mean, in runs of 256, each scaled by its own largest absolute value.

    As bitsandbytes does it, which looks for the nearest level from the nearest of 65,536 even steps between -1 and 1.
    """
    blocks, outputs = absmax.shape
    offset = _mean(absmax.reshape(-1))
    runs = _blocks((absmax - offset).T.reshape(-1, 1), NESTED)[..., 0]
    nested = jnp.abs(runs).max(1)
    scaled = jnp.clip(runs / jnp.maximum(nested, SMALLEST)[:, None], -1, 1)
    steps = jnp.floor((scaled + 1) * 32767.5 + 0.5).astype(jnp.int32)
    levels = dynamic_levels()
    nearest = np.searchsorted(_between(levels), (np.arange(65536) / 32767.5 - 1).astype(np.float32)).astype(np.uint8)
    codes = jnp.where(nested[:, None] > 0, jnp.asarray(nearest)[steps], 0)
    codes = codes.reshape(-1)[: blocks * outputs].reshape(outputs, blocks).T
    return {"absmax_codes": codes, "nested_absmax": nested, "offset": offset}


def _divided(x: jax.Array, by: jax.Array | float) -> jax.Array:
    """x / by, rounded once. XLA multiplies by the reciprocal of what is broadcast, and numbers half way between two codes, as the ends
    of a symmetric range are, would be rounded otherwise than elsewhere."""
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(jnp.asarray(by, x.dtype), x.shape))


def _mean(x: jax.Array) -> jax.Array:
    """The mean of numbers [n], summed in pairs: one after another float32 would lose digits."""
    count = len(x)
    x = jnp.pad(x, (0, (1 << (count - 1).bit_length()) - count))
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0] / count


def _between(levels: np.ndarray) -> np.ndarray:
    """Half way between ascending levels: up to there, and there itself, the lower one is the nearest."""
    return (levels[:-1] + levels[1:]) / np.float32(2)


def _evenly(count: int) -> np.ndarray:
    """So many numbers from 0.1 to 1 as torch spaces them: from both ends, with a step in float32, each rounded once."""
    tenth = np.float32(0.1)
    step, i = np.float64((np.float32(1) - tenth) / np.float32(count - 1)), np.arange(count)
    return np.where(i < count // 2, np.float64(tenth) + step * i, 1 - step * (count - 1 - i)).astype(np.float32)


def _level(codes: jax.Array) -> jax.Array:
    """NF4's level of each code: chosen bit by bit, which every processor does in registers (a table would be a gather).

    The barrier ties the levels to the codes: XLA would else spread each of the 16 to an array of the kernel's size, in front of the
    scan over layers.
    """
    codes, levels = jax.lax.optimization_barrier((codes, jnp.asarray(NF4)))
    found: list = list(levels)
    for bit in range(4):
        one = (codes >> bit & 1) == 1
        found = [jnp.where(one, high, low) for low, high in zip(found[::2], found[1::2])]
    return found[0]


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """[n, out] -> [blocks, block, out], the last block filled up with zeros."""
    x = jnp.pad(x, ((0, -x.shape[0] % block), (0, 0)))
    return x.reshape(-1, block, x.shape[1])


def _groups(x: jax.Array, group: int) -> jax.Array:
    """[n, out] -> [groups, group, out]. Raises ValueError where the inputs do not fill the groups."""
    if x.shape[0] % group:
        raise ValueError(f"{x.shape[0]} inputs do not fall into groups of {group}")
    return x.reshape(-1, group, x.shape[1])
