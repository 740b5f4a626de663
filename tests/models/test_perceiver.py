"""Perceiver resamplers: what they may not depend on, and what they learn from."""

import dataclasses

import jax
import numpy as np
import pytest

from mmjax import tree
from mmjax.models import connectors, perceiver
from mmjax.models.config import Execution
from mmjax.models.encoder_config import ConnectorConfig

CONFIG = ConnectorConfig(
    "perceiver", 6, 8, 5, depth=2, hidden_width=10, bias=False, latents=3, heads=2, head_dim=4, frames=4, media=2
)
KINDS = ("perceiver", "cross_self_perceiver")


def features(*shape):
    return np.random.default_rng(0).normal(size=(*shape, 5, 6)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_frames_are_not_read(kind):
    config = dataclasses.replace(CONFIG, kind=kind)
    params, x = perceiver.init(jax.random.key(0), config), features(1, 2, 4)
    seen = np.array([[[1, 1, 0, 0], [1, 1, 1, 1]]])
    other = x.copy()
    other[0, 0, 2:] = 7
    found = perceiver.resample(params, config, x, seen)
    assert found.shape == (1, 2, 3, 8)
    np.testing.assert_array_equal(found, perceiver.resample(params, config, other, seen))
    short = perceiver.resample(params, config, x[:, :, :2])
    np.testing.assert_allclose(found[0, 0], short[0, 0], rtol=1e-4, atol=1e-5)
    assert np.abs(found - perceiver.resample(params, config, x)).max() > 1e-3


def test_places_of_frames_and_media_are_added_to_what_is_read():
    config = dataclasses.replace(CONFIG, hidden_width=6, out_width=6)
    params, x = perceiver.init(jax.random.key(0), config), features(2, 2, 3)
    placed = (
        x + np.asarray(params["frame_embeddings"])[:3, None] + np.asarray(params["media_embeddings"])[:2, None, None]
    )
    bare = dataclasses.replace(config, frames=0, media=0)
    np.testing.assert_allclose(
        perceiver.resample(params, config, x), perceiver.resample(params, bare, placed), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="embeddings of 4 frames, not of 5"):
        perceiver.resample(params, config, features(1, 1, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_leaf(kind):
    config = dataclasses.replace(CONFIG, kind=kind, bias=kind != "perceiver", media=0)
    params, x = connectors.init(jax.random.key(0), config), features(2)

    def loss(params, run):
        return (connectors.connect(params, config, x, run=run) ** 2).sum()

    gradients = jax.jit(jax.grad(loss), static_argnums=1)(params, Execution())
    for path, leaf in tree.flatten(gradients).items():
        assert np.isfinite(leaf).all(), path
        # softmax does not see what is added to all keys alike
        assert path.endswith("key/bias") or np.abs(leaf).max() > 0, path
    again = jax.jit(jax.grad(loss), static_argnums=1)(params, Execution(remat="full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients, again)
