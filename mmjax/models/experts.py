"""A mixture of experts in the MLP's place: dropless, computed as grouped matrix products, divided over the mesh's `expert` axis."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mmjax.models.attention import on_tpu
from mmjax.models.block_config import Activation, Experts
from mmjax.models.kernels import Kernel, matmul, stored
from mmjax.models.layers import ACTIVATIONS, held_kernel
from mmjax.parallel.mesh import DATA_AXES, data_shards

LANES = 128  # of a TPU


class MixtureOfExperts(nn.Module):
    """x [rows, T, width] -> (y [rows, T, width], the router's logits, float32 [rows, T, experts]); arXiv 2401.04088.

    On a mesh tokens stay on their own data shard; each shard of the `expert` axis holds and runs its own experts, on the tokens that
    chose them, and the outputs of those shards are added.
    """

    experts: Experts
    hidden: int
    activation: Activation
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        count, width = self.experts.count, x.shape[-1]
        logits = matmul(x, _Kernel((width, count), name="router")()).astype(jnp.float32)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, -1), self.experts.chosen)
        weights = (weights / weights.sum(-1, keepdims=True)).astype(x.dtype)
        kernels = tuple(
            _Kernel((count, *shape), name=f"experts_{name}")()
            for name, shape in (
                ("gate", (width, self.hidden)),
                ("up", (width, self.hidden)),
                ("down", (self.hidden, width)),
            )
        )
        run = partial(_run, activation=self.activation, tpu=on_tpu(self.mesh))
        if self.mesh is None or self.mesh.size == 1:
            return run(x, weights, chosen, *kernels), logits
        mesh = self.mesh
        # Gathered over fsdp by hand, so that their gradients are scattered over it: of kernels that come in whole, those would be whole, too.
        cut = tuple(_divided(kernel, axis, mesh, "fsdp") for kernel, axis in zip(kernels, (1, 1, 2)))
        hidden = tuple(_divided(kernel, axis, mesh, "tensor") for kernel, axis in zip(kernels, (2, 2, 1)))
        sums = ("expert", "tensor") if hidden[0] is not None else ("expert",)

        def own(x: jax.Array, weights: jax.Array, chosen: jax.Array, *parts: Kernel) -> jax.Array:
            first = jax.lax.axis_index("expert") * _count(parts[0])
            return jax.lax.psum(run(x, weights, chosen, *parts, first=first, cut=cut), sums)

        rows = DATA_AXES if x.shape[0] % data_shards(mesh) == 0 else None
        tokens = PartitionSpec(rows, "sequence" if x.shape[1] % mesh.shape["sequence"] == 0 else None)
        specs = tuple(_spec(*axes) for axes in zip(cut, hidden))
        y = jax.shard_map(own, mesh=mesh, in_specs=(tokens,) * 3 + specs, out_specs=tokens, check_vma=False)(x, weights, chosen, *kernels)
        return y, logits


class _Kernel(nn.Module):
    """A leaf `kernel`; the last two axes are [in, out]."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Kernel:
        batch = tuple(range(len(self.shape) - 2))
        return held_kernel(self) or self.param("kernel", nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=batch), self.shape)


def _run(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    gate: Kernel,
    up: Kernel,
    down: Kernel,
    *,
    activation: Activation,
    tpu: bool = False,
    first: jax.Array | int = 0,
    cut: tuple[int | None, ...] = (None, None, None),
) -> jax.Array:
    """What experts first, first + 1, ... (those of the kernels) add to each token, [rows, T, width].

    x [rows, T, width]; weights and chosen [rows, T, k]; kernels [experts, in, out]; `cut`: see `grouped`. Each token is copied once for each
    expert it chose, the copies are sorted by expert, and each expert multiplies its own run of them.
    """
    tokens, weights, chosen = (a.reshape(-1, a.shape[-1]) for a in (x, weights, chosen))
    experts, k = _count(gate), chosen.shape[1]
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < experts), local, experts)  # those of other shards come last
    order = jnp.argsort(local, stable=True)
    sizes = jnp.bincount(local, length=experts + 1)[:experts].astype(jnp.int32)
    copies = tokens[order // k]
    h = ACTIVATIONS[activation](grouped(copies, gate, sizes, tpu, cut[0])) * grouped(copies, up, sizes, tpu, cut[1])
    y = grouped(h, down, sizes, tpu, cut[2]) * weights.reshape(-1)[order][:, None]
    y = jnp.where((jnp.arange(len(order)) < sizes.sum())[:, None], y, 0)
    return jnp.zeros_like(tokens).at[order // k].add(y).reshape(x.shape)


def _divided(kernel: Kernel, axis: int, mesh: Mesh, over: str) -> int | None:
    """`axis`, where this axis of a kernel [experts, in, out] is divided over that of the mesh (see mmjax.parallel.sharding), else None."""
    return axis if isinstance(kernel, jax.Array) and kernel.shape[axis] % mesh.shape[over] == 0 else None


def _spec(fsdp: int | None, tensor: int | None) -> PartitionSpec:
    """Of a kernel whose experts are divided over `expert`, and these axes of it over `fsdp` and `tensor`."""
    return PartitionSpec("expert", *({fsdp: "fsdp", tensor: "tensor"}.get(axis) for axis in (1, 2)))


def _count(kernels: Kernel) -> int:
    return jax.tree.leaves(kernels)[0].shape[0]


@partial(jax.checkpoint, static_argnums=(3, 4))
def grouped(x: jax.Array, kernels: Kernel, sizes: jax.Array, tpu: bool = False, cut: int | None = None) -> jax.Array:
    """x [n, in] times kernels [experts, in, out], expert after expert, each on its next `sizes[expert]` rows: [n, out], 0 behind them.

    cut   the axis of the kernels of which each device of `fsdp` holds its own part

    Checkpointed so that the kernels are cast to x's dtype, and gathered, again in the backward pass (see mmjax.models.kernels.matmul). On a TPU the
    kernels' gradient is a Pallas kernel's, where n is a multiple of 128: XLA would multiply all rows with each expert's mask.
    """
    dense = stored(kernels).astype(x.dtype)
    if cut is not None:
        dense = jax.lax.all_gather(dense, "fsdp", axis=cut, tiled=True)
    return tiled(x, dense, sizes) if tpu and len(x) % LANES == 0 else jax.lax.ragged_dot(x, dense, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def tiled(x: jax.Array, kernels: jax.Array, sizes: jax.Array, interpret: bool = False) -> jax.Array:
    """`grouped` of dense kernels; n is a multiple of 128. `interpret` runs the backward pass without a TPU, slowly."""
    return jax.lax.ragged_dot(x, kernels, sizes)


def _tiled_forward(x: jax.Array, kernels: jax.Array, sizes: jax.Array, interpret: bool) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return jax.lax.ragged_dot(x, kernels, sizes), (x, kernels, sizes)


def _tiled_backward(interpret: bool, kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # takes a while to import

    x, kernels, sizes = kept
    rows = next(rows for rows in (512, 256, LANES) if len(x) % rows == 0)
    of_kernels = tgmm(x.swapaxes(0, 1), gradient, sizes, kernels.dtype, (rows, 512, 512), interpret=interpret)
    return jax.lax.ragged_dot(gradient, kernels.swapaxes(1, 2), sizes), of_kernels, None


tiled.defvjp(_tiled_forward, _tiled_backward)


def balance_loss(logits: jax.Array, real: jax.Array, chosen: int) -> jax.Array:
    """The load-balancing loss of all layers together (arXiv 2101.03961, equations 4 to 6, over k chosen experts): experts times the
    sum over experts of the share of tokens sent there times the mean of the router's probability; `chosen` at perfect balance.

    logits  float32 [layers, rows, T, experts]; real  bool [rows, T]: tokens that count
    """
    experts = logits.shape[-1]
    probabilities = jax.nn.softmax(logits, -1)
    sent = jax.nn.one_hot(jax.lax.top_k(probabilities, chosen)[1], experts).sum(-2)
    share = real.astype(jnp.float32)[None, :, :, None]
    total = jnp.maximum(share.sum() * logits.shape[0], 1)
    return experts * ((sent * share).sum((0, 1, 2)) / total * ((probabilities * share).sum((0, 1, 2)) / total)).sum()
