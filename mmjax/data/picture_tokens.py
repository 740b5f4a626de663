"""Which tokens a picture takes in a text: those of its tiles, in an order that depends on its size alone.

The order is a gather on the host, so that unpadding, reordering and newlines cost the model nothing, and tokens are counted
before anything is decoded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, Sequence

import numpy as np

from mmjax.data.tiling import Layout, Tiling, unpadded
from mmjax.errors import UserError
from mmjax.models.encoder_config import Merge

NEWLINE = -2  # in an order: the learned vector behind a row of tokens (ConnectorConfig.newline)


@dataclasses.dataclass(frozen=True)
class PictureTokens:
    """per_tile   tokens of a tile
    tile       (height, width) of a tile in pixels
    tiling     how a picture is cut
    merge      see `order`
    """

    per_tile: int
    tile: tuple[int, int]
    tiling: Tiling
    merge: Merge | Literal["stitched"] = "flat"

    def tiles(self, size: tuple[int, int]) -> int:
        """Tiles of a picture of this (height, width)."""
        return self.tiling.layout(*size, self.tile).tiles

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the tiles behind its overview."""
        layout = self.tiling.layout(*size, self.tile)
        return layout.rows, layout.columns

    def order(self, size: tuple[int, int]) -> np.ndarray:
        """The tokens of a picture of this (height, width), as the function `order` has them; int32 [tokens]."""
        layout = self.tiling.layout(*size, self.tile)
        return order(layout, size, self.per_tile, self.merge, getattr(self.tiling, "rounded", True))


@functools.lru_cache(maxsize=4096)
def order(
    layout: Layout | None,
    size: tuple[int, int],
    per_tile: int,
    merge: Merge | Literal["stitched"] = "flat",
    rounded: bool = True,
) -> np.ndarray:
    """A picture's tokens as indices into those of its tiles, tile after tile, or NEWLINE; int32 [tokens], not to be written to.

    layout    how the picture is cut; None = it is one tile
    size      (height, width) of the picture itself
    per_tile  tokens of a tile: for all but "flat" a square map, row by row
    merge     "flat": tile after tile. "spatial": the overview, then the grid of all other tiles row by row over their edges.
              "spatial_unpad" (LLaVA-NeXT): the same without the rows or columns of black borders, and a newline behind every
              row; one tile alone has a newline at its end. "stitched": all tiles together have the tokens of one
    rounded   see mmjax.data.tiling.unpadded

    Raises UserError where the tokens of a tile are no square map.
    """
    tiles = layout.tiles if layout else 1
    indices = np.arange(tiles * per_tile, dtype=np.int32).reshape(tiles, per_tile)
    if merge == "stitched":
        return _fixed(indices[0])
    if merge == "flat" or layout is None or tiles == 1:
        flat = indices.reshape(-1)
        return _fixed(np.append(flat, np.int32(NEWLINE)) if merge == "spatial_unpad" else flat)
    side = math.isqrt(per_tile)
    if side**2 != per_tile:
        raise UserError(
            f"the {per_tile} tokens of a tile are no square map, which the merge {merge!r} puts together; "
            "does the connector read a class token?"
        )
    overview = {"first": indices[:1], "last": indices[-1:], "": indices[:0]}[layout.overview].reshape(-1)
    cells = {"first": indices[1:], "last": indices[:-1], "": indices}[layout.overview]
    maps = cells.reshape(layout.rows, layout.columns, side, side).transpose(0, 2, 1, 3)
    grid = maps.reshape(layout.rows * side, layout.columns * side)
    if merge == "spatial_unpad":
        rows, columns = unpadded(layout, *size, side, rounded)
        top, left = (grid.shape[0] - rows) // 2, (grid.shape[1] - columns) // 2
        grid = grid[top : top + rows, left : left + columns]
        grid = np.pad(grid, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return _fixed(np.concatenate([overview, grid.reshape(-1)]))


def together(orders: Sequence[np.ndarray], tiles: Sequence[int], per_tile: int, total: int) -> np.ndarray:
    """The tokens of several pictures one after another, as indices into those of all their tiles; int32 [tokens].

    orders, tiles   of each picture
    total           tiles in all, behind whose tokens the newline stands
    """
    starts = np.cumsum([0, *tiles])[:-1] * per_tile
    found = [np.where(order == NEWLINE, total * per_tile, order + start) for order, start in zip(orders, starts)]
    return np.concatenate([np.zeros(0, np.int32), *found]).astype(np.int32)


def _fixed(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array
