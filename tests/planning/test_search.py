"""Which candidates are tried, and what is recommended; nothing is compiled here."""

from __future__ import annotations

import pytest

from mmjax import config as recipes
from mmjax.config import Recipe, Stage
from mmjax.errors import UserError
from mmjax.models.config import ModelConfig
from mmjax.planning.arguments import fitting
from mmjax.planning.chips import CHIPS, Target
from mmjax.planning.compiled import Compiled
from mmjax.planning.estimate import Estimate
from mmjax.planning.search import search
from mmjax.planning.stages import StagePlan

CHIP = CHIPS["v5e"]


def _searched(stage: Stage, chips: tuple[int, ...], needed, seconds) -> tuple[list, list]:
    """What `search` returns, and the candidates in the order in which they were tried. `needed` (bytes) and `seconds` are functions of
    (fsdp, tensor, remat, accumulate, rows)."""
    target, order = Target("slice", CHIP, chips, None), []

    def plan(recipe: Recipe, mesh: recipes.Mesh) -> StagePlan:
        asked = fitting(recipe.stages["s"], mesh.fsdp)
        candidate = mesh.fsdp, mesh.tensor, asked.remat, asked.accumulate, asked.rows
        order.append(candidate)
        compiled = Compiled("", {"temporaries": 1}, needed(*candidate), "", 1.0, None)
        found = Estimate(1.0, CHIP.flops, target.count, seconds(*candidate), 0.0, 0.0, 0.0, (0.0, 0.0), {})
        return StagePlan("s", target, {"fsdp": mesh.fsdp, "tensor": mesh.tensor}, asked, {}, compiled, found)

    return search(Recipe(stages={"s": stage}), "s", ModelConfig(), target, plan), order


def test_the_batch_stays_the_recipes():
    """With 56 rows, weights over all of 256 chips, or over 128, would make it another training."""
    found, order = _searched(Stage(rows=56, remat="full"), (16, 16), lambda *_: 1, lambda fsdp, *_: 1.0 + fsdp)
    assert {candidate[:2] for candidate in order} == {(64, 4), (32, 8)}
    assert (found[0].mesh.fsdp, found[0].plan.stage.rows) == (32, 64)
    _, order = _searched(Stage(rows=4), (16, 16), lambda *_: 1, lambda *_: 1.0)
    assert {candidate[:2] for candidate in order} == {(32, 8)}  # the fewest rows that there can be


def test_what_does_not_fit_is_rematerialised_and_then_divided():
    def needed(fsdp, tensor, remat, accumulate, rows):
        return CHIP.hbm + (1 if (fsdp, accumulate) != (8, 4) else 0)

    found, order = _searched(Stage(rows=64, accumulate=16), (2, 4), needed, lambda *_: 1.0)
    assert [candidate[2:4] for candidate in order if candidate[0] == 8][:4] == [("none", 1), ("full", 1), ("full", 2), ("full", 4)]
    assert [(one.mesh.fsdp, one.remat, one.accumulate) for one in found if one.plan.fits][0] == (8, "full", 4)
    assert found[0].flags.endswith("--config.stages.s.rows=64 --config.stages.s.remat=full --config.stages.s.accumulate=4")


def test_less_is_rematerialised_on_the_best_mesh():
    cost = {"none": 1.0, "dots": 2.0, "full": 3.0}
    found, order = _searched(
        Stage(rows=8, remat="full"), (2, 4), lambda fsdp, tensor, remat, *_: CHIP.hbm + (remat == "none"), lambda fsdp, tensor, remat, *_: cost[remat] * tensor
    )
    assert (found[0].mesh.fsdp, found[0].remat) == (8, "dots")
    assert [candidate[2] for candidate in order] == ["full"] * 4 + ["none", "dots"]


def test_no_mesh_goes_with_the_model():
    def needed(*_):
        raise UserError("7 heads are not divided by tensor")

    with pytest.raises(UserError, match="no mesh of slice goes with stages.s: 7 heads"):
        _searched(Stage(rows=8), (2, 4), needed, None)


@pytest.mark.parametrize("rows, accumulate, shards, fitted", [(56, 1, 64, (64, 1)), (32, 16, 32, (32, 1)), (300, 4, 32, (384, 4)), (32, 16, 8, (32, 4)), (10, 3, 2, (12, 3))])
def test_rows_and_micro_batches_that_a_mesh_divides(rows, accumulate, shards, fitted):
    stage = fitting(Stage(rows=rows, accumulate=accumulate), shards)
    assert (stage.rows, stage.accumulate) == fitted
