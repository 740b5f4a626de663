"""A recipe's evaluations: held-out questions answered by generation, scored, set against the blind twin, and shown."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image
from tqdm import tqdm

from mmjax import drawing
from mmjax.config import Evaluation, Recipe
from mmjax.data import messages, sources
from mmjax.data.messages import BadSample, Sample
from mmjax.errors import UserError
from mmjax.evaluation import answers, blind, captions, word_errors
from mmjax.evaluation.answers import Score
from mmjax.evaluation.few_shot import Examples
from mmjax.inference.answering import answer
from mmjax.model import Model
from mmjax.results import record

log = logging.getLogger(__name__)

METRICS = ("accuracy", "letter", "bleu", "cider", "wer")
RIGHT = {"accuracy": answers.is_right, "letter": answers.same_letter}


def evaluate(model: Model, recipe: Recipe, workdir: Path) -> dict[str, float]:
    """Runs every evaluation of the recipe; prints tables; writes answers_NAME.jsonl, the pictures and results.json.

    Returns the figures by flat names; where there are several evaluations, each name begins with the evaluation's. Of several processes
    all answer together, and process 0 does the rest: the others return nothing.
    Raises UserError for an unknown metric.
    """
    figures: dict[str, float] = {}
    for name, evaluation in recipe.evaluations.items():
        if unknown := [metric for metric in evaluation.metrics if metric not in METRICS]:
            raise UserError(
                f"evaluations.{name}.metrics: unknown metric {unknown[0]!r}; there are {', '.join(METRICS)}"
            )
        prefix = f"{name}_" if len(recipe.evaluations) > 1 else ""
        training = _training_samples(recipe) if evaluation.blind else []
        found = _evaluate_one(model, name, evaluation, training, workdir)
        figures |= {prefix + key: value for key, value in found.items()}
    if jax.process_index() == 0:
        record(workdir, figures)
    return figures


def _evaluate_one(
    model: Model, name: str, evaluation: Evaluation, training: Iterable[Sample], workdir: Path
) -> dict[str, float]:
    dataset = sources.open(evaluation.source)
    samples = [dataset[i] for i in range(min(len(dataset), evaluation.limit or len(dataset)))]
    settings = evaluation.few_shot
    examples = Examples(settings, model, workdir) if settings.shots or settings.text_only else None

    def answered(shown: Sequence[Sample], label: str) -> list[str]:
        if examples is None:
            return _answers(model, evaluation, shown, dataset.image, label)
        asked = examples.before(shown, dataset.image, samples)
        return _answers(model, evaluation, asked, examples.opener(dataset.image), f"{label}, {settings.shots} shots")

    given = {"": answered(samples, name)}
    if evaluation.blind:
        given["shuffled"] = answered(blind.shuffled(samples), f"{name}, shuffled")
        given["withheld"] = answered(blind.withheld(samples), f"{name}, withheld")
        if usual := blind.most_frequent(training):
            given["most_frequent"] = [usual.get(sample.kind, usual[""]) for sample in samples]
    if jax.process_index() != 0:
        return {}
    figures: dict[str, float] = {"shots": settings.shots} if examples else {}
    if _right(evaluation):
        figures |= _accuracy(samples, given, evaluation, name, workdir)
    if {"bleu", "cider"} & set(evaluation.metrics):
        figures |= _captions(samples, given, evaluation)
    if "wer" in evaluation.metrics:
        figures |= _word_errors(samples, given)
    _write(samples, given, evaluation, workdir / f"answers_{name}.jsonl")
    shown = _spread(samples, evaluation.samples)
    pictures = [_drawn(samples[i], given[""][i], dataset, evaluation) for i in shown]
    drawing.sample_answers(workdir / f"answers_{name}.png", pictures)
    return figures


def _answers(model: Model, evaluation: Evaluation, samples: Sequence[Sample], open_image: Any, label: str) -> list[str]:
    """An answer to each sample; "" where it could not be asked, which is said aloud."""
    answered = answer(
        model,
        samples,
        open_image,
        batch=min(evaluation.batch, len(samples)),
        max_new_tokens=evaluation.max_new_tokens,
        num_beams=evaluation.num_beams,
        length_penalty=evaluation.length_penalty,
    )
    texts = []
    for _, text in tqdm(answered, label, total=len(samples), disable=True if jax.process_index() else None, unit="question"):
        if isinstance(text, BadSample):
            log.warning("%s; it counts as answered with nothing", text)
        texts.append("" if isinstance(text, BadSample) else text)
    return texts


def _accuracy(
    samples: Sequence[Sample], given: dict[str, list[str]], evaluation: Evaluation, name: str, workdir: Path
) -> dict[str, float]:
    apart, right = evaluation.report_apart, _right(evaluation)
    assert right is not None
    kinds = [sample.kind for sample in samples]
    scores = {
        source: answers.by_kind(kinds, (right(t, s.answers) for t, s in zip(texts, samples)))
        for source, texts in given.items()
    }
    totals = {source: answers.total(table, apart) for source, table in scores.items()}
    twins = [source for source in blind.TWINS if source in given]
    best = {kind: max((scores[twin][kind] for twin in twins), key=lambda s: s.right) for kind in scores[""] if twins}
    low, high = totals[""].interval
    figures: dict[str, float] = {
        "accuracy": totals[""].share,
        "accuracy_low": low,
        "accuracy_high": high,
        "questions": totals[""].total,
    }
    figures |= {f"accuracy_{kind}": score.share for kind, score in scores[""].items() if kind}
    if twins:
        figures["accuracy_blind"] = max(totals[twin].share for twin in twins)
        figures |= {f"accuracy_{twin}": totals[twin].share for twin in twins}
        figures |= {f"accuracy_blind_{kind}": score.share for kind, score in best.items() if kind}
    every = "all but " + ", ".join(apart) if apart else "all"
    table = {every: totals, **{kind: {source: scores[source][kind] for source in scores} for kind in scores[""]}}
    print(_table(name, table, twins))
    several = len(scores[""]) > 1
    shown = {every: totals[""], **(scores[""] if several else {})}
    unseen = {every: max((totals[t] for t in twins), key=lambda s: s.right), **best} if twins else None
    drawing.results(workdir / f"results_{name}.png", shown, unseen)
    return figures


def _right(evaluation: Evaluation) -> Callable[[str, Sequence[str]], bool] | None:
    """What says whether an answer is right, if the metrics ask for it."""
    return next((RIGHT[metric] for metric in evaluation.metrics if metric in RIGHT), None)


def _captions(samples: Sequence[Sample], given: dict[str, list[str]], evaluation: Evaluation) -> dict[str, float]:
    references = {str(i): sample.answers for i, sample in enumerate(samples)}
    figures: dict[str, float] = {}
    for source, texts in given.items():
        written, suffix = {str(i): text for i, text in enumerate(texts)}, f"_{source}" if source else ""
        if "bleu" in evaluation.metrics:
            figures |= {
                f"bleu{n}{suffix}": 100 * score for n, score in enumerate(captions.bleu(written, references), 1)
            }
        if "cider" in evaluation.metrics:
            figures[f"cider_d{suffix}"] = captions.cider_d(written, references)
    for metric in ("bleu4", "cider_d"):
        if twins := [figures[f"{metric}_{twin}"] for twin in blind.TWINS if f"{metric}_{twin}" in figures]:
            figures[f"{metric}_blind"] = max(twins)
    for source in given:
        suffix = f"_{source}" if source else ""
        shown = [f"{key.removesuffix(suffix)} {value:.3f}" for key, value in figures.items() if _of(key, suffix)]
        print(f"{source or 'captions':>14}: {'  '.join(shown)}   ({len(samples)} pictures)")
    return figures


def _word_errors(samples: Sequence[Sample], given: dict[str, list[str]]) -> dict[str, float]:
    """Word error rates in per cent, as written and without case and marks; of an answer the first line counts."""
    said, figures = [sample.answers[0] if sample.answers else "" for sample in samples], dict[str, float]()
    for source, texts in given.items():
        suffix, written = f"_{source}" if source else "", [text.strip().split("\n")[0].strip() for text in texts]
        plain = [[word_errors.plain(text) for text in side] for side in (written, said)]
        figures[f"wer{suffix}"] = 100 * word_errors.word_error_rate(written, said)
        figures[f"wer_plain{suffix}"] = 100 * word_errors.word_error_rate(*plain)
        print(f"{source or 'word errors':>14}: {figures[f'wer{suffix}']:.1f} %, {figures[f'wer_plain{suffix}']:.1f} % without case and marks")
    return figures


def _of(key: str, suffix: str) -> bool:
    """Whether a figure of captions belongs to this way of answering ("" = with the image)."""
    return key.endswith(suffix) if suffix else key in ("cider_d", *(f"bleu{n}" for n in range(1, captions.ORDER + 1)))


def _table(name: str, table: dict[str, dict[str, Score]], twins: Sequence[str]) -> str:
    """The shares of right answers: a line for each kind of question, a column for each way of answering."""
    lines = [f"{name:<22}{'questions':>10}{'right':>9}{'95 % interval':>16}" + "".join(f"{twin:>15}" for twin in twins)]
    for kind, by_source in table.items():
        score = by_source[""]
        low, high = score.interval
        interval = f"{100 * low:.1f} - {100 * high:.1f}"
        line = f"{kind or 'all':<22}{score.total:>10}{100 * score.share:>7.1f} %{interval:>16}"
        lines.append(line + "".join(f"{100 * by_source[twin].share:>13.1f} %" for twin in twins))
    return "\n".join(lines)


def _write(samples: Sequence[Sample], given: dict[str, list[str]], evaluation: Evaluation, path: Path) -> None:
    """A line for each sample: what was asked, what came with the image and without, and what was expected."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for i, sample in enumerate(samples):
            row: dict[str, Any] = {
                "id": sample.id,
                "kind": sample.kind,
                "question": _question(sample),
                "answer": given[""][i],
                "expected": list(sample.answers),
                "images": [part["path"] for part in messages.images(sample.messages) if "path" in part],
            }
            if right := _right(evaluation):
                row["right"] = right(given[""][i], sample.answers)
            row |= {f"answer_{source}": texts[i] for source, texts in given.items() if source}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _drawn(sample: Sample, text: str, dataset: sources.Dataset, evaluation: Evaluation) -> drawing.Answer:
    shown = messages.images(sample.messages)
    image = None
    if shown:
        image = dataset.image(shown[0]["path"]) if "path" in shown[0] else shown[0]["image"]
        image = image if isinstance(image, Image.Image) else None  # an embedding is not shown
    scored = _right(evaluation)
    right = scored(text, sample.answers) if scored else None
    return drawing.Answer(_question(sample), text, sample.answers[0] if sample.answers else "", right, image)


def _question(sample: Sample) -> str:
    return messages.text(messages.question(sample.messages)[-1])


def _spread(samples: Sequence[Sample], count: int) -> list[int]:
    """Numbers of `count` samples with the kinds in turn."""
    by_kind: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        by_kind.setdefault(sample.kind, []).append(i)
    ranked = sorted((turn, i) for numbers in by_kind.values() for turn, i in enumerate(numbers))
    return [i for _, i in ranked[:count]]


def _training_samples(recipe: Recipe) -> Iterable[Sample]:
    """The samples of the last stage that trains language; what cannot be read is left out, which is said aloud."""
    stages = [recipe.stages[name] for name in recipe.run if recipe.stages[name].objective == "language"]
    for name, source in stages[-1].sources.items() if stages else ():
        try:
            dataset = sources.open(source)
        except UserError as error:
            log.warning("the most frequent training answer is taken without the source %s: %s", name, error)
            continue
        for i in range(len(dataset)):
            try:
                yield dataset[i]
            except BadSample:
                continue
