"""--job=generate: the answer to one prompt, or a JSONL of messages in and a JSONL of answers out.

    --config.generate.prompt="Is there a 7?" --config.generate.image=scene.png
    --config.generate.input=questions.jsonl [--config.generate.output=answers.jsonl]

A line of the input is {"id", "messages": [...], "images": [...]}; the paths of images lie below the input's folder. A line of the
output is {"id", "answer"}, or {"id", "error"} where a sample cannot be asked. An interrupted job goes on where it
stopped: ids that are in the output already are skipped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from mmjax import config
from mmjax.config import Recipe
from mmjax.data import sources
from mmjax.data.messages import BadSample, Sample
from mmjax.errors import UserError
from mmjax.inference.answering import answer
from mmjax.jobs.trained import trained
from mmjax.model import Model
from mmjax.parallel import cluster

log = logging.getLogger(__name__)


def run(recipe: Recipe, workdir: Path) -> None:
    """Prints the answer to generate.prompt, or writes those to generate.input. Raises UserError without either."""
    settings = recipe.generate
    if bool(settings.prompt) == bool(settings.input):
        raise UserError("give either generate.prompt (with generate.image, if there is one) or generate.input")
    model = trained(recipe, workdir)
    if settings.input:
        output = Path(settings.output or workdir / "generated.jsonl")
        answer_file(model, settings, output)
        return
    text = answer_one(model, settings)
    if jax.process_index() == 0:
        print(text)


def answer_one(model: Model, settings: config.Generate) -> str:
    """The answer to generate.prompt about generate.image."""
    image = [{"type": "image", "path": settings.image}] if settings.image else []
    messages = [{"role": "user", "content": [*image, {"type": "text", "text": settings.prompt}]}]
    return model.chat(messages, settings.max_new_tokens, stop=settings.stop, task=settings.task, **_sampling(settings))


def answer_file(model: Model, settings: config.Generate, output: Path) -> None:
    """Appends a line to `output` for each line of generate.input whose id is not there yet, a batch at a time. Several processes
    answer together, and process 0 writes."""
    source = config.Source(kind="messages", path=settings.input, images=str(Path(settings.input).resolve().parent))
    dataset = sources.open(source)
    first = jax.process_index() == 0
    with cluster.first_alone("answered"):
        done = answered_ids(output)
    cluster.wait("answered by all")  # before anything is written
    broken: list[BadSample] = []
    waiting = _waiting(dataset, done, broken)
    left = len(dataset) - len(done)
    output.parent.mkdir(parents=True, exist_ok=True)
    answers = answer(
        model,
        waiting,
        dataset.image,
        batch=settings.batch,
        max_new_tokens=settings.max_new_tokens,
        stop=settings.stop,
        **_sampling(settings),
    )
    failed = 0
    with output.open("a") as file:
        for sample, text in tqdm(answers, "generate", total=max(left, 0), disable=None if first else True, unit="sample"):
            failed += isinstance(text, BadSample)
            if first:
                _append(file, sample.id, text)
        for error in broken if first else ():
            _append(file, error.id, error)
    failed += len(broken)
    if first:
        print(f"{output}: {len(answered_ids(output)) - len(done)} new, {len(done)} were there, {failed} could not be asked")


def answered_ids(output: Path) -> set[str]:
    """The ids in an output file. A last line that was cut short (the job was killed in the middle of it) is taken off."""
    if not output.exists():
        return set()
    text = output.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with output.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return {json.loads(line)["id"] for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output} holds something else than answers; name another generate.output") from error


def _waiting(dataset: sources.Dataset, done: set[str], broken: list[BadSample]) -> Iterator[Sample]:
    """The samples to be answered; lines that are no samples go to `broken`."""
    seen = set(done)
    for i in range(len(dataset)):
        try:
            sample = dataset[i]
        except BadSample as error:
            if error.id not in seen:
                seen.add(error.id)
                broken.append(error)
            continue
        if sample.id in seen and sample.id not in done:
            raise UserError(f"the id {sample.id!r} stands twice in the input; answers are told apart by it")
        if sample.id not in seen:
            seen.add(sample.id)
            yield sample


def _append(file, id: str, text: str | BadSample) -> None:
    row = {"id": id, "error": text.reason} if isinstance(text, BadSample) else {"id": id, "answer": text}
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def _sampling(settings: config.Generate) -> dict[str, Any]:
    return {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
