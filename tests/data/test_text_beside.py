"""What a Q-Former reads beside a picture: from messages to the batch."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mmjax.config import Loader, Source, Stage
from mmjax.data import sources, templates
from mmjax.data.collation import collate
from mmjax.data.encoding import Encoder
from mmjax.data.images import ImageProcessor
from mmjax.data.messages import Sample, validated
from mmjax.data.pipeline import Pipeline
from mmjax.data.text_beside import TextBeside
from mmjax.errors import UserError
from tests.data.tokenizers import byte_tokenizer

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "what", "is", "it", "where", "a", "top", "left", ",", *"0123456789"]


def words_tokenizer():
    """A small stand-in for BERT's."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")


BESIDE = TextBeside(words_tokenizer(), 5)
LANGUAGE = byte_tokenizer()
ENCODER = Encoder(LANGUAGE, templates.get("instructblip", LANGUAGE), 3, beside=BESIDE)


def conversation(*turns, images=()):
    messages = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return Sample("s", validated(messages, "s", images))


def text(ids):
    return " ".join(WORDS[i] for i in ids)


def test_of_a_long_instruction_the_end_is_read_of_a_long_caption_the_beginning():
    sample = conversation("<image>what is it where", "a", images=["x"])
    assert [text(ids) for ids in BESIDE.instructions(sample.messages)] == ["[CLS] is it where [SEP]"]
    assert text(BESIDE.caption("what is it where")) == "[CLS] what is it [SEP]"
    assert text(BESIDE.caption("")) == "[CLS] [SEP]"
    with pytest.raises(UserError, match="no room for a word"):
        TextBeside(words_tokenizer(), 2)


def test_each_picture_is_told_its_own_turn():
    turns = "<image><image>what is it", "a", "where", "it", "<image>is it", "a"
    example = ENCODER.encode(conversation(*turns, images=["x", "y", "z"]))
    assert [text(ids) for ids in example.beside] == ["[CLS] what is it [SEP]"] * 2 + ["[CLS] is it [SEP]"]
    asked = ENCODER.encode(conversation(*turns[:-1], images=["x", "y", "z"]), generation_prompt=True)
    assert [ids.tolist() for ids in asked.beside] == [ids.tolist() for ids in example.beside]
    assert ENCODER.encode(conversation("what", "a")).beside == ()
    cut = dataclasses.replace(ENCODER, max_length=30).encode(conversation(*turns, images=["x", "y", "z"]))
    assert len(cut.beside) == len(cut.images) == 2


def test_tiles_share_their_pictures_text_and_dummies_have_none():
    example = ENCODER.encode(conversation("<image>what", "a", images=["x"]))
    example = dataclasses.replace(example, tiles=(2,), pixels=np.zeros((2, 4, 4, 3), np.uint8))
    told = ENCODER.encode(conversation("where", "it"))
    batch = collate([[told], [example]], groups=2, tiles=3, beside_length=5)
    assert batch.connector_tokens.shape == (2, 3, 5) and not batch.connector_segments[0].any()
    assert batch.connector_tokens[1].tolist() == [[1, 4, 2, 0, 0]] * 2 + [[0] * 5]
    assert batch.connector_segments[1].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[0] * 5]


@pytest.mark.parametrize("objective", ["language", "contrastive"])
def test_a_stage_fills_them(objective):
    source = Source(kind="digits", options={"task": "caption", "size": 12})
    stage = Stage(objective=objective, rows=4, length=5 if objective == "contrastive" else 160, tiles=1, steps=1, sources={"scenes": source})
    made = Pipeline(stage, {"scenes": sources.open(source)}, ENCODER, ImageProcessor(8, "squash"), seed=0, loader=Loader(), shards=2)
    ((batch, info),) = made.batches()
    assert batch.connector_tokens.shape == (2, 2, 5) and batch.tiles.all() and info.samples == 4
    assert (batch.tokens is None) == (objective == "contrastive") and batch.classes is None
    known = {ids: sources.open(source)[int(ids.rpartition("-")[2])].answers[0] for (ids,) in info.ids}
    for (id, caption), ids in zip(known.items(), batch.connector_tokens.reshape(4, 5)):
        want = BESIDE.caption(caption if objective == "contrastive" else "Describe the digits.")
        if objective == "language":
            want = BESIDE.instructions(sources.open(source)[int(id.rpartition("-")[2])].messages)[0]
        np.testing.assert_array_equal(ids[: len(want)], want)
    if objective == "contrastive":
        assert info.tokens == batch.connector_segments.sum() and info.padding == pytest.approx(1 - info.tokens / 20)
