"""Properties of the compiled step: sums over micro-batches and devices, what it leaves alone, what it never does."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mmjax import config, tree
from mmjax.batch import Batch
from mmjax.parallel.mesh import make_mesh
from mmjax.parallel.sharding import batch_shardings, param_shardings
from mmjax.training.loop import hold
from mmjax.training.optimizer import make_optimizer, make_schedule
from mmjax.training.state import init_state, state_shardings
from mmjax.training.step import make_eval_step, make_train_step
from mmjax.training.trainable import select, split
from tests.training import tiny

STAGE = config.Stage(
    trainable=("connector/**", "llm/**/lora_*"),
    optimizer=config.Optimizer(learning_rate=1e-2, clip_norm=1.0, warmup_ratio=0.0, weight_decay=0.1),
    steps=3,
)
ONE = config.Mesh(data=1)


class Run:
    """A compiled step and what it is called with."""

    def __init__(self, stage=STAGE, sizes=ONE, model=tiny.CONFIG, frozen_dtype=jnp.float32):
        self.mesh = make_mesh(sizes, jax.devices()[:1] if sizes == ONE else jax.devices())
        self.selection = select(tiny.params(model), stage.trainable, "trainable")
        self.trainable, frozen = split(tiny.params(model), self.selection, stage.param_dtype)
        frozen = jax.tree.map(lambda leaf: leaf.astype(frozen_dtype), frozen)
        self.frozen = jax.device_put(frozen, param_shardings(frozen, self.mesh))
        self.optimizer = make_optimizer(stage.optimizer, self.trainable, stage.steps, "optimizer")
        schedule = make_schedule(stage.optimizer, stage.steps)
        placed = state_shardings(self.trainable, self.optimizer, self.mesh)
        self.step = make_train_step(model, stage, self.selection, self.optimizer, schedule, self.mesh, placed, seed=0)
        self.model, self.stage = model, stage

    def fresh(self):
        return init_state(jax.tree.map(jnp.copy, self.trainable), self.optimizer, self.mesh)

    def put(self, batch):
        return jax.device_put(batch, batch_shardings(batch, self.mesh))

    def losses(self, batches):
        """Loss and gradient norm of each step, from fresh."""
        state, found = self.fresh(), []
        for batch in batches:
            state, metrics = self.step(state, self.frozen, self.put(batch))
            found.append((metrics.loss, metrics.gradient_norm))
        return np.asarray(found)

    def compiled(self, batch):
        return self.step.lower(self.fresh(), self.frozen, self.put(batch)).compile()


BATCHES = [tiny.batch(rows=16, groups=16, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def one():
    return Run()


@pytest.fixture(scope="module")
def expected(one):
    return one.losses(BATCHES)


@pytest.fixture(scope="module")
def eight():
    """Two micro-batches over eight data shards."""
    return Run(dataclasses.replace(STAGE, accumulate=2), config.Mesh(data=8))


def test_the_loss_falls_on_one_batch(one):
    losses = one.losses([BATCHES[0]] * 4)
    assert losses[-1, 0] < losses[0, 0] and np.all(np.isfinite(losses))


def test_four_micro_batches_with_unequal_counts_are_one_batch(one, expected):
    counts = [batch.weights.reshape(4, 4, -1).sum((1, 2)) for batch in BATCHES]
    assert all(len(set(count)) > 1 for count in counts)
    accumulated = Run(dataclasses.replace(STAGE, accumulate=4))
    np.testing.assert_allclose(accumulated.losses(BATCHES), expected, rtol=1e-5)
    _, metrics = accumulated.step(accumulated.fresh(), accumulated.frozen, accumulated.put(BATCHES[0]))
    _, whole = one.step(one.fresh(), one.frozen, one.put(BATCHES[0]))
    np.testing.assert_allclose(metrics.losses, whole.losses, rtol=1e-5)  # a row's loss stays with its row


def test_eight_data_shards_are_one_device(eight, expected):
    np.testing.assert_allclose(eight.losses(BATCHES), expected, rtol=1e-5)


def test_divided_weights_are_one_device(expected):
    run = Run(sizes=config.Mesh(data=2, fsdp=2, tensor=2))
    assert run.frozen["llm"]["layers"]["mlp"]["up"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    np.testing.assert_allclose(run.losses(BATCHES), expected, rtol=1e-5)


def test_only_trainable_leaves_have_state(one):
    state = one.fresh()
    trainable = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert trainable == one.selection.count(tiny.params()) and moments == 2 * trainable


def test_no_recompilation_and_no_implicit_transfer(eight):
    batches = [eight.put(batch) for batch in BATCHES]
    state, _ = eight.step(eight.fresh(), eight.frozen, batches[0])
    before = eight.step._cache_size()
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, metrics = eight.step(state, eight.frozen, batch)
    assert eight.step._cache_size() == before == 1
    assert np.isfinite(jax.device_get(metrics.loss))


def test_a_broken_row_is_seen_and_changes_nothing(one):
    batch = tiny.batch(rows=16, groups=16, seed=5)
    batch.weights[3, np.argmax(batch.weights[3])] = np.nan
    state, metrics = one.step(one.fresh(), one.frozen, one.put(batch))
    assert not metrics.finite
    assert np.flatnonzero(~np.isfinite(np.asarray(metrics.losses))).tolist() == [3]
    for path, leaf in tree.flatten(state.trainable).items():
        np.testing.assert_array_equal(leaf, tree.flatten(one.trainable)[path])


def test_a_batch_without_supervision_gives_zero_loss(one):
    batch = dataclasses.replace(BATCHES[0], weights=np.zeros_like(BATCHES[0].weights))
    _, metrics = one.step(one.fresh(), one.frozen, one.put(batch))
    assert metrics.loss == 0 and metrics.finite and metrics.gradient_norm == 0


def test_validation_weighs_like_training(one, expected):
    evaluate = make_eval_step(one.model, one.stage, one.selection, one.mesh)
    total, weight = evaluate(one.trainable, one.frozen, one.put(BATCHES[0]))
    np.testing.assert_allclose(total / weight, expected[0, 0], rtol=1e-6)


def _gathered(text: str) -> list[int]:
    """Elements of every all-gather's result."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    return [int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes]


def test_no_media_features_cross_data_shards(eight):
    """In a micro-batch the features of all shards have 8 * 4 * 16 elements behind the encoder, and twice that behind the
    connector."""
    text = eight.compiled(BATCHES[0]).as_text()
    assert "all-reduce" in text  # the gradients do
    assert max(_gathered(text), default=0) < 8 * 4 * 16
    assert "all-to-all" not in text and "collective-permute" not in text


def test_frozen_bfloat16_weights_are_never_cast_as_a_stack():
    block = dataclasses.replace(tiny.LLM.block, width=128, head_dim=64, mlp_width=512)
    wide = dataclasses.replace(
        tiny.CONFIG,
        llm=dataclasses.replace(tiny.LLM, layers=16, block=block),
        connector=dataclasses.replace(tiny.CONFIG.connector, out_width=128),
    )
    run = Run(model=wide, frozen_dtype=jnp.bfloat16)
    run.frozen = hold(run.frozen, "bfloat16", whole=set())
    stack = 4 * sum(leaf.size for path, leaf in tree.flatten(run.frozen).items() if "llm/layers" in path)
    batch = tiny.batch(rows=1, length=8, groups=1)  # small, so that activations do not count
    assert run.compiled(batch).memory_analysis().temp_size_in_bytes < stack / 2


def test_layer_ranges_train_only_their_layers():
    run = Run(dataclasses.replace(STAGE, trainable=("llm/layers[1:2]/mlp/**",)))
    assert run.trainable["llm"]["layers"]["mlp"]["up"]["kernel"].shape == (1, 32, 64)
    losses = run.losses([BATCHES[0]] * 3)
    assert losses[-1, 0] < losses[0, 0]


def test_classification_trains_the_encoder_alone():
    model = dataclasses.replace(tiny.CONFIG, llm=None, connector=None, adapters=())
    stage = dataclasses.replace(STAGE, objective="classify", trainable=("vision/**",))
    whole = tiny.batch(rows=16, classes=True)
    batch = Batch(images=whole.images, tiles=whole.tiles, classes=whole.classes)
    losses = Run(stage, config.Mesh(data=8), model).losses([batch] * 3)
    assert losses[-1, 0] < losses[0, 0]
