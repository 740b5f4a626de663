"""Alpaca's instructions and HyPoradise's N-best lists, and their templates."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from mmjax.config import Source
from mmjax.data import sources, templates
from mmjax.data.encoding import Encoder
from mmjax.data.images import BrokenImage
from mmjax.data.instructions import Embeddings
from mmjax.data.messages import BadSample
from mmjax.errors import UserError
from tests.data import tokenizers


def written(template: str, sample) -> str:
    return "".join(f"[{s.text}]" if s.supervised else s.text for s in templates.get(template).segments(sample.messages))


def test_alpacas_two_prompts(tmp_path):
    rows = [
        {"instruction": "Name a cat.", "input": "", "output": "Tom"},
        {"instruction": "Sum up.", "input": "A long text.", "output": "Short."},
        {"instruction": "", "output": "x"},
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    dataset = sources.open(Source(kind="alpaca", path=str(tmp_path / "alpaca.json")))
    start = "Below is an instruction that describes a task"
    assert written("alpaca", dataset[0]) == (
        f"{start}. Write a response that appropriately completes the request.\n\n### Instruction:\nName a cat.\n\n### Response:[Tom</s>]"
    )
    assert written("alpaca", dataset[1]) == (
        f"{start}, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSum up.\n\n### Input:\nA long text.\n\n### Response:[Short.</s>]"
    )
    with pytest.raises(BadSample, match="no text in `instruction`"):
        dataset[2]


def test_hypotheses_with_what_stands_beside_them(tmp_path):
    rows = [{"input": ["a b", "a c", "d b", "e", "f", "g"], "output": "a b c"}, {"input1": "x", "input2": "y. z", "output": "w"}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    noise = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    np.savez(tmp_path / "beside.npz", noise=noise, noisy=np.ones((2, 5)), clean=np.zeros((2, 5)))
    source = Source(kind="hypotheses", path=str(tmp_path / "test.json"), images=str(tmp_path / "beside.npz"))
    dataset = sources.open(source)
    assert written("hypotheses", dataset[0]) == (
        "Below is the best-hypotheses transcribed from speech recognition system. Please try to revise it using the words which are only "
        "included into other-hypothesis, and write the response for the true transcription.\n\n### Best-hypothesis:\na b\n\n"
        "### Other-hypothesis:\na c. d b. e. f\n\n### Response:\n[a b c</s>]"
    )
    assert "### Best-hypothesis:\nx\n\n### Other-hypothesis:\ny. z\n" in written("hypotheses", dataset[1])
    [part] = [part for part in dataset[1].messages[0]["content"] if part["type"] == "image"]
    np.testing.assert_array_equal(dataset.image(part["path"]), noise[1])
    np.testing.assert_array_equal(dataset.audio(part["path"]), [[1] * 5, [0] * 5])
    np.savez(tmp_path / "beside.npz", noise=noise[:1])
    with pytest.raises(UserError, match=r"is to hold noise \[2, embeddings, width\].*it holds noise \[1, 3, 4\]"):
        sources.open(source)
    with pytest.raises(BrokenImage, match=r"its embedding is \[3, 4\], the model's are \[3, 6\]"):
        Embeddings((3, 6)).tiles(noise[0])


def test_drawn_hypotheses_are_the_same_each_time():
    dataset = sources.open(Source(kind="drawn_hypotheses", options={"size": 3, "embeddings": 2, "width": 4, "audio": 5}))
    assert dataset[1] == dataset[1] and dataset[1] != dataset[2] and dataset.image("1").shape == (2, 4)
    assert dataset.audio("1").shape == (2, 5)


def test_a_picture_beside_the_text_takes_no_place_in_it(tmp_path):
    rows = [
        {"id": "a", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "that"}]},
        {"id": "b", "conversations": [{"from": "human", "value": "<image><image>\nwhat"}, {"from": "gpt", "value": "that"}]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows[:1]))
    tokenizer = tokenizers.byte_tokenizer()
    encoder = Encoder(tokenizer, templates.get("alpaca", tokenizer), 0, media_apart=True)
    sample = sources.open(Source(path=str(tmp_path / "rows.json")))[0]
    example = encoder.encode(sample)
    assert len(example.images) == 1 and (example.media == -1).all() and example.tile_count == 1
    text = [{**m, "content": [part for part in m["content"] if part["type"] == "text"]} for m in sample.messages]
    alone = encoder.encode(dataclasses.replace(sample, messages=text))
    np.testing.assert_array_equal(example.ids, alone.ids)
    twice = [{**sample.messages[0], "content": sample.messages[0]["content"][:1] * 2}, sample.messages[1]]
    with pytest.raises(BadSample, match="it has several images"):
        encoder.encode(dataclasses.replace(sample, messages=twice))
