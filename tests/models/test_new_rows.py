"""New rows of the vocabulary laid over the tables equal the tables with the rows in them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import tree
from mmjax.config import Mesh
from mmjax.models import multimodal, new_rows
from mmjax.models.config import Execution
from mmjax.parallel.mesh import make_mesh
from mmjax.parallel.sharding import param_shardings
from tests.models import tiny

HEADS = {
    "untied": {},
    "tied": {"tied_head": True},
    "bias": {"head_bias": True},
    "tied, bias, scaled": {"tied_head": True, "head_bias": True, "embed_scale": 3.0, "logit_softcap": 5.0},
}
FRESH, KNOWN = (64, 65, 7), (20, 21, 9)  # of a vocabulary of 64
IDS = (7, 9, 20, 21, 64, 65)


def base(**head):
    config = dataclasses.replace(tiny.model_config(layers=1), vision=None, connector=None)
    config = dataclasses.replace(config, llm=dataclasses.replace(config.language, **head))
    return tiny.random_params(config), config


@functools.partial(jax.jit, static_argnames="config")
def run(params, config, tokens):
    """States [rows, length, width] and logits [rows, length, vocab]."""
    batch = dataclasses.replace(tiny.rows([[8], [8]], 8, images=False), tokens=tokens)
    states = multimodal.hidden(params, config, batch, Execution())
    return states, multimodal.head(params, config, states)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_rows_over_a_table_equal_a_table_that_holds_them(head):
    params, config = new_rows.add(*base(**head), FRESH, KNOWN)
    assert config.language.new_rows == IDS and config.language.vocab_size == 66 and config.language.beyond == 2
    shapes = {path: leaf.shape for path, leaf in tree.flatten(multimodal.shapes(config)).items()}
    assert {path: leaf.shape for path, leaf in tree.flatten(params).items()} == shapes
    tokens = np.array([[64, 3, 7, 9, 65, 20, 21, 63], [0, 1, 64, 64, 8, 10, 62, 22]], np.int32)
    drawn = {
        path: leaf + 0.3 * jax.random.normal(jax.random.key(len(path)), leaf.shape) if path in new_rows.LEAVES else leaf
        for path, leaf in tree.flatten(params).items()
    }
    for leaves in (params, tree.unflatten(drawn)):
        merged, plain = new_rows.merge(leaves, config)
        assert plain.language == dataclasses.replace(config.language, new_rows=(), beyond=0)
        assert not set(new_rows.LEAVES) & set(tree.flatten(merged))
        apart = run.__wrapped__  # not fused, so that the same product is rounded alike
        (states, logits), (theirs, wanted) = apart(leaves, config, tokens), apart(merged, plain, tokens)
        np.testing.assert_array_equal(states, theirs)
        old = np.setdiff1d(np.arange(66), IDS)
        np.testing.assert_array_equal(logits[..., old], wanted[..., old])
        np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-6)  # a narrow product is added up in another order


def test_what_rows_begin_as():
    before, config = base(head_bias=True)
    flat = tree.flatten(before)
    embedding, kernel, bias = (np.asarray(flat[table]) for table, _, _ in new_rows.TABLES)
    params, wider = new_rows.add(before, config, FRESH, KNOWN)
    found = tree.flatten(params)
    for path, table in zip(new_rows.LEAVES, (embedding, kernel.T, bias)):
        mean = table.mean(0)
        for id, row in zip(IDS, np.asarray(found[path])):
            np.testing.assert_allclose(row, mean if id in FRESH else table[id], rtol=1e-6, atol=1e-7)
    # Rows that were there already stay as they are when others come.
    changed = tree.merge(params, {"llm": {"embed": {"new_rows": params["llm"]["embed"]["new_rows"] + 1}}})
    more, widest = new_rows.add(changed, wider, (3, 66), (7,))
    assert widest.language.new_rows == (3, 7, 9, 20, 21, 64, 65, 66)
    np.testing.assert_array_equal(
        more["llm"]["embed"]["new_rows"][1:-1], changed["llm"]["embed"]["new_rows"]
    )
    many, _ = new_rows.add(before, config, range(64, 1064), start="normal", seed=3)
    drawn = np.asarray(many["llm"]["embed"]["new_rows"])
    np.testing.assert_allclose(drawn.std(0), embedding.std(0), rtol=0.1)
    assert np.abs(drawn.mean(0) - embedding.mean(0)).max() < 0.2 * embedding.std()
    assert new_rows.add(before, config, ()) == (before, config)


def test_ids_that_leave_a_gap_are_refused():
    with pytest.raises(ValueError, match="leave a gap"):
        new_rows.add(*base(), (66,))


def test_tables_divided_over_a_mesh():
    params, config = new_rows.add(*base(), FRESH, KNOWN)
    tokens = np.array([[64, 3, 7, 9, 65, 20, 21, 63], [0, 1, 64, 64, 8, 10, 62, 22]], np.int32)
    mesh = make_mesh(Mesh(fsdp=2, tensor=4))
    placed = jax.device_put(params, param_shardings(params, mesh))
    assert not placed["llm"]["head"]["kernel"].sharding.is_fully_replicated
    assert placed["llm"]["head"]["new_rows"].sharding.is_fully_replicated
    for ours, whole in zip(run(placed, config, tokens), run(params, config, tokens)):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_rows_alone():
    params, config = new_rows.add(*base(tied_head=True), (64, 65))
    tokens = np.array([[1, 2, 64, 3, 4, 5, 6, 7]] * 2, np.int32)

    def loss(rows):
        joined = tree.merge(params, {"llm": {"embed": {"new_rows": rows}}})
        return jax.nn.log_softmax(run(joined, config, tokens)[1])[:, 1, 64].sum()

    gradient = jax.grad(loss)(params["llm"]["embed"]["new_rows"])
    assert gradient.shape == (2, 32) and (jnp.abs(gradient).sum(1) > 0).all()
