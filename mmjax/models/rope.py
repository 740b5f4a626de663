"""Rotary position embedding, in transformers' convention (the two halves of a head rotate against each other)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models.block_config import Rope


def rotation(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [rows, length, rotated / 2] in float32 for positions [rows, length], or [rows, length, axes] with
    `rope.sections`.

    "dynamic" and "longrope" choose their frequencies by the largest position of the whole batch, as transformers does.
    """
    longest = positions.max() + 1
    if positions.ndim == 3:
        turned_by = np.repeat(np.arange(len(rope.sections)) % positions.shape[-1], rope.sections)
        each = positions[..., turned_by]
    else:
        each = positions[..., None]
    angles = each.astype(jnp.float32) * frequencies(rope, head_dim, longest)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [rows, length, heads, head_dim] with its first 2 * cos.shape[-1] channels rotated."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


def frequencies(rope: Rope, head_dim: int, longest: jax.Array | int = 0) -> jax.Array:
    """Angles a position, float32 [rotated / 2], after the scaling that `rope.kind` names, in an input of `longest` positions.

    linear     positions divided by `factor` (arXiv 2306.15595)
    dynamic    a base that grows with the input once it is longer than `max_length`
    llama3     only long wavelengths are divided, with a smooth passage between `original_length / high_frequency_factor` and
               `original_length / low_frequency_factor` (Llama 3.1 model card)
    yarn       the same idea with a passage that is linear in the channel (arXiv 2309.00071)
    longrope   a divisor for each channel, one set up to `original_length` and another beyond (arXiv 2402.13753)
    """
    rotated = int(head_dim * rope.fraction)
    if rope.kind == "axial":
        return jnp.concatenate([frequencies(Rope(rope.theta), 2 * angles) for angles in rope.sections])
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    if rope.kind == "dynamic":
        length = jnp.maximum(longest, rope.max_length).astype(jnp.float32)
        growth = rope.factor * length / rope.max_length - (rope.factor - 1)
        return 1.0 / (rope.theta * growth ** (rotated / (rotated - 2))) ** exponents
    base = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        base = base / rope.factor
    if rope.kind == "llama3":
        base = _llama3(rope, base)
    if rope.kind == "yarn":
        base = _yarn(rope, base, rotated)
    if rope.kind == "longrope":
        short, long = (base / np.array(factors, np.float32) for factors in (rope.short_factors, rope.long_factors))
        return jnp.where(jnp.asarray(longest) > rope.original_length, long, short)
    return jnp.asarray(base, jnp.float32)


def _llama3(rope: Rope, base: np.ndarray) -> np.ndarray:
    wavelength = 2 * math.pi / base
    low = rope.original_length / rope.low_frequency_factor
    high = rope.original_length / rope.high_frequency_factor
    smooth = (rope.original_length / wavelength - rope.low_frequency_factor) / (
        rope.high_frequency_factor - rope.low_frequency_factor
    )
    between = (1 - smooth) * base / rope.factor + smooth * base
    return np.where(wavelength > low, base / rope.factor, np.where(wavelength < high, base, between))


def _yarn(rope: Rope, base: np.ndarray, rotated: int) -> np.ndarray:
    def channel(turns: float) -> float:
        """Where in the head the wavelength is such that the original length holds so many turns."""
        return rotated * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001
    scaled = np.clip((np.arange(rotated // 2) - low) / (high - low), 0, 1)
    return base / rope.factor * scaled + base * (1 - scaled)
