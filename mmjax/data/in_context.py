"""What can be done to the samples of any data set: several joined into one, and questions put into the words of a prompt.

    Joined(dataset, 4, seed=0)[0]                     four samples, one after the other: an in-context row of several pictures
    Prompted(dataset, ("Question: {} Short answer:",))  the user's text within one of these, drawn by the sample's id
    Told(dataset, "")                                 a system text in place of the template's; "" = none
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Sequence

import numpy as np
from PIL import Image

from mmjax.data.messages import BadSample, Message, Sample
from mmjax.errors import UserError

if TYPE_CHECKING:
    from mmjax.data.sources import Dataset


class Wrapped:
    """A data set over another one, with the other's pictures."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def image(self, name: str) -> Image.Image:
        return self.dataset.image(name)

    def picture_size(self, name: str) -> tuple[int, int]:
        return self.dataset.picture_size(name)


class Joined(Wrapped):
    """Every `count` samples as one, each sample once: a random division that stays the same. What is left over is not shown.

    Their turns follow each other, so that each answer can be learned after those before it. Only the first one's system message is kept.
    """

    def __init__(self, dataset: Dataset, count: int, seed: int = 0):
        super().__init__(dataset)
        self.count = count
        if len(dataset) < count:
            raise UserError(f"join = {count}: the source has only {len(dataset)} samples")
        self._order = np.random.default_rng((seed, count)).permutation(len(dataset))

    def __len__(self) -> int:
        return len(self.dataset) // self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        samples = [self.dataset[int(number)] for number in self._order[index * self.count :][: self.count]]
        id = "+".join(sample.id for sample in samples)
        messages = joined([sample.messages for sample in samples], id)
        return dataclasses.replace(samples[-1], id=id, messages=messages)


class Told(Wrapped):
    """Samples with this system text in front, unless they have one of their own."""

    def __init__(self, dataset: Dataset, system: str):
        if not isinstance(system, str):
            raise UserError(f"system: give a text, not {system!r}")
        super().__init__(dataset)
        self.system = system

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        if sample.messages[0]["role"] == "system":
            return sample
        said: Message = {"role": "system", "content": [{"type": "text", "text": self.system}]}
        return dataclasses.replace(sample, messages=[said, *sample.messages])


class OfTask(Wrapped):
    """Samples that are all of one task, which multi-task prompts read."""

    def __init__(self, dataset: Dataset, task: int):
        if not isinstance(task, int) or task < 0:
            raise UserError(f"task_id: give the number of a task, from 0, not {task!r}")
        super().__init__(dataset)
        self.task = task

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return dataclasses.replace(self.dataset[index], task=self.task)


class Prompted(Wrapped):
    """Every text of the user in the words of one of `prompts`, in which {} is its place; a prompt without {} takes its place."""

    def __init__(self, dataset: Dataset, prompts: Sequence[str]):
        prompts = (prompts,) if isinstance(prompts, str) else prompts
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("prompts: give a list of texts; {} in one is the place of what the user says")
        super().__init__(dataset)
        self.prompts = tuple(prompts)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        messages = [worded(turn, self._drawn(f"{sample.id} {at}")) for at, turn in enumerate(sample.messages)]
        return dataclasses.replace(sample, messages=messages)

    def _drawn(self, key: str) -> str:
        return self.prompts[int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % len(self.prompts)]


def joined(conversations: Sequence[Sequence[Message]], id: str) -> list[Message]:
    """Validated conversations one after the other; only the first one's system message is kept.

    Raises BadSample where one begins with the role in which the one before ends.
    """
    messages: list[Message] = []
    for conversation in conversations:
        turns = [turn for turn in conversation if turn["role"] != "system" or not messages]
        if messages and turns and turns[0]["role"] == messages[-1]["role"]:
            raise BadSample(id, f"samples are joined of which one ends and the next begins with the {turns[0]['role']}")
        messages += turns
    return messages


def worded(message: Message, prompt: str) -> Message:
    """A user's message with its text, one part behind its images, in the words of `prompt`; another's as it is."""
    if message["role"] != "user":
        return message
    pictures = [part for part in message["content"] if part["type"] == "image"]
    text = "".join(part["text"] for part in message["content"] if part["type"] == "text").strip()
    return {"role": "user", "content": [*pictures, {"type": "text", "text": prompt.replace("{}", text)}]}
