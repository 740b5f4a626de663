"""Several tiles of a picture as one map: moondream 2 (github.com/vikhyat/moondream), and LLaVA's and VILA's S2 (arXiv 2403.13043).

A picture is seen twice: whole, as its overview, and in a grid of tiles. The features of the grid are put together into one map,
which is brought to the size of one tile's and joined to the overview's on channels. So a picture has as many positions
as a tile, whatever its grid.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mmjax.models.encoder_config import Stitching


def stitch(config: Stitching, features: jax.Array, grids: jax.Array) -> jax.Array:
    """Features [groups, tiles, positions, width] -> [groups, pictures, positions, 2 * width].

    grids   int [groups, pictures, 3]: which of the group's tiles is the picture's overview, and the rows and columns of the grid
            whose tiles follow it row by row. No rows: the overview stands in for the grid.
    Raises ValueError where a tile's positions are no square map.
    """
    groups, tiles, positions, width = features.shape
    side = math.isqrt(positions)
    if side**2 != positions:
        raise ValueError(f"tiles are stitched by their square maps of positions; {positions} are none")
    maps = features.reshape(groups, tiles, side, side, width)

    def one(maps: jax.Array, grids: jax.Array) -> jax.Array:
        first, rows, columns = grids[:, 0, None], grids[:, 1, None], grids[:, 2, None]
        place = jnp.arange(tiles) - first - 1  # [pictures, tiles], in the picture's grid
        own = (place >= 0) & (place < rows * columns)
        grid = grids[own.argmax(0)]  # [tiles, 3], of the picture that a tile belongs to
        place = jnp.where(own, place, 0).sum(0)
        down = shares(config, place // jnp.maximum(grid[:, 2], 1), grid[:, 1], side)
        across = shares(config, place % jnp.maximum(grid[:, 2], 1), grid[:, 2], side)
        parts = jnp.einsum("tgi,thj,tijc->tghc", down, across, maps.astype(jnp.float32))
        whole = jnp.einsum("pt,tghc->pghc", own.astype(jnp.float32), parts).astype(maps.dtype)
        overview = maps[grids[:, 0]]
        whole = jnp.where(rows[..., None, None] > 0, whole, overview)
        return jnp.concatenate([overview, whole], -1)

    return jax.vmap(one)(maps, grids).reshape(groups, -1, positions, 2 * width)


def joined(config: Stitching, grid: jax.Array) -> jax.Array:
    """The whole map of a grid before it is resized: [rows, columns, positions, width] -> [height, width in positions, width]."""
    rows, columns, positions, width = grid.shape
    side = math.isqrt(positions)
    maps = grid.reshape(rows, columns, side, side, width)

    def own(index: int, count: int) -> slice:
        return slice(config.overlap * (index > 0), side - config.overlap * (index < count - 1))

    lines = [[maps[r, c, own(r, rows), own(c, columns)] for c in range(columns)] for r in range(rows)]
    return jnp.concatenate([jnp.concatenate(line, 1) for line in lines], 0)


def shares(config: Stitching, index: jax.Array, count: jax.Array, side: int) -> jax.Array:
    """How much of each position of a tile goes into each position of the result, along one axis: float [tiles, side, side].

    index, count   int [tiles]: which of how many tiles it is, along that axis
    """
    index, count = index[:, None], count[:, None]
    step, local = side - 2 * config.overlap, jnp.arange(side)
    # Of what two tiles have both, each keeps its own half.
    kept = ((index == 0) | (local >= config.overlap)) & ((index == count - 1) | (local < side - config.overlap))
    place = (index * step + local)[:, None]  # [tiles, 1, side], in the whole map
    length = (count * step + 2 * config.overlap)[:, None]  # [tiles, 1, 1], of the whole map
    cell = jnp.arange(side)[:, None]
    if config.resize == "area":
        start, stop = cell * length // side, -(-(cell + 1) * length // side)
        share = ((place >= start) & (place < stop)) / (stop - start)
    else:
        centre = jnp.maximum((cell + 0.5) * length / side - 0.5, 0.0)
        low = jnp.floor(centre)
        share = (place == low) * (1 - centre + low) + (place == jnp.minimum(low + 1, length - 1)) * (centre - low)
    return kept[:, None] * share
