"""A mixture of experts in the MLP's place: dropless, computed as grouped matrix products, divided over the mesh's `expert` axis."""

from __future__ import annotations

from functools import partial
from typing import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from mmjax.models.attention import on_tpu
from mmjax.models.block_config import Activation, Experts
from mmjax.models.kernels import Kernel, matmul, stored
from mmjax.models.layers import ACTIVATIONS, held_kernel
from mmjax.models.stack import KEPT
from mmjax.parallel.mesh import DATA_AXES
from mmjax.parallel.sharding import dividing, names_of, rule

Gathers = tuple[tuple[str, int], ...]
LANES = 128  # of a TPU


class MixtureOfExperts(nn.Module):
    """x [rows, T, width] -> (y [rows, T, width], the router's logits, float32 [rows, T, experts]); arXiv 2401.04088.

    On a mesh tokens stay where they are, and each shard of the `expert` axis holds its own experts. Where rows are divided over that axis as
    well (in training, where there are enough), their kernels come to the tokens, a layer at a time, as all weights do over `fsdp`, and no
    token is dropped or waited for. Where they are not (few rows, in generation), each shard runs its own experts on the tokens that chose
    them, and the outputs of the shards are added.
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
        shapes = {"gate": (width, self.hidden), "up": (width, self.hidden), "down": (self.hidden, width)}
        kernels = tuple(_Kernel((count, *shape), name=f"experts_{name}")() for name, shape in shapes.items())
        run = partial(_run, activation=self.activation, tpu=on_tpu(self.mesh))
        if self.mesh is None or self.mesh.size == 1:
            return run(x, weights, chosen, *kernels, experts=count), logits
        mesh, rows = self.mesh, dividing(DATA_AXES, x.shape[0], self.mesh)
        specs = tuple(_spec(f"experts_{name}", kernel, mesh) for name, kernel in zip(shapes, kernels))
        gathered = {"fsdp"} | {"expert"} & set(names_of(rows))  # where each device of `expert` has tokens of its own
        summed = tuple(axis for axis in ("expert", "tensor") if axis in _axes(specs[0]) and axis not in gathered)

        def own(x: jax.Array, weights: jax.Array, chosen: jax.Array, *parts: Kernel) -> jax.Array:
            # Gathered by hand, so that their gradients are scattered again: of kernels that come in whole, those would be whole, too.
            gathers = tuple(tuple((axis, at) for axis, at in _axes(spec).items() if axis in gathered) for spec in specs)
            here = _count(parts[0]) if "expert" in summed else count
            first = jax.lax.axis_index("expert") * here if here < count else None
            y = run(x, weights, chosen, *parts, experts=here, first=first, gathers=gathers)
            return jax.lax.psum(y, summed)

        tokens = PartitionSpec(rows, dividing("sequence", x.shape[1], mesh))
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
    experts: int,
    tpu: bool = False,
    first: jax.Array | None = None,
    gathers: Sequence[Gathers] = ((), (), ()),
) -> jax.Array:
    """What `experts` experts, those of the kernels, add to each token, [rows, T, width]: all that there are, or those from `first` on.

    x [rows, T, width]; weights and chosen [rows, T, k]; kernels [experts, in, out]; `gathers`: see `grouped`. Each token is copied once for each
    expert it chose, the copies are sorted by expert, and each expert multiplies its own run of them.
    """
    tokens, weights, chosen = (a.reshape(-1, a.shape[-1]) for a in (x, weights, chosen))
    k = chosen.shape[1]
    local = chosen.reshape(-1)
    if first is not None:
        local = jnp.where((local >= first) & (local < first + experts), local - first, experts)  # those of other shards come last
    order = jnp.argsort(local, stable=True)
    sizes = jnp.bincount(local, length=experts + 1)[:experts].astype(jnp.int32)
    copies = tokens[order // k]
    h = ACTIVATIONS[activation](grouped(copies, gate, sizes, tpu, gathers[0])) * grouped(copies, up, sizes, tpu, gathers[1])
    y = grouped(h, down, sizes, tpu, gathers[2]) * weights.reshape(-1)[order][:, None]
    if first is not None:
        y = jnp.where((jnp.arange(len(order)) < sizes.sum())[:, None], y, 0)
    return jnp.zeros_like(tokens).at[order // k].add(y).reshape(x.shape)


def _spec(name: str, kernel: Kernel, mesh: Mesh) -> PartitionSpec:
    """How a kernel [experts, in, out] comes: as mmjax.parallel.sharding divides it; of a quantised one the experts alone."""
    axes = rule(f"llm/layers/mlp/{name}/kernel")[1]
    shape = kernel.shape if isinstance(kernel, jax.Array) else (_count(kernel),)
    return PartitionSpec(*(dividing(axis, size, mesh) for axis, size in zip(axes, shape)))


def _axes(spec: PartitionSpec) -> dict[str, int]:
    """Axis of the mesh -> the dimension that it divides, from the innermost parts outwards."""
    return {axis: at for at, axes in reversed([*enumerate(spec)]) for axis in reversed(names_of(axes))}


def _count(kernels: Kernel) -> int:
    return jax.tree.leaves(kernels)[0].shape[0]


@partial(jax.checkpoint, static_argnums=(3, 4))
def grouped(x: jax.Array, kernels: Kernel, sizes: jax.Array, tpu: bool = False, gathers: Gathers = ()) -> jax.Array:
    """x [n, in] times kernels [experts, in, out], expert after expert, each on its next `sizes[expert]` rows: [n, out], 0 behind them.

    gathers   axes of the mesh along which each device holds its own part of a dimension of the kernels, and which dimension

    Checkpointed so that the kernels are cast to x's dtype, and gathered, again in the backward pass (see mmjax.models.kernels.matmul). On a TPU it is
    megablox, where n is a multiple of 128: for the gradients XLA would multiply all rows with each expert's mask, and turn the kernels round
    in memory.
    """
    dense = stored(kernels).astype(x.dtype)
    for axis, at in gathers:
        dense = jax.lax.all_gather(dense, axis, axis=at, tiled=True)
    product = tiled(x, dense, sizes) if tpu and len(x) % LANES == 0 else jax.lax.ragged_dot(x, dense, sizes)
    return checkpoint_name(product, KEPT)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def tiled(x: jax.Array, kernels: jax.Array, sizes: jax.Array, interpret: bool = False) -> jax.Array:
    """`grouped` of dense kernels, by Pallas' megablox; n is a multiple of 128. `interpret` runs it without a TPU, slowly."""
    return _tiled_forward(x, kernels, sizes, interpret)[0]


def _tiled_forward(x: jax.Array, kernels: jax.Array, sizes: jax.Array, interpret: bool) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # takes a while to import

    return _cleared(gmm(x, kernels, sizes, x.dtype, _tiles(x), interpret=interpret), sizes), (x, kernels, sizes)


def _tiled_backward(interpret: bool, kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    x, kernels, sizes = kept
    of_kernels = tgmm(x.swapaxes(0, 1), gradient, sizes, kernels.dtype, _tiles(x), interpret=interpret)
    of_x = gmm(gradient, kernels, sizes, x.dtype, _tiles(x), transpose_rhs=True, interpret=interpret)
    return _cleared(of_x, sizes), of_kernels, None


def _tiles(x: jax.Array) -> tuple[int, int, int]:
    return next(rows for rows in (512, 256, LANES) if len(x) % rows == 0), 512, 512


def _cleared(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """0 behind the last expert's rows, where megablox leaves anything."""
    return jnp.where((jnp.arange(len(x)) < sizes.sum())[:, None], x, 0)


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
