"""The mixture of experts against a loop over experts, and divided over a mesh against itself on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config
from mmjax.inference.generate import Sampling, generate
from mmjax.models.block_config import Experts
from mmjax.models.config import Execution
from mmjax.models.experts import MixtureOfExperts, balance_loss, tiled
from mmjax.parallel.mesh import make_mesh
from mmjax.parallel.sharding import mesh_of, param_shardings
from tests.training import tiny
from tests.training.test_step import STAGE, Run

EXPERTS = Experts(count=4, chosen=2)
MODEL = dataclasses.replace(
    tiny.CONFIG,
    llm=dataclasses.replace(tiny.LLM, block=dataclasses.replace(tiny.LLM.block, experts=EXPERTS)),
    adapters=(),
)
# Not Adam: its first step is the sign of a gradient, however small.
TRAINED = dataclasses.replace(
    STAGE,
    trainable=("connector/**", "llm/**/mlp/**", "llm/**/attention/**"),
    router_loss=0.1,
    steps=2,
    optimizer=config.Optimizer(name="sgd", learning_rate=1e-2, warmup_ratio=0.0),
)


def test_equals_a_loop_over_experts():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32)
    module = MixtureOfExperts(EXPERTS, hidden=12, activation="silu")
    params = module.init(jax.random.key(0), x)["params"]
    # One expert that nobody is sent to, and one that everybody is.
    params["router"]["kernel"] = params["router"]["kernel"].at[:, 3].set(0) * 3
    y, logits = module.apply({"params": params}, x)
    probabilities = jax.nn.softmax(x @ params["router"]["kernel"], -1)
    expected = np.zeros(x.shape, np.float32)
    for row, t in np.ndindex(3, 5):
        best = np.argsort(-probabilities[row, t])[:2]
        for expert in best:
            gate, up, down = (params[f"experts_{name}"]["kernel"][expert] for name in ("gate", "up", "down"))
            out = (jax.nn.silu(x[row, t] @ gate) * (x[row, t] @ up)) @ down
            expected[row, t] += out * probabilities[row, t, expert] / probabilities[row, t, best].sum()
    assert np.abs(y - expected).max() < 1e-5
    assert np.allclose(jax.nn.softmax(logits, -1), probabilities, atol=1e-6)


def test_the_loss_of_a_perfect_balance():
    """Equal shares and equal probabilities: as much as the number of chosen experts; padding does not count."""
    logits = jnp.where(jnp.arange(4) // 2 == jnp.arange(6)[:, None] % 2, 1e-6, 0.0)[None, None]
    real = jnp.array([[True] * 4 + [False] * 2])
    assert np.allclose(balance_loss(logits, real, 2), 2.0, atol=1e-4)
    skewed = logits.at[..., 4:, :].set(jnp.array([9.0, 5.0, 0, 0]))
    assert np.allclose(balance_loss(skewed, real, 2), 2.0, atol=1e-4)
    assert np.allclose(balance_loss(skewed, jnp.ones((1, 6), bool), 2), 4 * (4 / 6 * 4 / 6 + 2 / 6 * 2 / 6), atol=1e-3)


@pytest.fixture(scope="module")
def alone():
    return Run(TRAINED, config.Mesh(data=1), MODEL).losses(BATCHES)


BATCHES = [tiny.batch(rows=8, groups=8, seed=seed) for seed in range(2)]


@pytest.mark.parametrize("sizes", [dict(data=2, expert=4), dict(fsdp=2, tensor=2, expert=2)], ids=str)
def test_divided_over_a_mesh(sizes, alone):
    """Losses and gradient norms of training steps, the balance of experts among them; experts are held in parts, and never gathered for all layers."""
    mesh = {"data": 1, **sizes}
    run = Run(TRAINED, config.Mesh(**mesh), MODEL)
    assert np.allclose(run.losses(BATCHES), alone, rtol=1e-5)
    held = run.frozen["llm"] if "mlp" in run.frozen["llm"].get("layers", {}) else run.fresh().trainable["llm"]
    kernel = held["layers"]["mlp"]["experts_up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == EXPERTS.count // sizes["expert"]
    full = str(list(kernel.shape)).replace(" ", "").strip("[]")
    assert f"f32[{full}]" not in run.compiled(BATCHES[0]).as_text()


def test_generation_on_a_mesh():
    mesh = make_mesh(config.Mesh(data=2, expert=4))
    params = tiny.params(MODEL)
    prompt = dataclasses.replace(tiny.batch(rows=4, groups=4), targets=None, weights=None)
    alone = generate(params, MODEL, prompt, Sampling(max_new_tokens=6)).tokens
    placed = jax.device_put(params, param_shardings(params, mesh))
    divided = generate(placed, MODEL, prompt, Sampling(max_new_tokens=6), Execution(mesh=mesh_of(placed))).tokens
    assert mesh_of(placed) is mesh and np.array_equal(alone, divided)


@pytest.mark.parametrize("sizes", [(100, 0, 56, 100), (0, 30, 20, 0)])
def test_gradients_of_the_tpu_kernel_equal_those_of_the_plain_product(sizes):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernels, weights = (jax.random.normal(key, shape) for key, shape in zip(keys, [(256, 24), (4, 24, 40), (256, 40)]))
    real = (jnp.arange(256) < sum(sizes))[:, None]

    def gradients(product):
        return jax.grad(lambda x, kernels: (product(x, kernels, jnp.array(sizes)) * weights * real).sum(), (0, 1))(x, kernels)

    plain, tiles = gradients(jax.lax.ragged_dot), gradients(lambda *inputs: tiled(*inputs, True))
    for found, expected in zip(tiles, plain):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
