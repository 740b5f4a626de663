"""The model card: WORKDIR/README.md, made from the recipe, the parts' own files and the figures of results.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmjax import tree
from mmjax.config import Part, Recipe, Source, Stage
from mmjax.errors import UserError
from mmjax.model import Model
from mmjax.models import quantised
from mmjax.models.adapters import leaves_of
from mmjax.published import locate

PICTURES = (
    ("answers_*.png", "Sample answers"),
    ("results_*.png", "Right answers by kind of question, with and without the image"),
    ("losses.png", "Loss of each stage"),
    ("first_batch_*.png", "The first batch of a stage, with what the model is taught to say marked"),
)


def write_card(model: Model, recipe: Recipe, workdir: Path) -> Path:
    """Writes the card and returns its path."""
    results = workdir / "results.json"
    figures = json.loads(results.read_text()) if results.exists() else {}
    counts = _parameters(model)
    sections = [
        f"# {recipe.name or 'A model made with mmjax'}",
        f"A model of {sum(counts.values()):,} parameters, trained with mmjax in "
        f"{len(recipe.run)} stages: {', '.join(recipe.run)}.",
        "## Results",
        _figures(figures) or "Not evaluated yet.",
        *_pictures(workdir),
        "## Parts",
        _rows(("part", "from", "licence", "parameters"), _parts(recipe, counts)),
        "## Data and training",
        _rows(
            ("stage", "trained", "data", "steps", "learning rate"), [_stage(n, recipe.stages[n]) for n in recipe.run]
        ),
        "The data's own licences and limits carry over to the model. " + _held_out(recipe),
        "## Use",
        f'```python\nimport mmjax\n\nmodel = mmjax.load("{workdir.resolve().name}")  # this directory, or one written by --job=export\n'
        f'model.chat([{{"role": "user", "content": {_content(recipe)}}}])\n```',
        "```\npython -m mmjax.main --job=chat --workdir=DIR\npython -m mmjax.main --job=export --workdir=DIR\n```",
        "The full recipe is in `recipe.json` beside this file.",
    ]
    path = workdir / "README.md"
    path.write_text("\n\n".join(sections) + "\n")
    return path


def _figures(figures: dict[str, Any]) -> str:
    """The evaluations' figures as a table; a figure of the blind twin stands beside the one it belongs to."""
    shown = {
        name: value for name, value in figures.items() if re.search(r"accuracy|bleu|cider|wer", name) and value is not None
    }
    plain = [n for n in shown if not re.search(r"_(low|high|blind|shuffled|withheld|most_frequent)(_|$)", n)]

    def text(name: str, value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %" if "accuracy" in name else f"{value:.3f}"

    def blind(name: str) -> float | None:
        return shown.get(f"{name}_blind", shown.get(name.replace("accuracy_", "accuracy_blind_", 1)))

    rows = [(n.replace("_", " "), text(n, shown[n]), text(n, blind(n))) for n in plain]
    if not rows:
        return ""
    said = (
        "The blind twin is the best of: the same model with the images shuffled between the questions, with the images "
        "withheld, and the most frequent training answer for each kind of question."
    )
    return _rows(("figure", "with the image", "blind twin"), rows) + f"\n\n{said}"


def _parameters(model: Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    own = tree.flatten(leaves_of(model.params, [adapter.name for adapter in model.config.adapters]))
    for path, leaf in tree.flatten(quantised.dense_shapes(model.params)).items():
        part = "adapters" if path in own else path.split("/")[0]
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    return counts


def _parts(recipe: Recipe, counts: dict[str, int]) -> Sequence[tuple[str, ...]]:
    given = {
        "llm": recipe.model.llm,
        "vision": recipe.model.vision,
        "connector": Part(recipe.model.connector.path, {"model_type": recipe.model.connector.kind}),
        "adapters": Part(config={"model_type": ", ".join(f"{one.kind} {name}" for name, one in recipe.model.adapters.items())}),
    }
    rows = []
    for name, count in counts.items():
        part = Part(recipe.model.path) if recipe.model.path else given.get(name, Part())
        origin = f"`{part.path}`" if part.path else f"fresh ({part.config.get('model_type', name)})"
        rows.append((name, origin, licence(part.path) if part.path else "yours", f"{count:,}"))
    return rows


def licence(path: str) -> str:
    """The licence that a published directory states in its model card or config; "not stated" where it does not."""
    try:
        directory = locate(path)
    except UserError:
        return "not stated"
    readme, config = directory / "README.md", directory / "config.json"
    if readme.is_file():
        front = re.match(r"---\n(.*?)\n---", readme.read_text(errors="replace"), re.DOTALL)
        found = re.search(r"^license(?:_name)?:\s*(\S.*)$", front[1], re.MULTILINE) if front else None
        if found:
            return found[1].strip("\"' ")
    if config.is_file():
        return str(json.loads(config.read_text()).get("license", "not stated"))
    return "not stated"


def _stage(name: str, stage: Stage) -> tuple[str, ...]:
    length = f"{stage.steps}" if stage.steps else f"{stage.epochs:g} epochs"
    data = "; ".join(_source(key, source) for key, source in stage.sources.items())
    trained = ", ".join(f"`{glob}`" for glob in stage.trainable)
    return name, trained, data, length, f"{stage.optimizer.learning_rate:g} ({stage.optimizer.name})"


def _source(name: str, source: Source) -> str:
    what = Path(source.path).name if source.path else ", ".join(f"{k} {v}" for k, v in source.options.items())
    return f"{name} ({source.kind}{': ' + what if what else ''})"


def _held_out(recipe: Recipe) -> str:
    if not recipe.evaluations:
        return "It was not measured on anything."
    what = "; ".join(_source(name, evaluation.source) for name, evaluation in recipe.evaluations.items())
    return f"It was measured on {what}; expect less elsewhere."


def _content(recipe: Recipe) -> str:
    image = '{"type": "image", "path": "photo.jpg"}, ' if recipe.model.vision.path or recipe.model.vision.config else ""
    return f'[{image}{{"type": "text", "text": "What is this?"}}]'


def _pictures(workdir: Path) -> list[str]:
    return [f"![{what}]({path.name})" for pattern, what in PICTURES for path in sorted(workdir.glob(pattern))]


def _rows(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
