"""Multi-scale features (S2, LLaVA's `s2`): one encoder at several resolutions of a picture, joined on channels."""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp

from mmjax.models.interpolation import resized_pictures


def features(encode: Callable[[jax.Array], jax.Array], pictures: jax.Array, scales: tuple[int, ...]) -> jax.Array:
    """What `encode` makes of pictures at several scales: [n, positions, width * len(scales)].

    encode     [m, side, side, channels] -> [m, positions, width], the positions of a square map row by row
    pictures   [n, max(scales) * side, max(scales) * side, channels], normalised
    scales     multiples of `side`, from 1 up, to which a picture is resized (bicubic, as torch does it) and then cut into scale x scale tiles;
               the tiles' maps are put together again and averaged over blocks of scale x scale to the size of one

    Raises ValueError for pictures that max(scales) does not divide.
    """
    count, height, width, channels = pictures.shape
    if height != width or height % max(scales):
        raise ValueError(f"pictures of {height} x {width} pixels are not {max(scales)} times the encoder's size")
    side = height // max(scales)
    found = []
    for scale in scales:
        resized = resized_pictures(pictures, scale * side)
        # [n, tile's row, row in it, tile's column, column in it, channel]
        cut = resized.reshape(count, scale, side, scale, side, channels).transpose(0, 1, 3, 2, 4, 5)
        out = encode(cut.reshape(-1, side, side, channels))
        cells = round(out.shape[1] ** 0.5)
        if cells**2 != out.shape[1]:
            raise ValueError(f"the encoder's {out.shape[1]} positions are no square map: is a class token kept?")
        grid = out.reshape(count, scale, scale, cells, cells, -1).transpose(0, 1, 3, 2, 4, 5)
        blocks = grid.reshape(count, cells, scale, cells, scale, -1)
        found.append(blocks.astype(jnp.float32).mean((2, 4)).astype(out.dtype).reshape(count, cells**2, -1))
    return jnp.concatenate(found, -1)
