"""Templates for rows of several images: documents (one message by the assistant) and conversations that are in-context rows.

All of them write the parts of a message in their order and supervise the assistant's text but where a part says `"supervised": false`.
In a document, what the others call an answer is the whole text. The tokenizer's end token is written behind a whole row.
"""

from __future__ import annotations

# `ns` goes from part to part.
_START = (
    "{%- if system -%}{{ system }}{%- endif -%}"
    "{%- set ns = namespace(text=false, seen=false, chunk=false, image=false) -%}"
)
_END = "{%- generation -%}{{ eos_token }}{%- endgeneration -%}"
_ASKED = "{%- set told = turns | selectattr('role', 'equalto', 'user') | list | length > 0 -%}"
_ASKED_IN_WORDS = (
    "{%- set asked = namespace(words=false) -%}{%- for m in turns if m.role == 'user' -%}"
    "{%- if m.content is string or m.content | selectattr('type', 'equalto', 'text') | list -%}{%- set asked.words = true -%}"
    "{%- endif -%}{%- endfor -%}{%- set told = asked.words -%}"
)


def _rows(
    text: str, image: str, before: str = "", after: str = "", end: str = "", prompt: str = "", told: str = _ASKED
) -> str:
    """A template's body: `before` and `after` each turn `m`, `text` and `image` for its parts `part`, `end` behind all turns, and
    `prompt` where the model is to go on; `told` sets whether this is a conversation (there is a user), not a document."""
    return (
        _START
        + told
        + "{%- for m in turns -%}" + before
        + "{%- for part in ([{'type': 'text', 'text': m.content}] if m.content is string else m.content) -%}"
        + "{%- if part.type == 'image' -%}" + image + "{%- else -%}" + text + "{%- endif -%}{%- endfor -%}"
        + after + "{%- endfor -%}"
        + "{%- if add_generation_prompt -%}" + prompt + "{%- else -%}" + end + "{%- endif -%}"
    )  # fmt: skip


def _learned(text: str, when: str = "true") -> str:
    """`text`, supervised in the assistant's turns where `when` holds and the part does not say otherwise."""
    return (
        "{%- if m.role == 'assistant' and part.supervised is not false and " + when + " -%}"
        "{%- generation -%}{{ " + text + " }}{%- endgeneration -%}"
        "{%- else -%}{{ " + text + " }}{%- endif -%}"
    )


# VILA (arXiv 2312.07533): text and images as they come, all text learned. One pair is "<image>caption</s>"; joined pairs are lines.
_INTERLEAVED = _rows(
    text=_learned("(' ' if ns.text and loop.first else '') + part.text") + "{%- set ns.text = true -%}",
    image='{{ "<image>" }}{%- set ns.text = false -%}',
    after="{%- if told and m.role == 'assistant' and not loop.last -%}{%- generation -%}{{ '\\n' }}{%- endgeneration -%}"
    "{%- set ns.text = false -%}{%- endif -%}",
    end=_END,
)


def _chunks(mark: str, space: str) -> str:
    """Flamingo's rows: text belongs to the image before it, and `mark` ends it. In a document nothing before the first image is
    learned, nor is the end token; of a conversation the answers are, each with its mark, and the end token."""
    chunk_end = "{%- generation -%}{{ '" + mark + "' }}{%- endgeneration -%}{%- set ns.chunk = false -%}"
    return _rows(
        text=_learned(f"('{space}' if told and m.role == 'assistant' and loop.first else '') + part.text", "(told or ns.seen)")
        + "{%- set ns.chunk = true -%}",
        image="{%- if m.role == 'assistant' and ns.chunk and ns.seen -%}" + chunk_end + "{%- endif -%}"
        '{{ "<image>" }}{%- set ns.seen = true -%}{%- set ns.chunk = false -%}',
        after="{%- if m.role == 'assistant' and (told or ns.chunk and ns.seen) -%}" + chunk_end + "{%- endif -%}",
        end="{%- if told -%}" + _END + "{%- else -%}{{ eos_token }}{%- endif -%}",
    )  # fmt: skip


# Otter (arXiv 2305.03726): the answer stands behind <answer>; also the end token is learned.
_OTTER = _rows(
    before="{{ 'User:' if m.role == 'user' and m.content is string else '' }}"
    "{{ ' GPT:<answer>' if m.role == 'assistant' and told else '' }}{%- set ns.text = m.content is string -%}",
    text="{{ 'User:' if m.role == 'user' and not ns.text else '' }}" + _learned("part.text") + "{%- set ns.text = true -%}",
    image='{{ "<image>" }}',
    after="{%- if m.role == 'assistant' -%}{%- generation -%}{{ '<|endofchunk|>' }}{%- endgeneration -%}{%- endif -%}",
    end=_END,
    prompt="{{ ' GPT:<answer>' }}",
)

# IDEFICS (arXiv 2306.16527): every image between two marks, one mark between neighbours; turns end with <end_of_utterance>. A user who
# only shows a picture (a pair) makes no conversation.
_IDEFICS = _rows(
    told=_ASKED_IN_WORDS,
    before="{%- if told -%}{{ ('' if loop.first else '\\n') + ('User:' if m.role == 'user' else 'Assistant:') }}{%- endif -%}"
    "{%- set ns.image = false -%}{%- set ns.text = told -%}",
    text=_learned("(' ' if ns.text else '') + (part.text.strip(' ') if told else part.text)")
    + "{%- set ns.text = false -%}{%- set ns.image = false -%}",
    image="{{ '' if ns.image else '<fake_token_around_image>' }}"
    '{{ "<image>" }}{{ \'<fake_token_around_image>\' }}{%- set ns.image = true -%}{%- set ns.text = false -%}',
    after="{%- if told and m.role == 'assistant' -%}{%- generation -%}{{ '<end_of_utterance>' }}{%- endgeneration -%}"
    "{%- elif told -%}{{ '<end_of_utterance>' }}{%- endif -%}",
    end="{%- if not told -%}" + _END + "{%- endif -%}",
    prompt="{%- if told -%}{{ '\\nAssistant:' }}{%- endif -%}",
)

# name: (body, default system text, stops, strings that must be tokens), as mmjax.data.templates has them
NAMED: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "interleaved": (_INTERLEAVED, "", ("\n",), ()),
    "flamingo": (_chunks("<EOC>", " "), "", ("<EOC>",), ("<EOC>",)),
    "openflamingo": (_chunks("<|endofchunk|>", ""), "", ("<|endofchunk|>",), ("<|endofchunk|>",)),
    "otter": (_OTTER, "", ("<|endofchunk|>",), ("<answer>", "<|endofchunk|>")),
    "idefics": (_IDEFICS, "", ("<end_of_utterance>",), ("<end_of_utterance>", "<fake_token_around_image>")),
}
