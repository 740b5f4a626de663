"""Messages are the one interchange format: training files, the Python API and the command line take the same list.

    [{"role": "user", "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "What is this?"}]},
     {"role": "assistant", "content": "A cat."}]

Content is a string or a list of text and image parts; an image part has a `path` (a name in the source's image store) or
an `image` (a picture, an array or encoded bytes). `<image>` inside a text is a placeholder: it stands for the next of the
images listed beside the messages, and the two must agree in number.

A document of text and pictures is one message by the assistant. A text part of the assistant's may have `"supervised": false`: it is
read, but not learned to be written (see mmjax.data.interleaved for the policies that put it there).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping, Sequence

from mmjax.errors import UserError

PLACEHOLDER = "<image>"
LEFT_OUT = "left out: "  # how the reason of a BadSample begins that is no fault: the recipe asked for it
ROLES = ("system", "user", "assistant")
_LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation.

    id        what reports call it
    messages  as `validated` returns them
    kind      the kind of question, for figures per kind
    answers   what an evaluation accepts, the last answer itself if the data says nothing else; for the classification
              objective the class
    task      the number of its task, which multi-task prompts read
    """

    id: str
    messages: list[Message]
    kind: str = ""
    answers: tuple[str, ...] = ()
    task: int = 0


class BadSample(UserError):
    """A sample that cannot be used: its id, and why."""

    def __init__(self, id: str, reason: str):
        super().__init__(id, reason)
        self.id, self.reason = id, reason

    def __str__(self) -> str:
        return f"sample {self.id}: {self.reason}"


def from_messages(row: Mapping[str, Any], id: str) -> Sample:
    """A Sample from a row `{"id", "messages", "images", "kind", "answers", "task_id"}`, of which only `messages` must be there.

    Raises BadSample.
    """
    id = _id(row, id)
    messages = validated(row.get("messages"), id, _images(row, id))
    task = row.get("task_id", 0)
    if not isinstance(task, int) or task < 0:
        raise BadSample(id, f"`task_id` is {task!r}, not the number of a task")
    return Sample(id, messages, str(row.get("kind", "")), _answers(row, messages), task)


def from_llava(row: Mapping[str, Any], id: str) -> Sample:
    """A Sample from LLaVA's `{"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}`.

    LLaVA's position rule (arXiv 2310.03744's code) is applied here: the one image of a turn moves to its front, followed by
    a newline. Turns with several images keep them where they are. A first turn by the model is skipped.
    Raises BadSample.
    """
    id = _id(row, id)
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadSample(id, "`conversations` is not a list of turns")
    messages: list[Message] = []
    for turn in turns:
        role, text = _LLAVA_ROLES.get(turn.get("from", "")), turn.get("value")
        if role is None:
            raise BadSample(id, f"a turn is from {turn.get('from')!r}; known are {', '.join(_LLAVA_ROLES)}")
        if not isinstance(text, str):
            raise BadSample(id, "a turn has no text in `value`")
        if role == "assistant" and not any(message["role"] == "user" for message in messages):
            continue
        if text.count(PLACEHOLDER) == 1:
            text = f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}".strip()
        messages.append({"role": role, "content": text})
    messages = validated(messages, id, _images(row, id))
    return Sample(id, messages, str(row.get("kind", "")), _answers(row, messages))


def validated(messages: Any, id: str = "(conversation)", images: Sequence[Any] = ()) -> list[Message]:
    """The messages with every content as a list of parts and every placeholder joined to its image, in order.

    images   names (or pictures) for the placeholders. Raises BadSample.
    """
    if not isinstance(messages, list) or not messages:
        raise BadSample(id, "`messages` is not a list with at least one message")
    result, waiting, placeholders, previous = [], list(images), 0, None
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise BadSample(id, f"message {number} has the role {role!r}; known are {', '.join(ROLES)}")
        if role == "system" and number:
            raise BadSample(id, f"message {number} is from the system; only the first may be")
        if role == previous:
            raise BadSample(id, f"messages {number - 1} and {number} are both from the {role}; roles must alternate")
        previous = role
        parts = []
        for part in _parts(message.get("content"), f"message {number}", id):
            if part == {"type": "image"}:
                placeholders += 1
                if waiting:
                    image = waiting.pop(0)
                    part = {"type": "image", ("path" if isinstance(image, str) else "image"): image}
            parts.append(part)
        result.append({"role": role, "content": parts})
    if placeholders != len(images):
        raise BadSample(id, f"{placeholders} {PLACEHOLDER} placeholders but {len(images)} images")
    return result


def images(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The image parts of validated messages, in order."""
    return [part for message in messages for part in message["content"] if part["type"] == "image"]


def text(message: Message) -> str:
    """The text of one validated message, its images left out."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def question(messages: Sequence[Message]) -> list[Message]:
    """The messages without a last answer: what the model is asked."""
    return list(messages[:-1] if messages[-1]["role"] == "assistant" else messages)


def _parts(content: Any, where: str, id: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return _split(content)
    if not isinstance(content, list):
        raise BadSample(id, f"the content of {where} is neither text nor a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            supervised = part.get("supervised", True)
            if not isinstance(supervised, bool):
                raise BadSample(id, f"{where} has a text whose `supervised` is {supervised!r}, neither true nor false")
            mark = {} if supervised else {"supervised": False}
            parts += [{**piece, **mark} if piece["type"] == "text" else piece for piece in _split(part["text"])]
        elif kind == "image":
            if "url" in part:
                raise BadSample(
                    id, f"{where} has an image by URL; nothing is fetched: give a `path` or the `image` itself"
                )
            image = part.get("path", part.get("image"))
            if image is None:
                parts.append({"type": "image"})
            else:
                parts.append({"type": "image", ("path" if isinstance(image, str) else "image"): image})
        else:
            raise BadSample(id, f"{where} has a part of type {kind!r}; parts are text (with `text`) and image")
    return parts


def _split(text: str) -> list[dict[str, Any]]:
    """The text between placeholders, and the placeholders."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        parts += [{"type": "image"}] * (number > 0)
        parts += [{"type": "text", "text": piece}] * bool(piece)
    return parts


def _id(row: Mapping[str, Any], id: str) -> str:
    return str(row["id"]) if row.get("id") is not None else id


def _answers(row: Mapping[str, Any], messages: Sequence[Message]) -> tuple[str, ...]:
    found = row.get("answers", [text(messages[-1])] if messages[-1]["role"] == "assistant" else [])
    return tuple(map(str, found if isinstance(found, list) else [found]))


def _images(row: Mapping[str, Any], id: str) -> list[Any]:
    """The images beside the text: `image` or `images`, one name or a list of them."""
    found = row.get("images", row.get("image"))
    found = [] if found is None or found == "" else found if isinstance(found, list) else [found]
    if not all(isinstance(name, str) for name in found):
        raise BadSample(id, "an image is given by something else than its name")
    return found
