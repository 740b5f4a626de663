"""How a picture is cut into tiles that an encoder takes one by one.

A tiling makes a Layout from a picture's height and width alone, so that tiles and tokens are counted before anything is
decoded. There are AnyRes (LLaVA-NeXT, https://llava-vl.github.io/blog/2024-01-30-llava-next), DynamicTiles
(InternVL 1.5, arXiv 2404.16821), SmartResize (Qwen2-VL, arXiv 2409.12191) and OverlappingTiles (moondream 2). Sizes are (height, width), grids are
(rows, columns).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from mmjax.config import Image


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is done to one picture: resized to height x width, put in the middle of a black canvas, which is cut.

    rows, columns   of the tiles that the canvas consists of
    block           tiles come row by row within blocks of block x block, and the blocks row by row; 1 = all row by row
    overview        where the whole picture, fitted into one tile, stands among the tiles; "" = nowhere
    overlap         pixels by which a tile reaches beyond its own part, on each side
    """

    height: int
    width: int
    rows: int
    columns: int
    block: int = 1
    overview: Literal["", "first", "last"] = ""
    overlap: int = 0

    @property
    def tiles(self) -> int:
        return self.rows * self.columns + bool(self.overview)


@dataclasses.dataclass(frozen=True)
class AnyRes:
    """The grid that shows most of the picture's pixels, with the least black around them; an overview comes first.

    grids   to choose from; where two are equally good the first wins. LLaVA's own configurations give the pixels of
            canvases as (width, height), transformers' as (height, width): the same list has another order in each, so
            that a square picture gets another grid
    overview  whether there is one
    rounded   see `unpadded`
    """

    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    overview: bool = True
    rounded: bool = True

    def layout(self, height: int, width: int, tile: tuple[int, int]) -> Layout:
        """Of a picture of this size, for tiles of (height, width) pixels."""

        def goodness(grid: tuple[int, int]) -> tuple[int, int]:
            canvas = grid[0] * tile[0], grid[1] * tile[1]
            scale = min(canvas[1] / width, canvas[0] / height)
            shown = min(int(width * scale) * int(height * scale), width * height)  # enlarging shows nothing more
            return shown, shown - canvas[0] * canvas[1]

        rows, columns = max(self.grids, key=goodness)
        down, across = rows * tile[0] / height, columns * tile[1] / width
        if across < down:
            resized = min(math.ceil(height * across), rows * tile[0]), columns * tile[1]
        else:
            resized = rows * tile[0], min(math.ceil(width * down), columns * tile[1])
        return Layout(*resized, rows, columns, overview="first" if self.overview else "")


@dataclasses.dataclass(frozen=True)
class DynamicTiles:
    """The grid whose aspect is nearest to the picture's, which is stretched to it. Several tiles end with an overview.

    least, most   tiles of a grid
    overview      whether there is one
    """

    least: int = 1
    most: int = 12
    overview: bool = True

    def layout(self, height: int, width: int, tile: tuple[int, int]) -> Layout:
        """Of a picture of this size, for tiles of (height, width) pixels."""
        grids = [
            (rows, columns)
            for columns in range(1, self.most + 1)
            for rows in range(1, self.most // columns + 1)
            if rows * columns >= self.least
        ]
        best, apart = (1, 1), math.inf
        for rows, columns in sorted(grids, key=math.prod):
            here = abs(width / height - columns / rows)
            # Of equally good grids the larger one, if the picture has pixels for half of it.
            if here < apart or here == apart and height * width > 0.5 * math.prod(tile) * rows * columns:
                best, apart = (rows, columns), here
        rows, columns = best
        last = self.overview and rows * columns > 1
        return Layout(rows * tile[0], columns * tile[1], rows, columns, overview="last" if last else "")


@dataclasses.dataclass(frozen=True)
class SmartResize:
    """About the picture's own size: the tiles are the encoder's patches. No overview.

    least, most   pixels of the resized picture
    merge         both sides are multiples of this many patches; the patches of a merge x merge block, which become one
                  token, follow one another
    """

    least: int = 56 * 56
    most: int = 28 * 28 * 1280
    merge: int = 2

    def layout(self, height: int, width: int, tile: tuple[int, int]) -> Layout:
        """Of a picture of this size, for patches of (height, width) pixels."""
        unit = tile[0] * self.merge, tile[1] * self.merge
        units = round(height / unit[0]), round(width / unit[1])
        pixels = units[0] * unit[0] * units[1] * unit[1]
        # Very narrow pictures may have more pixels than `most`: no side is shorter than one block.
        if pixels > self.most:
            shrink = math.sqrt(height * width / self.most)
            units = max(1, math.floor(height / shrink / unit[0])), max(1, math.floor(width / shrink / unit[1]))
        elif pixels < self.least:
            grow = math.sqrt(self.least / (height * width))
            units = math.ceil(height * grow / unit[0]), math.ceil(width * grow / unit[1])
        rows, columns = units[0] * self.merge, units[1] * self.merge
        return Layout(rows * tile[0], columns * tile[1], rows, columns, block=self.merge)


@dataclasses.dataclass(frozen=True)
class OverlappingTiles:
    """About the picture's own size and shape, in tiles that overlap; an overview comes first (moondream 2).

    most      tiles of a grid
    overlap   pixels by which a tile reaches beyond its own part, on each side
    resample  Pillow's filter for tiles and overview, whatever the image processor's is: Lanczos
    """

    most: int = 12
    overlap: int = 56
    resample: int = 1

    def layout(self, height: int, width: int, tile: tuple[int, int]) -> Layout:
        """Of a picture of this size, for tiles of (height, width) pixels."""
        border = 2 * self.overlap
        part = tile[0] - border, tile[1] - border
        rows, columns = self._grid(height - border, width - border, part)
        return Layout(
            rows * part[0] + border, columns * part[1] + border, rows, columns, overview="first", overlap=self.overlap
        )

    def _grid(self, height: int, width: int, part: tuple[int, int]) -> tuple[int, int]:
        if height <= part[0] or width <= part[1]:
            return 1, 1
        least = math.ceil(height / part[0]), math.ceil(width / part[1])  # nothing is made smaller
        if math.prod(least) > self.most:
            shrink = math.sqrt(self.most / math.prod(least))
            return max(1, math.floor(least[0] * shrink)), max(1, math.floor(least[1] * shrink))
        rows = max(math.floor(math.sqrt(self.most * height / width)), least[0])
        columns = max(math.floor(math.sqrt(self.most * width / height)), least[1])
        if rows * columns > self.most:
            rows, columns = (rows, self.most // rows) if columns > rows else (self.most // columns, columns)
        return max(1, rows), max(1, columns)


Tiling = AnyRes | DynamicTiles | SmartResize | OverlappingTiles


def of_recipe(image: Image) -> Tiling | None:
    """How a recipe's `model.image` says that pictures are cut; None = not at all."""
    if image.tiling == "anyres":
        sides = [grid.split("x") for grid in image.grids]
        grids = tuple((int(rows), int(columns)) for rows, columns in sides)
        return AnyRes(grids or AnyRes().grids, image.overview)
    if image.tiling == "dynamic":
        return DynamicTiles(image.least_tiles, image.most_tiles, image.overview)
    if image.tiling == "overlapping":
        return OverlappingTiles(image.most_tiles, image.overlap)
    return None


def cut(pixels: np.ndarray, layout: Layout, tile: tuple[int, int]) -> np.ndarray:
    """The tiles of a resized picture, without the overview.

    uint8 [layout.height, layout.width, 3] -> uint8 [layout.rows * layout.columns, *tile, 3]
    """
    (height, width), block = tile, layout.block
    if layout.overlap:
        steps = height - 2 * layout.overlap, width - 2 * layout.overlap
        corners = [(row * steps[0], column * steps[1]) for row in range(layout.rows) for column in range(layout.columns)]
        return np.stack([pixels[top : top + height, left : left + width] for top, left in corners])
    missing = layout.rows * height - pixels.shape[0], layout.columns * width - pixels.shape[1]
    if any(missing):
        pixels = np.pad(pixels, [*((n // 2, n - n // 2) for n in missing), (0, 0)])
    blocks = pixels.reshape(layout.rows // block, block, height, layout.columns // block, block, width, 3)
    return blocks.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, height, width, 3)


def patch_rows(tiles: np.ndarray, frames: int = 1) -> np.ndarray:
    """Patches as the rows that a patch embedding multiplies: channels, then frames, then pixels. A still picture is
    repeated for an embedding over several frames.

    [patches, height, width, 3] -> [patches, 3 * frames * height * width]
    """
    channels_first = tiles.transpose(0, 3, 1, 2)[:, :, None]
    return np.repeat(channels_first, frames, axis=2).reshape(len(tiles), -1)


def unpadded(layout: Layout, height: int, width: int, side: int, rounded: bool = True) -> tuple[int, int]:
    """(rows, columns) of the features of a grid that are left without those of the black borders, for a picture of this
    size and side x side features of a tile (LLaVA-NeXT's `spatial_unpad`). As many are cut off at either end, so that an odd
    number of black ones leaves one.

    rounded   to 7 digits before the fraction is cut off, as transformers does it, so that a whole number does not fall below
              itself for want of a last digit. LLaVA's own code does not, so that some pictures have two rows or columns fewer there

    With the overview, and one newline for each row, a picture has side**2 + rows * (columns + 1) tokens.
    """
    digits = 7 if rounded else 99
    rows, columns = layout.rows * side, layout.columns * side
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), digits))
        return rows - (rows - kept) // 2 * 2, columns
    kept = int(round(width * (rows / height), digits))
    return rows, columns - (columns - kept) // 2 * 2
