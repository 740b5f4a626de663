"""Interpolation of a square map of learned positions to maps of other shapes, as torch's `interpolate` does it.

It is linear in the map and separable: weights over its rows times weights over its columns, made from sizes alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.models.encoder_config import Interpolation


def resized(table: jax.Array, rows: int, columns: int, kind: Interpolation) -> jax.Array:
    """[side, side, width] -> [rows * columns, width], row by row."""
    down, across = (_weights(kind, len(table), size, jnp.arange(size)) for size in (rows, columns))
    # It is small, and rounded as whatever surrounds it is it would shift every position.
    out = jnp.einsum("ri,cj,ijw->rcw", down, across, table.astype(jnp.float32), precision="highest")
    return out.reshape(rows * columns, -1)


def resized_pictures(pictures: jax.Array, side: int) -> jax.Array:
    """[n, height, width, channels] -> [n, side, side, channels], bicubic and without anything against aliasing."""
    if pictures.shape[1:3] == (side, side):
        return pictures
    down, across = (_weights("bicubic", size, side, jnp.arange(side)) for size in pictures.shape[1:3])
    out = jnp.einsum("ri,cj,nijw->nrcw", down, across, pictures.astype(jnp.float32), precision="highest")
    return out.astype(pictures.dtype)


def resized_to_each(table: jax.Array, shapes: jax.Array, length: int, kind: Interpolation) -> jax.Array:
    """[side, side, width], and the rows and columns int [n, 2] of n maps -> [n, length, width]: each map row by row.

    What stands behind a map's last position means nothing.
    """
    rows, columns = shapes[:, :1], shapes[:, 1:]
    at = jnp.arange(length)[None]
    at = jnp.where(at < rows * columns, at, 0)
    down = _weights(kind, len(table), rows, at // columns)
    across = _weights(kind, len(table), columns, at % columns)
    places = (down[..., :, None] * across[..., None, :]).reshape(len(shapes), length, -1)
    return jnp.matmul(places, table.astype(jnp.float32).reshape(places.shape[-1], -1), precision="highest")


def _weights(kind: Interpolation, source: int, target: int | jax.Array, at: jax.Array) -> jax.Array:
    """The weights [..., source] with which places `at` [...] of an axis of `target` places read an axis of `source`."""
    scale = jnp.asarray(source / target, jnp.float32)[..., None]
    center = (at[..., None] + 0.5) * scale - 0.5
    places = jnp.arange(source)
    if kind == "bicubic":
        taps = jnp.floor(center) + jnp.arange(-1, 3)
        share = _cubic(center - taps, -0.75)
        taps = jnp.clip(taps, 0, source - 1)  # outside of the map its edge goes on
        return (share[..., None] * (taps[..., None] == places)).sum(-2)
    # Against aliasing the kernel is stretched over as many places as become one, and cut off at the edge.
    distance = (center - places) / jnp.maximum(scale, 1)
    share = _cubic(distance, -0.5) if kind == "bicubic_antialias" else jnp.maximum(1 - jnp.abs(distance), 0)
    return share / share.sum(-1, keepdims=True)


def _cubic(distance: jax.Array, a: float) -> jax.Array:
    """Keys' cubic convolution kernel (IEEE ASSP 29(6), 1981)."""
    x = jnp.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return jnp.where(x <= 1, near, jnp.where(x < 2, far, 0))
