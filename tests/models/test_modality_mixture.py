import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import tree
from mmjax.models import adapters, decoder, modality_mixture, multimodal, plugged
from mmjax.models.attention import Mask
from mmjax.models.config import Execution
from mmjax.models.ports import Plug
from mmjax.models.tuning_config import ModalityMixtureConfig
from tests.models import tiny

MIXTURE = ModalityMixtureConfig("mma", width=4, temperature=2.0, places=("attention", "mlp"), visual_router="per_sample_cls")
RUN = Execution()


def logits(params, config, batch):
    return np.asarray(multimodal.head(params, config, multimodal.hidden(params, config, batch, RUN)))


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(tiny.model_config(layers=3), adapters=(MIXTURE,))
    return config, tiny.random_params(config)


def test_a_fresh_mixture_is_the_base(model):
    config, params = model
    base = dataclasses.replace(config, adapters=())
    bare = tree.unflatten({path: leaf for path, leaf in tree.flatten(params).items() if not tree.adapter_of(path)})
    fresh = adapters.add(tiny.key(), bare, config)
    batch = tiny.rows([[9, 6]], 16)
    np.testing.assert_array_equal(logits(fresh, config, batch), logits(bare, base, batch))
    leaves = fresh["llm"]["plugs"]["mma"]["attention"]
    assert leaves["first"].shape == (3, 2, 32) and not leaves["first"].any() and not leaves["second_bias"].any()
    assert fresh["llm"]["prompts"]["mma"]["modality"].shape == (2, 32) and leaves["down"].any() and leaves["router"].any()


@pytest.mark.parametrize("modality", [0, 1])
def test_the_modality_token_may_as_well_stand_in_the_text(model, modality):
    """Put in front of a text, unseen by all others, with routers that read the first position: as the authors have it."""
    config, params = model
    llm = params["llm"]
    x = jax.random.normal(tiny.key(), (2, 7, 32))
    token = jnp.broadcast_to(llm["prompts"]["mma"]["modality"][modality], (2, 1, 32))

    def call(leaves, where, x):
        return modality_mixture.adapt(leaves[where], MIXTURE, x, modality_mixture.weigh(leaves[where], MIXTURE, x[:, :1]))

    plug = Plug("mma", "inputs", (0, 1, 2), call)
    segments = jnp.array([[9, *[1] * 7]] * 2)  # a sample of its own
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    shared = {"run": RUN, "mask": Mask()}
    whole = decoder.decode(
        llm, config.llm, jnp.concatenate([token, x], 1), segments=segments, positions=positions, plugs=(plug,), **shared
    )
    is_media = jnp.full((2, 7), -1 + modality)
    batch = tiny.rows([[7], [7]], 7, images=False)
    routed = multimodal.route(params, config, dataclasses.replace(batch, media=is_media), RUN)
    reading = multimodal.Reading(x, jnp.ones((2, 7), jnp.int32), positions[:, :7], routed=routed)
    got = multimodal.decode_reading(params, config, reading, RUN)
    np.testing.assert_allclose(got.last, whole.last[:, 1:], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(routed.last[modality], whole.last[0, :1], rtol=2e-5, atol=2e-5)


def test_packed_samples_are_routed_by_their_own_modality(model):
    """A sample with a picture, and one without: packed as each alone; and the two modalities differ."""
    config, params = model
    batch = tiny.rows([[9, 6]], 16)
    media = batch.media.copy()
    media[0, 9:] = -1
    packed = logits(params, config, dataclasses.replace(batch, media=media))
    apart = tiny.rows([[9], [6]], 16)
    tokens, alone = np.zeros_like(apart.tokens), np.full_like(apart.media, -1)
    tokens[0, :9], tokens[1, :6], alone[0, :4] = batch.tokens[0, :9], batch.tokens[0, 9:15], apart.media[0, :4]
    single = logits(params, config, dataclasses.replace(apart, tokens=tokens, media=alone, images=batch.images))
    np.testing.assert_allclose(packed[0, :9], single[0, :9], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packed[0, 9:15], single[1, :6], rtol=1e-4, atol=1e-4)
    routed = multimodal.route(params, config, dataclasses.replace(batch, media=media), RUN)
    assert list(routed.modality[0]) == [1] * 9 + [0] * 7
    assert np.abs(routed.weights["attention"][:, 0] - routed.weights["attention"][:, 1]).max() > 0.01


def test_the_released_visual_router_depends_on_the_batch_and_the_other_does_not(model):
    config, params = model
    images = np.random.default_rng(0).normal(size=(2, 3, 28, 28, 3)).astype(np.float32)

    def features(router, images):
        adapter = dataclasses.replace(MIXTURE, visual_router=router)
        shape = dataclasses.replace(config, adapters=(adapter,))
        return np.asarray(multimodal.vision_features(params, shape, images, RUN))

    own = features("per_sample_cls", images)
    np.testing.assert_allclose(own[:, :2], features("per_sample_cls", images[:, :2]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(own[:, ::-1], features("per_sample_cls", images[:, ::-1]), rtol=1e-5, atol=1e-5)
    led = features("released", images)
    np.testing.assert_allclose(led[1], features("released", images[1:])[0], rtol=1e-5, atol=1e-5)  # each group has its first
    assert np.abs(led[:, 1:] - features("released", images[:, 1:])).max() > 1e-3
    released = dataclasses.replace(config, adapters=(dataclasses.replace(MIXTURE, visual_router="released"),))
    assert "depend on how pictures are batched" in modality_mixture.notices(released)[0] and not modality_mixture.notices(config)


def test_dropout_acts_in_training_alone_in_both_towers(model):
    config, params = model
    shape = dataclasses.replace(config, adapters=(dataclasses.replace(MIXTURE, dropout=0.5),))
    batch = tiny.rows([[9, 6]], 16)
    np.testing.assert_array_equal(logits(params, shape, batch), logits(params, config, batch))

    def trained(key):
        return np.asarray(multimodal.decode(params, shape, batch, RUN, dropout_key=jax.random.key(key)).last)

    assert np.abs(trained(1) - trained(2)).max() > 1e-3
    np.testing.assert_array_equal(trained(1), trained(1))
    only = tree.merge(params, {"llm": {"plugs": jax.tree.map(jnp.zeros_like, params["llm"]["plugs"])}})
    one, two = (multimodal.decode(only, shape, batch, RUN, dropout_key=jax.random.key(key)).last for key in (1, 2))
    assert np.abs(one - two).max() > 1e-4  # what is left drops in the encoder
    assert [plug.draws for plug in plugged.plugs(shape, "vision")] == [True]
