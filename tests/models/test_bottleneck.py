import dataclasses

import jax
import numpy as np
import pytest

from mmjax import tree
from mmjax.models import adapters, bottleneck, multimodal
from mmjax.models.config import Execution
from mmjax.models.tuning_config import BottleneckConfig
from tests.models import tiny

EVERYWHERE = BottleneckConfig(
    "houlsby", width=6, places=("attention", "mlp"), reads="output", activation="silu", norm_before=True, parts=("llm", "vision")
)
PFEIFFER = BottleneckConfig("pfeiffer", reduction=4, norm_after=True, layers=(1, 2))
PARALLEL = BottleneckConfig("parallel", reduction=8, reads="input", scale=4.0, places=("attention", "mlp"))
RUN = Execution()


def logits(params, config, batch):
    return np.asarray(multimodal.head(params, config, multimodal.hidden(params, config, batch, RUN)))


@pytest.fixture(scope="module")
def base():
    config = tiny.model_config()
    params = tiny.random_params(config)
    batch = tiny.rows([[9, 6], [14]], 16)
    return config, params, batch, logits(params, config, batch)


def with_adapter(base, *added):
    config = dataclasses.replace(base[0], adapters=added)
    return config, adapters.add(tiny.key(), base[1], config)


@pytest.mark.parametrize("adapter", [EVERYWHERE, PFEIFFER, PARALLEL], ids=lambda a: a.name)
def test_a_fresh_bottleneck_is_the_base(base, adapter):
    config, params = with_adapter(base, adapter)
    np.testing.assert_array_equal(logits(params, config, base[2]), base[3])
    leaf = params["llm"]["plugs"][adapter.name]["mlp"]["down"]
    assert leaf.shape == (len(adapter.layers) or 4, 32, bottleneck.inner_width(adapter, 32)) and float(abs(leaf).max()) > 0


def test_rows_for_its_layers_alone_and_samples_that_do_not_meet(base):
    """Random leaves: every one of them counts, packed samples are those alone, and layers that lack it are untouched."""
    config = dataclasses.replace(base[0], adapters=(EVERYWHERE, PFEIFFER, PARALLEL))
    params = tree.merge(tiny.random_params(config), base[1])
    assert params["llm"]["plugs"]["pfeiffer"]["mlp"]["up"].shape == (2, 8, 32)
    assert params["vision"]["plugs"]["houlsby"]["attention"]["down"].shape == (3, 24, 6)
    got = logits(params, config, base[2])
    assert np.abs(got - base[3]).max() > 0.01
    alone = tiny.rows([[9], [6], [14]], 16)
    tokens = np.zeros_like(alone.tokens)
    tokens[0, :9], tokens[1, :6], tokens[2, :14] = base[2].tokens[0, :9], base[2].tokens[0, 9:15], base[2].tokens[1, :14]
    apart = logits(params, config, dataclasses.replace(alone, tokens=tokens, images=base[2].images))
    for packed, single in ((got[0, :9], apart[0, :9]), (got[0, 9:15], apart[1, :6]), (got[1, :14], apart[2, :14])):
        np.testing.assert_allclose(packed, single, rtol=1e-4, atol=1e-4)
    batch = jax.tree.map(np.asarray, base[2])

    def total(leaves):
        return multimodal.head(tree.merge(params, leaves), config, multimodal.hidden(tree.merge(params, leaves), config, batch, RUN)).sum()

    plugs = {part: {"plugs": params[part]["plugs"]} for part in ("llm", "vision")}
    gradients = tree.flatten(jax.grad(total)(plugs))
    unread = [path for path, leaf in gradients.items() if not float(abs(leaf).max()) and not path.startswith("vision/")]
    assert not unread
    last = gradients["vision/plugs/houlsby/mlp/up"]  # the connector reads the state in front of the last block
    assert float(abs(last[1]).max()) and not float(abs(last[2]).max())


@pytest.mark.parametrize("part", ["encoder"])
def test_parts_that_are_not_there_are_named(base, part):
    with pytest.raises(ValueError, match="no blocks of 'encoder'"):
        with_adapter(base, BottleneckConfig("x", parts=(part,)))
    with pytest.raises(ValueError, match=r"layers \[4\] of llm, which has 4"):
        with_adapter(base, BottleneckConfig("x", layers=(3, 4)))
