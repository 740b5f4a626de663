"""Fifty steps of LLaMA-Adapter: what is frozen stays as it is, byte for byte, and the optimizer knows of nothing else."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import config, tree
from mmjax.models.encoder_config import ConnectorConfig
from mmjax.models.tuning_config import AdaptionPromptConfig, AffineConfig
from mmjax.parallel.mesh import make_mesh
from mmjax.training.loop import hold
from mmjax.training.optimizer import make_optimizer, make_schedule
from mmjax.training.state import init_state, state_shardings
from mmjax.training.step import make_train_step
from mmjax.training.trainable import select, split
from tests.training import tiny

MODEL = dataclasses.replace(
    tiny.CONFIG,
    connector=ConnectorConfig("visual_blocks", 16, 32, 4, depth=1, hidden_width=16, latents=2, heads=2),
    adapters=(
        AffineConfig("affine", ("llm/layers/mlp/*",), "bias"),
        AdaptionPromptConfig("prompts", 2, 1, media="added", adapted=False),
    ),
)
STAGE = config.Stage(
    trainable=("llm/plugs/**", "connector/**", "llm/**/affine_bias"),
    optimizer=config.Optimizer(learning_rate=1e-2, warmup_ratio=0.0),
    steps=50,
)


def batch():
    made = tiny.batch(rows=4, groups=4)
    beside = {"row_media": np.zeros((4, 1), np.int32), "media_segments": np.ones((4, 1), np.int32)}
    return dataclasses.replace(made, media=np.full_like(made.media, -1), **beside)


def test_what_is_frozen_stays_and_what_is_trained_has_moments():
    mesh = make_mesh(config.Mesh(data=1), jax.devices()[:1])
    params = tiny.params(MODEL)
    selection = select(params, STAGE.trainable, "trainable")
    trainable, frozen = split(params, selection, "float32")
    frozen = hold(frozen, "bfloat16", set())
    before = {path: np.asarray(leaf).tobytes() for path, leaf in tree.flatten(frozen).items()}
    optimizer = make_optimizer(STAGE.optimizer, trainable, STAGE.steps, "optimizer")
    placed = state_shardings(trainable, optimizer, mesh)
    schedule = make_schedule(STAGE.optimizer, STAGE.steps)
    step = make_train_step(MODEL, STAGE, selection, optimizer, schedule, mesh, placed, seed=0)
    state, started = init_state(jax.tree.map(jnp.copy, trainable), optimizer, mesh), jax.tree.map(np.asarray, trainable)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trainable))
    counters = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim == 0]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer)) - sum(leaf.nbytes for leaf in counters)
    assert held == 2 * size  # two moments of each, and of nothing else
    losses = []
    for _ in range(STAGE.steps):
        state, metrics = step(state, frozen, batch())
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.8 * losses[0]
    assert {path: np.asarray(leaf).tobytes() for path, leaf in tree.flatten(frozen).items()} == before
    for path, leaf in tree.flatten(state.trainable).items():
        assert np.abs(np.asarray(leaf) - tree.flatten(started)[path]).max() > 0, path
