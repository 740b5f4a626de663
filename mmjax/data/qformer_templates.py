"""Templates of BLIP-2, InstructBLIP and MiniGPT-4: one turn each as they were trained, several where a user goes on asking.

`bos_token` is the tokenizer's start token where it puts one before a text, else nothing.
"""

from __future__ import annotations


def _supervised(text: str, end: str) -> str:
    return "{%- generation -%}{{ " + text + " }}{{ " + end + " }}{%- endgeneration -%}"


def _pictures_first(question: str, end: str) -> str:
    """Pictures, the start token, the user's words as `question` writes them, and an answer that `end` ends."""
    return (
        "{%- set ns = namespace(asked=false) -%}{%- for m in turns -%}{%- if m.role == 'user' -%}"
        "{{ pictures(m.content) }}{%- if loop.first -%}{{ bos_token }}{{ system }}{%- else -%}{{ ' ' }}{%- endif -%}"
        "{{ " + question + " }}{%- set ns.asked = words(m.content) | length > 0 -%}"
        "{%- else -%}" + _supervised("(' ' if ns.asked else '') + words(m.content)", end) + "{%- endif -%}{%- endfor -%}"
    )


def _minigpt4(asks: str, answers: str, end: str, later: str) -> str:
    """The user's turn between `asks` and `answers` (`later` takes the place of `asks` from the second turn on), each picture in a frame."""
    return (
        "{{ system }}{%- for m in turns -%}{%- if m.role == 'user' -%}{{ '" + asks + "' if loop.first else '" + later + "' }}"
        "{%- for part in ([{'type': 'text', 'text': m.content}] if m.content is string else m.content) -%}"
        "{%- if part.type == 'image' -%}{{ '<Img>' }}{{ \"<image>\" }}{{ '</Img> ' }}{%- else -%}{{ part.text }}{%- endif -%}"
        "{%- endfor -%}{{ '" + answers + "' }}{%- else -%}" + _supervised("words(m.content)", end) + "{%- endif -%}{%- endfor -%}"
    )


# name: (body, default system text, stops, strings that must be tokens), as mmjax.data.templates has them
NAMED: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "blip2": (_pictures_first("words(m.content)", "'\\n'"), "", ("\n",), ()),
    "blip2_vqa": (_pictures_first("'Question: ' + words(m.content) + ' Answer:'", "'\\n'"), "", ("\n",), ()),
    "blip2_t5_vqa": (_pictures_first("'Question: ' + words(m.content) + ' Short answer:'", "'\\n'"), "", ("\n",), ()),
    "instructblip": (_pictures_first("words(m.content)", "eos_token"), "", (), ()),
    "minigpt4": (_minigpt4("###Human: ", " ###Assistant: ", "'###'", "Human: "), "", ("###",), ()),
    "minigpt4_llama_2": (_minigpt4("[INST] ", " [/INST] ", "eos_token", "[INST] "), "", (), ()),
}
# MiniGPT-4 tokenises what is asked and what is answered each on its own.
APART = ("minigpt4", "minigpt4_llama_2")
