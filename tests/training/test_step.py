"""Properties of the compiled step: sums over micro-batches and devices, what it leaves alone, what it never does."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config, tree
from mmjax.parallel.mesh import make_mesh
from mmjax.parallel.sharding import batch_shardings, param_shardings
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
    """A step with its state on a mesh."""

    def __init__(self, stage=STAGE, sizes=ONE, model=tiny.CONFIG, frozen_dtype=jnp.float32):
        devices = jax.devices()[:1] if sizes == ONE else jax.devices()
        self.mesh = make_mesh(sizes, devices)
        params = tiny.params(model)
        self.selection = select(params, stage.trainable, "trainable")
        trainable, frozen = split(params, self.selection, stage.param_dtype)
        frozen = jax.tree.map(lambda leaf: leaf.astype(frozen_dtype), frozen)
        self.frozen = jax.device_put(frozen, param_shardings(frozen, self.mesh))
        optimizer = make_optimizer(stage.optimizer, trainable, stage.steps, "optimizer")
        schedule = make_schedule(stage.optimizer, stage.steps)
        shardings = state_shardings(trainable, optimizer, self.mesh)
        self.state = init_state(trainable, optimizer, self.mesh)
        self.step = make_train_step(model, stage, self.selection, optimizer, schedule, self.mesh, shardings, seed=0)
        self.model, self.stage = model, stage

    def put(self, batch):
        return jax.device_put(batch, batch_shardings(batch, self.mesh))

    def losses(self, batches):
        found = []
        for batch in batches:
            self.state, metrics = self.step(self.state, self.frozen, self.put(batch))
            found.append((metrics.loss, metrics.gradient_norm))
        return np.asarray(found)

    def compiled(self, batch):
        return self.step.lower(self.state, self.frozen, self.put(batch)).compile()


BATCHES = [tiny.batch(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def one():
    run = Run()
    run.first_frozen = jax.tree.map(np.array, run.frozen)
    run.found = run.losses(BATCHES)
    return run


def test_the_loss_falls_on_one_batch():
    losses = Run().losses([BATCHES[0]] * 4)
    assert losses[-1, 0] < losses[0, 0] and np.all(np.isfinite(losses))


def test_four_micro_batches_with_unequal_counts_are_one_batch(one):
    counts = [batch.weights.reshape(4, 2, -1).sum((1, 2)) for batch in BATCHES]
    assert all(len(set(count)) > 1 for count in counts)
    accumulated = Run(dataclasses.replace(STAGE, accumulate=4))
    np.testing.assert_allclose(accumulated.losses(BATCHES), one.found, rtol=1e-5)
    _, metrics = accumulated.step(accumulated.state, accumulated.frozen, accumulated.put(BATCHES[0]))
    _, whole = Run().step(one.state, one.frozen, one.put(BATCHES[0]))
    np.testing.assert_allclose(metrics.losses, whole.losses, rtol=1e-4)  # a row's loss stays with its row


@pytest.mark.parametrize(
    "sizes, accumulate",
    [
        (config.Mesh(data=8), 1),
        (config.Mesh(data=2, fsdp=2, tensor=2), 2),
        (config.Mesh(data=1, fsdp=4, tensor=2), 1),
        (config.Mesh(data=4, sequence=2), 1),
    ],
)
def test_eight_devices_are_one(one, sizes, accumulate):
    run = Run(dataclasses.replace(STAGE, accumulate=accumulate), sizes)
    np.testing.assert_allclose(run.losses(BATCHES), one.found, rtol=1e-5)


def test_frozen_bytes_are_untouched_and_only_trainable_leaves_have_state(one):
    for path, leaf in tree.flatten(one.frozen).items():
        np.testing.assert_array_equal(leaf, tree.flatten(one.first_frozen)[path])
    trainable = sum(leaf.size for leaf in jax.tree.leaves(one.state.trainable))
    moments = sum(leaf.size for leaf in jax.tree.leaves(one.state.optimizer) if leaf.ndim)
    assert moments == 2 * trainable
    assert trainable == one.selection.count(tiny.params())


def test_no_recompilation_and_no_implicit_transfer():
    run = Run(sizes=config.Mesh(data=4, fsdp=2))
    batches = [run.put(batch) for batch in BATCHES]
    run.state, _ = run.step(run.state, run.frozen, batches[0])
    with jax.transfer_guard("disallow"):
        for batch in batches:
            run.state, metrics = run.step(run.state, run.frozen, batch)
    assert run.step._cache_size() == 1
    assert np.isfinite(jax.device_get(metrics.loss))


def test_a_broken_row_is_seen_and_changes_nothing():
    run = Run()
    before = jax.tree.map(np.array, run.state.trainable)
    batch = tiny.batch(seed=5)
    batch.weights[3, np.argmax(batch.weights[3])] = np.nan
    run.state, metrics = run.step(run.state, run.frozen, run.put(batch))
    assert not metrics.finite
    assert np.flatnonzero(~np.isfinite(np.asarray(metrics.losses))).tolist() == [3]
    for path, leaf in tree.flatten(run.state.trainable).items():
        np.testing.assert_array_equal(leaf, tree.flatten(before)[path])


def test_a_batch_without_supervision_gives_zero_loss():
    run = Run()
    batch = dataclasses.replace(BATCHES[0], weights=np.zeros_like(BATCHES[0].weights))
    _, metrics = run.step(run.state, run.frozen, run.put(batch))
    assert metrics.loss == 0 and metrics.finite and metrics.gradient_norm == 0


def _gathered(text: str) -> list[int]:
    """Elements of every all-gather's result."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    return [int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_media_features_cross_data_shards(accumulate):
    """The features of all shards have 16 * 4 * 16 elements behind the encoder and twice that behind the connector."""
    run = Run(dataclasses.replace(STAGE, accumulate=accumulate), config.Mesh(data=8))
    text = run.compiled(tiny.batch(rows=16)).as_text()
    assert "all-reduce" in text  # the gradients do
    assert max(_gathered(text), default=0) < 16 * 4 * 16 / accumulate
    assert "all-to-all" not in text and "collective-permute" not in text


def test_frozen_bfloat16_weights_are_never_cast_as_a_stack():
    wide = dataclasses.replace(
        tiny.CONFIG,
        llm=dataclasses.replace(
            tiny.LLM, layers=16, block=dataclasses.replace(tiny.LLM.block, width=128, head_dim=64, mlp_width=512)
        ),
        connector=dataclasses.replace(tiny.CONFIG.connector, out_width=128),
        adapters=(dataclasses.replace(tiny.CONFIG.adapters[0], targets=("llm/layers/mlp/up",)),),
    )
    run = Run(model=wide, frozen_dtype=jnp.bfloat16)
    kernels = [leaf for path, leaf in tree.flatten(run.frozen).items() if "llm/layers" in path]
    cast_stack = 4 * sum(leaf.size for leaf in kernels)
    assert run.compiled(tiny.batch()).memory_analysis().temp_size_in_bytes < cast_stack / 2


def test_layer_ranges_train_only_their_layers():
    run = Run(dataclasses.replace(STAGE, trainable=("llm/layers[1:2]/mlp/**",)))
    before = jax.tree.map(np.array, run.frozen)
    losses = run.losses([BATCHES[0]] * 3)
    assert losses[-1, 0] < losses[0, 0]
    np.testing.assert_array_equal(
        run.frozen["llm"]["layers"]["mlp"]["up"]["kernel"], before["llm"]["layers"]["mlp"]["up"]["kernel"]
    )
    assert run.state.trainable["llm"]["layers"]["mlp"]["up"]["kernel"].shape == (1, 32, 64)


def test_classification_trains_the_encoder_alone():
    model = dataclasses.replace(tiny.CONFIG, llm=None, connector=None, adapters=())
    stage = dataclasses.replace(STAGE, objective="classify", trainable=("vision/**",))
    batch = tiny.batch(rows=16, classes=True)
    batch = type(batch)(images=batch.images, tiles=batch.tiles, classes=batch.classes)
    one, eight = Run(stage, model=model), Run(dataclasses.replace(stage, accumulate=1), config.Mesh(data=8), model)
    losses = one.losses([batch] * 3)
    np.testing.assert_allclose(eight.losses([batch] * 3), losses, rtol=1e-5)
    assert losses[-1, 0] < losses[0, 0]


def test_validation_weighs_like_training(one):
    run = Run()
    evaluate = make_eval_step(run.model, run.stage, run.selection, run.mesh)
    total, weight = evaluate(run.state.trainable, run.frozen, run.put(BATCHES[0]))
    np.testing.assert_allclose(total / weight, one.found[0, 0], rtol=1e-6)
