"""The objective "contrastive": all pairs of the batch against each other, whatever devices hold them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config
from mmjax.batch import Batch
from mmjax.models.encoder_config import ConnectorConfig
from mmjax.models.image_text import stage1_losses
from mmjax.models.multimodal import vision_features
from mmjax.training.step import execution, make_eval_step
from tests.training import tiny
from tests.training.test_step import ONE, Run

MODEL = dataclasses.replace(
    tiny.CONFIG,
    llm=None,
    adapters=(),
    connector=ConnectorConfig(
        "qformer", in_width=16, out_width=0, positions=4, depth=1, hidden_width=16, latents=3, heads=2, text_vocab=20,
        text_positions=8, contrast_width=8,
    ),
)  # fmt: skip
STAGE = config.Stage(
    objective="contrastive",
    trainable=("connector/**",),
    optimizer=config.Optimizer(learning_rate=1e-2, warmup_ratio=0.0),
    steps=2,
)


def batch(groups=8, tiles=2) -> Batch:
    """Pairs of unequal length; the last tile is a dummy."""
    random = np.random.default_rng(0)
    lengths = random.integers(3, 7, (groups, tiles))
    lengths[-1, -1] = 0
    segments = (np.arange(6) < lengths[..., None]).astype(np.int32)
    return Batch(
        images=random.integers(0, 256, (groups, tiles, 8, 8, 3), dtype=np.uint8),
        tiles=lengths > 0,
        connector_tokens=random.integers(1, 19, segments.shape).astype(np.int32) * segments,
        connector_segments=segments,
    )


@pytest.fixture(scope="module")
def one():
    return Run(STAGE, ONE, MODEL)


def test_eight_devices_are_one(one):
    found = one.losses([batch()] * 2)
    assert found[-1, 0] < found[0, 0]
    eight = Run(STAGE, config.Mesh(data=8), MODEL).losses([batch()] * 2)
    np.testing.assert_allclose(eight, found, rtol=1e-4)


def test_the_loss_is_the_sum_of_its_parts_and_the_mean_over_real_pairs(one):
    state, metrics = one.step(one.fresh(), one.frozen, one.put(batch()))
    assert set(metrics.parts) == {"contrastive", "matching", "language"} and metrics.weight == 15
    np.testing.assert_allclose(sum(metrics.parts.values()), metrics.loss, rtol=1e-6)
    params, given = {**tiny.params(MODEL)}, batch()
    features = vision_features(params, MODEL, given.images, execution(STAGE, one.mesh)).reshape(16, 4, 16)
    text = (jnp.asarray(a).reshape(16, 6) for a in (given.connector_tokens, given.connector_segments))
    key = jax.random.fold_in(jax.random.key(0), 0)
    want = jax.jit(stage1_losses, static_argnums=1)(params["connector"], MODEL.connector, features, *text, key)
    for name, part in metrics.parts.items():
        np.testing.assert_allclose(part, want[name], rtol=1e-5, err_msg=name)


def test_held_out_pairs_are_weighed_alike_at_every_validation(one):
    step = make_eval_step(MODEL, STAGE, one.selection, one.mesh)
    first, second = (step(one.trainable, one.frozen, one.put(batch())) for _ in range(2))
    assert first[1] == 15 and first[0] == second[0]
