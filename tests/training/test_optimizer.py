"""Schedules as transformers', one clip over all leaves, decay and rates by path, state of the right size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax import tree
from mmjax.config import Optimizer
from mmjax.errors import UserError
from mmjax.training.optimizer import decay_mask, make_optimizer, make_schedule

TRAINABLE = tree.unflatten(
    {
        "llm/layers/attention_norm/scale": jnp.ones((2, 8)),
        "llm/layers/mlp/up/kernel": jnp.full((2, 8, 16), 0.5),
        "llm/embed/embedding": jnp.ones((12, 8)),
        "connector/layers_0/kernel": jnp.ones((4, 8)),
        "connector/layers_0/bias": jnp.ones(8),
    }
)
GRADIENTS = jax.tree.map(
    lambda leaf: jnp.asarray(np.random.default_rng(0).normal(size=leaf.shape), jnp.float32), TRAINABLE
)


def _update(options: Optimizer):
    optimizer = make_optimizer(options, TRAINABLE, 10, "stages.a.optimizer")
    return tree.flatten(jax.jit(optimizer.update)(GRADIENTS, optimizer.init(TRAINABLE), TRAINABLE)[0])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_equal_those_of_transformers(schedule):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    steps, warmup = 40, 5
    parameter = torch.nn.Parameter(torch.zeros(1))
    reference_optimizer = torch.optim.SGD([parameter], lr=2e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, reference_optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    ours = make_schedule(Optimizer(learning_rate=2e-3, schedule=schedule, warmup_ratio=0.101), steps)
    for step in range(steps):
        np.testing.assert_allclose(ours(jnp.int32(step)), reference.get_last_lr()[0], rtol=1e-5, atol=1e-9)
        reference_optimizer.step()
        reference.step()
    assert ours(jnp.int32(0)) == 0


def test_a_schedule_ends_at_its_end_factor_and_may_do_without_warm_up():
    schedule = make_schedule(Optimizer(learning_rate=1.0, warmup_ratio=0.0, end_factor=0.1), 10)
    np.testing.assert_allclose([schedule(jnp.int32(0)), schedule(jnp.int32(10))], [1.0, 0.1], rtol=1e-6)
    constant = make_schedule(Optimizer(learning_rate=1.0, schedule="constant", warmup_ratio=0.0), 10)
    assert constant(jnp.int32(0)) == 1.0


def test_the_norm_is_clipped_once_over_all_leaves():
    options = Optimizer("sgd", learning_rate=1.0, schedule="constant", warmup_ratio=0.0, b1=0.0, clip_norm=0.5)
    updates = _update(options)
    np.testing.assert_allclose(optax.global_norm(updates), 0.5, rtol=1e-5)
    whole = optax.global_norm(GRADIENTS)
    for path, leaf in tree.flatten(GRADIENTS).items():
        np.testing.assert_allclose(updates[path], -leaf * 0.5 / whole, rtol=1e-5)


def test_decay_spares_vectors_of_stacked_layers_and_follows_globs():
    mask = tree.flatten(decay_mask(Optimizer(decay=("llm/**", "connector/**/bias")), TRAINABLE, "k"))
    assert [path for path, decays in mask.items() if decays] == ["llm/layers/mlp/up/kernel", "llm/embed/embedding"]
    base = dict(learning_rate=0.1, schedule="constant", warmup_ratio=0.0)
    with_decay, without = _update(Optimizer(weight_decay=0.2, **base)), _update(Optimizer(**base))
    for path, leaf in tree.flatten(TRAINABLE).items():
        change = -0.1 * 0.2 * leaf if leaf.ndim - ("/layers/" in path) >= 2 else 0 * leaf
        np.testing.assert_allclose(with_decay[path] - without[path], change, atol=1e-6)


def test_rates_are_multiplied_by_the_first_matching_glob():
    base = dict(learning_rate=0.1, schedule="constant", warmup_ratio=0.0, weight_decay=0.1)
    plain = _update(Optimizer(**base))
    scaled = _update(Optimizer(multipliers={"connector/**/bias": 0.0, "connector/**": 10.0}, **base))
    np.testing.assert_array_equal(scaled["connector/layers_0/bias"], 0.0)
    np.testing.assert_allclose(scaled["connector/layers_0/kernel"], 10 * plain["connector/layers_0/kernel"], rtol=1e-6)
    np.testing.assert_array_equal(scaled["llm/embed/embedding"], plain["llm/embed/embedding"])


@pytest.mark.parametrize("field", ["decay", "multipliers"])
def test_a_glob_that_matches_no_trainable_leaf_is_an_error(field):
    value = ("vision/**",) if field == "decay" else {"vision/**": 2.0}
    with pytest.raises(UserError, match=rf"stages\.a\.optimizer\.{field}.*vision"):
        make_optimizer(Optimizer(weight_decay=0.1, **{field: value}), TRAINABLE, 10, "stages.a.optimizer")


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_every_optimizer_goes_downhill_with_bfloat16_moments(name):
    options = Optimizer(
        name, learning_rate=0.01, schedule="constant", warmup_ratio=0.0, b1=0.9, moment_dtype="bfloat16"
    )
    optimizer = make_optimizer(options, TRAINABLE, 10, "k")
    params, state = TRAINABLE, optimizer.init(TRAINABLE)
    first = jax.tree.map(lambda leaf: leaf.dtype, state)

    def loss(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    assert loss(params) < loss(TRAINABLE)
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == first  # no dtype drifts: nothing recompiles
    if name not in ("adafactor",):
        assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state))


def test_muon_takes_matrices_layer_by_layer_and_leaves_embeddings_to_adam():
    options = Optimizer("muon", learning_rate=1.0, schedule="constant", warmup_ratio=0.0, b1=0.9)
    updates = _update(options)
    values = np.linalg.svd(np.asarray(updates["llm/layers/mlp/up/kernel"]), compute_uv=False)
    assert values.shape == (2, 8) and np.all((values > 0.6 * 2**0.5) & (values < 1.3 * 2**0.5))
    adam = _update(Optimizer(learning_rate=1.0, schedule="constant", warmup_ratio=0.0))
    np.testing.assert_allclose(updates["llm/embed/embedding"], adam["llm/embed/embedding"], rtol=1e-5)
