"""Gated cross-attention: what zero gates leave alone, and which positions see which media."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import tree
from mmjax.models import decoder, gated_cross_attention
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import Execution
from mmjax.models.encoder_config import GatedCrossAttentionConfig
from tests.models import tiny

BLOCK = BlockConfig(32, 2, 2, 8, 48, "gelu", "layer", 1e-5, False, False, False, False, memory_width=12)
LAYERS = (1, 3)
CONFIG = GatedCrossAttentionConfig(BLOCK, LAYERS)
# text, an image, text, an image, text
LOCATIONS = np.array([[0, 0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]], bool)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 8, 32)).astype(np.float32)
MEDIA = RNG.normal(size=(2, 2, 3, 12)).astype(np.float32)  # two images of three tokens a row


def leaves(config=CONFIG, opened=True):
    """Leaves of two layers; their gates drawn at random, or 0 as at first."""
    params = gated_cross_attention.init_layers(jax.random.key(0), config, len(LAYERS))
    draw = {
        name: RNG.normal(0.6, 0.3, leaf.shape).astype(np.float32) for name, leaf in params.items() if "gate" in name
    }
    return {**params, **draw} if opened else params


def one(config=CONFIG):
    return jax.tree.map(lambda leaf: leaf[0], leaves(config))


def crossed(params, config=CONFIG, media=MEDIA, present=None, locations=LOCATIONS):
    mask = gated_cross_attention.media_mask(config, gated_cross_attention.media_begun(locations), 2, 3, present)
    held = gated_cross_attention.keys_values(params, config, media)
    return np.asarray(gated_cross_attention.cross(params, config, X, (*held, mask)))


@jax.jit
def decoded(params, leaves, media):
    """A decoder's states with the plug on some of its layers; without it where there are no leaves."""
    config = tiny.model_config().llm
    plugs = (gated_cross_attention.plug(CONFIG, media),) if leaves else ()
    ones, positions = jnp.ones(X.shape[:2], jnp.int32), jnp.tile(jnp.arange(X.shape[1]), (len(X), 1))
    params = {**params, "plugs": {"cross_attention": gated_cross_attention.plugged(leaves, media)}} if leaves else params
    return decoder.decode(params, config, X, segments=ones, positions=positions, run=Execution(), plugs=plugs).last


def media_of(tokens):
    begun = gated_cross_attention.media_begun(LOCATIONS)
    return gated_cross_attention.Media(tokens, gated_cross_attention.media_mask(CONFIG, begun, 2, 3))


def test_zero_gates_equal_the_language_model_exactly():
    llm = tiny.random_params(tiny.model_config())["llm"]
    alone = decoded(llm, {}, None)
    np.testing.assert_array_equal(decoded(llm, leaves(opened=False), media_of(MEDIA)), alone)
    opened, media = leaves(), media_of(MEDIA)
    found = decoded(llm, opened, media)
    assert np.abs(found - alone).max() > 1e-2
    remembered = gated_cross_attention.remember(opened, CONFIG, media)._replace(tokens=np.zeros_like(MEDIA))
    np.testing.assert_allclose(decoded(llm, opened, remembered), found, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_and_leave_zero():
    llm = tiny.random_params(tiny.model_config())["llm"]
    gradient = jax.jit(jax.grad(lambda p, m: (decoded(llm, p, media_of(m)) ** 2).mean(), argnums=(0, 1)))
    for opened in (False, True):
        for path, leaf in tree.flatten(dict(zip(("leaves", "media"), gradient(leaves(opened=opened), MEDIA)))).items():
            assert np.isfinite(leaf).all(), path
            assert np.abs(leaf).max() > 0 or not (opened or path.endswith("gate")), path


@pytest.mark.parametrize("last_media_only", [True, False])
def test_who_sees_which_media(last_media_only):
    config = dataclasses.replace(CONFIG, last_media_only=last_media_only)
    params = one(config)
    output = crossed(params, config)
    first, second = MEDIA.copy(), MEDIA.copy()
    first[:, 0], second[:, 1] = 5, 5
    after_first = np.cumsum(LOCATIONS, 1) == 1 if last_media_only else np.cumsum(LOCATIONS, 1) > 0
    after_second = np.cumsum(LOCATIONS, 1) == 2
    for media, seen in ((first, after_first), (second, after_second)):
        changed = np.abs(crossed(params, config, media) - output).max(-1) > 0
        np.testing.assert_array_equal(changed, seen)
    # text before the first image is left as it is
    bare = crossed({**params, "mlp_gate": jnp.zeros(())}, config)
    before = np.cumsum(LOCATIONS, 1) == 0
    np.testing.assert_array_equal(bare[before], X[before])
    assert (np.abs(bare - X).max(-1) > 0)[~before].all()


def test_padding_is_no_medium():
    params, config = one(), dataclasses.replace(CONFIG, last_media_only=False)
    present = np.array([[True, True], [True, False]])
    late = np.array([[1, 0, 0, 1, 0, 0, 0, 0]] * 2, bool)
    other = MEDIA.copy()
    other[1, 1] = 9
    output = crossed(params, config, MEDIA, present, late)
    np.testing.assert_array_equal(crossed(params, config, other, present, late), output)
    assert np.abs(output[1] - crossed(params, config, MEDIA, None, late)[1]).max() > 1e-3


def test_text_may_belong_to_the_following_medium():
    begun = gated_cross_attention.media_begun(LOCATIONS)
    following = gated_cross_attention.media_begun(LOCATIONS, following=True)
    assert begun.tolist() == [[0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert following.tolist() == [[1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]


def test_a_gate_for_each_channel():
    config, params = dataclasses.replace(CONFIG, vector_gates=True), one()
    gates = {name: jnp.full(32, params[name]) for name in params if name.endswith("gate")}
    assert gated_cross_attention.init(jax.random.key(0), config)["mlp_gate"].shape == (32,)
    np.testing.assert_allclose(crossed({**params, **gates}, config), crossed(params), rtol=1e-6, atol=1e-6)
