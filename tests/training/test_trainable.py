"""Globs choose leaves; the split and its inverse."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import tree
from mmjax.errors import UserError
from mmjax.training.trainable import join, select, shapes, split

PARAMS = tree.unflatten(
    {
        "vision/layers/mlp/up/kernel": jnp.arange(4 * 3 * 2.0, dtype=jnp.bfloat16).reshape(4, 3, 2),
        "vision/layers/norm/scale": jnp.ones((4, 3), jnp.bfloat16),
        "connector/layers_0/kernel": jnp.ones((3, 5)),
        "llm/head/kernel": jnp.ones((5, 7)),
    }
)


def test_whole_leaves_are_split_and_joined():
    selection = select(PARAMS, ("connector/**", "llm/head/*"), "stages.a.trainable")
    trainable, frozen = split(PARAMS, selection, "float32")
    assert list(tree.flatten(trainable)) == ["connector/layers_0/kernel", "llm/head/kernel"]
    assert list(tree.flatten(frozen)) == ["vision/layers/mlp/up/kernel", "vision/layers/norm/scale"]
    assert selection.count(PARAMS) == 15 + 35
    joined = tree.flatten(join(trainable, frozen, selection))
    for path, leaf in tree.flatten(PARAMS).items():
        np.testing.assert_array_equal(joined[path], leaf)


def test_a_layer_range_is_a_leaf_of_its_own():
    selection = select(PARAMS, ("vision/layers[1:3]/**",), "stages.a.trainable")
    trainable, frozen = split(PARAMS, selection, "float32")
    kernel = trainable["vision"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (2, 3, 2) and kernel.dtype == jnp.float32
    assert selection.count(PARAMS) == 2 * 6 + 2 * 3
    assert shapes(PARAMS, selection, "float32")["vision"]["layers"]["norm"]["scale"].shape == (2, 3)
    trainable["vision"]["layers"]["mlp"]["up"]["kernel"] = kernel + 0.001
    joined = join(trainable, frozen, selection)["vision"]["layers"]["mlp"]["up"]["kernel"]
    original = PARAMS["vision"]["layers"]["mlp"]["up"]["kernel"].astype(jnp.float32)
    assert joined.dtype == jnp.float32  # the small change is not lost in the frozen leaf's bfloat16
    np.testing.assert_array_equal(joined, original.at[1:3].add(0.001))


def test_open_and_overlapping_ranges():
    assert select(PARAMS, ("vision/layers[-1:]/norm/scale",), "k").ranges == {"vision/layers/norm/scale": (3, 4)}
    assert select(PARAMS, ("vision/layers[0:2]/norm/*", "vision/layers[2:3]/norm/*"), "k").ranges == {
        "vision/layers/norm/scale": (0, 3)
    }
    assert select(PARAMS, ("vision/layers[:2]/norm/*", "vision/**/scale"), "k").ranges == {}


@pytest.mark.parametrize(
    "globs, words",
    [
        (("connectors/**",), ["stages.a.trainable", "'connectors/**'", "connector/**"]),
        (("vision/layers[2:9]/**",), ["stages.a.trainable", "layers 0 to 3"]),
        (("vision/layers[2:2]/**",), ["chooses no layers"]),
        (("connector/layers_0[0:1]/**",), ["not stacked"]),
        (("vision/layers[0:1]/**", "vision/layers[3:4]/**"), ["gap"]),
        ((), ["empty"]),
    ],
)
def test_what_cannot_be_chosen_is_named(globs, words):
    with pytest.raises(UserError) as error:
        select(PARAMS, globs, "stages.a.trainable")
    for word in words:
        assert word in str(error.value)
