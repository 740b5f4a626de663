"""Connectors against torch, their initialisation, and adapters on every part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import tree
from mmjax.checkpoints import safetensors, weights
from mmjax.families import composed, reading, writing
from mmjax.models import adapters, connectors, kernels, multimodal
from mmjax.models.config import Execution
from mmjax.models.encoder_config import ConnectorConfig
from mmjax.models.tuning_config import LoraConfig
from tests.models import tiny

torch = pytest.importorskip("torch")

KINDS = {
    "linear": ConnectorConfig("linear", 6, 8, 4),
    "mlp2x": ConnectorConfig("mlp", 6, 8, 4),
    "mlp3x": ConnectorConfig("mlp", 6, 8, 4, depth=3, hidden_width=10),
    "pooled": ConnectorConfig("pooled_mlp", 6, 8, 4, pooled_tokens=3),
    "concat": ConnectorConfig("concat", 6, 8, 5, group=2, depth=1),
    "residual": ConnectorConfig("residual_mlp", 6, 8, 4, hidden_width=10),
    "normed": ConnectorConfig("mlp", 6, 8, 4, input_norm=True),
    "2x2": ConnectorConfig("space_to_depth", 6, 8, 9, group=2, input_norm=True),
    "3x3": ConnectorConfig("space_to_depth", 6, 8, 16, group=3, squeeze_width=7, token_order="columns"),
    "identity": ConnectorConfig("identity", 8, 8, 4),
}

PERCEIVERS = {
    "perceiver": ConnectorConfig("perceiver", 6, 8, 4, hidden_width=10, bias=False, latents=3, heads=2, head_dim=4, frames=2),
    "cross_self": ConnectorConfig("cross_self_perceiver", 6, 8, 4, latents=3, heads=2),
}


def in_torch(params, config, x):
    """The same connector written with torch's own layers."""

    def linear(leaf, y):
        return torch.nn.functional.linear(y, torch.tensor(leaf["kernel"].T), torch.tensor(leaf["bias"]))

    def norm(leaf, y):
        return torch.nn.functional.layer_norm(y, y.shape[-1:], torch.tensor(leaf["scale"]), torch.tensor(leaf["bias"]))

    gelu = torch.nn.functional.gelu
    x = torch.tensor(x)
    if config.kind == "residual_mlp":
        x = linear(params["first"]["down"], gelu(linear(params["first"]["up"], x)))
        x = norm(params["norm"], x)
        return x + linear(params["second"]["down"], gelu(linear(params["second"]["up"], x)))
    if config.kind == "pooled_mlp":
        x = x.mean(1)
    if config.kind == "concat":
        x = torch.stack([torch.cat([x[:, 0], x[:, 1]], -1), torch.cat([x[:, 2], x[:, 3]], -1)], 1)
    if config.kind == "space_to_depth":
        side, g = round(config.positions**0.5), config.group
        x = torch.nn.functional.pad(x.reshape(2, side, side, 6), (0, 0, 0, -side % g, 0, -side % g))
        corners = [(r, c) for r in range(0, side, g) for c in range(0, side, g)]
        if config.token_order == "columns":
            corners = [(r, c) for c, r in corners]
        x = torch.stack([x[:, r : r + g, c : c + g].reshape(2, -1) for r, c in corners], 1)
    x = norm(params["input_norm"], x) if config.input_norm else x
    for i in range(sum(name.startswith("layers_") for name in params)):
        x = gelu(x) if i else x
        x = norm(params["squeeze_norm"], x) if i == 1 and config.squeeze_width else x
        x = linear(params[f"layers_{i}"], x)
    return x.reshape(2, 3, 8) if config.kind == "pooled_mlp" else x


@pytest.mark.parametrize("name", KINDS)
def test_equal_to_torch(name):
    config = KINDS[name]
    shapes = jax.eval_shape(lambda: connectors.init(tiny.key(), config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    x = rng.normal(size=(2, config.positions, config.in_width)).astype(np.float32)
    got = connectors.connect(params, config, x)
    assert got.shape == (2, config.tokens, 8)
    np.testing.assert_allclose(got, in_torch(params, config, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*KINDS, *PERCEIVERS])
def test_every_kind_goes_out_and_comes_back(name, tmp_path):
    config = {**KINDS, **PERCEIVERS}[name]
    params = {"connector": connectors.init(tiny.key(), config)}
    rules = composed.connector_rules(config)
    safetensors.write(writing.tensors(params, rules), tmp_path)
    back = reading.load(weights.read(tmp_path), rules, params, dtype="float32")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, {"connector": {}, **back}))


def test_fresh_weights_are_torch_defaults():
    params = connectors.init(tiny.key(), ConnectorConfig("mlp", 400, 300, 4))
    for leaf, inputs in ((params["layers_0"], 400), (params["layers_1"], 300)):
        for values in leaf.values():
            assert 0.9 * inputs**-0.5 < np.abs(values).max() <= inputs**-0.5


def test_features_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="made for features of 4 positions x 6 channels, the encoder gives 9 x 6"):
        connectors.connect({}, KINDS["linear"], jnp.ones((1, 9, 6)))


def test_lora_at_init_equals_the_base_and_merged_equals_unmerged():
    everywhere = LoraConfig("a", 3, 6.0, ("llm/layers/**", "vision/layers/**", "connector/*"), rank_stabilised=True)
    base = tiny.model_config()
    config = tiny.model_config(adapters=(everywhere, LoraConfig("b", 2, 2.0, ("llm/layers/attention/{query,value}",))))
    params = tiny.random_params(base)
    adapted = adapters.add(tiny.key(), params, config)
    batch = tiny.rows([[9], [7]], 9)
    run = Execution()

    def states(params, config):
        return jax.jit(lambda p: multimodal.hidden(p, config, batch, run))(params)

    np.testing.assert_array_equal(states(adapted, config), states(params, base))
    flat = tree.flatten(adapted)
    rng = np.random.default_rng(0)
    trained = {k: rng.normal(size=v.shape).astype(np.float32) * 0.1 if "lora_b" in k else v for k, v in flat.items()}
    trained = tree.unflatten(trained)
    merged, _ = adapters.merge(trained, config)
    assert set(tree.flatten(merged)) == set(tree.flatten(params))
    want = states(trained, config)
    assert np.abs(want - states(params, base)).max() > 1e-2
    np.testing.assert_allclose(states(merged, base), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side, grid", [(7, 3), (6, 3), (4, 4), (5, 1)])
def test_a_grid_averages_as_torch_does(side, grid):
    config = ConnectorConfig("linear", 5, 4, side**2, grid=grid)
    features = np.random.default_rng(0).normal(size=(2, side**2, 5)).astype(np.float32)
    planes = torch.tensor(features.reshape(2, side, side, 5)).permute(0, 3, 1, 2)
    want = torch.nn.functional.adaptive_avg_pool2d(planes, grid).permute(0, 2, 3, 1).reshape(2, grid**2, 5).numpy()
    found = connectors.pool(config, features)
    np.testing.assert_allclose(found, want, atol=1e-6)
    params = connectors.init(jax.random.key(0), config)
    made = connectors.connect(params, config, features)
    assert made.shape == (2, config.tokens, 4) == (2, grid**2, 4)
    np.testing.assert_array_equal(made, connectors.connect(params, config, found))


def test_a_target_that_matches_nothing_is_named():
    config = tiny.model_config(adapters=(LoraConfig("x", 2, 2.0, ("llm/layers/attention/q_proj",)),))
    with pytest.raises(ValueError, match="q_proj.*matches no linear layer"):
        multimodal.shapes(config)


@pytest.mark.parametrize("where", ["vision/layers/attention/query", "connector/**"])
def test_dropout_of_adapters_where_it_would_not_act_is_refused(where):
    config = tiny.model_config(adapters=(LoraConfig("d", 4, 8.0, (where,), dropout=0.5),))
    with pytest.raises(ValueError, match=f"acts in the blocks of the language model alone, not at {where.split('/')[0]}/"):
        multimodal.shapes(config)


def test_dropout_acts_in_training_only_and_follows_its_key():
    config = tiny.model_config(adapters=(LoraConfig("d", 4, 8.0, ("llm/layers/**",), dropout=0.5),))
    params, batch, run = tiny.random_params(config), tiny.rows([[9]], 9), Execution()
    states = jax.jit(lambda key: multimodal.decode(params, config, batch, run, 0.0, key).last)
    a, b, c = (states(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3
    in_blocks = jax.jit(lambda key: multimodal.decode(params, tiny.model_config(), batch, run, 0.3, key).last)
    assert np.abs(in_blocks(jax.random.key(1)) - in_blocks(jax.random.key(2))).max() > 1e-3
    plain = jax.jit(lambda: multimodal.hidden(params, config, batch, run))()
    assert np.abs(a - plain).max() > 1e-3


def test_dropped_keeps_the_mean():
    x = kernels.dropped(jnp.ones((400, 400)), 0.2, tiny.key())
    assert abs(float((x == 0).mean()) - 0.2) < 0.01
    assert abs(float(x.mean()) - 1) < 0.01
