"""Rotary position embedding, in transformers' convention (the two halves of a head rotate against each other)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models.config import Rope


def rotation(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [rows, length, rotated / 2] in float32 for positions [rows, length]."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies(rope, head_dim))
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [rows, length, heads, head_dim] with its first 2 * cos.shape[-1] channels rotated."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angles a position [rotated / 2], after the scaling that `rope.kind` names.

    linear: positions divided by `factor` (arXiv 2306.15595). llama3: only long wavelengths are, with a smooth passage between
    `original_length / high_frequency_factor` and `original_length / low_frequency_factor` (Llama 3.1 model card).
    """
    rotated = int(head_dim * rope.fraction)
    base = 1.0 / (rope.theta ** (np.arange(0, rotated, 2, dtype=np.float32) / rotated))
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / base
        low = rope.original_length / rope.low_frequency_factor
        high = rope.original_length / rope.high_frequency_factor
        smooth = (rope.original_length / wavelength - rope.low_frequency_factor) / (
            rope.high_frequency_factor - rope.low_frequency_factor
        )
        between = (1 - smooth) * base / rope.factor + smooth * base
        scaled = np.where(wavelength > low, base / rope.factor, np.where(wavelength < high, base, between))
        return scaled.astype(np.float32)
    return base
