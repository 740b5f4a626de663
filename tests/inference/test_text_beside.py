"""A model whose Q-Former reads the question beside the picture: the same in training, chat and after it was written and read back."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax import tree
from mmjax.assembly import assemble
from mmjax.config import from_config_dict
from mmjax.data.messages import Sample, validated
from mmjax.models import multimodal
from tests.configs import expand

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = assemble(from_config_dict(expand.config("instructblip", "tiny")), tmp_path_factory.mktemp("workdir"))
    rng = np.random.default_rng(0)
    leaves = {path: np.asarray(rng.normal(0, 0.3, leaf.shape), np.float32) for path, leaf in tree.flatten(made.params).items()}
    return dataclasses.replace(made, params=jax.tree.map(jax.numpy.asarray, tree.unflatten(leaves)))


def asked(text, picture=True):
    image = [{"type": "image", "image": PICTURE}] if picture else []
    return [{"role": "user", "content": [*image, {"type": "text", "text": text}]}]


def prompt(model, *conversations):
    examples = [model.prompt(Sample("s", validated(conversation))) for conversation in conversations]
    return model.collate([[example] for example in examples])


def test_the_question_changes_what_the_queries_see(model):
    batches = [prompt(model, asked(text)) for text in ("What is the sum?", "Is there a 7?")]
    assert all(batch.connector_segments.any() for batch in batches)
    one, other = (multimodal.encode_media(model.params, model.config, batch, model.run) for batch in batches)
    assert np.abs(one - other).max() > 1e-3
    assert prompt(model, asked("What?", picture=False)).connector_tokens is None


def test_together_as_alone(model):
    """A row without a picture, and questions of other lengths beside it, change nothing."""
    conversations = asked("What is the sum of the digits?"), asked("Hello", picture=False), asked("Is there a 7?")
    together = model.answers(conversations, 6)
    assert together == [model.answers([conversation], 6)[0] for conversation in conversations]


def test_written_and_read_back(model, tmp_path):
    model.save_pretrained(tmp_path, layout="mmjax")
    again = mmjax.load(tmp_path)
    assert again.connector_text == model.connector_text == 32
    question = asked("What is the sum of the digits?")
    for field in ("tokens", "connector_tokens", "connector_segments"):
        np.testing.assert_array_equal(getattr(prompt(again, question), field), getattr(prompt(model, question), field))
    assert again.chat(question, 6) == model.chat(question, 6)
