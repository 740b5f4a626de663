"""The attention function against a plain float64 computation, over every rule a mask knows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models.attention import Mask, attention

SEGMENTS = np.array([[0, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
MEDIA = np.array([[0, 0, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1]])
SPANS = np.array([[0, 1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 2, 2, 2]])
KEY_MEDIA = np.array([[1, 1, 2, 2, 0], [1, 2, 2, 0, 0]])
MASKS = {
    "causal": (Mask(), 7),
    "bidirectional": (Mask(causal=False), 7),
    "window": (Mask(window=3), 7),
    "packed_and_padded": (Mask(query_segments=SEGMENTS, key_segments=SEGMENTS), 7),
    "prefix": (Mask(query_spans=np.array([[1, 1, 1, 0, 0, 0, 0]] * 2), key_spans=np.array([[1, 1, 1, 0, 0, 0, 0]] * 2)), 7),
    "spans_beyond_a_window": (Mask(window=2, query_spans=SPANS, key_spans=SPANS), 7),
    "spans_within_a_window": (Mask(window=2, windowed_spans=True, query_spans=SPANS, key_spans=SPANS), 7),
    "all_media": (Mask(causal=False, query_media=MEDIA, key_media=KEY_MEDIA), 5),
    "last_medium": (Mask(causal=False, query_media=MEDIA, key_media=KEY_MEDIA, last_media_only=True), 5),
    "cached": (Mask(offset=4), 11),
    "free_keys": (Mask(free_keys=2), 9),
}


def may_see(mask: Mask, row: int, t: int, s: int) -> bool:
    """The rules again, one pair at a time."""
    if s < mask.free_keys:
        return True
    s -= mask.free_keys
    t_slot = t + mask.offset
    near = not mask.window or t_slot - s < mask.window
    allowed = not mask.causal or s <= t_slot
    together = mask.query_spans is not None and mask.query_spans[row, t] == mask.key_spans[row, s] > 0
    allowed = near and (allowed or together) if mask.windowed_spans else (near and allowed) or together
    if mask.query_segments is not None:
        allowed &= bool(mask.query_segments[row, t] == mask.key_segments[row, s] > 0)
    if mask.query_media is not None:
        q, k = mask.query_media[row, t], mask.key_media[row, s]
        allowed &= bool(k > 0 and (k == q if mask.last_media_only else k <= q))
    return bool(allowed)


def reference(q, k, v, mask, bias=None, softcap=0.0, scale=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = [s for s in range(k.shape[1]) if may_see(mask, b, t, s)]
        if not seen:
            continue
        scores = k[b, seen, h // group] @ q[b, t, h] * (scale or q.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[0, h, t, seen]
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, seen, h // group] / weights.sum()
    return out


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_equals_the_plain_computation(name, kv_heads):
    mask, keys = MASKS[name]
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 7, 4, 8)).astype(np.float32)
    k, v = (rng.normal(size=(2, keys, kv_heads, 8)).astype(np.float32) for _ in range(2))
    want = reference(q, k, v, mask)
    for backend in ("reference", "xla"):
        np.testing.assert_allclose(attention(q, k, v, mask, backend=backend), want, atol=2e-6)


def test_bias_softcap_and_scale():
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(1, 5, 2, 4)).astype(np.float32) for _ in range(3))
    bias = rng.normal(size=(1, 2, 5, 5)).astype(np.float32)
    want = reference(q, k, v, Mask(), bias, softcap=2.0, scale=0.7)
    np.testing.assert_allclose(attention(q, k, v, Mask(), bias=bias, softcap=2.0, scale=0.7), want, atol=2e-6)


def test_a_query_that_sees_nothing_gives_zero_and_finite_gradients():
    mask = Mask(query_segments=np.array([[0, 1]]), key_segments=np.array([[0, 1]]))
    q = k = v = jnp.ones((1, 2, 1, 4))
    assert not attention(q, k, v, mask)[0, 0].any()
    for gradient in jax.grad(lambda *a: (attention(*a, mask) ** 2).sum(), (0, 1, 2))(q, k, v):
        assert jnp.isfinite(gradient).all()


def test_what_a_backend_cannot_do_is_said():
    x = jnp.ones((1, 2, 1, 8))
    with pytest.raises(ValueError, match="softcap"):
        attention(x, x, x, Mask(), softcap=1.0, backend="cudnn")
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        attention(x, x, x, Mask(), backend="cudnn")
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        attention(x, x, x, Mask(), backend="flash")
