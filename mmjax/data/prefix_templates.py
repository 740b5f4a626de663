"""Templates of GIT, PaliGemma and Gemma 3. The first two were trained on single turns; a second one follows as it comes."""

from __future__ import annotations


def _turns(user: str, answer: str, before_answer: str = "", prompt: str = "") -> str:
    """`answer` is supervised; `m` is the turn at hand."""
    return (
        "{%- for m in turns -%}{%- if m.role == 'user' -%}" + user + "{%- else -%}" + before_answer
        + "{%- generation -%}{{ " + answer + " }}{%- endgeneration -%}{%- endif -%}{%- endfor -%}"
        + ("{%- if add_generation_prompt -%}" + prompt + "{%- endif -%}" if prompt else "")
    )  # fmt: skip


def _git(question: str) -> str:
    """Pictures, [CLS], what is asked, and an answer up to [SEP]."""
    return _turns("{{ pictures(m.content) }}{{ '[CLS]' if loop.first }}" + question, "words(m.content) + '[SEP]'")


_PALIGEMMA = _turns(
    "{{ pictures(m.content) }}{{ '<bos>' if loop.first }}{{ words(m.content) + '\\n' }}", "words(m.content) + '<eos>'"
)
# Pictures stand where they are among the words, with nothing put between.
_JOINED = (
    "{%- for part in ([{'type': 'text', 'text': m.content}] if m.content is string else m.content) -%}"
    "{%- if part.type == 'image' -%}{{ \"<image>\" }}{%- else -%}{{ part.text | trim }}{%- endif -%}{%- endfor -%}"
)
_GEMMA_3 = _turns(
    "{{ ('' if loop.first else '\\n') + '<start_of_turn>user\\n' }}{%- if loop.first and system -%}{{ system + '\\n\\n' }}{%- endif -%}" + _JOINED
    + "{{ '<end_of_turn>\\n' }}",
    "words(m.content) | trim + '<end_of_turn>'",
    before_answer="{{ '<start_of_turn>model\\n' }}",
    prompt="{{ '<start_of_turn>model\\n' }}",
)  # fmt: skip

# name: (body, default system text, stops, strings that must be tokens), as mmjax.data.templates has them
NAMED: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "git": (_git(""), "", ("[SEP]",), ("[CLS]", "[SEP]")),
    "git_vqa": (_git("{{ words(m.content) + ' ' }}"), "", ("[SEP]",), ("[CLS]", "[SEP]")),
    "paligemma": (_PALIGEMMA, "", ("<eos>",), ("<bos>", "<eos>")),
    "gemma3": (_GEMMA_3, "", ("<end_of_turn>",), ("<start_of_turn>", "<end_of_turn>")),
}
