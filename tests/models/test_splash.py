"""The TPU's kernel, interpreted, against the float32 reference: every rule it knows, with gradients, and divided over a mesh."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config
from mmjax.models import splash
from mmjax.models.attention import Mask, attention
from mmjax.parallel.mesh import make_mesh

LENGTH = 200  # two blocks, the second padded
PACKED = np.repeat([[1, 2, 0], [0, 1, 1]], [60, 100, 40], 1)
KEYS = np.repeat([[1, 0], [0, 0]], [90, 60], 1)
MASKS = {
    "causal": (Mask(), LENGTH),
    "full": (Mask(causal=False), LENGTH),
    "window": (Mask(window=70), LENGTH),
    "packed": (Mask(query_segments=PACKED, key_segments=PACKED), LENGTH),
    "padded": (Mask(causal=False, query_segments=PACKED, key_segments=KEYS), 150),  # most queries see nothing
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(splash, "BLOCKS", (128,))


def drawn(keys: int, heads: int, kv_heads: int, rows: int = 2):
    rng = np.random.default_rng(0)
    shapes = [(rows, LENGTH, heads, 16), (rows, keys, kv_heads, 16), (rows, keys, kv_heads, 16), (rows, LENGTH, heads, 16)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def both(function, q, k, v, pull):
    """The output, and the gradients of its product with `pull`."""

    def product(q, k, v):
        y = function(q, k, v)
        return (y * pull).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(product, (0, 1, 2), has_aux=True))(q, k, v)
    return y, *gradients


def compare(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kv_heads", [2, 1], ids=["mha", "gqa"])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_equals_the_reference(name, kv_heads):
    mask, keys = MASKS[name]
    arrays = drawn(keys, 2, kv_heads)
    capped = {"softcap": 2.0, "scale": 0.4} if name == "packed" else {"scale": 0.25}
    wanted = both(lambda *a: attention(*a, mask, backend="reference", **capped), *arrays)
    compare(both(lambda *a: splash.attention(*a, mask, interpret=True, **capped), *arrays), wanted)


@pytest.mark.usefixtures("small_blocks")
def test_a_mesh_divides_rows_heads_and_queries():
    """Two heads share their keys with two others on another device, which are given them anew."""
    mesh = make_mesh(config.Mesh(data=2, tensor=2, sequence=2), jax.devices())
    arrays = drawn(LENGTH, 4, 1)
    mask = Mask(window=70, query_segments=PACKED, key_segments=PACKED)
    wanted = both(lambda *a: attention(*a, mask, scale=0.25, backend="reference"), *arrays)
    compare(both(lambda *a: splash.attention(*a, mask, scale=0.25, mesh=mesh, interpret=True), *arrays), wanted)


def test_blocks_waste_little():
    wanted = {196: 256, 256: 256, 577: 640, 729: 768, 2048: 2048, 2880: 3072}
    assert {length: splash._whole(length, splash._block(length)) for length in wanted} == wanted


def on_tpu(monkeypatch):
    """A mesh of one TPU, on which nothing runs."""
    called = []
    monkeypatch.setattr(splash, "attention", lambda query, *_, **settings: called.append(settings) or query)
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")])), called


def test_auto_is_the_kernel_where_it_can(monkeypatch, caplog):
    mesh, called = on_tpu(monkeypatch)
    x = jnp.ones((1, 256, 1, 8))
    with caplog.at_level(logging.INFO, "mmjax"):
        for _ in range(2):
            attention(x, x, x, Mask(), mesh=mesh)
            attention(x, x, x, Mask(query_spans=np.ones((1, 256)), key_spans=np.ones((1, 256))), mesh=mesh)
        attention(x[:, :7], x, x, Mask(causal=False), mesh=mesh)
        attention(x, x, x, Mask(offset=jnp.int32(0)), mesh=mesh)
    assert len(called) == 2 and called[0]["mesh"] is mesh
    assert [line.split(": ")[1] for line in caplog.messages] == [
        "splash",
        "xla, since splash cannot do spans that see each other",
        "xla, since splash cannot do fewer than 128 queries or keys without computing more of padding",
        "xla, since splash cannot do a cache",
    ]


def test_what_it_cannot_do_by_name_is_an_error(monkeypatch):
    x = jnp.ones((1, 256, 1, 8))
    with pytest.raises(ValueError, match="is for TPUs alone"):
        attention(x, x, x, Mask(), backend="splash")
    mesh, _ = on_tpu(monkeypatch)
    for what, mask in {"free|prefix": Mask(free_keys=1), "cache": Mask(offset=3), "another length": Mask()}.items():
        with pytest.raises(ValueError, match=what):
            attention(x, x[:, :200], x[:, :200], mask, backend="splash", mesh=mesh)
    with pytest.raises(ValueError, match="bias"):
        attention(x, x, x, Mask(), bias=jnp.zeros((1, 1, 256, 256)), backend="splash", mesh=mesh)
