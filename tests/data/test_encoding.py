import dataclasses
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from mmjax.data import templates
from mmjax.data.encoding import Encoder
from mmjax.data.messages import BadSample, Sample, from_llava, validated
from mmjax.errors import UserError
from tests.data.tokenizers import marked_tokenizer


def sample(*turns, images=(), id="s-1"):
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return Sample(id, validated(messages, id, images))


@pytest.fixture(scope="module")
def tokenizer():
    return marked_tokenizer()


def supervised_text(encoder, example):
    return encoder.tokenizer.decode(example.labels[example.labels >= 0])


@pytest.mark.parametrize("case", ["v1", "llava_llama_2", "plain", "mpt", "v0_no_bos_tokenizer"])
def test_labels_equal_llavas(case, goldens):
    folder = goldens / "label_mask" / case
    config, reference = json.loads((folder / "config.json").read_text()), np.load(folder / "outputs.npz")
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / config["tokenizer"])
    encoder = Encoder(tokenizer, templates.get(config["template"], tokenizer), tokens_per_image=1)
    for number, row in enumerate(config["conversations"]):
        example = encoder.encode(from_llava(row, str(number)))
        np.testing.assert_array_equal(np.where(example.media >= 0, -200, example.ids), reference[f"input_ids_{number}"])
        np.testing.assert_array_equal(example.labels, reference[f"labels_{number}"])


@pytest.mark.parametrize(
    ("case", "template"), [("qformer_stage2_prompt_two_rows", "minigpt4"), ("llama2_concat4_no_qformer", "minigpt4_llama_2")]
)
def test_labels_equal_minigpt4s(case, template, goldens):
    folder = goldens / "minigpt4" / case
    asked = json.loads((folder / "config.json").read_text())["samples"]
    reference = np.load(folder / "outputs.npz")
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "tokenizer_llama")
    encoder = Encoder(tokenizer, templates.get(template, tokenizer), tokens_per_image=4)
    for number, (prompt, answer) in enumerate(zip(asked["instruction_input"], asked["answer"])):
        words = prompt.partition("</Img> ")[2].removesuffix(" ###Assistant: ").removesuffix(" [/INST] ")
        example = encoder.encode(sample(f"<image>{words}", answer, images=["x"]))
        labels = reference["labels"][number]
        at = np.flatnonzero(labels >= 0)
        np.testing.assert_array_equal(example.labels, labels[: at[-1] + 1])


def test_where_the_reference_drifts_the_clean_rule_holds(goldens):
    """The ids of LLaVA's quirk cases are ours; of the labels, every supervised run is an answer with its end."""
    folder = goldens / "label_mask/v0_bos_tokenizer_drift_quirk"
    config, reference = json.loads((folder / "config.json").read_text()), np.load(folder / "outputs.npz")
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / config["tokenizer"])
    encoder = Encoder(tokenizer, templates.get("v0", tokenizer), tokens_per_image=1)
    for number, row in enumerate(config["conversations"]):
        example = encoder.encode(from_llava(row, str(number)))
        np.testing.assert_array_equal(np.where(example.media >= 0, -200, example.ids), reference[f"input_ids_{number}"])
        said = " ".join(turn["value"] for turn in row["conversations"] if turn["from"] == "gpt")
        text = supervised_text(encoder, example)
        assert all(word in text for word in said.split())
        assert "What is in this image" not in text and "How many" not in text


def test_images_take_their_positions_and_chunks_are_tokenised_apart(tokenizer):
    encoder = Encoder(tokenizer, templates.get("plain", tokenizer), tokens_per_image=3, image_start="<im_start>",
                      image_end="<im_end>")  # fmt: skip
    example = encoder.encode(sample("<image> <image>", "ab", images=["x.png", "y.png"]))
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<im_start>", "<im_end>"))
    a, b, newline = (tokenizer(char, add_special_tokens=False)["input_ids"][0] for char in "ab\n")
    assert example.ids.tolist() == [start, 0, 0, 0, end, start, 0, 0, 0, end, a, b, newline]
    assert example.media.tolist() == [-1, 0, 1, 2, -1, -1, 3, 4, 5, -1] + [-1] * 3
    assert example.labels.tolist() == [-100] * 10 + [a, b, newline]
    assert [part["path"] for part in example.images] == ["x.png", "y.png"]


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "🙂🙃 emoji", "tab\tand\r\nnewline ", "</s>", "  "])
def test_every_answer_is_supervised_to_the_byte(text, tokenizer):
    for name in ("v1", "mpt", "plain", "mistral_instruct"):
        template = templates.get(name, tokenizer)
        encoder = Encoder(tokenizer, template, tokens_per_image=1)
        example = encoder.encode(sample(f"ask {text}", text, "more", text))
        wanted = "".join(
            s.text for s in template.segments(sample(f"ask {text}", text, "more", text).messages) if s.supervised
        )
        assert supervised_text(encoder, example) == wanted
        assert wanted.count(text) >= 2


def test_a_generation_prompt_is_what_precedes_the_answer(tokenizer):
    for name in templates.NAMES:
        encoder = Encoder(tokenizer, templates.get(name, tokenizer), tokens_per_image=2)
        whole = encoder.encode(sample("<image>\nWhat?", "This.", images=["x"]))
        asked = Sample("s-1", sample("<image>\nWhat?", "This.", images=["x"]).messages[:1])
        prompt = encoder.encode(asked, generation_prompt=True)
        assert whole.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
        assert (whole.labels[len(prompt.ids) :] >= 0).all() or name == "v0"
        assert prompt.media[prompt.media >= 0].tolist() == [0, 1]


@pytest.mark.parametrize("limit", range(4, 30))
def test_cutting_never_splits_an_image(limit, tokenizer):
    encoder = Encoder(tokenizer, templates.get("mistral_instruct", tokenizer), tokens_per_image=5, max_length=limit)
    turns = ("<image>", "a", "<image>", "b")
    whole = Encoder(tokenizer, encoder.template, 5).encode(sample(*turns, images=["x", "y"]))
    try:
        cut = encoder.encode(sample(*turns, images=["x", "y"]))
    except BadSample as error:
        assert not (whole.labels[:limit] >= 0).any()
        assert error.id == "s-1" and "nothing in it is supervised" in error.reason
        return
    assert limit - 5 < len(cut.ids) <= limit
    assert (cut.media >= 0).sum() == 5 * len(cut.images) == 5 * cut.tile_count
    assert cut.ids.tolist() == whole.ids[: len(cut.ids)].tolist()


def test_a_prompt_is_never_cut(tokenizer):
    encoder = Encoder(tokenizer, templates.get("plain", tokenizer), tokens_per_image=5, max_length=4)
    with pytest.raises(BadSample, match="the prompt has 5 tokens; there is room for 4"):
        encoder.encode(
            Sample("p", validated([{"role": "user", "content": "<image>"}], "p", ["x"])), generation_prompt=True
        )


def test_a_sample_without_an_answer_is_refused_by_id(tokenizer):
    encoder = Encoder(tokenizer, templates.get("v1", tokenizer), tokens_per_image=1)
    with pytest.raises(BadSample, match="sample s-1: nothing in it is supervised"):
        encoder.encode(sample("Anybody?"))


def test_an_exported_template_gives_the_same_ids(goldens):
    tokenizer = AutoTokenizer.from_pretrained(goldens / "label_mask/tokenizer_llama")
    named = templates.get("v1", tokenizer)
    one = sample("<image>\nWhat is it?", "A cat.", images=["x"])
    before = Encoder(tokenizer, named, 2).encode(one)
    tokenizer.chat_template = named.exported(tokenizer)
    after = Encoder(tokenizer, templates.get("tokenizer", tokenizer), 2).encode(one)
    assert before.ids.tolist() == after.ids.tolist()
    assert tokenizer.decode(after.labels[after.labels >= 0]).strip() == "A cat.</s>"


def test_a_tokenizer_without_offsets_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="Slow gives no character offsets"):
        Encoder(Slow(), templates.get("v1"), 1)


def test_virtual_tokens_stand_in_front_and_are_counted(tokenizer):
    plain = Encoder(tokenizer, templates.get("plain", tokenizer), tokens_per_image=3)
    encoder = dataclasses.replace(plain, virtual=4, tasks=2)
    before, said = plain.encode(sample("<image>", "ab", images=["x.png"])), sample("<image>", "ab", images=["x.png"])
    example = encoder.encode(dataclasses.replace(said, task=1))
    assert example.task == 1 and encoder.collation["virtual"] == 4
    assert example.ids.tolist() == [0] * 4 + before.ids.tolist()
    assert example.labels.tolist() == [-100] * 4 + before.labels.tolist()
    assert example.media.tolist() == [-1] * 4 + before.media.tolist()
    shorter = dataclasses.replace(encoder, max_length=len(example.ids) - 1).encode(said)
    assert shorter.ids.tolist() == example.ids.tolist()[:-1]
    with pytest.raises(BadSample, match="of task 2, and the model's prompts know 0 to 1"):
        encoder.encode(dataclasses.replace(said, task=2))
