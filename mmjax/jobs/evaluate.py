"""--job=evaluate: the recipe's evaluations with the model of a workdir."""

from __future__ import annotations

from pathlib import Path

from mmjax.config import Recipe
from mmjax.errors import UserError
from mmjax.evaluation.run import evaluate
from mmjax.jobs.trained import trained


def run(recipe: Recipe, workdir: Path) -> None:
    """Prints the tables; writes WORKDIR/answers_NAME.jsonl, pictures and the figures of results.json."""
    if not recipe.evaluations:
        raise UserError("the recipe has no evaluations")
    evaluate(trained(recipe, workdir), recipe, workdir)
