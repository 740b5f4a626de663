"""The plan of one stage on one mesh: what it takes of each device, what it computes and sends, and how long that is likely to take."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Iterable

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from mmjax import config as recipes
from mmjax import tree
from mmjax.config import Recipe, Stage
from mmjax.models import multimodal
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig
from mmjax.parallel.mesh import DATA_AXES, axis_sizes, data_shards, make_mesh
from mmjax.parallel.presets import AXES
from mmjax.parallel.sharding import Axes, names_of
from mmjax.planning.chips import Target
from mmjax.planning.compiled import Arguments, Compiled, compile_step, prepare
from mmjax.planning.estimate import Estimate, estimate
from mmjax.planning.hlo import Program
from mmjax.training.loss import chunking

LEAST = 2**20  # bytes of a buffer that is worth a word
PADDED = 1.3  # times its positions, that an encoder's texts of patches may have in whole blocks


@dataclasses.dataclass(frozen=True)
class Large:
    """A buffer as large as a stacked weight that the compiled step makes; `why` is "" where it is none that must be."""

    op: str
    bytes: float
    type: str
    why: str


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """bytes per device; `compiled` and what follows are None or empty where there is no compiler for the target, and `estimate` also where
    the step does not fit.

    stage       as planned: its rows are the recipe's, or the next number that the mesh divides
    held        bytes of trained and frozen parameters, optimizer state and batch, from shapes and their shardings
    plain       of the same step with attention as XLA has it, (bytes per device, estimate); None where it has none; no estimate where that does not fit
    costs       the dearest operations: (operation, share of the compiler's cycles)
    open_loops  loops that count as one turn, since the data decide how often they turn
    """

    name: str
    target: Target
    mesh: dict[str, int]
    stage: Stage
    held: dict[str, int]
    compiled: Compiled | None = None
    estimate: Estimate | None = None
    plain: tuple[int, Estimate | None] | None = None
    costs: tuple[tuple[str, float], ...] = ()
    large: tuple[Large, ...] = ()
    open_loops: tuple[str, ...] = ()

    @property
    def needed(self) -> int:
        """Bytes per device: the compiler's count, or what is known without one."""
        return self.compiled.needed if self.compiled else sum(self.held.values())

    @property
    def fits(self) -> bool | None:
        """None where nobody has said how much the activations take."""
        if not self.target.chip.hbm or (self.compiled is None and self.needed <= self.target.chip.hbm):
            return None
        return self.needed <= self.target.chip.hbm and not (self.compiled and self.compiled.refused)


def plan_stage(
    recipe: Recipe, name: str, config: ModelConfig, target: Target, sizes: recipes.Mesh, flops_per_row: float, compare: bool = True
) -> StagePlan:
    """Compiles the stage's step for the target, where there is a compiler for it, and, to `compare`, the same without Pallas kernels.
    Raises UserError where the mesh does not fit it."""
    mesh = mesh_for(target, sizes)
    prepared = prepare(recipe, name, config, mesh)
    rows = prepared.stage.rows
    shape = {axis: size for axis, size in mesh.shape.items() if size > 1} or {"data": 1}
    known: dict[str, Any] = {"name": name, "target": target, "mesh": shape, "stage": prepared.stage, "held": _held(prepared)}
    if not isinstance(mesh, Mesh):
        return StagePlan(**known)
    made = compile_step(recipe, name, prepared, mesh)
    if made.refused or not target.chip.clock:
        return StagePlan(**known, compiled=made)
    program = Program(made.text)
    found = estimate(program, target, flops_per_row * rows)
    plain = None
    if found.kernel_flops and compare:
        stage = dataclasses.replace(prepared.stage, attention="xla")
        other = compile_step(recipe, name, dataclasses.replace(prepared, stage=stage), mesh)
        plain = other.needed, None if other.refused else estimate(Program(other.text), target, flops_per_row * rows)
    total = program.cycles() or 1.0
    costs = sorted(((i.op, cycles / total) for i, cycles in program.costs()), key=lambda item: -item[1])[:8]
    return StagePlan(
        **known,
        compiled=made,
        estimate=found,
        plain=plain,
        costs=tuple(costs),
        large=tuple(_large(program, prepared, mesh)),
        open_loops=tuple(sorted(program.open_loops)),
    )


def mesh_for(target: Target, sizes: recipes.Mesh) -> Any:
    """The mesh of a target's devices, or, where there are none to compile for, one without devices."""
    if target.devices is not None:
        return make_mesh(sizes, target.devices)
    shape = axis_sizes(sizes, target.count)
    return AbstractMesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _held(prepared: Arguments) -> dict[str, int]:
    parts = {"trained": prepared.state.trainable, "frozen": prepared.frozen, "optimizer": prepared.state.optimizer, "batch": prepared.batch}
    return {part: sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(leaves)) for part, leaves in parts.items()}


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def _large(program: Program, prepared: Arguments, mesh: Mesh) -> list[Large]:
    """Buffers at least as large as the largest stack of weights is on one device, in two bytes a weight."""
    leaves = tree.flatten(prepared.frozen) | tree.flatten(prepared.state.trainable)
    stacks = [leaf.sharding.shard_shape(leaf.shape) for path, leaf in leaves.items() if tree.is_stacked(path)]
    least = max([2.0 * math.prod(shape) for shape in stacks] + [LEAST])
    known, most = _known(prepared, mesh), _most(prepared, mesh)
    depths = {leaf.shape[0] for path, leaf in leaves.items() if tree.is_stacked(path)}
    found: dict[tuple[str, str], Large] = {}
    for op, size, kind in program.large(least):
        shape = _bare(int(n) for n in kind.split("[")[1].rstrip("]").split(",") if n)
        why = known.get(shape) or known.get((math.prod(shape[:-1]), shape[-1])) or _in_groups(known, shape, depths)
        within = shape[0] not in depths or "Block/" in op or "splash" in op  # there may be as many heads as layers
        if not why and within and math.prod(shape) <= most:
            why = "activations of one layer"
        elif not why and shape[0] in depths and math.prod(shape[1:]) <= most and prepared.stage.remat != "full":
            why = f"activations of all layers, kept for the gradient (remat={prepared.stage.remat})"
        found.setdefault((why, kind), Large(op, size, kind, why))
    return list(found.values())


def _in_groups(known: dict[tuple[int, ...], str], shape: tuple[int, ...], depths: set[int]) -> str:
    """Of stacks whose layers run in groups: [groups, layers of each, ...], or of one layer of each group [groups, ...]."""
    for count in (1, 2):
        for depth in depths:
            if math.prod(shape[:count]) <= depth and (why := known.get((depth, *shape[count:]))):
                return why
    return ""


def _most(prepared: Arguments, mesh: Mesh) -> float:
    """The most numbers that activations of one layer have on a device."""
    config, stage = prepared.config, prepared.stage
    rows = stage.rows // (data_shards(mesh) * stage.accumulate)
    sizes = [0.0]
    if (llm := config.llm) is not None:
        copies = llm.block.experts.chosen if llm.block.experts else 1
        sizes.append(rows * stage.length * copies * max(llm.block.width, llm.block.mlp_width))
        if (crossed := config.cross_attention) is not None:
            sizes.append(rows * stage.length * crossed.block.mlp_width)
            logits = crossed.block.heads * stage.length * stage.tiles * (config.connector.tokens if config.connector else 1)
            sizes.append(rows * logits)
    if isinstance(config.vision, ViTConfig):
        block, positions = config.vision.block, config.vision.positions + config.vision.prefix
        sizes.append(PADDED * _tiles(prepared, mesh) * positions * max(block.width, block.mlp_width))
    return max(sizes)


def _tiles(prepared: Arguments, mesh: Mesh) -> int:
    """Tiles that a device encodes at once."""
    shape = prepared.batch.images.shape if prepared.batch.images is not None else (0, 0)
    return -(-shape[1] // multimodal.parts_of_tiles(prepared.config, shape, mesh))


def _gathered(axes: Axes, mesh: Mesh) -> int:
    """Of how many parts a dimension is put together where it is used."""
    return math.prod(mesh.shape[axis] for axis in names_of(axes) if axis in DATA_AXES)


def _known(prepared: Arguments, mesh: Mesh) -> dict[tuple[int, ...], str]:
    """Shapes that a step must have on a device, however large, without axes of size 1."""
    known: dict[tuple[int, ...], str] = {}
    for path, leaf in (tree.flatten(prepared.frozen) | tree.flatten(prepared.state.trainable)).items():
        local = leaf.sharding.shard_shape(leaf.shape)
        # what the data axes divide is gathered where it is used, a layer at a time
        gathered = [own * _gathered(axes, mesh) for own, axes in zip(local, leaf.sharding.spec)]
        one = gathered[1:] if tree.is_stacked(path) else gathered
        known[_bare(one)] = f"of {path}: gathered where it is used" + (", one layer" if tree.is_stacked(path) else "")
        if len(one) == 2:
            known.setdefault((one[1], one[0]), f"of {path}, turned: the head's, or its gradient")
        if "/plugs/" in path:  # the distillation asks all layers at once
            for shape in (gathered, (gathered[0], *reversed(gathered[1:]))):
                known.setdefault(_bare(shape), f"of {path}: of all layers, which are asked at once, or its gradient")
    config, stage = prepared.config, prepared.stage
    rows = stage.rows // (data_shards(mesh) * stage.accumulate)
    if config.llm is not None:
        width, length = config.llm.block.width, stage.length // mesh.shape["sequence"]
        for own in (length, length // mesh.shape["tensor"]):  # the stream between blocks is divided over `tensor`, too
            known[_bare((config.llm.layers, rows, own, width))] = "what each layer of the language model reads, kept for the gradient"
        for chunk in (n for n in range(1, rows * length + 1) if rows * length % n == 0):
            known.setdefault(_bare((rows * length // chunk, chunk, width)), "the last states, a chunk of positions after another")
        vocab = config.llm.vocab_size // mesh.shape["tensor"]
        known[_bare((chunking(rows * stage.length, config.llm.vocab_size)[1] // mesh.shape["sequence"], vocab))] = "the logits of a chunk of positions"
    if isinstance(config.vision, ViTConfig):
        tiles = _tiles(prepared, mesh)
        for extra in (config.vision.positions, config.vision.positions + config.vision.prefix):
            kept = (config.vision.layers, tiles, extra, config.vision.block.width)
            known[_bare(kept)] = "what each layer of the encoder reads, kept for the gradient"
    if (connector := config.connector) is not None:
        for width in (connector.inner_width, connector.in_width):
            kept = (connector.depth, rows * stage.tiles, connector.latents, width)
            known[_bare(kept)] = "what each layer of the connector reads, kept for the gradient"
    for path, leaf in tree.flatten(prepared.state.trainable).items():
        known[_bare(leaf.sharding.shard_shape(leaf.shape))] = f"of {path}, which is trained: its gradient, moments or new values"
    return known


def _bare(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
