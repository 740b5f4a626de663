"""The one attention function and the one description of what may see what.

A `Mask` is structure (segments, spans, a window, media ids). It becomes a boolean array only inside a backend that needs one.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmjax.models import splash

log = logging.getLogger(__name__)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["query_segments", "key_segments", "query_spans", "key_spans", "query_media", "key_media", "seen_media", "offset"],
    meta_fields=["causal", "window", "windowed_spans", "last_media_only", "free_keys"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Who may see whom. Every rule that is given must allow; a query that may see nothing yields 0.

    causal           query t sees keys at or before slot offset + t
    window           ... and not further back than this many slots, its own included (0 = no limit)
    query/key_segments   int [rows, T] / [rows, S]; equal and non-zero may see each other (packing, padding)
    query/key_spans      int; equal and non-zero see each other whatever `causal` says (prefix-LM, an image's own tokens)
    windowed_spans   ... within the window; else whatever that says, too
    query/key_media      int; query: number of media begun so far (0 = none), key: which medium it belongs to, from 1.
                         A query sees all media begun, or with `last_media_only` the latest one (Flamingo, arXiv 2204.14198)
    seen_media       bool [rows, T, media], in the place of query_media: which media each query sees, be they what they may
    free_keys        the first so many keys are seen by all (prefix tuning); slots are counted after them
    """

    causal: bool = True
    window: int = 0
    windowed_spans: bool = False
    query_segments: Any = None
    key_segments: Any = None
    query_spans: Any = None
    key_spans: Any = None
    query_media: Any = None
    key_media: Any = None
    seen_media: Any = None
    last_media_only: bool = False
    offset: jax.Array | int = 0
    free_keys: int = 0

    def allowed(self, queries: int, keys: int) -> jax.Array:
        """bool [rows or 1, 1, queries, keys + free_keys]: the mask as an array."""
        query = jnp.arange(queries)[:, None] + self.offset
        key = jnp.arange(keys)[None, :]
        allowed = jnp.ones((1, queries, keys), bool)
        if self.causal:
            allowed = allowed & (key <= query)
        near = query - key < self.window if self.window else jnp.ones((1, 1, 1), bool)
        if not self.windowed_spans:
            allowed = allowed & near
        if self.query_spans is not None:
            q, k = self.query_spans[:, :, None], self.key_spans[:, None, :]
            allowed = allowed | ((q == k) & (q > 0))
        if self.windowed_spans:
            allowed = allowed & near
        if self.query_segments is not None:
            q, k = self.query_segments[:, :, None], self.key_segments[:, None, :]
            allowed = allowed & (q == k) & (q > 0)
        if self.query_media is not None:
            q, k = self.query_media[:, :, None], self.key_media[:, None, :]
            allowed = allowed & (k > 0) & ((k == q) if self.last_media_only else (k <= q))
        if self.seen_media is not None:
            number = self.key_media[:, None, :]
            seen = jnp.take_along_axis(jnp.asarray(self.seen_media) > 0, jnp.maximum(number - 1, 0), 2)
            allowed = allowed & (number > 0) & seen
        if self.free_keys:
            free = jnp.ones((*allowed.shape[:2], self.free_keys), bool)
            allowed = jnp.concatenate([free, allowed], -1)
        return allowed[:, None]


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    *,
    bias: jax.Array | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped keys (arXiv 1706.03762, 2305.13245).

    query [rows, T, heads, dim]; key, value [rows, S, kv_heads, dim]; bias broadcasts to [rows, heads, T, S].
    Returns [rows, T, heads, dim]; rows of queries that see nothing are 0, with finite gradients.

    backend: "reference" computes in float32 throughout; "xla" keeps the products in the inputs' dtype and the softmax in float32;
    "cudnn" is NVIDIA's fused kernel (float16/bfloat16, no softcap); "splash" is the fused kernel for TPUs (see mmjax.models.splash);
    "auto" is "splash" on TPUs where that can do what is asked, which is logged once for each pair of lengths, else "xla".
    mesh: of the arrays' devices; None = there is one device.
    Raises ValueError for what a backend cannot do.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if backend == "auto":
        backend = _choice(query, key, mask, bias, mesh)
    elif backend == "splash":
        refused = splash.refusal(query, key, mask, bias)
        if refused or not on_tpu(mesh):
            raise ValueError(f"the splash attention backend {_cannot(refused)}; choose attention='auto' or 'xla'")
    if backend == "splash":
        return splash.attention(query, key, value, mask, softcap=softcap, scale=scale, mesh=mesh)
    allowed = mask.allowed(query.shape[1], key.shape[1] - mask.free_keys)
    if backend == "cudnn":
        return _cudnn(query, key, value, allowed, bias, softcap, scale)
    if backend == "reference":
        q, k, v = (a.astype(jnp.float32) for a in (query, key, value))
        with jax.default_matmul_precision("highest"):
            return _einsum(q, k, v, allowed, bias, softcap, scale).astype(query.dtype)
    if backend != "xla":
        raise ValueError(f"unknown attention backend {backend!r}; known: auto, reference, xla, cudnn, splash")
    return _einsum(query, key, value, allowed, bias, softcap, scale)


def _choice(query: jax.Array, key: jax.Array, mask: Mask, bias: jax.Array | None, mesh: Mesh | None) -> str:
    """What "auto" is here, by the devices that the arrays will live on, which need not be those of this process."""
    if not on_tpu(mesh):
        return "xla"
    refused = splash.refusal(query, key, mask, bias)
    if refused is None and min(query.shape[1], key.shape[1]) < splash.LANES:
        refused = f"fewer than {splash.LANES} queries or keys without computing more of padding"
    if refused is None and mesh is None and jax.device_count() > 1:
        refused = "arrays on several devices whose mesh it is not told"
    _tell(query.shape[1], key.shape[1], refused)
    return "xla" if refused else "splash"


def on_tpu(mesh: Mesh | None) -> bool:
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform == "tpu"


def _cannot(refused: str | None) -> str:
    return f"cannot do {refused}" if refused else "is for TPUs alone"


@functools.cache
def _tell(queries: int, keys: int, refused: str | None) -> None:
    why = f"xla, since splash {_cannot(refused)}" if refused else "splash"
    log.info("attention of %d queries to %d keys: %s", queries, keys, why)


def _einsum(query, key, value, allowed, bias, softcap, scale):
    rows, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    query = query.reshape(rows, length, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", query * jnp.asarray(scale, query.dtype), key)
    scores = scores.astype(jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (bias.shape[0], heads, *bias.shape[2:]))
        scores = scores + bias.reshape(bias.shape[0], kv_heads, heads // kv_heads, *bias.shape[2:])
    allowed = allowed[:, :, None]
    scores = jnp.where(allowed, scores, -1e30)
    weights = jnp.where(allowed, jax.nn.softmax(scores, -1), 0)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights.astype(value.dtype), value)
    return mixed.reshape(rows, length, heads, dim)


def _cudnn(query, key, value, allowed, bias, softcap, scale):
    if softcap:
        raise ValueError("the cudnn attention backend has no softcap; choose attention='xla'")
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        raise ValueError(f"the cudnn attention backend computes in float16 or bfloat16, not {query.dtype}")
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    seen = jnp.broadcast_to(allowed, (shape[0], 1, *shape[2:]))
    full = jnp.broadcast_to(seen, shape)
    mixed = jax.nn.dot_product_attention(query, key, value, bias, full, scale=scale, implementation="cudnn")
    return jnp.where(seen.any(-1)[:, 0, :, None, None], mixed, 0)
