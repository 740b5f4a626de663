"""Which mesh, rematerialisation and micro-batches: tried by compiling, the most promising first."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable, Iterator, Literal

from tqdm import tqdm

from mmjax import config as recipes
from mmjax.config import Recipe
from mmjax.errors import UserError
from mmjax.models.config import ModelConfig
from mmjax.parallel.mesh import DATA_AXES
from mmjax.planning.arguments import fitting
from mmjax.planning.chips import Target
from mmjax.planning.stages import StagePlan

TENSOR = (1, 2, 4, 8)  # parts of a layer that are tried
ACCUMULATE = (1, 2, 4, 8, 16)
ROWS = 1.5  # times the recipe's, that a step may have


@dataclasses.dataclass(frozen=True)
class Tried:
    """A mesh and settings of the stage, and the plan that came of them."""

    mesh: recipes.Mesh
    remat: Literal["none", "dots", "full"]
    accumulate: int
    plan: StagePlan

    @property
    def seconds(self) -> float:
        """Of a step, all communication beside nothing, for a row: what candidates are compared by; infinite where it does not fit."""
        if self.plan.estimate is None or not self.plan.fits:
            return float("inf")
        return self.plan.estimate.step[1] / self.plan.stage.rows

    @property
    def flags(self) -> str:
        """For the command line."""
        sizes = " ".join(f"--config.mesh.{axis}={getattr(self.mesh, axis)}" for axis in ("data", "fsdp", "tensor", "expert"))
        key = f"--config.stages.{self.plan.name}"
        return f"{sizes} {key}.rows={self.plan.stage.rows} {key}.remat={self.remat} {key}.accumulate={self.accumulate}"


Plan = Callable[[Recipe, recipes.Mesh], StagePlan]


def search(recipe: Recipe, name: str, config: ModelConfig, target: Target, plan: Plan) -> list[Tried]:
    """The candidates that were compiled, the best first. `plan` makes the plan of a recipe's stage on a mesh.

    Meshes come first, under the recipe's own rematerialisation or, where that does not fit, a stronger one and more micro-batches; then
    weaker rematerialisation on the best mesh. A mesh that asks for many more rows than the recipe has is left out, since it would be
    another training. Raises UserError where nothing was tried."""
    tried: list[Tried] = []
    refused: list[str] = []
    stage, meshes = recipe.stages[name], list(_meshes(target, config))

    def rows(mesh: recipes.Mesh, accumulate: int = 1) -> int:
        return fitting(dataclasses.replace(stage, accumulate=accumulate), _shards(mesh)).rows

    most = max(ROWS * stage.rows, min(map(rows, meshes)))

    def attempt(mesh: recipes.Mesh, remat: Any, accumulate: int) -> Tried | None:
        changed = dataclasses.replace(stage, remat=remat, accumulate=accumulate)
        try:
            made = plan(dataclasses.replace(recipe, stages={**recipe.stages, name: changed}), mesh)
        except UserError as error:  # this mesh does not go with this model
            refused.append(str(error))
            return None
        tried.append(Tried(mesh, remat, accumulate, made))
        return tried[-1]

    for mesh in tqdm([mesh for mesh in meshes if rows(mesh) <= most], f"{name}: meshes", disable=None):
        each = math.ceil(stage.rows / _shards(mesh))
        parts = [(n, "full") for n in ACCUMULATE if n <= each and rows(mesh, n) <= most]
        for accumulate, remat in dict.fromkeys([(1, stage.remat), *parts]):
            found = attempt(mesh, remat, accumulate)
            if found is None or found.plan.fits:
                break
    if not tried:
        raise UserError(f"no mesh of {target.name} goes with stages.{name}: {refused[0]}")
    best = min(tried, key=lambda t: t.seconds)
    for remat in tqdm([r for r in ("none", "dots", "full") if r != best.remat], f"{name}: rematerialisation", disable=None):
        attempt(best.mesh, remat, best.accumulate)
    return sorted(tried, key=lambda t: t.seconds)


def _shards(mesh: recipes.Mesh) -> int:
    return math.prod(getattr(mesh, axis) for axis in DATA_AXES)


def _meshes(target: Target, config: ModelConfig) -> Iterator[recipes.Mesh]:
    experts = config.llm.block.experts.count if config.llm and config.llm.block.experts else 1
    for expert in (1, experts) if experts > 1 else (1,):
        for tensor in TENSOR:
            if target.count % (tensor * expert) == 0:
                yield recipes.Mesh(data=1, fsdp=target.count // (tensor * expert), tensor=tensor, expert=expert)
