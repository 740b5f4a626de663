"""The decoder's properties: packing, batching, the cache, the layer pattern, rematerialisation, its ports, its memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import tree
from mmjax.models import decoder, kernels, layers, multimodal, position_bias
from mmjax.models.attention import Mask
from mmjax.models.block import Extra
from mmjax.models.config import Execution, RelativeBias
from mmjax.models.ports import Plug
from tests.models import tiny

RUN = Execution()


@pytest.fixture(scope="module")
def model():
    config = tiny.model_config(adapters=(tiny.LORA,))
    return config, tiny.random_params(config)


@functools.partial(jax.jit, static_argnames=("config", "run"))
def logits(params, config, batch, run=RUN):
    return multimodal.head(params, config, multimodal.hidden(params, config, batch, run))


@functools.partial(jax.jit, static_argnames=("config", "plugs", "return_states"))
def decode(params, config, x, segments, positions, cache=None, plugs=(), return_states=False):
    return decoder.decode(
        params,
        config,
        x,
        segments=segments,
        positions=positions,
        run=RUN,
        cache=cache,
        plugs=plugs,
        return_states=return_states,
    )


def test_packed_equals_unpacked_and_batch_equals_single(model):
    config, params = model
    alone = tiny.rows([[9], [7]], 9)
    together = tiny.rows([[9, 7]], 18)
    a, b = logits(params, config, alone), logits(params, config, together)
    np.testing.assert_allclose(b[0, :9], a[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(b[0, 9:16], a[1, :7], rtol=1e-5, atol=1e-5)
    single = dataclasses.replace(
        alone, **{f: getattr(alone, f)[1:] for f in ("tokens", "segments", "positions", "media")}
    )
    np.testing.assert_allclose(logits(params, config, single)[0, :7], a[1, :7], rtol=1e-5, atol=1e-5)


def test_images_are_seen_at_their_own_places(model):
    config, params = model
    batch = tiny.rows([[9], [7]], 9)
    changed = batch.images.copy()
    changed[0, 1] = 255 - changed[0, 1]
    a, b = logits(params, config, batch), logits(params, config, dataclasses.replace(batch, images=changed))
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[1, :7] - b[1, :7]).max() > 1e-3


def test_cached_decoding_equals_the_whole_row():
    config = tiny.model_config(layers=5, windows=(0, 3))
    params = tiny.random_params(config)["llm"]
    x = jax.random.normal(tiny.key(), (2, 10, 32))
    segments, positions = jnp.ones((2, 10), jnp.int32), jnp.tile(jnp.arange(10), (2, 1))
    whole = decode(params, config.llm, x, segments, positions).last
    cache, parts = decoder.empty_cache(config.llm, 2, 12, jnp.float32), []
    for part in (slice(0, 6), slice(6, 7), slice(7, 10)):
        out = decode(params, config.llm, x[:, part], segments[:, part], positions[:, part], cache)
        cache = out.cache
        parts.append(out.last)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_the_pattern_with_a_remainder_equals_layer_by_layer():
    config = tiny.model_config(layers=5, windows=(2, 0)).llm
    params = tiny.random_params(tiny.model_config(layers=5, windows=(2, 0)))["llm"]
    x = jax.random.normal(tiny.key(), (1, 8, 32))
    segments, positions = jnp.ones((1, 8), jnp.int32), jnp.arange(8)[None]
    states = decode(params, config, x, segments, positions, return_states=True).states
    assert states.shape == (5, 1, 8, 32)
    for i in range(4):
        one = dataclasses.replace(config, layers=1, windows=(config.windows[i % 2],))
        layer = {**params, "layers": jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params["layers"])}
        got = decode(layer, one, states[i], segments, positions)
        final = layers.Norm("rms", 1e-5).apply({"params": params["final_norm"]}, states[i + 1])
        np.testing.assert_allclose(got.last, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(model, remat):
    config, params = model
    batch = tiny.rows([[9], [7]], 9)

    def gradient(run):
        return jax.jit(jax.grad(lambda p: (multimodal.hidden(p, config, batch, run) ** 2).mean()))(params)

    for a, b in zip(jax.tree.leaves(gradient(RUN)), jax.tree.leaves(gradient(Execution(remat=remat))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def plugged(config, params, plug, leaves, x):
    params = {**params, "plugs": {plug.name: leaves}}
    ones = jnp.ones(x.shape[:2], jnp.int32)
    positions = jnp.tile(jnp.arange(x.shape[1]), (x.shape[0], 1))
    return decode(params, config, x, ones, positions, plugs=(plug,)).last


@pytest.mark.parametrize("where", [(1, 3), (0, 2, 3)], ids=["every_second", "irregular"])
@pytest.mark.parametrize("port", ["keys_values", "inputs", "sublayer", "before"])
def test_a_plug_acts_on_its_layers_alone(port, where):
    """Each port, on some layers: equal to the unplugged model when its leaves are zero, and to a model cut at the plug's
    first layer before it."""
    whole = tiny.model_config(layers=4, windows=(0, 3))
    config, params = whole.llm, tiny.random_params(whole)["llm"]
    rng = np.random.default_rng(0)
    calls = {
        "keys_values": lambda p, q, project: Extra(
            jnp.broadcast_to(p["w"].reshape(1, 1, 2, 8), (q.shape[0], 3, 2, 8)),
            jnp.ones((q.shape[0], 3, 2, 8)),
            p["gate"],
        ),
        "inputs": lambda p, place, x: x + p["gate"].sum() * jnp.tanh(x),
        "sublayer": lambda p, place, x, joined, y: y + p["gate"].sum() * x * p["w"].mean(),
        "before": lambda p, x: x + p["gate"].sum() * jnp.tanh(x),
    }
    plug = Plug("probe", port, where, calls[port])
    leaves = {"w": rng.normal(size=(len(where), 16)).astype(np.float32), "gate": np.zeros((len(where), 4), np.float32)}
    x = jax.random.normal(tiny.key(), (2, 6, 32))
    ones, positions = jnp.ones((2, 6), jnp.int32), jnp.tile(jnp.arange(6), (2, 1))
    base = decode(params, config, x, ones, positions).last
    np.testing.assert_array_equal(plugged(config, params, plug, leaves, x), base)
    for row in (0, len(where) - 1):
        changed = {**leaves, "gate": leaves["gate"].copy()}
        changed["gate"][row] = 0.5
        got = plugged(config, params, plug, changed, x)
        assert np.abs(got - base).max() > 1e-3
        one = Plug("probe", port, (where[row],), calls[port])
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], changed)
        np.testing.assert_allclose(got, plugged(config, params, one, alone, x), rtol=1e-5, atol=1e-5)


def test_prefix_keys_join_the_softmax():
    """Ungated keys and values equal those that tokens standing before the row would give (no rotation in between)."""
    whole = tiny.model_config(layers=1)
    config = dataclasses.replace(whole.llm, block=dataclasses.replace(whole.llm.block, rope=None))
    params = tiny.random_params(whole)["llm"]
    x = jax.random.normal(tiny.key(), (1, 7, 32))
    ones = jnp.ones((1, 7), jnp.int32)
    want = decode(params, config, x, ones, ones).last[:, 2:]
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    h = layers.Norm("rms", 1e-5).apply({"params": layer["attention_norm"]}, x[:, :2])
    keys, values = (
        (h @ layer["attention"][n]["kernel"]).reshape(1, 2, 2, 8) for n in ("key", "value")
    )
    plug = Plug("prefix", "keys_values", (0,), lambda p, q, project: Extra(p["keys"], p["values"]))
    got = plugged(config, params, plug, {"keys": keys[None], "values": values[None]}, x[:, 2:])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_backward_pass_keeps_no_stack_of_casts():
    """Frozen bfloat16 weights, float32 computation: temporaries stay below one float32 copy of the stacked weights."""
    config = tiny.model_config(layers=16, adapters=(tiny.LORA,))
    block = dataclasses.replace(config.llm.block, width=128, head_dim=32, mlp_width=512)
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, block=block), vision=None, connector=None)
    flat = tree.flatten(multimodal.shapes(config))
    trained = {path: leaf for path, leaf in flat.items() if "lora" in path}
    frozen = {
        path: kernels.as_bits(jnp.zeros(leaf.shape, jnp.bfloat16)) if path.endswith("kernel") else jnp.ones(leaf.shape)
        for path, leaf in flat.items()
        if "lora" not in path
    }
    batch = tiny.rows([[8]], 8, images=False)

    def loss(trained, frozen):
        return multimodal.hidden(tree.unflatten({**frozen, **trained}), config, batch, RUN).mean()

    memory = jax.jit(jax.grad(loss)).lower(trained, frozen).compile().memory_analysis()
    stack = sum(4 * leaf.size for path, leaf in frozen.items() if "/layers/" in path)
    assert memory.temp_size_in_bytes < stack / 2


def test_bits_are_the_same_numbers():
    kernel = jax.random.normal(tiny.key(), (8, 8)).astype(jnp.bfloat16)
    x = jax.random.normal(tiny.key(), (3, 8))
    np.testing.assert_array_equal(kernels.matmul(x, kernel), kernels.matmul(x, kernels.as_bits(kernel)))


def test_a_lone_padding_row_stays_finite(model):
    config, params = model
    batch = tiny.rows([[9], []], 9)
    assert np.isfinite(logits(params, config, batch)).all()
    assert Mask().allowed(2, 2).shape == (1, 1, 2, 2)


@pytest.mark.parametrize(
    "buckets, longest, both, steps, bucket",
    [(4, 200, False, 20, 3), (6, 100, True, 10, 2), (8, 200, True, 20, 3), (32, 128, True, 64, 14), (32, 128, False, 500, 31)],
)
def test_buckets_of_relative_positions_at_their_boundaries(buckets, longest, both, steps, bucket):
    """Where a logarithm is a whole number but for its rounding."""
    found = position_bias.buckets(RelativeBias(buckets, longest), both)
    assert found[min(steps, longest)] == bucket
