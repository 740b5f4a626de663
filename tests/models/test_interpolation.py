"""Interpolation of positions against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models.interpolation import resized, resized_to_each

torch = pytest.importorskip("torch")

KINDS = {
    "bicubic": {"mode": "bicubic"},
    "bicubic_antialias": {"mode": "bicubic", "antialias": True},
    "bilinear_antialias": {"mode": "bilinear", "antialias": True},
}
SHAPES = [(1, 1), (2, 3), (13, 7)]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_torch(kind):
    table = np.random.default_rng(0).standard_normal((7, 7, 5)).astype(np.float32)
    picture = torch.tensor(table).permute(2, 0, 1)[None]
    each = jax.jit(resized_to_each, static_argnums=(2, 3))(table, jnp.asarray(SHAPES), 100, kind)
    assert np.isfinite(each).all()
    for (rows, columns), one in zip(SHAPES, np.asarray(each)):
        wanted = torch.nn.functional.interpolate(picture, (rows, columns), align_corners=False, **KINDS[kind])
        wanted = wanted[0].permute(1, 2, 0).reshape(rows * columns, -1).numpy()
        found = jax.jit(resized, static_argnums=(1, 2, 3))(table, rows, columns, kind)
        assert np.abs(found - wanted).max() < 1e-5
        assert np.abs(one[: rows * columns] - wanted).max() < 1e-5
