"""Fifty steps of every method beside weights and in blocks: what is frozen stays as it is to the byte, and only what is trained has state."""

import dataclasses

import jax
import numpy as np
import pytest

from mmjax import config, tree
from mmjax.models import adapters
from mmjax.models.config import ModelConfig
from mmjax.models.tuning_config import (
    AffineConfig,
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    ModalityMixtureConfig,
    NormConfig,
)
from mmjax.parallel.mesh import make_mesh
from mmjax.training.optimizer import make_optimizer, make_schedule
from mmjax.training.state import init_state, state_shardings
from mmjax.training.step import make_train_step
from mmjax.training.trainable import select, split
from tests.training import tiny

LINEARS = ("llm/layers/**",)
KINDS = {
    "lora": LoraConfig("tune", 2, 4.0, ("llm/layers[0:1]/**", "llm/head", "llm/embed"), bias="all", token_ids=(3, 7)),
    "dora": LoraConfig("tune", 2, 4.0, LINEARS, dora=True, lora_bias=True),
    "ia3": Ia3Config("tune", ("llm/layers/**/{key,value,down}",), ("llm/layers/mlp/down",)),
    "affine": AffineConfig("tune", LINEARS),
    "norm": NormConfig("tune", ("llm/**",)),
    "bottleneck": BottleneckConfig("tune", width=4, places=("attention", "mlp"), norm_before=True, norm_after=True, dropout=0.1),
    "modality_mixture": ModalityMixtureConfig("tune", width=4, places=("attention", "mlp"), temperature=1.0, parts=("llm",)),
}
BASE = ModelConfig(llm=tiny.LLM)
STEPS = 50


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_bytes_stay_and_state_is_of_trained_leaves_alone(kind):
    model = dataclasses.replace(BASE, adapters=(KINDS[kind],))
    params = adapters.add(jax.random.key(0), tiny.params(BASE), model)
    stage = config.Stage(
        trainable=("llm/**/tune/**",),
        optimizer=config.Optimizer(learning_rate=3e-2, warmup_ratio=0.0, weight_decay=0.01),
        steps=STEPS,
    )
    mesh = make_mesh(config.Mesh(data=1), jax.devices()[:1])
    selection = select(params, stage.trainable, "trainable")
    trainable, frozen = split(params, selection, stage.param_dtype)
    optimizer = make_optimizer(stage.optimizer, trainable, STEPS, "optimizer")
    placed = state_shardings(trainable, optimizer, mesh)
    state = init_state(jax.tree.map(lambda leaf: leaf.copy(), trainable), optimizer, mesh)
    own = {path: leaf for path, leaf in tree.flatten(params).items() if tree.adapter_of(path)}
    assert set(tree.flatten(state.trainable)) == set(own)
    assert not any(tree.adapter_of(path) for path in tree.flatten(frozen))
    moments = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == 2 * 4 * sum(leaf.size for leaf in own.values())  # Adam's two, in float32

    before = {path: np.asarray(leaf).tobytes() for path, leaf in tree.flatten(frozen).items()}
    step = make_train_step(model, stage, selection, optimizer, make_schedule(stage.optimizer, STEPS), mesh, placed, seed=0)
    batch = dataclasses.replace(tiny.batch(rows=4, groups=4), images=None, tiles=None, media=None)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.9 * losses[0]
    assert {path: np.asarray(leaf).tobytes() for path, leaf in tree.flatten(frozen).items()} == before
    for path, leaf in tree.flatten(state.trainable).items():
        assert not np.array_equal(leaf, own[path]), f"{path} was not trained"
