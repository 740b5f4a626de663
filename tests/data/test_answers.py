"""Samples for an encoder-decoder: the prompt goes into its encoder, the last answer into its decoder."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import processors

from mmjax.config import Loader, Source, Stage
from mmjax.data import packing, templates
from mmjax.data.collation import collate
from mmjax.data.encoding import Encoder
from mmjax.data.messages import BadSample, Sample, validated
from mmjax.data.pipeline import Pipeline
from mmjax.families.t5 import FAMILY
from mmjax.loading import load
from mmjax.models.config import Execution
from mmjax.training.loss import language_loss, total_weight
from tests.data.tokenizers import byte_tokenizer

START = 0


def t5_like_tokenizer():
    """Puts its end token behind a text and nothing in front, as T5's does."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


TOKENIZER = t5_like_tokenizer()
END = TOKENIZER.eos_token_id


def encoder(template="plain", **settings):
    return Encoder(TOKENIZER, templates.get(template, TOKENIZER, ""), 3, start_token=START, **settings)


def sample(*turns, images=(), id="s"):
    messages = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return Sample(id, validated(messages, id, images))


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_the_prompt_is_read_and_the_answer_written():
    example = encoder("v1").encode(sample("<image>What?", "A cat.", images=["x"]))
    assert TOKENIZER.decode(example.ids[example.media < 0]) == "USER: \nWhat? ASSISTANT:</s>"
    assert (example.media >= 0).sum() == 3 and (example.labels == -100).all()
    assert example.decoder_labels.tolist() == [*ids("A cat."), END]  # once, though the template writes </s> as well
    assert example.decoder_ids.tolist() == [START, *ids("A cat.")]


def test_earlier_turns_are_read():
    turns = "<image>What?", "A cat.", "Where?", "On a mat.", "Thanks."
    example = encoder("v1").encode(sample(*turns, images=["x"]))
    assert TOKENIZER.decode(example.ids[example.media < 0]) == "USER: \nWhat? ASSISTANT: A cat.</s>USER: Where? ASSISTANT:</s>"
    assert example.decoder_labels.tolist() == [*ids("On a mat."), END]
    asked = encoder("v1").encode(sample(*turns[:3], images=["x"]), generation_prompt=True)
    assert asked.ids.tolist() == example.ids.tolist() and asked.decoder_ids is None


def test_limits_of_both_sides():
    example = encoder(max_length=4, max_answer=5).encode(sample("<image>", "A long answer", images=["x"]))
    assert example.decoder_labels.tolist() == ids("A lon") and example.decoder_ids.tolist() == [START, *ids("A lo")]
    with pytest.raises(BadSample, match="the prompt has 4 tokens; there is room for 3"):
        encoder(max_length=3).encode(sample("<image>", "A", images=["x"]))
    with pytest.raises(BadSample, match="nothing in it is supervised"):
        encoder().encode(sample("<image>", images=["x"]))


def test_answers_of_packed_samples_stand_in_their_segments():
    one, two = encoder().encode(sample("", "ab")), encoder().encode(sample("<image>", "c", images=["x"]))
    two = dataclasses.replace(two, pixels=np.zeros((1, 2, 2, 3), np.uint8))
    batch = collate([[one, two], []], answer_length=6)
    (a, b, c) = ids("abc")
    assert batch.tokens[0].tolist() == [END, 0, 0, 0, END] and batch.segments[0].tolist() == [1, 2, 2, 2, 2]
    assert batch.decoder_tokens.tolist() == [[START, a, b, START, c, 0], [0] * 6]
    assert batch.decoder_segments.tolist() == [[1, 1, 1, 2, 2, 0], [0] * 6]
    assert batch.targets.tolist() == [[a, b, END, c, END, 0], [0] * 6]
    assert batch.weights.tolist() == [[1, 1, 1, 1, 1, 0], [0] * 6]
    with pytest.raises(ValueError, match="a row's answers have 5 tokens, more than 4; its last sample is s"):
        collate([[one, two]], answer_length=4)


def test_rows_have_a_budget_of_answers():
    rng = np.random.default_rng(0)
    tokens, answers = rng.integers(1, 20, (2, 500))
    rows = packing.plan(tokens, np.zeros(500, int), np.arange(500), 64, 0, True, answers, 32)
    used = [answers[rows[row]].sum() for row in range(len(rows))]
    assert max(used) <= 32 and sorted(rows.samples.tolist()) == list(range(500))
    assert all(tokens[rows[row]].sum() <= 64 for row in range(len(rows)))
    with pytest.raises(ValueError, match="larger than a row"):
        packing.plan(tokens, np.zeros(500, int), np.arange(500), 64, 0, True, answers, 10)


class Sums:
    """Sums in words, of unequal lengths."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return sample(f"{'1 + ' * (index % 5)}1?", "x" * (1 + index % 3) + str(1 + index % 5), id=str(index))


def batches(**stage):
    stage = Stage(length=64, answer_length=16, tiles=0, sources={"sums": Source()}, **stage)
    return list(Pipeline(stage, {"sums": Sums()}, encoder("v1"), None, seed=0, loader=Loader()).batches())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' T5 and ours, with the same random weights."""
    torch.manual_seed(0)
    config = hf.T5Config(vocab_size=len(TOKENIZER), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, tie_word_embeddings=False, decoder_start_token_id=0,
                         relative_attention_num_buckets=8, relative_attention_max_distance=16)  # fmt: skip
    theirs = hf.T5ForConditionalGeneration(config).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "layer_norm" in name else 0.0, 0.3)
    directory = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(directory)
    return theirs, load(directory)


@functools.partial(jax.jit, static_argnames="config")
def summed(params, batch, *, config):
    return language_loss(params, config, batch, Execution(), groups=1).sum(), total_weight(batch)


def test_the_loss_equals_transformers(pair):
    theirs, ours = pair
    assert ours.family is FAMILY
    total = count = 0.0
    for number in range(24):
        example = encoder("v1").encode(Sums()[number])
        labels = torch.tensor(example.decoder_labels[None].astype(np.int64))
        with torch.no_grad():
            loss = theirs(input_ids=torch.tensor(example.ids[None].astype(np.int64)), labels=labels).loss
        total, count = total + float(loss) * labels.numel(), count + labels.numel()
    ((batch, info),) = batches(rows=24, epochs=1.0, packing=False)
    loss, weight = summed(ours.params, batch, config=ours.config)
    assert float(weight) == count and float(loss) == pytest.approx(total, rel=1e-5)
    assert info.supervised == info.answers == count and info.tokens == (batch.segments > 0).sum() + count
    assert info.padding == pytest.approx(1 - info.tokens / (24 * (64 + 16)))


def test_packed_equals_unpacked(pair):
    _, ours = pair
    ((batch, info),) = batches(rows=24, steps=1)
    assert batch.decoder_segments.max() > 1 and batch.segments.max() == batch.decoder_segments.max()
    samples = [[encoder("v1").encode(Sums()[int(id)])] for row in info.ids for id in row]
    alone = collate(samples + [[]] * (len(samples) % 2), length=64, answer_length=16)
    apart, packed = (summed(ours.params, given, config=ours.config) for given in (alone, batch))
    np.testing.assert_allclose(packed, apart, rtol=1e-5)
