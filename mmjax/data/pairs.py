"""Pairs of a picture and a text, with a question or without, and MIMIC-IT's instructions with their in-context examples.

kind "pairs": one sample a row; options name the fields
    {"image": "coco/1.jpg", "text_input": "What is it?", "text_output": "A cat."}    question="text_input", answer="text_output"  InstructBLIP
    {"annotations": [{"image_id": "2", "caption": "A cat."}, ...]}    within="annotations", image="image_id", pattern="{}.jpg"     MiniGPT-4
    {"image": "val2014/1.jpg", "image_id": "1", "caption": "A cat."}                                                                LAVIS COCO
    00000.tar: 000000001.jpg, 000000001.txt and/or 000000001.json {"caption": "A cat.", ...}                                    webdataset
kind "mimic_it": a file of instructions, pictures in a JSON file of base64 (arXiv 2306.05425)
    {"meta": {...}, "data": {"LA_00001": {"instruction": "What is it?", "answer": "A cat.", "image_ids": ["LA_IMG_1"], "rel_ins_ids": ["LA_00007"]}}}
"""

from __future__ import annotations

from typing import Any, Mapping

from PIL import Image

from mmjax.data import images, rows, stores
from mmjax.data.messages import PLACEHOLDER, BadSample, Message, Sample, validated
from mmjax.errors import UserError


class Pairs:
    """A data set of pairs (see mmjax.data.sources.Dataset).

    images     the store; "" = the tar files of `path` themselves
    image      the field that names the picture; pattern: its name in the store, "{}" the field's value
    question   the field with what is asked; "" = nothing is asked
    answer     the field with the answer or a list of them, of which the first is learned and all are accepted
    """

    def __init__(
        self,
        path: str,
        images: str,
        image: str = "image",
        pattern: str = "{}",
        question: str = "",
        answer: str = "caption",
        within: str = "",
    ):
        if "{}" not in pattern:
            raise UserError(f"pairs: the pattern {pattern!r} of the pictures' names has no place {{}} for the field {image!r}")
        self._arguments = path, images, image, pattern, question, answer, within
        self._rows = rows.open_rows(path, within)
        self._store = stores.open_store(images or (path if path.endswith(".tar") else ""))
        self._image, self._pattern, self._question, self._answer = image, pattern, question, answer

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row, id = self._rows[index], self._rows.id(index)
        id = str(row["id"]) if row.get("id") is not None else id
        picture = row.get(self._image)
        found = row.get(self._answer)
        answers: list[Any] = found if isinstance(found, list) else [found]
        if not isinstance(picture, (str, int)) or not answers or not all(isinstance(text, str) for text in answers):
            raise BadSample(id, f"the row has no picture in {self._image!r} or no text in {self._answer!r}")
        content = [{"type": "image", "path": self._pattern.replace("{}", str(picture))}]
        if self._question:
            content.append({"type": "text", "text": _text(row, self._question, id)})
        answers = [answer.replace(PLACEHOLDER, PLACEHOLDER.upper()) for answer in answers]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answers[0]}]
        return Sample(id, validated(turns, id), "pair" if self._question else "caption", tuple(answers))

    def image(self, name: str) -> Image.Image:
        return images.decode(self._store.read(name))

    def picture_size(self, name: str) -> tuple[int, int]:
        return images.size_of(self._store.read(name))

    def __reduce__(self) -> tuple:
        return Pairs, self._arguments


class MimicIt:
    """MIMIC-IT's instructions, each after up to `shots` of those that the file relates to it (see mmjax.data.sources.Dataset).

    Every instruction has its own pictures before it. An instruction that is named but not there is left out.
    """

    def __init__(self, path: str, images: str, shots: int = 0):
        self._arguments = path, images, shots
        self._rows = rows.TextRows(path, "data")
        if len(self._rows) and not self._rows.keys:
            raise UserError(f"{path}: `data` is not an object of instructions by their ids")
        self._numbers = {key: number for number, key in enumerate(self._rows.keys)}
        self._store, self._shots = stores.open_store(images), shots

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row, id = self._rows[index], self._rows.id(index)
        related = row.get("rel_ins_ids") or []
        if not isinstance(related, list):
            raise BadSample(id, "`rel_ins_ids` is not a list of ids")
        numbers = [self._numbers[key] for key in related if key in self._numbers and key != id][: self._shots]
        turns = [turn for number in numbers for turn in _instruction(self._rows[number], self._rows.id(number))]
        turns += _instruction(row, id)
        return Sample(id, validated(turns, id), "instruction", (_text(row, "answer", id),))

    def image(self, name: str) -> Image.Image:
        return images.decode(self._store.read(name))

    def picture_size(self, name: str) -> tuple[int, int]:
        return images.size_of(self._store.read(name))

    def __reduce__(self) -> tuple:
        return MimicIt, self._arguments


def _instruction(row: Mapping[str, Any], id: str) -> list[Message]:
    """The two turns of an instruction."""
    names = row.get("image_ids") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadSample(id, "`image_ids` is not a list of names")
    content = [{"type": "image", "path": name} for name in names]
    asked = {"type": "text", "text": _text(row, "instruction", id)}
    return [
        {"role": "user", "content": [*content, asked]},
        {"role": "assistant", "content": _text(row, "answer", id)},
    ]


def _text(row: Mapping[str, Any], field: str, id: str) -> str:
    text = row.get(field)
    if not isinstance(text, str):
        raise BadSample(id, f"the row has no text in {field!r}")
    return text.replace(PLACEHOLDER, PLACEHOLDER.upper())
