"""--job=chat: a conversation in the terminal.

/image PATH    shows the model a picture with the next question
/example QUESTION => ANSWER   tells the model how the pictures shown are to be answered, before your own question; without "=>" it is
               the answer to pictures alone
/reset         begins a new conversation
/quit          ends (so does the end of the input)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import mmjax
from mmjax import config
from mmjax.config import Recipe
from mmjax.data import images
from mmjax.data.messages import Message, Sample, validated
from mmjax.errors import UserError
from mmjax.inference.generate import stream
from mmjax.model import Model


def run(recipe: Recipe, workdir: Path) -> None:
    """Reads questions from the standard input and writes answers as they come."""
    model = mmjax.load(workdir)
    if sys.stdin.isatty():
        print(f"{recipe.name}. /image PATH shows a picture with your next question, /reset begins anew, /quit ends.")
    talk(model, recipe.generate, sys.stdin, sys.stdout, "> " if sys.stdin.isatty() else "")


def talk(model: Model, settings: config.Generate, lines: Iterable[str], out: TextIO, mark: str = "") -> None:
    """The conversation: answers the lines, one after the other, on `out`. What cannot be done is said and changes nothing."""
    messages: list[Message] = []
    pictures: list[dict[str, Any]] = []

    def say(text: str) -> None:
        out.write(text)
        out.flush()

    say(mark)
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "/quit":
                return
            elif word == "/reset":
                messages, pictures = [], []
                say("A new conversation.\n")
            elif word == "/image":
                pictures.append({"type": "image", "image": images.decode(str(Path(rest.strip()).expanduser()))})
                say(f"{rest.strip()} goes with the next question.\n")
            elif word == "/example":
                question, _, known = rest.rpartition("=>")
                said = [{"type": "text", "text": question.strip()}] if question.strip() else []
                if not known.strip() or not [*pictures, *said]:
                    raise UserError("/example QUESTION => ANSWER, or behind /image PATH /example ANSWER: a part of it is missing.")
                say(f"An example with {len(pictures)} pictures.\n")
                answered = {"role": "assistant", "content": known.strip()}
                messages, pictures = [*messages, {"role": "user", "content": [*pictures, *said]}, answered], []
            elif word.startswith("/"):
                say(f"There is no {word}; there are /image PATH, /example QUESTION => ANSWER, /reset and /quit.\n")
            elif line.strip():
                asked = [*messages, {"role": "user", "content": [*pictures, {"type": "text", "text": line.strip()}]}]
                answer = ""
                for piece in pieces(model, settings, asked):
                    answer += piece
                    say(piece)
                say("\n")
                messages, pictures = [*asked, {"role": "assistant", "content": answer}], []
        except UserError as error:
            say(f"{error}\n")
        say(mark)


def pieces(model: Model, settings: config.Generate, messages: list[Message]) -> Iterator[str]:
    """The answer to a conversation, piece by piece as it is generated."""
    example = model.prompt(Sample("the conversation", validated(messages), task=settings.task))
    chosen: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    sampling = model.sampling(settings.max_new_tokens, num_beams=1, **chosen)  # beams are not known until their end
    ended = model.ended((*settings.stop, *model.stops))
    shown = text = ""
    for tokens in stream(model.params, model.config, model.collate([[example]]), sampling, model.run, ended=ended):
        text = model.text(tokens[0], settings.stop)
        # A character whose bytes are not all there yet waits for them.
        if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]
