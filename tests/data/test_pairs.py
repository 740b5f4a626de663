"""Pairs of pictures and texts in their published forms, and MIMIC-IT."""

import base64
import json
import pickle

import pytest

from mmjax.config import Source
from mmjax.data import sources
from mmjax.data.images import BrokenImage
from mmjax.data.messages import BadSample, images, text
from mmjax.errors import UserError
from tests.data.pictures import encoded, gradient, write_tar

PICTURE = encoded(gradient())


def said(sample):
    return [text(message) for message in sample.messages]


def test_minigpt4_annotations(tmp_path):
    (tmp_path / "f.json").write_text(json.dumps({"annotations": [{"image_id": 2, "caption": "A <image> cat."}, {"caption": "?"}]}))
    (tmp_path / "2.jpg").write_bytes(PICTURE)
    prompts = ["Describe this, please.", "What do you see?"]
    options = {"within": "annotations", "image": "image_id", "pattern": "{}.jpg", "prompts": prompts}
    dataset = sources.open(Source(kind="pairs", path=str(tmp_path / "f.json"), images=str(tmp_path), options=options))
    sample = pickle.loads(pickle.dumps(dataset))[0]
    assert said(sample)[0] in prompts and said(sample)[1] == "A <IMAGE> cat."
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "text"]
    assert dataset.image(images(sample.messages)[0]["path"]).size == (24, 16)
    with pytest.raises(BadSample, match="no picture in 'image_id'"):
        dataset[1]
    with pytest.raises(UserError, match="no place {}"):
        sources.open(Source(kind="pairs", path=str(tmp_path / "f.json"), options={"pattern": "a.jpg"}))


def test_instructblip_triples_and_several_answers(tmp_path):
    rows = [{"image": "a", "text_input": "What?", "text_output": "Cat"}, {"image": "b", "text_input": "Who?", "text_output": ["I", "me"]}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    options = {"question": "text_input", "answer": "text_output", "prompts": "Question: {} Short answer:"}
    dataset = sources.open(Source(kind="pairs", path=str(tmp_path / "t.json"), options=options))
    assert said(dataset[0]) == ["Question: What? Short answer:", "Cat"]
    assert said(dataset[1])[1] == "I" and dataset[1].answers == ("I", "me")


def test_webdataset(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", {f"{shard}0.jpg": PICTURE, f"{shard}0.json": b'{"caption": "A cat."}'})
    dataset = sources.open(Source(kind="pairs", path=str(tmp_path / "*.tar")))
    assert len(dataset) == 2 and said(dataset[1]) == ["", "A cat."] and dataset[1].id == "10"
    assert dataset.image("10.jpg").size == (24, 16)


def test_mimic_it(tmp_path):
    data = {
        str(number): {
            "instruction": f"Q{number}",
            "answer": f"A{number}",
            "image_ids": [f"i{number}"],
            "rel_ins_ids": [str(number + 1), "absent", "0", "2"],
        }
        for number in range(3)
    }
    (tmp_path / "x_instructions.json").write_text(json.dumps({"meta": {"version": "0"}, "data": data}))
    code = base64.b64encode(PICTURE).decode()
    pictures = {"i0": code, "i1": "data:image/png;base64," + code, "i2": "!"}
    (tmp_path / "x.json").write_text(json.dumps(pictures).replace("/", "\\/"))

    def opened(**options):
        return sources.open(
            Source(kind="mimic_it", path=str(tmp_path / "x_instructions.json"), images=str(tmp_path / "x.json"), options=options)
        )

    assert said(opened()[1]) == ["Q1", "A1"]
    dataset = pickle.loads(pickle.dumps(opened(shots=2)))
    assert said(dataset[0]) == ["Q1", "A1", "Q2", "A2", "Q0", "A0"] and dataset[0].id == "0" and dataset[0].answers == ("A0",)
    assert [part["path"] for part in images(dataset[0].messages)] == ["i1", "i2", "i0"]
    assert dataset.image("i0").size == dataset.image("i1").size == (24, 16)
    for name, reason in (("i2", "not a readable picture"), ("i9", "i9: no such picture in x.json")):
        with pytest.raises(BrokenImage, match=reason):
            dataset.image(name)


def test_pictures_that_are_no_object_of_base64_are_refused(tmp_path):
    (tmp_path / "r.json").write_text("[]")
    (tmp_path / "x.json").write_text('["a", "b"]')
    with pytest.raises(UserError, match="not a JSON object of names and pictures"):
        sources.open(Source(kind="pairs", path=str(tmp_path / "r.json"), images=str(tmp_path / "x.json")))
