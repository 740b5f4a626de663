"""Every method beside weights: at init it is the base, merged it is what it was, off it is gone; layers, ranks and rows of their own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import active_adapters, tree
from mmjax.errors import UserError
from mmjax.models import adapters, multimodal
from mmjax.models.config import Execution
from mmjax.models.tuning_config import AffineConfig, Ia3Config, LoraConfig, NormConfig
from tests.models import tiny

LLM = ("llm/layers/**",)
LORA = LoraConfig(
    "lora",
    3,
    6.0,
    ("llm/layers[1:3]/**", "llm/layers[0:1]/mlp/up", "connector/*", "llm/embed", "llm/head", "vision/layers/**"),
    rank_pattern=(("llm/layers[2:3]/**", 2),),
    alpha_pattern=(("connector/*", 2.0),),
    bias="all",
    lora_bias=True,
    whole=("llm/final_norm/scale",),
    token_ids=(5, 3),
)
KINDS = {
    "lora": (LORA,),
    "dora": (LoraConfig("dora", 2, 4.0, ("llm/layers[2:4]/**", "llm/head"), dora=True),),
    "ia3": (Ia3Config("ia3", ("llm/layers/**/{key,value,down}",), ("llm/layers/mlp/down",)),),
    "affine": (AffineConfig("a", LLM), AffineConfig("b", ("llm/layers[1:2]/**",), "input"), AffineConfig("c", LLM, "bias")),
    "norm": (NormConfig("norm", ("llm/**",)), NormConfig("seen", ("vision/layers[0:1]/attention_norm",))),
}
KINDS["all"] = tuple(adapter for some in KINDS.values() for adapter in some)
BASE = tiny.model_config()
PARAMS = tiny.random_params(BASE)
BATCH = tiny.rows([[9], [7]], 9)


@functools.partial(jax.jit, static_argnames="config")
def logits(params, config):
    return multimodal.head(params, config, multimodal.hidden(params, config, BATCH, Execution()))


def drawn(params, seed=0):
    """The parameters with every leaf of an adapter moved at random."""
    rng = np.random.default_rng(seed)
    flat = {p: a + rng.normal(size=a.shape).astype(np.float32) * 0.1 if "/adapters/" in p else a for p, a in tree.flatten(params).items()}
    return tree.unflatten(flat)


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_base_and_merged_is_what_it_was(kind):
    config = tiny.model_config(adapters=KINDS[kind])
    fresh = adapters.add(tiny.key(), PARAMS, config)
    base = logits(PARAMS, BASE)
    if any(getattr(adapter, "dora", False) for adapter in config.adapters):
        np.testing.assert_allclose(logits(fresh, config), base, atol=1e-6 * np.abs(base).max())
    else:
        np.testing.assert_array_equal(logits(fresh, config), base)
    trained = drawn(fresh)
    want = logits(trained, config)
    assert np.abs(want - base).max() > 0.1
    np.testing.assert_array_equal(logits(trained, BASE), base)  # switched off
    merged, plain = adapters.merge(trained, config)
    assert plain.adapters == () and not any("/adapters/" in path for path in tree.flatten(merged))
    np.testing.assert_allclose(logits(merged, plain), want, rtol=1e-4, atol=2e-5)
    under, also, change = adapters.merge_by_layer(trained, config)
    assert also == plain
    for path, leaf in tree.flatten(under).items():
        layers = range(len(leaf)) if tree.is_stacked(path) else [None]
        found = [change(path, i, np.asarray(leaf if i is None else leaf[i])) for i in layers]
        np.testing.assert_allclose(found if tree.is_stacked(path) else found[0], tree.flatten(merged)[path], atol=1e-5, err_msg=path)


def test_leaves_cover_their_layers_alone():
    flat = tree.flatten(multimodal.shapes(tiny.model_config(adapters=KINDS["lora"])))
    up = "llm/layers/mlp/up/adapters/lora"
    assert flat[f"{up}/rank3_alpha6/lora_a"].shape == (2, 32, 3) and flat[f"{up}/rank2_alpha6/lora_b"].shape == (1, 2, 48)
    assert flat["llm/layers/mlp/down/adapters/lora/rank3_alpha6/lora_a"].shape == (1, 48, 3)
    assert flat["llm/embed/adapters/lora/lora_a"].shape == (64, 3) and flat["llm/embed/adapters/lora/rows"].shape == (2, 32)
    assert flat["vision/layers/attention_norm/adapters/lora/bias"].shape == (3, 24)


def test_norms_get_no_gradient_and_copies_follow_their_base():
    config = tiny.model_config(adapters=(LoraConfig("d", 2, 4.0, ("llm/layers/mlp/up",), dora=True),))
    params = adapters.add(tiny.key(), PARAMS, config)
    kernel = PARAMS["llm"]["layers"]["mlp"]["up"]["kernel"]
    magnitude = params["llm"]["layers"]["mlp"]["up"]["adapters"]["d"]["lora_magnitude"]
    np.testing.assert_allclose(magnitude, np.linalg.norm(kernel, axis=1), rtol=1e-6)

    # With the norms of the changed weight held fixed, the gradient of lora_b is that of their quotient's numerator alone.
    x, leaves = jnp.ones((1, 32)), {k: v[0] for k, v in params["llm"]["layers"]["mlp"]["up"]["adapters"]["d"].items()}
    from mmjax.models import lora

    def out(b):
        plain = x @ kernel[0]
        return lora.change(plain, x, plain, kernel[0], {**leaves, "lora_b": b}, config.adapters[0], None).sum()

    found = jax.grad(out)(leaves["lora_b"])
    want = (x @ leaves["lora_a"]).T * jnp.ones((1, 48)) * 2.0  # alpha / rank; the quotient itself is 1
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "affine", "norm"])
def test_rows_have_weights_of_their_own(kind):
    some = KINDS[kind]
    if kind == "lora":
        some = (LoraConfig("lora", 2, 4.0, (*LLM, "llm/head", "llm/embed")),)
    if kind == "norm":
        some = some[:1]
    config = tiny.model_config(adapters=some)
    params = drawn(adapters.add(tiny.key(), PARAMS, config))
    names = [adapter.name for adapter in some]
    both = logits(*active_adapters.choose(params, config, [dict.fromkeys(names, 0.5), {}]))
    half = logits(*active_adapters.choose(params, config, dict.fromkeys(names, 0.5)))
    none = logits(*active_adapters.choose(params, config, []))
    np.testing.assert_allclose(both[0], half[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(both[1], none[1], rtol=1e-5, atol=1e-5)
    assert np.abs(half - none).max() > 1e-2
    np.testing.assert_array_equal(none, logits(PARAMS, BASE))
    merged = adapters.merge(*active_adapters.choose(params, config, dict.fromkeys(names, 0.5)))
    np.testing.assert_allclose(logits(*merged), half, rtol=1e-4, atol=2e-5)


def test_choices_that_cannot_be_meant():
    config = tiny.model_config(adapters=(LoraConfig("see", 2, 4.0, ("vision/layers/**",)), LoraConfig("speak", 2, 4.0, LLM)))
    params = adapters.add(tiny.key(), PARAMS, config)
    with pytest.raises(UserError, match="unknown adapter 'spek' .nearest: 'speak'.; this model has see, speak"):
        active_adapters.choose(params, config, {"spek": 1.0})
    with pytest.raises(UserError, match="'see' changes more than the language model"):
        logits(*active_adapters.choose(params, config, [{"see": 1.0}, {}]))
    with pytest.raises(UserError, match="weights for 3 rows; the batch has 2"):
        logits(*active_adapters.choose(params, config, [{"speak": 1.0}, {}, {}]))
