"""Templates of instructions: Alpaca's (Taori et al., 2023; also LLaMA-Adapter's, arXiv 2303.16199) and HyPoradise's (arXiv 2309.15701).

A user's text that holds Alpaca's "### Input:" is an instruction with an input (see mmjax.data.instructions).
"""

from __future__ import annotations


def _turns(before: str, user: str, prompt: str) -> str:
    """`before` stands in front of the first turn, `prompt` before each answer, which is supervised with the text's end."""
    return (
        "{%- for m in turns -%}{%- if m.role == 'user' -%}"
        "{{ pictures(m.content) }}{%- if loop.first -%}" + before + "{%- else -%}{{ '\\n\\n' }}{%- endif -%}" + user
        + "{{ '" + prompt + "' }}{%- else -%}"
        + "{%- generation -%}{{ words(m.content) + '</s>' }}{%- endgeneration -%}{%- endif -%}{%- endfor -%}"
    )  # fmt: skip


_ALPACA = _turns(
    "{{ system + (', paired with an input that provides further context. ' if '### Input:\\n' in words(m.content) else '. ')"
    " + 'Write a response that appropriately completes the request.\\n\\n' }}",
    "{{ '### Instruction:\\n' + words(m.content) | trim }}",
    "\\n\\n### Response:",
)
_HYPOTHESES = _turns("{{ system + '\\n\\n' }}", "{{ '### Best-hypothesis:\\n' + words(m.content) }}", "\\n\\n### Response:\\n")
_REVISE = (
    "Below is the best-hypotheses transcribed from speech recognition system. Please try to revise it using the words which are only "
    "included into other-hypothesis, and write the response for the true transcription."
)

# name: (body, default system text, stops, strings that must be tokens), as mmjax.data.templates has them
NAMED: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "alpaca": (_ALPACA, "Below is an instruction that describes a task", ("</s>",), ("</s>",)),
    "hypotheses": (_HYPOTHESES, _REVISE, ("</s>",), ("</s>",)),
}
