import json

import pytest

from mmjax.data import templates
from mmjax.data.messages import validated
from mmjax.errors import UserError
from tests.data.tokenizers import byte_tokenizer, marked_tokenizer

CHAT = [
    {"role": "user", "content": [{"type": "image", "path": "a"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
ONE = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."

SEES = "You are a helpful AI assistant that can see images and answer questions about them."
SYSTEM, USER = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("system", "user"))


@pytest.fixture(scope="module")
def tokenizer():
    return marked_tokenizer()


def written(template, messages, **options):
    segments = template.segments(validated(messages, "m"), **options)
    return "".join("<image>" if segment.image else segment.text for segment in segments)


def supervised(template, messages):
    """The supervised runs of text."""
    runs, joined = [], False
    for segment in template.segments(validated(messages, "m")):
        if segment.supervised and joined:
            runs[-1] += segment.text
        elif segment.supervised:
            runs.append(segment.text)
        joined = segment.supervised
    return runs


@pytest.mark.parametrize(
    ("name", "text", "answers", "prompt"),
    [
        ("v1", f"{V1} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>",
         [" A cat.</s>", " Yes.</s>"], f"{V1} USER: Q ASSISTANT:"),
        ("plain", "<image>A cat.\nYes.\n", ["A cat.\nYes.\n"], ""),
        ("llava_llama_2",
         f"[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A cat. </s><s>[INST] Sure? [/INST] Yes. </s>",
         [" A cat. </s>", " Yes. </s>"], f"[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\nQ [/INST]"),
        ("mistral_instruct", "[INST] <image>\nWhat is it? [/INST] A cat. </s>[INST] Sure? [/INST] Yes. </s>",
         [" A cat. </s>", " Yes. </s>"], "[INST] Q [/INST]"),
        ("mpt", f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|><|im_start|>assistant\n"
         "A cat.<|im_end|><|im_start|>user\nSure?<|im_end|><|im_start|>assistant\nYes.<|im_end|>",
         ["A cat.<|im_end|>", "Yes.<|im_end|>"],
         f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\n"),
        ("llama_3", f"<|begin_of_text|>{SYSTEM}{LLAMA_2}<|end_of_text|>{USER}<image>\nWhat is it?<|end_of_text|>{SYSTEM}A cat.<|end_of_text|>"
         f"{USER}Sure?<|end_of_text|>{SYSTEM}Yes.<|end_of_text|>", ["A cat.<|end_of_text|>", "Yes.<|end_of_text|>"],
         f"<|begin_of_text|>{SYSTEM}{LLAMA_2}<|end_of_text|>{USER}Q<|end_of_text|>{SYSTEM}"),
        ("doubutsu", f"<image><|im_start|>system\n{SEES}<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
         "A cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>",
         ["<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>", "<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"],
         f"<|im_start|>system\n{SEES}<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"),
        ("hermes-2", "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
         "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nSure?<|im_end|><|im_start|>assistant\nYes.<|im_end|>",
         ["A cat.<|im_end|>", "Yes.<|im_end|>"],
         "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\n"),
        ("moondream", "<image>\n\nQuestion: What is it?\n\nAnswer: A cat.<END>\n\nQuestion: Sure?\n\nAnswer: Yes.<END>",
         [" A cat.<END>", " Yes.<END>"], "Question: Q\n\nAnswer:"),
        ("blip2", "<image>What is it? A cat.\n Sure? Yes.\n", [" A cat.\n", " Yes.\n"], "Q"),
        ("blip2_vqa", "<image>Question: What is it? Answer: A cat.\n Question: Sure? Answer: Yes.\n", [" A cat.\n", " Yes.\n"],
         "Question: Q Answer:"),
        ("git", "<image>[CLS]A cat.[SEP]Yes.[SEP]", ["A cat.[SEP]Yes.[SEP]"], "[CLS]"),
        ("git_vqa", "<image>[CLS]What is it? A cat.[SEP]Sure? Yes.[SEP]", ["A cat.[SEP]", "Yes.[SEP]"], "[CLS]Q "),
        ("paligemma", "<image><bos>What is it?\nA cat.<eos>Sure?\nYes.<eos>", ["A cat.<eos>", "Yes.<eos>"], "<bos>Q\n"),
        ("gemma3", "<start_of_turn>user\n<image>What is it?<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n"
         "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>",
         ["A cat.<end_of_turn>", "Yes.<end_of_turn>"], "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n"),
        ("minigpt4", "###Human: <Img><image></Img> What is it? ###Assistant: A cat.###Human: Sure? ###Assistant: Yes.###",
         ["A cat.###", "Yes.###"], "###Human: Q ###Assistant: "),
    ],
)  # fmt: skip
def test_named_templates_write_the_published_text(name, text, answers, prompt):
    template = templates.get(name)
    assert written(template, CHAT) == text
    assert supervised(template, CHAT) == answers
    assert written(template, ONE[:1], generation_prompt=True) == prompt
    assert text.endswith(template.stops[0])


def test_v0_also_supervises_the_marks_between_turns():
    template = templates.get("v0")
    system = V1.replace("user's", "human's").replace("user", "human")
    assert written(template, ONE) == f"{system}\n\n### Human: Q\n### Assistant: A\n### "
    assert supervised(template, ONE) == ["###", "### Assistant: A\n### "]


@pytest.mark.parametrize("name", templates.NAMES)
def test_the_exported_template_writes_the_same_text_in_transformers(name, tokenizer):
    template = templates.get(name, tokenizer)
    bare = byte_tokenizer(chat_template=template.exported(tokenizer))
    assert "generation" not in bare.chat_template.replace("add_generation_prompt", "")
    for chat, options in ((CHAT, {}), (ONE, {}), (CHAT[:3], {"generation_prompt": True})):
        flags = {"add_generation_prompt": options.get("generation_prompt", False)}
        assert bare.apply_chat_template(chat, tokenize=False, **flags) == written(template, chat, **options)
    framed = template.exported(tokenizer, "<im_start>", "<im_end>")
    said = byte_tokenizer(chat_template=framed).apply_chat_template(CHAT, tokenize=False)
    assert said == written(template, CHAT).replace("<image>", "<im_start><image><im_end>")


def test_a_system_message_takes_the_place_of_the_default():
    chat = [{"role": "system", "content": "Be brief."}, *ONE]
    assert written(templates.get("v1"), chat) == "Be brief. USER: Q ASSISTANT: A</s>"
    assert written(templates.get("v1", system='Say "\n".'), ONE) == 'Say "\n". USER: Q ASSISTANT: A</s>'
    assert written(templates.get("v1", system=""), ONE) == "USER: Q ASSISTANT: A</s>"


def test_an_unknown_or_unfitting_template_is_refused(goldens):
    with pytest.raises(UserError, match="nearest: 'plain'"):
        templates.get("plane")
    from transformers import AutoTokenizer

    neox = AutoTokenizer.from_pretrained(goldens / "label_mask/tokenizer_neox")
    with pytest.raises(UserError, match="'</s>' is not one of its tokens"):
        templates.get("v1", neox)
    with pytest.raises(UserError, match="carries no chat template"):
        templates.get("tokenizer", neox)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_tokenizers_own_template_without_marks_is_supervised_by_its_prefixes():
    template = templates.get("tokenizer", byte_tokenizer(chat_template=CHATML))
    assert not template.lists and not template.adds_bos
    assert written(template, CHAT).startswith("<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n")
    assert supervised(template, CHAT) == ["A cat.<|im_end|>", "Yes.<|im_end|>"]
    assert template.stops == ("<|im_end|>", "</s>")


@pytest.mark.parametrize("name", templates.NAMES)
def test_an_exported_template_is_recognised_for_what_it_writes(name, tokenizer):
    template = templates.get(name, tokenizer)
    again = templates.get("tokenizer", byte_tokenizer(chat_template=template.exported(tokenizer)))
    asked = validated([{"role": "user", "content": [{"type": "image", "path": "x"}, {"type": "text", "text": "What is it?"}]}], "m")
    written, read = ("".join(s.text or "<image>" for s in t.segments(asked, True)) for t in (template, again))
    assert read.removeprefix(tokenizer.bos_token or "") == written


def test_a_tokenizers_own_marks_are_used():
    marked = CHATML.replace(
        "m['content']", "''", 1
    ).replace("'<|im_end|>\\n' }}", "'' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
              "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}", 1)  # fmt: skip
    template = templates.get("tokenizer", byte_tokenizer(chat_template=marked))
    assert supervised(template, CHAT) == ["A cat.", "Yes."]


def test_a_template_whose_past_changes_with_what_follows_is_refused():
    forgetful = "{% for m in messages %}{{ m['role'] + ':' + (m['content'] if loop.last else '...') }}{% endfor %}"
    template = templates.get("tokenizer", byte_tokenizer(chat_template=forgetful))
    with pytest.raises(UserError, match="generation marks"):
        template.segments(validated(CHAT, "m"))


def test_a_templates_own_refusal_is_told():
    strict = CHATML + "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    template = templates.get("tokenizer", byte_tokenizer(chat_template=strict))
    with pytest.raises(UserError, match="no system here"):
        template.segments(validated([{"role": "system", "content": "x"}, *ONE], "m"))


def test_a_template_runs_in_a_sandbox():
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UserError, match="refuses"):
        templates.get("tokenizer", byte_tokenizer(chat_template=evil)).segments(validated(ONE, "m"))


@pytest.mark.parametrize(
    "folder", ["Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", 
               "meta-llama/Llama-3.2-11B-Vision-Instruct", "meta-llama/Llama-4-Scout-17B-16E-Instruct",
               "OpenGVLab/InternVL3-1B-hf", "HuggingFaceTB/SmolVLM2-256M-Video-Instruct", "Gemma3/gemma-3-4b-it"],
)  # fmt: skip
def test_published_vision_templates(folder, data_kit):
    config = json.loads((data_kit / "tokenizers/vlm_configs" / folder / "tokenizer_config.json").read_text())
    template = templates.get("tokenizer", byte_tokenizer(chat_template=config["chat_template"]))
    assert template.lists
    segments = template.segments(validated(CHAT, "m"))
    assert [segment.image["path"] for segment in segments if segment.image] == ["a"]
    runs = supervised(template, CHAT)
    assert [run.strip()[: len(answer)] for run, answer in zip(runs, ("A cat.", "Yes."), strict=True)] == [
        "A cat.",
        "Yes.",
    ]


def test_a_template_that_ends_only_the_last_answer_serves_one_turn(data_kit):
    path = data_kit / "tokenizers/vlm_configs/Llava/llava-1.5-7b-hf/tokenizer_config.json"
    template = templates.get("tokenizer", byte_tokenizer(chat_template=json.loads(path.read_text())["chat_template"]))
    assert supervised(template, CHAT[:2]) == ["A cat.</s>"]
    with pytest.raises(UserError, match="up to answer 1 changes"):
        template.segments(validated(CHAT, "m"))
