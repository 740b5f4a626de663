"""AWQ over a model's blocks: folding changes nothing but rounding, and rounding costs less than without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import tree
from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.models import calibration, multimodal, quantised
from mmjax.models.block import Block
from mmjax.models.block_config import BlockConfig, Rope
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.models.layers import apply
from mmjax.models.quantised import Quantisation
from tests.models import tiny

GATED = BlockConfig(32, 4, 4, 8, 64, "silu", "rms", 1e-5, True, False, False, False, Rope())
SPEC = Quantisation("int4", block=16)


def layer_of(config):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), tiny.random_params(config)["llm"]["layers"])


@pytest.mark.parametrize(
    "block",
    [
        GATED,
        dataclasses.replace(GATED, kv_heads=2, norm="rms_plus_one", qkv_bias=True, mlp_bias=True, output_bias=True),
        BlockConfig(32, 4, 4, 8, 64, "relu", "layer", 1e-5, False, True, True, True),
    ],
)
def test_folding_changes_no_output(block):
    config = ModelConfig(llm=DecoderConfig(64, 1, block, 64))
    layer, x = layer_of(config), jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 32)), jnp.float32)
    around = calibration.surroundings(config.language, x)
    targets = tuple(path.removesuffix("/kernel") for path in tree.flatten(layer) if path.endswith("/kernel"))
    pairs = calibration.pairs(block, targets)
    assert len(pairs) == (4 if block.kv_heads == 4 else 3)
    rng = np.random.default_rng(1)
    scales = {
        pair: jnp.asarray(rng.uniform(0.5, 2, tree.flatten(layer)[f"{pair.readers[0]}/kernel"].shape[0]), jnp.float32)
        for pair in pairs
    }
    folded = calibration.fold(layer, block, scales)
    kernel = "mlp/down/kernel"
    np.testing.assert_allclose(
        tree.flatten(folded)[kernel], tree.flatten(layer)[kernel] * np.asarray(scales[pairs[-1]])[:, None], rtol=1e-6
    )
    before, after = (apply(Block(block), leaves, x, around) for leaves in (layer, folded))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_calibration_costs_less_than_rounding():
    config = ModelConfig(llm=DecoderConfig(64, 2, GATED, 64))
    params, rng = tiny.random_params(config), np.random.default_rng(0)
    channels = np.where(np.arange(32) % 8 == 0, 6.0, 0.3).astype(np.float32)  # some inputs are large, as in real models
    params["llm"]["layers"]["attention_norm"]["scale"] *= channels
    params["llm"]["layers"]["mlp_norm"]["scale"] *= channels
    tokens = rng.integers(0, 64, (4, 16))
    found = calibration.quantised_by_awq(params, config, tokens, SPEC)
    whole = dataclasses.replace(config, quantisation=SPEC)
    assert {p: leaf.shape for p, leaf in tree.flatten(found).items()} == {
        p: leaf.shape for p, leaf in tree.flatten(multimodal.shapes(whole)).items()
    }
    batch = _batch(tokens)
    outputs = {
        name: np.asarray(multimodal.hidden(leaves, shapes, batch, Execution()))
        for name, leaves, shapes in (
            ("dense", params, config),
            ("awq", found, whole),
            ("rounded", quantised.converted(params, SPEC), whole),
        )
    }
    errors = {name: ((out - outputs["dense"]) ** 2).mean() for name, out in outputs.items()}
    assert 0 < errors["awq"] < 0.7 * errors["rounded"]


def test_what_awq_is_not_for():
    config = tiny.model_config(layers=1)
    with pytest.raises(UserError, match="AWQ is of int4 in the blocks of a decoder, not of vision/layers"):
        calibration.quantised_by_awq(tiny.random_params(config), config, np.ones((1, 4), int), Quantisation("int4", ("vision/layers/**",), block=8))


def _batch(tokens):
    return Batch(
        tokens=jnp.asarray(tokens, jnp.int32),
        segments=jnp.ones(tokens.shape, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape),
    )
