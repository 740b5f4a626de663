import gzip
import json
import pickle

import pytest

from mmjax.config import Source
from mmjax.data import sources, templates
from mmjax.data.images import BrokenImage
from mmjax.data.messages import BadSample, images, text
from mmjax.errors import UserError
from tests.data.pictures import encoded, gradient, write_tar


def llava(number, **extra):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Answer {number}, naïve ☃."}]
    return {"id": number, "image": f"{number}.png", "conversations": turns, **extra}


@pytest.mark.parametrize("ending", [".json", ".json.gz", ".jsonl", ".jsonl.gz"])
def test_llava_files_of_every_form(tmp_path, ending):
    rows = [llava(number) for number in range(5)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    written = (lines.replace("\n", "\n\n") + "\n" if ".jsonl" in ending else json.dumps(rows, indent=1)).encode()
    path = tmp_path / f"data{ending}"
    path.write_bytes(gzip.compress(written) if ending.endswith("gz") else written)
    tar = write_tar(tmp_path / "images.tar", {"3.png": encoded(gradient())})
    dataset = sources.open(Source(kind="llava", path=str(path), images=str(tar)))
    for copy in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert len(copy) == 5
        assert [copy[number].id for number in range(5)] == list("01234")
        assert text(copy[3].messages[1]) == "Answer 3, naïve ☃."
        assert copy.image("3.png").size == (24, 16)
    with pytest.raises(BrokenImage, match="4.png: no such file"):
        dataset.image("4.png")


def test_messages_rows_keep_kind_and_answers(tmp_path):
    row = {
        "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
        "answers": ["A", "a"],
        "kind": "k",
    }
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    sample = sources.open(Source(kind="messages", path=str(tmp_path / "m.jsonl")))[0]
    assert (sample.id, sample.kind, sample.answers) == ("m.jsonl:1", "k", ("A", "a"))


def test_a_damaged_row_is_one_bad_sample(tmp_path):
    (tmp_path / "m.jsonl").write_text(f'{json.dumps(llava(1))}\n{{"id": \n[1]\n"<image>"\n')
    dataset = sources.open(Source(kind="llava", path=str(tmp_path / "m.jsonl")))
    assert len(dataset) == 4 and dataset[0].id == "1"
    for number in (1, 2, 3):
        with pytest.raises(BadSample, match=f"m.jsonl:{number + 1}"):
            dataset[number]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'{"id": 1}', "is not a JSON list"),
        ("a.json", b'[{"id": 1}, {"id"', "not valid JSON after 1 rows"),
        ("a.json", b'[{"id": 1} {"id": 2}]', "not valid JSON after 1 rows"),
        ("a.json", b"[]", "has no samples"),
        ("a.jsonl", b"", "has no samples"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.json", b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        sources.open(Source(kind="llava", path=str(tmp_path / name)))


def test_captions_for_training_and_for_evaluation(tmp_path):
    rows = [{"id": "x", "image": "x.png", "en": ["a", "b <image>"]}, {"image": "y.png", "caption": "c"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def opened(**options):
        return sources.open(Source(kind="captions", path=str(tmp_path / "c.jsonl"), options=options))

    train = opened(prompt="Say:")
    assert [sample.id for sample in map(train.__getitem__, range(len(train)))] == ["x#0", "x#1", "c.jsonl:2#0"]
    assert [text(train[1].messages[0]), text(train[1].messages[1])] == ["Say:", "b "]
    assert images(train[2].messages)[0]["path"] == "y.png"
    held_out = opened(split="eval")
    assert len(held_out) == 2 and held_out[0].answers == ("a", "b ")
    with pytest.raises(BadSample, match="sample x: .*captions"):
        opened(field="captions")[0]
    with pytest.raises(UserError, match="nearest: 'prompt'"):
        opened(promt="")
    with pytest.raises(UserError, match="unknown split"):
        opened(split="test")
    told, bare = (opened(shown=shown, prompt="Say:")[0].messages for shown in ("words", "nothing"))
    assert [text(told[0]), text(bare[0])] == ["b  Say:", "Say:"] and not images(told) + images(bare)
    with pytest.raises(UserError, match="unknown shown"):
        opened(shown="sketch")


def test_the_beginning_of_a_caption_is_the_users(tmp_path):
    captions = [" ".join(f"{word}{number}" for word in "abcde") for number in range(40)]
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "x", "image": "x.png", "captions": captions}))
    dataset = sources.open(Source(kind="captions", path=str(tmp_path / "c.jsonl"), options={"prefix": True}))
    said = [text(dataset[number].messages[0]).split() for number in range(40)]
    for number, caption in enumerate(captions):
        assert [*said[number], *text(dataset[number].messages[1]).split()] == caption.split()
    assert {len(words) for words in said} == {0, 1, 2, 3, 4}


def test_kinds_limits_and_fingerprints(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(llava(number)) for number in range(9)))
    with pytest.raises(UserError, match="nearest: 'llava'"):
        sources.open(Source(kind="lava", path=str(path)))
    with pytest.raises(UserError, match="no file"):
        sources.open(Source(path=str(tmp_path / "b.jsonl")))
    few = sources.open(Source(path=str(path), limit=4))
    assert len(few) == 4 and few[3].id == "3"
    before = sources.fingerprint(Source(path=str(path)))
    assert before != sources.fingerprint(Source(path=str(path), limit=4))
    path.write_text(path.read_text().replace("What", "Who"))
    assert before != sources.fingerprint(Source(path=str(path)))


def test_a_source_may_bring_a_system_text_or_none():
    for system in ("", "Be brief."):
        dataset = sources.open(Source(kind="digits", options={"task": "single", "size": 4, "system": system}))
        assert len(dataset) == 4 and text(dataset[1].messages[0]) == system
        written = templates.get("v1").segments(dataset[1].messages)[0].text
        assert written.startswith("Be brief. USER: " if system else "USER: ")


def test_samples_have_the_task_of_their_row_or_of_their_source(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    lines = [json.dumps(row), json.dumps({**row, "task_id": 2}), json.dumps({**row, "task_id": "x"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    rows = Source(kind="messages", path=str(tmp_path / "rows.jsonl"))
    dataset = sources.open(rows)
    assert [dataset[0].task, dataset[1].task] == [0, 2]
    with pytest.raises(BadSample, match="task_id"):
        dataset[2]
    given = sources.open(Source(kind="messages", path=rows.path, options={"task_id": 1}))
    assert [given[0].task, given[1].task] == [1, 1]
    with pytest.raises(UserError, match="task_id: give the number of a task"):
        sources.open(Source(kind="messages", path=rows.path, options={"task_id": "one"}))


def test_handwriting_is_a_source_like_the_others():
    dataset = sources.open(Source(kind="digits", options={"task": "single", "size": 7}))
    assert len(dataset) == 7
    name = images(dataset[2].messages)[0]["path"]
    assert dataset.image(name).mode == "RGB"
    assert not images(sources.open(Source(kind="digit_facts", options={"size": 3}))[0].messages)


def test_flickr8k_as_it_comes(data_kit):
    folder = data_kit / "flickr8k"
    dataset = sources.open(Source(path=str(folder / "llava_train.json.gz"), images=str(folder / "images_train-*.tar")))
    assert len(dataset) == 30000
    for index in (0, 17, 29999):
        sample = dataset[index]
        assert dataset.image(images(sample.messages)[0]["path"]).size == (160, 160)
        assert [message["role"] for message in sample.messages] == ["user", "assistant"]
    captions = sources.open(
        Source(kind="captions", path=str(folder / "captions_val.jsonl.gz"), options={"split": "eval"})
    )
    assert len(captions) == 1000 and len(captions[0].answers) == 5
