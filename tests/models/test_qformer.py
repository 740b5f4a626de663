"""The Q-Former: who sees whom, what it has parameters for, and the losses of its first stage."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import tree
from mmjax.models import connectors, image_text, qformer
from mmjax.models.encoder_config import ConnectorConfig
from mmjax.models.image_text import Negatives
from mmjax.models.qformer import Text

CONFIG = ConnectorConfig(
    "qformer",
    in_width=10,
    out_width=12,
    positions=5,
    depth=5,
    hidden_width=8,
    latents=3,
    heads=2,
    text_vocab=20,
    text_positions=7,
    contrast_width=6,
)
RNG = np.random.default_rng(0)
FEATURES = jnp.asarray(RNG.standard_normal((4, 5, 10)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(1, 19, (4, 6)))
SEGMENTS = jnp.asarray(np.arange(6) < np.array([[6], [3], [4], [0]]), jnp.int32)  # the last picture has no text
TEXT = Text(TOKENS, SEGMENTS)
read, read_behind, connect = (jax.jit(f, static_argnums=1) for f in (qformer.read, qformer.read_behind, qformer.connect))
stage1_losses = jax.jit(image_text.stage1_losses, static_argnums=1)


@pytest.fixture(scope="module")
def params():
    fresh = jax.jit(qformer.init, static_argnums=1)(jax.random.key(0), CONFIG)
    leaves, structure = jax.tree.flatten(fresh)
    drawn = [leaf + 0.3 * jnp.asarray(RNG.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, drawn)


def test_only_the_layers_that_read_pictures_have_cross_attention():
    shapes = tree.flatten(jax.eval_shape(lambda: qformer.init(jax.random.key(0), CONFIG)))
    assert {leaf.shape[0] for path, leaf in shapes.items() if path.startswith("cross/layers/")} == {3}
    assert {leaf.shape[0] for path, leaf in shapes.items() if path.startswith("layers/")} == {5}
    silent = dataclasses.replace(CONFIG, text_vocab=0, contrast_width=0)
    left = tree.flatten(jax.eval_shape(lambda: qformer.init(jax.random.key(0), silent)))
    gone = set(shapes) - set(left)
    assert gone and all(path.startswith(("heads/", "embed/embedding", "embed/positions", "layers/text_mlp")) for path in gone)


def test_queries_alone_are_the_queries_that_written_text_stands_behind(params):
    """UniLM's mask: queries see no text, and a word sees the queries and the words before it."""
    alone = read(params, CONFIG, FEATURES)
    behind = read_behind(params, CONFIG, alone.seen, TEXT).states
    changed = TEXT._replace(tokens=TEXT.tokens.at[:, 3].set(19))
    other = read_behind(params, CONFIG, alone.seen, changed).states
    assert np.array_equal(other[:, :3], behind[:, :3]) and not np.allclose(other[:3, 3], behind[:3, 3])
    shown = read(params, CONFIG, FEATURES[::-1])
    assert not np.allclose(read_behind(params, CONFIG, shown.seen, TEXT).states, behind)


def test_queries_and_text_see_each_other_and_padding_is_not_seen(params):
    both = read(params, CONFIG, FEATURES, TEXT).states
    later = TEXT._replace(tokens=TEXT.tokens.at[0, 5].set(19))
    assert not np.allclose(read(params, CONFIG, FEATURES, later).states[0, :3], both[0, :3])
    padded = TEXT._replace(tokens=jnp.where(SEGMENTS > 0, TOKENS, 7))
    np.testing.assert_allclose(read(params, CONFIG, FEATURES, padded).states[:, :3], both[:, :3], atol=1e-6)
    np.testing.assert_allclose(both[3, :3], read(params, CONFIG, FEATURES).states[3], atol=1e-5)


def test_a_connector_reads_tiles_with_the_text_beside_them(params):
    tiles, beside = FEATURES.reshape(2, 2, 5, 10), Text(TOKENS.reshape(2, 2, 6), SEGMENTS.reshape(2, 2, 6))
    out = jax.jit(lambda params: connectors.connect(params, CONFIG, tiles, text=beside))(params)
    assert out.shape == (2, 2, 3, 12)
    own = Text(TOKENS[1:2, :3], SEGMENTS[1:2, :3])  # alone, without padding
    np.testing.assert_allclose(out[0, 1], connect(params, CONFIG, FEATURES[1:2], own)[0], atol=1e-5)
    assert not np.allclose(out[0, 1], connect(params, CONFIG, FEATURES[1:2])[0])


def test_text_that_it_cannot_read_is_refused(params):
    with pytest.raises(ValueError, match="positions for 7"):
        qformer.read_text(params, CONFIG, Text(jnp.ones((1, 8), int), jnp.ones((1, 8), int)))
    with pytest.raises(ValueError, match="reads no text"):
        qformer.read_text(params, dataclasses.replace(CONFIG, text_vocab=0), TEXT)


def test_a_picture_without_text_counts_nowhere(params):
    given = Negatives(jnp.array([1, 2, 0, 3]), jnp.array([2, 0, 1, 3]))
    whole = stage1_losses(params, CONFIG, FEATURES, TOKENS, SEGMENTS, None, negatives=given)
    pairs = Negatives(given.pictures[:3], given.texts[:3])
    part = stage1_losses(params, CONFIG, FEATURES[:3], TOKENS[:3], SEGMENTS[:3], None, negatives=pairs)
    for name, value in part.items():
        np.testing.assert_allclose(whole[name], value, rtol=1e-5, err_msg=name)
    assert set(part) == {"contrastive", "matching", "language", "loss"}


def test_hard_negatives_belong_to_others_and_look_alike(params):
    scores = jnp.asarray([[9.0, 8.0, 0.0, 9.0], [7.0, 9.0, 1.0, 9.0], [0.0, 5.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    real, keys = jnp.array([True, True, True, False]), jax.random.split(jax.random.key(0), 200)
    drawn = jax.jit(jax.vmap(lambda key: image_text.hard_negatives(key, scores, real)))(keys)
    for found in drawn:
        assert (found[:, :3] != jnp.arange(3)).all() and (found[:, :3] != 3).all()
    assert (drawn.texts[:, 0] == 1).mean() > 0.95  # the second text is as near to the first picture as its own


def test_every_leaf_but_the_projection_learns_from_the_first_stage(params):
    def loss(params):
        return stage1_losses(params, CONFIG, FEATURES, TOKENS, SEGMENTS, jax.random.key(1))["loss"]

    for path, gradient in tree.flatten(jax.jit(jax.grad(loss))(params)).items():
        assert np.isfinite(gradient).all()
        assert path.startswith("project_out") == (not np.any(gradient)), path


def test_what_it_says_of_a_picture_is_what_the_text_loss_finds_likely(params):
    said = jax.jit(lambda params: image_text.write(params, CONFIG, FEATURES[:1], 4))(params)
    text = Text(jnp.concatenate([jnp.array([[19]]), said], 1), jnp.ones((1, 5), int))
    behind = read_behind(params, CONFIG, read(params, CONFIG, FEATURES[:1]).seen, text).states
    logits = image_text.language_logits(params, CONFIG, behind)
    assert logits[0, :4].argmax(-1).tolist() == said[0].tolist()
