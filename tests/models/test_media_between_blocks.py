"""Whole models whose blocks read media by cross-attention: who sees what in packed rows, in generation, on a mesh, with adapters."""

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
from mmjax.models import adapters, gated_cross_attention, multimodal, ports
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import Execution
from mmjax.models.encoder_config import ConnectorConfig, GatedCrossAttentionConfig
from mmjax.models.tuning_config import LoraConfig
from mmjax.parallel.mesh import make_mesh
from mmjax.parallel.sharding import batch_shardings, param_shardings
from mmjax.training.trainable import select
from tests.models import tiny

IMAGE = 63
BLOCK = BlockConfig(32, 2, 2, 8, 48, "gelu", "layer", 1e-5, False, False, False, False, memory_width=24)
CONFIG = dataclasses.replace(
    tiny.model_config(),
    connector=ConnectorConfig("perceiver", 24, 24, 4, depth=1, bias=False, latents=3, heads=2, head_dim=6),
    cross_attention=GatedCrossAttentionConfig(BLOCK, (1, 3)),
)
ALONE = dataclasses.replace(CONFIG, connector=None, vision=None, cross_attention=None)
PARAMS = tiny.random_params(CONFIG)
RUN = Execution()


def sample(name: str, text: str, seed: int = 0) -> Example:
    """A sample of letters (text) and I (images)."""
    rng = np.random.default_rng([seed, *map(ord, name + text)])
    ids = np.array([IMAGE if c == "I" else rng.integers(3, 60) for c in text], np.int32)
    shown = text.count("I")
    media = np.where(ids == IMAGE, np.cumsum(ids == IMAGE) - 1, -1).astype(np.int32)
    pixels = rng.integers(0, 256, (shown, 28, 28, 3), dtype=np.uint8) if shown else None
    return Example(name, ids, ids.copy(), media, ({},) * shown, pixels, tile_tokens=1)


def batch(*rows, **settings):
    return collate([list(row) for row in rows], row_media=0, media_shape=(28, 28, 3), **settings)


@functools.partial(jax.jit, static_argnames="config")
def states(params, batch, config=CONFIG):
    return multimodal.hidden(params, config, batch, RUN)


def with_gates(value: float):
    flat = tree.flatten(PARAMS)
    return tree.unflatten({path: jnp.full_like(leaf, value) if path.endswith("_gate") else leaf for path, leaf in flat.items()})


def test_rows_know_their_own_media():
    a, b, c = sample("a", "xIxxIx"), sample("b", "xx"), sample("c", "Ixx")
    made = batch([a, b, c], [b], [c], groups=1)
    assert made.begun[0].tolist() == [0, 1, 1, 1, 2, 2, 0, 0, 3, 3, 3]
    assert made.begun[1].tolist() == [0] * 11 and made.begun[2].tolist() == [1] * 3 + [0] * 8
    assert made.row_media.tolist() == [[0, 1, 2], [-1] * 3, [3, -1, -1]]
    assert made.media_segments.tolist() == [[1, 1, 3], [0] * 3, [1, 0, 0]]
    assert (made.media == -1).all() and made.tokens[0, 1] == IMAGE and made.images.shape[:2] == (1, 4)
    apart = batch([a, b, c], [b], [c], [c], groups=2)
    assert apart.row_media.tolist() == [[0, 1, 2], [-1] * 3, [0, -1, -1], [1, -1, -1]]
    with pytest.raises(ValueError, match="a row holds 3 images, more than 2; the last is of sample c"):
        collate([[a, c]], row_media=2)


def test_zero_gates_equal_the_language_model_exactly():
    made = batch([sample("a", "xIxxIxx")], [sample("b", "xxxx")])
    text = dataclasses.replace(made, **dict.fromkeys(("images", "tiles", "begun", "row_media", "media_segments")))
    alone = states({"llm": {name: leaf for name, leaf in PARAMS["llm"].items() if name != "plugs"}}, text, config=ALONE)
    real = made.segments > 0
    np.testing.assert_array_equal(np.asarray(states(with_gates(0.0), made))[real], np.asarray(alone)[real])
    assert np.abs(np.asarray(states(PARAMS, made)) - alone)[real].max() > 1e-2


def test_what_sees_no_image_is_what_it_is_without_any():
    """A row of text among rows with images, and the text before a first image."""
    a, b = sample("a", "xxxxIxx"), sample("b", "xxxxxxx")
    found = np.asarray(states(PARAMS, batch([a], [b])))
    np.testing.assert_allclose(found[1], states(PARAMS, batch([b]))[0], rtol=1e-5, atol=1e-5)
    other = np.asarray(states(PARAMS, batch([dataclasses.replace(a, pixels=255 - a.pixels)], [b])))
    np.testing.assert_array_equal(other[0, :4], found[0, :4])
    np.testing.assert_array_equal(other[1], found[1])
    assert (np.abs(other[0, 4:] - found[0, 4:]).max(-1) > 0).all()


@pytest.mark.parametrize("last_media_only", [True, False])
def test_packed_rows_equal_each_sample_alone(last_media_only):
    config = dataclasses.replace(
        CONFIG, cross_attention=dataclasses.replace(CONFIG.cross_attention, last_media_only=last_media_only)
    )
    samples = sample("a", "xIxxIx"), sample("b", "xxx"), sample("c", "xIIxx")
    packed = np.asarray(states(PARAMS, batch(samples, [sample("d", "Ix")]), config=config))[0]
    start = 0
    for one in samples:
        alone = np.asarray(states(PARAMS, batch([one]), config=config))[0]
        np.testing.assert_allclose(packed[start : start + len(alone)], alone, rtol=1e-4, atol=1e-5)
        start += len(alone)


@pytest.mark.parametrize("last_media_only", [True, False])
def test_the_order_of_images_matters_only_to_who_sees_the_last(last_media_only):
    config = dataclasses.replace(CONFIG.cross_attention, last_media_only=last_media_only)
    params = jax.tree.map(lambda leaf: leaf[0], PARAMS["llm"]["plugs"]["cross_attention"])
    rng = np.random.default_rng(0)
    x, media = rng.normal(size=(1, 4, 32)).astype(np.float32), rng.normal(size=(1, 2, 3, 24)).astype(np.float32)
    mask = gated_cross_attention.media_mask(config, np.full((1, 4), 2), 2, 3)
    one, other = (
        gated_cross_attention.read(params, config, x, (*gated_cross_attention.keys_values(params, config, m), mask))
        for m in (media, media[:, ::-1])
    )
    assert np.allclose(one, other, rtol=1e-4, atol=1e-5) != last_media_only


@pytest.mark.parametrize("beams", [1, 2])
def test_cached_generation_equals_the_whole_text_anew(beams):
    prompts = [sample("a", "xIxxIxx"), sample("b", "xxxx"), sample("c", "xIx")]
    made = batch(*([p] for p in prompts))
    settings = Sampling(max_new_tokens=5, num_beams=beams)
    found = generate(PARAMS, CONFIG, made, settings, RUN, return_scores=beams == 1)
    for row, prompt in enumerate(prompts):
        alone = generate(PARAMS, CONFIG, batch([prompt]), settings, RUN).tokens[0]
        np.testing.assert_array_equal(found.tokens[row], alone)
        if beams > 1:
            continue
        whole = np.concatenate([prompt.ids, found.tokens[row]]).astype(np.int32)
        longer = dataclasses.replace(
            prompt, ids=whole, labels=whole, media=np.concatenate([prompt.media, np.full(5, -1, np.int32)])
        )
        logits = multimodal.head(PARAMS, CONFIG, states(PARAMS, batch([longer]))[0])
        np.testing.assert_allclose(found.scores[row], logits[len(prompt.ids) - 1 : -1], rtol=1e-3, atol=1e-3)


def test_one_device_equals_eight():
    rows = [[sample("a", "xIxxIxx")], [sample("b", "xxxx")], [sample("c", "xIx")], [sample("d", "Ixxx"), sample("e", "xxI")]]
    made = batch(*rows, groups=4, tiles=8)
    wanted = states(PARAMS, made)
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    places = param_shardings(multimodal.shapes(CONFIG), mesh)
    plugs = tree.flatten(places)["llm/plugs/cross_attention/cross_attention/query/kernel"]
    assert tuple(plugs.spec) == (None, "fsdp", "tensor")
    divided = jax.device_put(PARAMS, places)
    found = states(divided, jax.device_put(made, batch_shardings(made, mesh)))
    real = made.segments > 0
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(wanted)[real], rtol=1e-4, atol=1e-5)
    settings = Sampling(max_new_tokens=4)
    np.testing.assert_array_equal(
        generate(divided, CONFIG, made, settings, RUN).tokens, generate(PARAMS, CONFIG, made, settings, RUN).tokens
    )


def test_adapters_beside_the_plugs():
    lora = LoraConfig("default", 2, 4.0, ("llm/plugs/**",))
    config = dataclasses.replace(CONFIG, adapters=(lora,))
    adapted = adapters.add(jax.random.key(0), PARAMS, config)
    leaf = adapted["llm"]["plugs"]["cross_attention"]["cross_attention"]["key"]["adapters"]["default"]["lora_a"]
    assert leaf.shape == (2, 24, 2)
    made = batch([sample("a", "xIxxIxx")])
    np.testing.assert_array_equal(states(adapted, made, config=config), states(PARAMS, made))
    opened = tree.unflatten(
        {path: leaf + 0.1 if path.endswith("lora_b") else leaf for path, leaf in tree.flatten(adapted).items()}
    )
    found = states(opened, made, config=config)
    assert np.abs(np.asarray(found) - states(PARAMS, made)).max() > 1e-3
    np.testing.assert_allclose(found, states(adapters.merge(opened, config)[0], made), rtol=1e-4, atol=1e-4)


def test_adapters_beside_the_plugs_have_no_dropout():
    with pytest.raises(ValueError, match="has dropout, which acts in the blocks of the language model alone, not at llm/plugs/cross_attention"):
        adapters.add(jax.random.key(0), PARAMS, dataclasses.replace(CONFIG, adapters=(LoraConfig("d", 2, 4.0, ("llm/**",), 0.1),)))


def test_plugs_have_places_of_their_own_in_the_scan():
    def plug(*layers):
        return ports.Plug("p", "before", layers, lambda params, x: x)

    assert ports.period((plug(3, 7, 11),), 1, 12) == 4
    assert ports.period((plug(0, 7, 14),), 2, 20) == 14
    assert ports.period((plug(0, 7, 14),), 3, 20) == 3  # a period of 21 is not within 20 layers
    assert ports.period((plug(1),), 1, 2) == 2 and ports.period((plug(0, 1, 5),), 1, 6) == 1
    rows, present = ports.rows_for(plug(3, 7, 11), {"leaf": jnp.arange(3)}, 3, 4, 3)
    assert present is None and rows["leaf"].shape == (3,)


def test_what_is_computed_for_whom():
    shapes = multimodal.shapes(CONFIG)
    cost = training_flops(CONFIG, select(shapes, ("connector/**", "llm/plugs/**"), "here"))
    plugs = {path: leaf for path, leaf in tree.flatten(shapes).items() if path.startswith("llm/plugs/") and path.endswith("kernel")}
    media = sum(leaf.size for path, leaf in plugs.items() if "/key/" in path or "/value/" in path)
    text = sum(leaf.size for leaf in plugs.values()) - media
    assert cost.per_tile["llm"] == 6 * media * 3
    block = sum(leaf.size for path, leaf in tree.flatten(shapes).items() if path.startswith("llm/layers/") and path.endswith("kernel"))
    # the first layer has nothing trained in front of it
    assert cost.per_token["llm"] == 6 * text + 4 * block * 3 / 4 + 2 * block / 4
    assert cost.per_token["llm attention"] == 2 * 3 * 4 * 2 * 8 * 3
