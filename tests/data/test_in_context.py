"""Samples joined into in-context rows, prompts, and how the rows are written and learned."""

import json

import numpy as np
import pytest

from mmjax.config import Source
from mmjax.data import sources, templates
from mmjax.data.encoding import IGNORED, Encoder
from mmjax.data.messages import BadSample, Sample, images, text, validated
from mmjax.data.pipeline import collate
from mmjax.errors import UserError
from tests.data.tokenizers import marked_tokenizer

IMAGE = {"type": "image", "path": "a"}


def part(text, **more):
    return {"type": "text", "text": text, **more}


DOCUMENT = [{"role": "assistant", "content": [part("s0"), IMAGE, part("s1"), IMAGE, part("s2"), part(" s3", supervised=False)]}]
ROW = [
    {"role": "user", "content": [IMAGE, part("Q1")]},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": [IMAGE, IMAGE, part("Q2")]},
    {"role": "assistant", "content": "A2"},
]
FAKE = "<fake_token_around_image>"


@pytest.fixture(scope="module")
def tokenizer():
    return marked_tokenizer()


def marked(template, messages, **options):
    """The text as it is written, the supervised runs in braces."""
    segments = template.segments(validated(messages), **options)
    runs = "".join("<image>" if s.image else f"{{{s.text}}}" if s.supervised else s.text for s in segments)
    return runs.replace("}{", "")


@pytest.mark.parametrize(
    ("name", "document", "row", "prompt"),
    [
        ("interleaved", "{s0}<image>{s1}<image>{s2} s3{</s>}", "<image>Q1{ A1\n}<image><image>Q2{ A2</s>}",
         "<image>Q1 A1\n<image><image>Q2"),
        ("flamingo", "s0<image>{s1<EOC>}<image>{s2} s3{<EOC>}</s>", "<image>Q1{ A1<EOC>}<image><image>Q2{ A2<EOC></s>}",
         "<image>Q1 A1<EOC><image><image>Q2"),
        ("openflamingo", "s0<image>{s1<|endofchunk|>}<image>{s2} s3{<|endofchunk|>}</s>",
         "<image>Q1{A1<|endofchunk|>}<image><image>Q2{A2<|endofchunk|></s>}", "<image>Q1A1<|endofchunk|><image><image>Q2"),
        ("otter", "{s0}<image>{s1}<image>{s2} s3{<|endofchunk|></s>}",
         "<image>User:Q1 GPT:<answer>{A1<|endofchunk|>}<image><image>User:Q2 GPT:<answer>{A2<|endofchunk|></s>}",
         "<image>User:Q1 GPT:<answer>A1<|endofchunk|><image><image>User:Q2 GPT:<answer>"),
        ("idefics", f"{{s0}}{FAKE}<image>{FAKE}{{s1}}{FAKE}<image>{FAKE}{{s2}} s3{{</s>}}",
         f"User:{FAKE}<image>{FAKE}Q1<end_of_utterance>\nAssistant:{{ A1<end_of_utterance>}}\nUser:{FAKE}<image>{FAKE}<image>{FAKE}Q2"
         "<end_of_utterance>\nAssistant:{ A2<end_of_utterance>}",
         f"User:{FAKE}<image>{FAKE}Q1<end_of_utterance>\nAssistant: A1<end_of_utterance>\nUser:{FAKE}<image>{FAKE}<image>{FAKE}Q2"
         "<end_of_utterance>\nAssistant:"),
    ],
)  # fmt: skip
def test_documents_and_in_context_rows_as_they_are_published(tokenizer, name, document, row, prompt):
    template = templates.get(name, tokenizer)
    assert marked(template, DOCUMENT) == document
    assert marked(template, ROW) == row
    written = marked(template, ROW[:3], generation_prompt=True).replace("{", "").replace("}", "")
    assert written == prompt
    assert marked(template, [{"role": "system", "content": "S."}, *ROW]).startswith("S.")


def test_text_without_pictures_is_learned_where_it_answers(tokenizer):
    words = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert marked(templates.get("openflamingo", tokenizer), words) == "Q{A<|endofchunk|></s>}"


def test_a_template_that_supervises_whole_answers_refuses_a_policy(tokenizer):
    with pytest.raises(UserError, match="'v1' supervises whole answers"):
        templates.get("v1", tokenizer).segments(validated(DOCUMENT))
    with pytest.raises(BadSample, match="neither true nor false"):
        validated([{"role": "assistant", "content": [part("x", supervised="no")]}])


def test_labels_are_the_supervised_text(tokenizer):
    encoder = Encoder(tokenizer, templates.get("openflamingo", tokenizer), tokens_per_image=3)
    example = encoder.encode(Sample("d", validated(DOCUMENT)))
    assert tokenizer.decode(example.labels[example.labels != IGNORED]) == "s1<|endofchunk|>s2<|endofchunk|>"
    assert len(example.images) == 2


def captions(tmp_path, **source):
    rows = [{"id": str(number), "image": f"{number}.png", "caption": f"Caption {number}."} for number in range(11)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Source(kind="captions", path=str(tmp_path / "c.jsonl"), **source)


def test_samples_are_joined_each_once(tmp_path):
    source = captions(tmp_path, join=3, options={"prompts": ["Output:", "{} Output:"], "prompt": "Say."})
    dataset = sources.open(source)
    assert len(dataset) == 3
    ids = [id for index in range(3) for id in dataset[index].id.split("+")]
    assert len(ids) == len(set(ids)) == 9 and ids != sorted(ids)
    sample = dataset[1]
    assert [message["role"] for message in sample.messages] == ["user", "assistant"] * 3
    assert [part["path"] for part in images(sample.messages)] == [f"{id[:-2]}.png" for id in sample.id.split("+")]
    assert {text(message) for message in sample.messages[::2]} <= {"Output:", "Say. Output:"}
    assert sources.open(source)[1] == sample
    with pytest.raises(IndexError):
        dataset[3]
    with pytest.raises(UserError, match="has only 11 samples"):
        sources.open(captions(tmp_path, join=12))
    assert sources.fingerprint(captions(tmp_path)) != sources.fingerprint(captions(tmp_path, join=2))


def test_documents_cannot_be_joined_to_a_conversation(tmp_path):
    rows = [{"images": [None], "texts": ["x"]}] * 2
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadSample, match="ends and the next begins with the assistant"):
        sources.open(Source(kind="obelics", path=str(tmp_path / "d.jsonl"), join=2))[0]


def test_the_weight_of_a_source_reaches_the_loss(tokenizer):
    encoder = Encoder(tokenizer, templates.get("interleaved", tokenizer), tokens_per_image=0)
    example = encoder.encode(Sample("d", validated([{"role": "assistant", "content": "abc"}])))
    weights = np.asarray(collate([[example], [type(example)(**{**vars(example), "weight": 0.25})]]).weights)
    assert weights.max(1).tolist() == [1.0, 0.25] and (weights > 0).sum(1).tolist() == [3, 3]


