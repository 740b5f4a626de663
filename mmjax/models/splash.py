"""Attention on TPUs by the splash kernel of jax.experimental.pallas.ops.tpu, which never holds scores outside of its blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax.models.stack import KEPT
from mmjax.parallel.mesh import DATA_AXES, data_shards

if TYPE_CHECKING:
    from mmjax.models.attention import Mask

LANES = 128  # of a TPU's vector unit: lengths and blocks are multiples of it
BLOCKS = (512, 640, 384, 256, 128)  # the first of those that cost the same


def refusal(query: jax.Array, key: jax.Array, mask: Mask, bias: jax.Array | None) -> str | None:
    """What the kernel cannot do of this, None where it can do all of it."""
    refused = {
        "a bias of the scores": bias is not None,
        "spans that see each other": mask.query_spans is not None,
        "a mask over media": mask.query_media is not None or mask.seen_media is not None,
        "keys that all see (a prefix)": mask.free_keys > 0,
        "a cache": not isinstance(mask.offset, int) or mask.offset != 0,
        "causal or windowed attention to another length": (mask.causal or mask.window > 0) and query.shape[1] != key.shape[1],
        f"{query.dtype}": query.dtype not in (jnp.float32, jnp.bfloat16),
    }
    return next((what for what, found in refused.items() if found), None)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    *,
    softcap: float = 0.0,
    scale: float = 1.0,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As mmjax.models.attention.attention, of what `refusal` does not refuse.

    On a mesh each device computes its own rows and heads and, of a text that is divided over `sequence`, its own queries, for which
    all keys are gathered. Rows or heads that their axes do not divide are computed by all. Keys that fewer heads share than `tensor`
    has parts are repeated for them. `interpret` runs the kernel without a TPU, slowly.

    Lengths are padded to whole blocks; padding is of no sample.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels  # takes a while to import

    rows, length, heads, _ = query.shape
    keys = key.shape[1]
    parts = 1 if mesh is None else mesh.shape["sequence"]
    tensor = 1 if mesh is None or heads % mesh.shape["tensor"] else mesh.shape["tensor"]
    repeats = tensor // math.gcd(tensor, key.shape[2])
    own = -(-length // parts)
    block, key_block = _block(own), _block(own if keys == length else keys)
    padded = parts * _whole(own, block)
    padded_keys = padded if keys == length else _whole(keys, key_block)

    shape = (padded, padded_keys)
    if mask.window:
        seen: Any = kernels.LocalMask(shape, (mask.window - 1, 0 if mask.causal else None), 0)
    else:
        seen = kernels.CausalMask(shape) if mask.causal else kernels.FullMask(shape)
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([seen] * (heads // tensor)),
        block_sizes=kernels.BlockSizes(block, key_block, key_block, block, key_block, key_block, block, key_block),
        head_shards=1,
        q_seq_shards=parts,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    segments = None
    if mask.query_segments is not None:
        segments = kernels.SegmentIds(_ids(mask.query_segments, rows, padded), _ids(mask.key_segments, rows, padded_keys))
    elif not mask.causal and padded_keys > keys:
        segments = kernels.SegmentIds(_ids(jnp.ones((1, length)), rows, padded), _ids(jnp.ones((1, keys)), rows, padded_keys))

    query = _heads_first(query * jnp.asarray(scale, query.dtype), padded)
    key, value = (_heads_first(jnp.repeat(a, repeats, 2), padded_keys) for a in (key, value))
    inputs = (query, key, value, segments)
    if mesh is None:
        y = jax.vmap(kernel)(*inputs)
    else:
        row_axes = DATA_AXES if rows % data_shards(mesh) == 0 else None
        head_axis = "tensor" if tensor > 1 else None
        queries, read = PartitionSpec(row_axes, head_axis, "sequence"), PartitionSpec(row_axes, head_axis)
        ids: Any = segments and kernels.SegmentIds(PartitionSpec(row_axes, "sequence"), PartitionSpec(row_axes))  # type: ignore[arg-type]
        own_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, "sequence")))
        y = jax.shard_map(
            lambda kernel, *inputs: jax.vmap(kernel)(*inputs),
            mesh=mesh,
            in_specs=(own_kernel, queries, read, read, ids),
            out_specs=queries,
            check_vma=False,
        )(kernel, *inputs)
    y = y.swapaxes(1, 2)[:, :length]
    if mask.query_segments is None:
        return y
    # The kernel gives a query that sees nothing the mean of what it may not see.
    return jnp.where(mask.allowed(length, keys).any(-1)[:, 0, :, None, None], y, 0)


def _block(length: int) -> int:
    """The size of the blocks that `length` positions are cut into: the largest that need no padding, which would be a copy of everything; else
    what is computed of padding, in queries and in keys, against what small blocks cost."""
    exact = [block for block in BLOCKS if block >= 256 and length % block == 0]
    return max(exact) if exact else min(BLOCKS, key=lambda block: _whole(length, block) ** 2 * (1 + LANES / block))


def _whole(length: int, block: int) -> int:
    """The length of as many blocks as hold `length` positions."""
    return -(-length // block) * block


def _ids(segments: Any, rows: int, length: int) -> jax.Array:
    """int32 [rows, length]: segments [rows or 1, fewer], and padding, which is of none that keys or queries have (see `attention`)."""
    segments = jnp.asarray(segments, jnp.int32)
    return jnp.broadcast_to(jnp.pad(segments, ((0, 0), (0, length - segments.shape[1])), constant_values=-1), (rows, length))


def _heads_first(x: jax.Array, length: int) -> jax.Array:
    """[rows, T, heads, dim] -> [rows, heads, length, dim], zeros at the end."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)
