"""Prompts with zero-init attention, and with a noise embedding: closed gates, who sees which, packing, the cache, several devices."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import tree
from mmjax.config import Mesh
from mmjax.data.collation import collate
from mmjax.data.encoding import Example
from mmjax.flops import training_flops
from mmjax.inference.generate import generate
from mmjax.inference.sampling import Sampling
from mmjax.models import adapters, mine, multimodal
from mmjax.models.config import Execution
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec
from mmjax.models.tuning_config import AdaptionPromptConfig, AffineConfig, LoraConfig, NoisePromptConfig
from mmjax.parallel.mesh import make_mesh
from mmjax.parallel.sharding import batch_shardings, param_shardings
from mmjax.training.trainable import select
from tests.models import tiny

RUN = Execution()
BASE = tiny.model_config(layers=3)
BLOCKS = ConnectorConfig("visual_blocks", 16, 32, 5, depth=1, hidden_width=24, latents=2, heads=2)
PICTURES = dataclasses.replace(
    BASE,
    vision=dataclasses.replace(BASE.vision, projection=16, post_norm="pooled", pooling="class_token"),
    connector=BLOCKS,
    features=FeatureSpec((-1,), keep_class_token=True, post_norm=True, projected=True),
)
TEXT = dataclasses.replace(BASE, vision=None, connector=None)
PROMPTS = AdaptionPromptConfig("prompts", 2, 2, media="added", adapted=False)
ADDED = dataclasses.replace(PICTURES, adapters=(PROMPTS,))
EARLY = dataclasses.replace(
    PICTURES,
    adapters=(AdaptionPromptConfig("early", depth=1, bottom=True, media="alone"), AdaptionPromptConfig("late", 3, 2, gate="layer")),
)
CHAT = dataclasses.replace(
    TEXT,
    adapters=(AffineConfig("affine", ("llm/layers/**",), "input"), AdaptionPromptConfig("prompts", 4, 2, gate_scale=True)),
)
NOISE = dataclasses.replace(TEXT, adapters=(NoisePromptConfig("prompts", 3, 2, channels=6),))
EVERY = {"added": ADDED, "early": EARLY, "chat": CHAT, "noise": NOISE}


def sample(name: str, length: int, beside: bool, config=ADDED) -> Example:
    """Tokens, with a picture or a noise embedding beside them or without."""
    rng = np.random.default_rng([length, *map(ord, name)])
    ids = rng.integers(3, 60, length).astype(np.int32)
    pixels = None
    if beside:
        pixels = rng.normal(size=(1, 3, 6)).astype(np.float32) if config is NOISE else rng.integers(0, 256, (1, 28, 28, 3), dtype=np.uint8)
    shown = ({},) * (pixels is not None)
    return Example(name, ids, ids.copy(), np.full(length, -1, np.int32), shown, pixels)


def batch(*rows, config=ADDED, **settings):
    shape = (3, 6) if config is NOISE else (28, 28, 3)
    apart = {"row_media": 0, "media_shape": shape, "media_apart": True} if config.media_beside else {}
    return collate([list(row) for row in rows], **apart, **settings)


@functools.partial(jax.jit, static_argnames="config")
def states(params, batch, config=ADDED):
    return multimodal.hidden(params, config, batch, RUN)


@functools.cache
def params(config):
    return tiny.random_params(config)


@pytest.mark.parametrize("name", EVERY)
def test_fresh_adapters_change_nothing_at_all(name):
    config = EVERY[name]
    bare = dataclasses.replace(config, adapters=())
    base = params(bare)
    fresh = jax.eval_shape(lambda: adapters.add(tiny.key(), base, config))
    made = batch([sample("a", 7, config.media_beside, config)], [sample("b", 5, False, config)], config=config)
    text = dataclasses.replace(made, **dict.fromkeys(("images", "features", "tiles", "row_media", "media_segments")))
    adapted = adapters.add(tiny.key(), base, config)
    assert tree.flatten(fresh).keys() == tree.flatten(adapted).keys() == tree.flatten(params(config)).keys()
    real = np.asarray(made.segments) > 0
    want = np.asarray(states(base, text, config=bare))[real]
    np.testing.assert_array_equal(np.asarray(states(adapted, made, config=config))[real], want)
    assert np.abs(np.asarray(states(params(config), made, config=config))[real] - want).max() > 1e-2


@pytest.mark.parametrize("name", ["added", "early", "noise"])
def test_packed_rows_equal_each_sample_alone(name):
    """Also a sample without a medium among others with one, which sees the prompts as they are."""
    config = EVERY[name]
    samples = [sample("a", 6, True, config), sample("b", 4, False, config), sample("c", 5, True, config)]
    packed = np.asarray(states(params(config), batch(samples, config=config), config=config))[0]
    apart = batch(*([one] for one in samples), config=config)
    alone, start = np.asarray(states(params(config), apart, config=config)), 0
    for row, one in enumerate(samples):
        length = len(one.ids)
        np.testing.assert_allclose(packed[start : start + length], alone[row, :length], rtol=1e-5, atol=1e-5)
        start += length
    other = dataclasses.replace(samples[0], pixels=samples[2].pixels)
    changed = np.asarray(states(params(config), batch([other, *samples[1:]], config=config), config=config))[0]
    assert np.abs(changed[:6] - packed[:6]).max() > 1e-4  # all of a sample sees its medium, also what stands first
    np.testing.assert_array_equal(changed[6:], packed[6:])
    text = dataclasses.replace(batch([samples[1]], config=config), row_media=None, features=None, images=None)
    np.testing.assert_allclose(states(params(config), text, config=config)[0], alone[1, :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["added", "noise"])
def test_cached_generation_equals_the_whole_text_anew(name):
    config = EVERY[name]
    prompts = [sample("a", 6, True, config), sample("b", 4, False, config)]
    found = generate(params(config), config, batch(*([p] for p in prompts), config=config), Sampling(max_new_tokens=3), RUN, True)
    longer = []
    for row, prompt in enumerate(prompts):
        ids = np.concatenate([prompt.ids, found.tokens[row]]).astype(np.int32)
        longer.append(dataclasses.replace(prompt, ids=ids, labels=ids, media=np.full(len(ids), -1, np.int32)))
    whole = states(params(config), batch(*([p] for p in longer), config=config), config=config)
    for row, prompt in enumerate(prompts):
        logits = multimodal.head(params(config), config, whole[row, len(prompt.ids) - 1 : len(prompt.ids) + 2])
        np.testing.assert_allclose(found.scores[row], logits, rtol=1e-4, atol=1e-4)
    if name == "noise":
        beams = generate(params(config), config, batch([prompts[0]], config=config), Sampling(max_new_tokens=3, num_beams=2), RUN)
        assert beams.tokens.shape == (1, 3)


def test_one_device_equals_eight():
    rows = [[sample("a", 7, True)], [sample("b", 4, False)], [sample("c", 3, True)], [sample("d", 3, True), sample("e", 3, True)]]
    made = batch(*rows, groups=4, tiles=2)
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    divided = jax.device_put(params(ADDED), param_shardings(multimodal.shapes(ADDED), mesh))
    found = states(divided, jax.device_put(made, batch_shardings(made, mesh)))
    real = made.segments > 0
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(states(params(ADDED), made))[real], rtol=1e-4, atol=1e-5)


def test_shared_keys_equal_those_of_a_model_that_has_them_for_each_head():
    """Grouped-query attention, with gates for each head and with noise that each head has its own of."""
    for config in (CHAT, NOISE):
        block = config.llm.block
        wide = dataclasses.replace(config, llm=dataclasses.replace(config.llm, block=dataclasses.replace(block, kv_heads=block.heads)))
        flat = dict(tree.flatten(params(config)))
        for path, leaf in flat.items():
            if "/attention/key/" in path or "/attention/value/" in path:
                if path.endswith(("kernel", "affine_bias")):
                    heads = leaf.reshape(*leaf.shape[:-1], block.kv_heads, block.head_dim)
                    flat[path] = np.repeat(heads, block.heads // block.kv_heads, -2).reshape(*leaf.shape[:-1], -1)
        made = batch([sample("a", 7, config.media_beside, config)], config=config)
        want = states(tree.unflatten(flat), made, config=wide)
        np.testing.assert_allclose(states(params(config), made, config=config), want, rtol=1e-5, atol=1e-5)


def test_prompts_read_the_linears_with_or_without_their_adapters():
    """V2's LoRA is none of the prompts' (adapted=False); its scales are."""
    lora = LoraConfig("lora", 2, 2.0, ("llm/layers/attention/{key,value}",))
    found = {}
    for adapted in (True, False):
        config = dataclasses.replace(TEXT, adapters=(lora, AdaptionPromptConfig("prompts", 2, 3, adapted=adapted)))
        drawn = params(config)
        made = batch([sample("a", 4, False, config)], config=config)
        merged, bare = adapters.merge(drawn, config)
        found[adapted] = np.abs(np.asarray(states(drawn, made, config=config)) - states(merged, made, config=bare)).max()
    assert found[True] < 1e-4 < 1e-3 < found[False]


def test_weights_of_adapters_reach_the_gates():
    config = dataclasses.replace(TEXT, adapters=(AdaptionPromptConfig("prompts", 2, 2),))
    made = batch([sample("a", 4, False, config)], [sample("b", 4, False, config)], config=config)
    bare = {"llm": {name: leaf for name, leaf in params(config)["llm"].items() if name != "plugs"}}
    base = states(bare, made, config=dataclasses.replace(config, adapters=()))
    weighed = states({**params(config), "adapter_weights": {"prompts": jnp.array([0.0, 1.0])}}, made, config=config)
    np.testing.assert_array_equal(weighed[0], base[0])
    np.testing.assert_allclose(weighed[1], states(params(config), made, config=config)[1], rtol=1e-6, atol=1e-6)


def test_mines_losses_reach_their_own_leaves_alone():
    rng = np.random.default_rng(0)
    network = mine.init(tiny.key(), 32, 10, 6)
    noise, noisy, clean = (rng.normal(size=s).astype(np.float32) for s in ((4, 3, 6), (4, 7, 10), (4, 7, 10)))
    embeddings = rng.normal(size=(2, 4, 3, 32)).astype(np.float32)
    own = jax.grad(lambda p: mine.distillation_loss(p, embeddings, noisy).sum())(network)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(own))
    noisy, clean = noisy + 1, clean - 1

    @jax.jit
    def better(network):
        loss, gradient = jax.value_and_grad(lambda p: mine.estimation_loss(p, noise, noisy, clean).mean())(network)
        return jax.tree.map(lambda leaf, g: leaf - g, network, gradient), loss

    losses = []
    for _ in range(30):
        network, loss = better(network)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    assert {name: leaf["kernel"].shape for name, leaf in network.items()}["proj4"] == (2, 1)


def test_what_is_trained_in_front_of_the_prompts_costs_nothing():
    """No gradient passes through layers below the first one with prompts."""
    shapes = multimodal.shapes(ADDED)
    cost = training_flops(ADDED, select(shapes, ("connector/**", "llm/plugs/**"), "here"))
    block = sum(leaf.size for path, leaf in tree.flatten(shapes).items() if path.startswith("llm/layers/") and path.endswith("kernel"))
    assert cost.per_token["llm"] == (4 * 2 / 3 + 2 / 3) * block
    assert cost.per_token["llm attention"] == 4 * 4 * 8 * 2 * 2 * 3  # 4 heads of 8 channels, 2 prompts in 2 layers, thrice
