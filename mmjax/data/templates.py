"""Chat templates: from messages to segments of text, of which some are supervised, with images between them.

A template is Jinja text as Hugging Face tokenizers carry it, rendered by transformers in its sandbox. What stands between
`{% generation %}` and `{% endgeneration %}` is supervised. So a named template, the one that is exported with a model and a
foreign tokenizer's own are one thing.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import threading
from typing import Any, Sequence

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mmjax.data import document_templates, instruction_templates, prefix_templates, qformer_templates
from mmjax.data.messages import PLACEHOLDER, Message, images
from mmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation: text, or an image part of the messages."""

    text: str = ""
    supervised: bool = False
    image: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Template:
    """jinja     the template; with generation marks where it has them
    stops     strings at which an answer ends
    marker    what the template writes for an image
    lists     it reads lists of parts (else: strings, in which the image marks are put)
    adds_bos  the tokenizer's own start token goes before the text, unless the text begins with it
    special   the tokenizer's special tokens by name, which templates may write
    ends      special tokens after which the white space is not part of the answer
    apart     what is supervised and what is not are tokenised each on its own
    """

    name: str
    jinja: str
    stops: tuple[str, ...]
    marker: str = PLACEHOLDER
    lists: bool = True
    adds_bos: bool = True
    special: tuple[tuple[str, str], ...] = ()
    ends: tuple[str, ...] = ()
    apart: bool = False

    def segments(self, messages: Sequence[Message], generation_prompt: bool = False) -> list[Segment]:
        """The conversation, ready to be tokenised (`messages` are validated).

        generation_prompt   end with what makes the model answer. Raises UserError where the template refuses the messages.
        """
        parts = (part for message in messages for part in message["content"])
        if "supervised" not in self.jinja and any("supervised" in part for part in parts):
            raise UserError(
                f"the template {self.name!r} supervises whole answers, and this conversation has parts that are not to be learned; "
                f"documents are written by one of {', '.join(document_templates.NAMED)}"
            )
        rendered, spans = self._render(messages, generation_prompt)
        shown = images(messages)
        pieces = rendered.split(self.marker) if self.marker else [rendered]
        if len(pieces) - 1 != len(shown):
            raise UserError(
                f"the template {self.name!r} wrote {len(pieces) - 1} image marks {self.marker!r} for {len(shown)} images"
            )
        result, start = [], 0
        for number, piece in enumerate(pieces):
            if number:
                result.append(Segment(image=shown[number - 1]))
                start += len(self.marker)
            cuts = {start, start + len(piece)} | {
                at for span in spans for at in span if start < at < start + len(piece)
            }
            for left, right in zip(sorted(cuts), sorted(cuts)[1:]):
                supervised = any(begin <= left and right <= end for begin, end in spans)
                result.append(Segment(rendered[left:right], supervised))
            start += len(piece)
        return result

    def exported(self, tokenizer: PreTrainedTokenizerBase, image_start: str = "", image_end: str = "") -> str:
        """The Jinja text for a Hugging Face tokenizer: no generation marks, the start token written out."""
        if PLACEHOLDER in image_start + image_end:
            raise UserError(
                f"image_start and image_end cannot contain {PLACEHOLDER!r}, which marks images in the exported template"
            )
        jinja = _GENERATION.sub("", self.jinja)
        if image_start or image_end:
            jinja = jinja.replace(_MARK, _literal(image_start + PLACEHOLDER + image_end))
        return ("{{- bos_token -}}" if self.adds_bos and starts_with_bos(tokenizer) else "") + jinja

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text and its supervised spans, in characters."""
        if _GENERATION.search(self.jinja):
            return self._run(messages, generation_prompt, marked=True)
        rendered, _ = self._run(messages, generation_prompt)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._run(messages[:number], True)
            through, _ = self._run(messages[: number + 1], False)
            if not (through.startswith(before) and rendered.startswith(through)):
                raise UserError(
                    f"the template {self.name!r} has no generation marks, and what it writes up to answer {number} changes "
                    "with what follows, so the answers' places in the text are unknown; put {% generation %} and "
                    "{% endgeneration %} around the answers in the template"
                )
            trimmed = through.rstrip()
            spans.append((len(before), len(trimmed) if trimmed.endswith(self.ends or ("\0",)) else len(through)))
        return rendered, spans

    def _run(
        self, messages: Sequence[Message], prompt: bool, marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        plain = [
            {
                "role": message["role"],
                "content": [
                    {"type": "image"} if part["type"] == "image" else dict(part)
                    for part in message["content"]
                ]
                if self.lists
                else flat(message),
            }
            for message in messages
        ]
        special: dict[str, Any] = dict(self.special)
        try:
            with _LOCK:
                result: Any = render_jinja_template(
                    [plain],  # type: ignore[list-item]
                    chat_template=self.jinja,
                    return_assistant_tokens_mask=marked,
                    add_generation_prompt=prompt,
                    **special,
                )
        except TemplateError as error:
            raise UserError(f"the template {self.name!r} refuses this conversation: {error}") from error
        texts, spans = result
        return texts[0], spans[0] if marked else []


def get(name: str, tokenizer: PreTrainedTokenizerBase | None = None, system: str | None = None) -> Template:
    """The template called `name`, or the tokenizer's own for "tokenizer".

    system   takes the place of a named template's default system text. Raises UserError for an unknown name and for a
             template whose markers are not tokens of this tokenizer.
    """
    if name == "tokenizer":
        if tokenizer is None:
            raise UserError('the template "tokenizer" needs a tokenizer')
        return _of_tokenizer(tokenizer, system)
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        raise UserError(
            f"unknown template {name!r}{f' (nearest: {near[0]!r})' if near else ''}; there are {', '.join(NAMES)}"
        )
    body, default, stops, markers = _NAMED[name]
    for marker in markers:
        if tokenizer is not None and not is_token(tokenizer, marker):
            raise UserError(
                f"the template {name!r} does not fit the tokenizer: {marker!r} is not one of its tokens; choose another of "
                f"{', '.join(NAMES)}"
            )
    adds_bos, special = "bos_token" not in body, {}
    if tokenizer is not None:
        special = {"eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token}
        body = body if starts_with_bos(tokenizer) else body.replace("{{ bos_token }}", "")
    return Template(
        name,
        _PREAMBLE.replace("DEFAULT", _literal(default if system is None else system)) + body,
        stops,
        adds_bos=adds_bos,
        special=tuple((token, text) for token, text in special.items() if text and token in body),
        apart=name in qformer_templates.APART,
    )


def markers(name: str) -> tuple[str, ...]:
    """The strings that a named template needs as tokens; none for a tokenizer's own."""
    return _NAMED[name][3] if name in _NAMED else ()


def flat(message: Message) -> str:
    """A validated message as one string, a mark for each image, by the same rule as the named templates."""
    written, parts = "", message["content"]
    for part, following in zip(parts, [*parts[1:], None]):
        if part["type"] == "text":
            written += part["text"]
        else:
            glued = following is None or following["type"] == "text" and following["text"][:1] in ("", " ", "\n")
            written += PLACEHOLDER if glued else PLACEHOLDER + "\n"
    return written


def is_token(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether this string, within a text, is one token of the tokenizer's."""
    ids = tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"]
    known = tokenizer.convert_tokens_to_ids(token)
    return known is not None and known in ids and tokenizer.convert_ids_to_tokens(known) == token


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its start token before a text."""
    bare, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return ids != bare and ids[0] == tokenizer.bos_token_id


def ends_with_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its end token behind a text, as T5's does."""
    bare, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return ids != bare and ids[-1] == tokenizer.eos_token_id


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase, system: str | None) -> Template:
    jinja = tokenizer.chat_template
    if isinstance(jinja, dict):
        jinja = jinja.get("default")
    if not jinja:
        raise UserError(f"the tokenizer carries no chat template; choose one of {', '.join(NAMES)}")
    if system is not None:
        raise UserError("model.system cannot change a tokenizer's own template; put a system message into the data")
    special = tuple((key, str(value)) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str))
    template = Template("tokenizer", jinja, (), lists=False, special=special, ends=_marks(tokenizer))
    probe = "is anybody there"  # asked and answered: a captioning template writes answers alone
    turns = [{"role": role, "content": [{"type": "text", "text": probe}]} for role in ("user", "assistant")]
    try:
        seen, _ = dataclasses.replace(template, lists=True)._run(turns, False)
    except (UserError, TypeError):  # TypeError: the template adds a list to a string
        seen = ""
    if probe in seen and "'type'" not in seen:
        template = dataclasses.replace(template, lists=True, marker=_marker(template, tokenizer, seen, probe))
    return dataclasses.replace(template, adds_bos=template.lists, stops=_stops(template, tokenizer))


def _marker(template: Template, tokenizer: PreTrainedTokenizerBase, without: str, probe: str) -> str:
    """What a template that reads lists of parts writes for an image; PLACEHOLDER where it knows no images."""
    parts = [{"type": "image"}, {"type": "text", "text": probe}]
    shown, _ = dataclasses.replace(template, lists=True)._run(_ask(parts), False)
    candidates = [getattr(tokenizer, "image_token", None), PLACEHOLDER, *_MARKERS, *_marks(tokenizer)]
    return next((mark for mark in candidates if mark and mark in shown and mark not in without), PLACEHOLDER)


def _stops(template: Template, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The end token, and whatever the template writes after an answer."""
    answer = "nobody here"
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    after = template._run([*_ask([{"type": "text", "text": "hello"}]), reply], False)[0].rpartition(answer)[2].strip()
    return tuple(dict.fromkeys(stop for stop in (after, tokenizer.eos_token) if stop))


def _marks(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens that were added to the tokenizer beside its learned vocabulary."""
    return tuple(mark for mark in tokenizer.get_added_vocab() if mark.strip())


def _ask(parts: list[dict[str, Any]]) -> list[Message]:
    return [{"role": "user", "content": parts}]


def _literal(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


# transformers' tracker of generation marks belongs to the compiled template, which threads share.
_LOCK = threading.Lock()
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_MARKERS = ("<|image_pad|>", "<|image|>", "<start_of_image>", "<IMG_CONTEXT>", "[IMG]")
_MARK = _literal(PLACEHOLDER)

# An image is followed by a newline unless it ends its turn or the text after it begins with white space.
_PREAMBLE = (
    "{%- macro flat(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if part.type == 'image' -%}{{ " + _MARK + " }}"
    "{%- if loop.nextitem is defined and (loop.nextitem.type == 'image' or loop.nextitem.text[:1] not in ['', ' ', '\\n']) -%}"
    "{{ '\\n' }}{%- endif -%}{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- macro pictures(content) -%}{%- if content is not string -%}{%- for part in content -%}"
    "{%- if part.type == 'image' -%}{{ " + _MARK + " }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- macro words(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if part.type == 'text' -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- if messages[0].role == 'system' -%}{%- set system = flat(messages[0].content) -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = DEFAULT -%}{%- set turns = messages -%}{%- endif -%}"
)


def _turns(user: str, assistant: str, before: str = "", prompt: str = "", after: str = "") -> str:
    """A template's body from Jinja for its parts; `m` is the turn at hand."""
    return (
        before
        + "{%- for m in turns -%}{%- if m.role == 'user' -%}" + user
        + "{%- else -%}" + assistant
        + "{%- endif -%}{%- endfor -%}"
        + ("{%- if add_generation_prompt -%}" + prompt + "{%- else -%}" + after + "{%- endif -%}" if prompt or after else "")
    )  # fmt: skip


def _supervised(text: str) -> str:
    return "{%- generation -%}" + text + "{%- endgeneration -%}"


_V1 = _turns(
    "{{ 'USER: ' + flat(m.content) + ' ' }}",
    "{{ 'ASSISTANT:' }}" + _supervised("{{ ' ' + flat(m.content) + '</s>' }}"),
    before="{%- if system -%}{{ system + ' ' }}{%- endif -%}",
    prompt="{{ 'ASSISTANT:' }}",
)
# LLaVA's first template also supervises the marks before each turn.
_V0 = _turns(
    _supervised("{{ '###' }}") + "{{ ' Human: ' + flat(m.content) + '\\n' }}",
    _supervised("{{ '### Assistant: ' + flat(m.content) + '\\n' }}"),
    before="{%- if system -%}{{ system + '\\n\\n' }}{%- endif -%}",
    prompt="{{ '### Assistant:' }}",
    after=_supervised("{{ '### ' }}"),
)
_PLAIN = _turns("{{ pictures(m.content) }}", _supervised("{{ flat(m.content) + '\\n' }}"))
_CHATML = _turns(
    "{{ '<|im_start|>user\\n' + flat(m.content) + '<|im_end|>' }}",
    "{{ '<|im_start|>assistant\\n' }}" + _supervised("{{ flat(m.content) + '<|im_end|>' }}"),
    before="{%- if system -%}{{ '<|im_start|>system\\n' + system + '<|im_end|>' }}{%- endif -%}",
    prompt="{{ '<|im_start|>assistant\\n' }}",
)
_INSTRUCT = _turns(
    "{{ ('' if loop.first else SEPARATOR) + '[INST] ' }}"
    "{%- if loop.first and system -%}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif -%}"
    "{{ flat(m.content) + ' [/INST]' }}",
    _supervised("{{ ' ' + flat(m.content) + ' </s>' }}"),
)
# VILA's: the assistant's header says system as well, and a turn ends with the text's end.
_LLAMA_3 = _turns(
    "{{ HEADER.format('user') + flat(m.content) + '<|end_of_text|>' }}",
    "{{ HEADER.format('system') }}" + _supervised("{{ flat(m.content) + '<|end_of_text|>' }}"),
    before="{{ '<|begin_of_text|>' }}{%- if system -%}{{ HEADER.format('system') + system + '<|end_of_text|>' }}{%- endif -%}",
    prompt="{{ HEADER.format('system') }}",
).replace("HEADER", "'<|start_header_id|>{}<|end_header_id|>\n\n'")
# The pictures of all turns stand in front; what ends a question is learned with its answer.
_DOUBUTSU = _turns(
    "{{ ('' if loop.first else '\n') + '<|im_start|>user\n' + words(m.content) }}",
    _supervised("{{ '<|im_end|>\n<|im_start|>assistant\n' + words(m.content) + '<|im_end|>' }}"),
    before="{%- for m in turns -%}{{ pictures(m.content) }}{%- endfor -%}"
    "{%- if system -%}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{%- endif -%}",
    prompt="{{ '<|im_end|>\n<|im_start|>assistant\n' }}",
)
_MOONDREAM = _turns(
    "{{ ('' if loop.first else '\\n\\n') + pictures(m.content) + ('\\n\\n' if pictures(m.content) else '')"
    " + 'Question: ' + words(m.content) + '\\n\\n' }}",
    "{{ 'Answer:' }}" + _supervised("{{ ' ' + words(m.content) + '<END>' }}"),
    prompt="{{ 'Answer:' }}",
)

# LaVIN's: the picture is said to be one, or that there is none; what ends an answer is the text's end.
_LAVIN = _turns(
    "{{ ('Image: ' + (pictures(m.content) or 'N/A ')) if loop.first else '\\n' }}{{ words(m.content) + '\\nResponse:' }}",
    _supervised("{{ words(m.content) }}{{ eos_token }}"),
)

_CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to {1} questions."
)
_HUMAN, _USER = _CURIOUS.format("human", "the human's"), _CURIOUS.format("user", "the user's")
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_SEES = "You are a helpful AI assistant that can see images and answer questions about them."
_LLAMA_3_MARKS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
# name: (body, default system text, stops, strings that must be tokens)
_NAMED: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "v0": (_V0, _HUMAN, ("###",), ()),
    "v1": (_V1, _USER, ("</s>",), ("</s>",)),
    "vicuna_v1": (_V1, _USER, ("</s>",), ("</s>",)),
    "llava_v1": (_V1, _HUMAN, ("</s>",), ("</s>",)),
    "plain": (_PLAIN, "", ("\n",), ()),
    "llava_llama_2": (_INSTRUCT.replace("SEPARATOR", "'<s>'"), _LLAMA_2, ("</s>",), ("<s>", "</s>")),
    "mistral_instruct": (_INSTRUCT.replace("SEPARATOR", "''"), "", ("</s>",), ("</s>",)),
    "mpt": (_CHATML, _MPT, ("<|im_end|>",), ("<|im_start|>", "<|im_end|>")),
    "chatml": (_CHATML, _MPT, ("<|im_end|>",), ("<|im_start|>", "<|im_end|>")),
    "chatml_direct": (_CHATML, "Answer the questions.", ("<|im_end|>",), ("<|im_start|>", "<|im_end|>")),
    "hermes-2": (_CHATML, "Answer the questions.", ("<|im_end|>",), ("<|im_start|>", "<|im_end|>")),
    "llama_3": (_LLAMA_3, _LLAMA_2, ("<|end_of_text|>",), _LLAMA_3_MARKS),
    "doubutsu": (_DOUBUTSU, _SEES, ("<|im_end|>",), ("<|im_start|>", "<|im_end|>")),
    "moondream": (_MOONDREAM, "", ("<END>",), ()),
    **instruction_templates.NAMED,
    "lavin": (_LAVIN, "", (), ()),
    **document_templates.NAMED,
    **qformer_templates.NAMED,
    **prefix_templates.NAMED,
}
NAMES = tuple(_NAMED)
