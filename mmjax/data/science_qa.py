"""ScienceQA (arXiv 2209.09513): questions with several options, of which 48.7 % come with a picture, and the reasons of their answers.

    problems.json     {"1": {"question", "choices": [...], "answer": 0, "hint", "lecture", "solution", "image": "image.png" or null, "subject", ...}}
    pid_splits.json   {"train": ["1", ...], "val": [...], "test": [...]}
    captions.json     {"captions": {"1": "..."}}
    images/SPLIT/1/image.png

What is asked and answered is written as QCM-ALE, which LaVIN is tuned on: question, context, options; the answer, lecture and explanation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

from PIL import Image

from mmjax.data import images as pictures
from mmjax.data import stores
from mmjax.data.messages import PLACEHOLDER, BadSample, Sample, validated
from mmjax.errors import UserError

LETTERS = "ABCDE"


class ScienceQA:
    """A data set of questions (see mmjax.data.sources.Dataset).

    path       problems.json
    images     the folder (or tar) with SPLIT/ID/image.png
    split      which of the lists in pid_splits.json
    splits     that file; "" = the one beside problems.json
    captions   captions.json, whose texts are added to the context; "" = none are (as in LaVIN's published runs)
    explained  whether an answer goes on with its reasons: "The answer is B. BECAUSE: LECTURE SOLUTION"
    """

    def __init__(
        self, path: str, images: str, split: str = "train", splits: str = "", captions: str = "", explained: bool = True
    ):
        self._arguments = path, images, split, splits, captions, explained
        self._problems = _json(path)
        lists = _json(splits or str(Path(path).parent / "pid_splits.json"))
        if split not in lists:
            raise UserError(f"science_qa: there is no split {split!r}; there are {', '.join(lists)}")
        self._ids = [str(id) for id in lists[split]]
        self._captions = _json(captions)["captions"] if captions else {}
        self._store, self._split, self._explained = stores.open_store(images), split, explained

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Sample:
        id = self._ids[index]
        problem = self._problems.get(id)
        if problem is None:
            raise BadSample(id, "it is in no problem of the file")
        try:
            asked, answered, letter = written(problem, self._captions.get(id, ""), self._explained)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise BadSample(id, f"the problem is not as ScienceQA's are: {error!r}") from error
        content: list[dict[str, Any]] = [{"type": "text", "text": asked}]
        if problem.get("image"):
            content.insert(0, {"type": "image", "path": f"{self._split}/{id}/{problem['image']}"})
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answered}]
        return Sample(id, validated(turns, id), problem.get("subject") or "", (letter,))

    def image(self, name: str) -> Image.Image:
        return pictures.decode(self._store.read(name))

    def picture_size(self, name: str) -> tuple[int, int]:
        return pictures.size_of(self._store.read(name))

    def __reduce__(self) -> tuple:
        return ScienceQA, self._arguments


def written(problem: Mapping[str, Any], caption: str = "", explained: bool = True) -> tuple[str, str, str]:
    """What is asked, what is answered, and the letter of the right option."""
    context = " ".join([problem["hint"], caption]).strip() or "N/A"
    options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(problem["choices"]))
    letter = LETTERS[problem["answer"]]
    asked = f"Question: {problem['question']}\nContext: {context}\nOptions: {options}"
    answered = f"The answer is {letter}."
    if explained:
        reasons = " ".join(problem[name].replace("\n", "\\n") for name in ("lecture", "solution"))
        answered += f" BECAUSE: {reasons}"
    asked, answered = (text.replace("  ", " ").strip().replace(PLACEHOLDER, PLACEHOLDER.upper()) for text in (asked, answered))
    return asked, answered, letter


def _json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"science_qa: {path} cannot be read: {error}") from error
