"""The Python contract on a real model: 260K parameters that tell stories, with their tokenizer."""

import json

import numpy as np
import pytest

import mmjax
from mmjax.errors import UserError


@pytest.fixture(scope="module")
def stories(data_kit):
    return mmjax.load(data_kit / "weights" / "stories260k_hf")


@pytest.fixture(scope="module")
def golden(data_kit):
    return json.loads((data_kit / "weights" / "golden.json").read_text())["stories260k"]


def test_two_hundred_greedy_tokens(stories, golden):
    wanted = golden["greedy_ids"]
    found = stories.generate({"input_ids": [[1]]}, max_new_tokens=200, ignore_eos=True)
    assert [1, *found[0].tolist()][: len(wanted)] == wanted
    assert len(wanted) >= 200
    assert (
        stories.tokenizer.decode(found[0], skip_special_tokens=True).strip()[:80] == golden["greedy_text"].strip()[:80]
    )


def test_logits_after_the_first_token(stories, golden):
    logits = np.asarray(stories({"input_ids": np.array([[1]])})["logits"])[0, 0, :8]
    assert np.abs(logits - golden["logits_after_bos_first8"]).max() < 1e-4


def test_padding_changes_nothing(stories):
    ids = stories.tokenizer("Once upon a time")["input_ids"]
    bare = stories({"input_ids": [ids]})
    left = stories({"input_ids": [[0, 0, *ids]], "attention_mask": [[0, 0, *[1] * len(ids)]]})
    assert np.abs(np.asarray(left["logits"])[0, 2:] - np.asarray(bare["logits"])[0]).max() < 1e-4


def test_ids_outside_the_vocabulary_are_said(stories):
    with pytest.raises(UserError, match=r"input_ids\[0, 1\] = 512 is outside the vocabulary of 512"):
        stories({"input_ids": [[1, 512]]})


def test_settings_of_generation_are_checked(stories):
    with pytest.raises(UserError, match="unknown setting of generation 'temprature'"):
        stories.generate({"input_ids": [[1]]}, temprature=1.0)


def test_bfloat16(data_kit, stories):
    half = mmjax.load(data_kit / "weights" / "stories260k_hf", dtype="bfloat16")
    inputs = {"input_ids": [stories.tokenizer("Once upon a time")["input_ids"]]}
    exact, rounded = (np.asarray(m(inputs)["logits"], np.float32) for m in (stories, half))
    assert half.params["llm"]["layers"]["mlp"]["up"]["kernel"].dtype == "bfloat16"
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()
