"""Tiles stitched into one map, against torch's own pooling and interpolation of the map put together."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models.encoder_config import Stitching
from mmjax.models.stitching import joined, stitch

torch = pytest.importorskip("torch")
SIDE, WIDTH = 5, 3


@pytest.mark.parametrize("resize", ["area", "bilinear"])
@pytest.mark.parametrize("overlap", [0, 1])
def test_every_picture_of_a_group_is_joined_to_its_overview(resize, overlap):
    config = Stitching(resize, overlap)
    features = np.random.default_rng(0).standard_normal((2, 12, SIDE**2, WIDTH)).astype(np.float32)
    # Pictures in several grids, one that is its overview alone, and a dummy.
    grids = np.array([[[0, 2, 3], [7, 1, 1], [9, 0, 0], [0, 0, 0]], [[1, 1, 4], [6, 3, 1], [10, 1, 1], [0, 0, 0]]])
    found = np.asarray(stitch(config, jnp.asarray(features), jnp.asarray(grids)))
    assert found.shape == (2, 4, SIDE**2, 2 * WIDTH)
    for group, pictures in enumerate(grids):
        for number, (first, rows, columns) in enumerate(pictures):
            overview = features[group, first]
            np.testing.assert_array_equal(found[group, number, :, :WIDTH], overview)
            expected = overview
            if rows:
                tiles = features[group, first + 1 : first + 1 + rows * columns].reshape(rows, columns, SIDE**2, WIDTH)
                whole = torch.tensor(np.array(joined(config, jnp.asarray(tiles)))).permute(2, 0, 1)[None]
                step = SIDE - 2 * overlap
                assert whole.shape[2:] == (rows * step + 2 * overlap, columns * step + 2 * overlap)
                if resize == "area":
                    resized = torch.nn.functional.adaptive_avg_pool2d(whole, SIDE)
                else:
                    resized = torch.nn.functional.interpolate(whole, (SIDE, SIDE), mode="bilinear", align_corners=False)
                expected = resized[0].permute(1, 2, 0).reshape(SIDE**2, WIDTH).numpy()
            np.testing.assert_allclose(found[group, number, :, WIDTH:], expected, atol=1e-5)


def test_one_tile_is_itself():
    features = jnp.asarray(np.random.default_rng(1).standard_normal((1, 2, SIDE**2, WIDTH)), jnp.float32)
    found = stitch(Stitching("area", 2), features, jnp.array([[[0, 1, 1]]]))
    np.testing.assert_allclose(found[0, 0, :, WIDTH:], features[0, 1], atol=1e-6)


def test_a_tile_must_be_a_square_map():
    with pytest.raises(ValueError, match="24 are none"):
        stitch(Stitching(), jnp.zeros((1, 2, 24, 3)), jnp.array([[[0, 1, 1]]]))
