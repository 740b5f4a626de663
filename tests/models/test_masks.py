"""Models whose prompts or images are seen both ways: packed = unpacked, batch = single, cached = whole, one device = eight."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mmjax import config as recipes
from mmjax.batch import Batch
from mmjax.data.collation import collate
from mmjax.data.encoding import Example
from mmjax.inference.generate import generate, pad_prompt
from mmjax.inference.sampling import Sampling
from mmjax.models import multimodal
from mmjax.models.config import Execution, ModelConfig
from mmjax.parallel.mesh import make_mesh
from mmjax.parallel.sharding import batch_shardings, param_shardings
from tests.models import tiny

RUN = Execution()
RNG = np.random.default_rng(0)


def git_like(base: ModelConfig) -> ModelConfig:
    """Learned positions and a norm for the text alone; no window."""
    llm = dataclasses.replace(
        base.language, learned_positions=32, embed_norm=True, media_as_they_are=True, block=dataclasses.replace(base.language.block, rope=None)
    )
    return dataclasses.replace(base, llm=llm, mask="media")


BASE = tiny.model_config(layers=3, windows=(3, 0))
MODELS = {
    "prefix": dataclasses.replace(BASE, mask="prefix"),
    "media": dataclasses.replace(BASE, mask="media"),
    "media as they are": git_like(tiny.model_config(layers=2)),
}
LAYOUTS = ("a####bcDE", "####fGH", "ijK", "####l####mNO", "pq####R", "####sT", "uV", "w####xyzABC")


def example(layout: str) -> Example:
    """A small letter is a token, a capital a supervised one, #### an image."""
    ids = np.array([0 if char == "#" else ord(char) % 50 + 3 for char in layout], np.int32)
    is_media = np.array([char == "#" for char in layout])
    media = np.where(is_media, np.cumsum(is_media) - 1, -1).astype(np.int32)
    labels = np.where([char.isupper() for char in layout], ids, -100).astype(np.int32)
    count = layout.count("####")
    pixels = RNG.integers(0, 256, (count, 28, 28, 3), dtype=np.uint8) if count else None
    return Example(layout, ids, labels, media, ({"path": "x"},) * count, pixels, tile_tokens=4)


EXAMPLES = [example(layout) for layout in LAYOUTS]


@functools.partial(jax.jit, static_argnames="config")
def logits(params, config, batch):
    return multimodal.head(params, config, multimodal.hidden(params, config, batch, RUN))


def collated(config: ModelConfig, rows, **settings) -> Batch:
    llm = config.language
    return collate(rows, mask=config.mask, media_positions=not llm.media_as_they_are, media_shape=(28, 28, 3), **settings)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    config = MODELS[request.param]
    params = tiny.random_params(config)
    return config, params, np.asarray(logits(params, config, collated(config, [[e] for e in EXAMPLES], length=24, tiles=8)))


def test_packed_equals_unpacked_and_batch_equals_single(model):
    config, params, alone = model
    packed = collated(config, [EXAMPLES[:2], EXAMPLES[2:4], EXAMPLES[4:7], EXAMPLES[7:], *[[]] * 4], length=24, tiles=8)
    found = np.asarray(logits(params, config, packed))
    number = 0
    for row, held in enumerate((2, 2, 3, 1)):
        for segment in range(1, held + 1):
            at = np.asarray(packed.segments[row]) == segment
            np.testing.assert_allclose(found[row, at], alone[number, : at.sum()], rtol=1e-5, atol=1e-5)
            number += 1
    for number, one in enumerate(EXAMPLES[:2]):
        single = logits(params, config, collated(config, [[one]]))
        np.testing.assert_allclose(single[0], alone[number, : len(one.ids)], rtol=1e-5, atol=1e-5)


def test_eight_devices_equal_one(model):
    config, params, alone = model
    mesh = make_mesh(recipes.Mesh(data=4, fsdp=2), jax.devices())
    placed = jax.device_put(params, param_shardings(params, mesh))
    batch = collated(config, [[e] for e in EXAMPLES], length=24, tiles=2, groups=8)
    found = logits(placed, config, jax.device_put(batch, batch_shardings(batch, mesh)))
    real = np.asarray(batch.segments) > 0
    np.testing.assert_allclose(np.asarray(found)[real], alone[real], rtol=1e-4, atol=1e-5)


def test_what_follows_is_seen_within_a_span_alone(model):
    """A changed token changes what stands before it only where they share a span."""
    config, params, alone = model
    batch = collated(config, [[e] for e in EXAMPLES], length=24, tiles=8)
    tokens = np.array(batch.tokens)
    tokens[0, 6] = 60  # in "a####bcDE" the last token of the prompt
    changed = np.asarray(logits(params, config, dataclasses.replace(batch, tokens=tokens)))
    moved = np.abs(changed - alone)[0].max(-1) > 1e-4
    assert moved[6:9].all() and moved[:6].all() == (config.mask == "prefix") == moved[:6].any()
    assert np.array_equal(changed[1:], alone[1:])


def test_generation_reads_prompts_as_a_whole_pass_does(model):
    """Greedy ids with a cache are those of whole passes over prompt and answer, whatever the row's padding."""
    config, params, _ = model
    prompts = [dataclasses.replace(e, labels=np.full_like(e.labels, -100)) for e in EXAMPLES[:3]]
    batch = collated(config, [[e] for e in prompts])
    new = generate(params, config, batch, Sampling(max_new_tokens=4), RUN).tokens
    for e, row in zip(EXAMPLES, new):
        ids, n = np.concatenate([e.ids, row[:-1]]).astype(np.int32), len(row) - 1
        labels = np.concatenate([np.full(len(e.ids), -100), row[:-1]]).astype(np.int32)
        whole = dataclasses.replace(e, ids=ids, labels=labels, media=np.concatenate([e.media, np.full(n, -1)]))
        found = logits(params, config, collated(config, [[whole]], length=24, tiles=8))
        assert np.argmax(found[0, len(e.ids) - 1 : len(ids)], -1).tolist() == row.tolist()


def test_padding_on_the_left_moves_spans_along():
    batch = pad_prompt(collated(MODELS["media"], [[EXAMPLES[0]], [EXAMPLES[1]]]))
    assert batch.spans.shape == batch.tokens.shape == (2, 32)
    assert ((batch.spans > 0) == (batch.media >= 0)).all()
