"""`model.generate` equals transformers' `generate` for loaded directories: an encoder-decoder, longrope, stop strings, and what a
generation_config.json says."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import mmjax
from mmjax.errors import UserError

torch = pytest.importorskip("torch")

import transformers as hf  # noqa: E402

RNG = np.random.default_rng(0)
IDS = RNG.integers(3, 60, (4, 17))
RIGHT = np.array([[1] * 17, [1] * 9 + [0] * 8, [0] * 5 + [1] * 12, [1] + [0] * 16])
LEFT = np.array([[1] * 17, [0] * 8 + [1] * 9, [0] * 5 + [1] * 12, [0] * 16 + [1]])


def randomised(model, deviation=0.4):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), 1.0 if "shared" in name else deviation)
    return model.eval()


def new_ids(theirs, inputs, prompt=17, **settings):
    """transformers' new ids, without the prompt of so many."""
    given = {name: torch.tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        return theirs.generate(**given, do_sample=False, **settings)[:, prompt:].numpy()


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    directory = tmp_path_factory.mktemp("t5")
    config = hf.T5Config(
        vocab_size=60, d_model=24, d_kv=6, d_ff=40, num_heads=3, num_layers=2, relative_attention_num_buckets=8,
        relative_attention_max_distance=12, decoder_start_token_id=0, eos_token_id=[21, 34, 47, 58],
    )  # fmt: skip
    theirs = randomised(hf.T5ForConditionalGeneration(config))
    theirs.save_pretrained(directory)
    return theirs, mmjax.load(directory)


PREFIX = {
    "decoder_input_ids": np.where(LEFT[:, -5:] == 1, IDS[:, :5], 0),
    "decoder_attention_mask": LEFT[:, -5:],
}


@pytest.mark.parametrize(
    "more, settings",
    [
        ({}, {"max_new_tokens": 64, "eos_token_id": None}),
        (PREFIX, {"repetition_penalty": 1.8, "min_new_tokens": 4}),
        (
            {},
            {"num_beams": 3, "repetition_penalty": 1.8, "num_return_sequences": 2, "forced_bos_token_id": 9, "forced_eos_token_id": 1},
        ),
    ],
    ids=["greedy", "begun", "beams"],
)
def test_an_encoder_decoder(t5, more, settings):
    theirs, ours = t5
    inputs = {"input_ids": IDS, "attention_mask": RIGHT, **more}
    settings = {"max_new_tokens": 20, **settings}
    start = 1 + (5 if more else 0)  # no row begins with the start token, so that all are given one
    if more:
        inputs["decoder_input_ids"] = np.maximum(inputs["decoder_input_ids"], 3)
    want = new_ids(theirs, inputs, start, **settings)
    settings = {"ignore_eos": "eos_token_id" in settings, **{k: v for k, v in settings.items() if k != "eos_token_id"}}
    np.testing.assert_array_equal(ours.generate(inputs, **settings), want)
    assert (want[0] != want[1]).any()


def test_keys_turn_otherwise_once_a_text_is_long(tmp_path):
    config = hf.Phi3Config(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
        original_max_position_embeddings=20, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        rope_scaling={"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 6.0]},
    )  # fmt: skip
    theirs = randomised(hf.Phi3ForCausalLM(config))
    theirs.save_pretrained(tmp_path)
    ours = mmjax.load(tmp_path)
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    for beams in (1, 2):
        settings = {"max_new_tokens": 16, "num_beams": beams, "repetition_penalty": 1.4}
        np.testing.assert_array_equal(ours.generate(inputs, **settings), new_ids(theirs, inputs, **settings))


def letters():
    """A tokenizer whose tokens are one, two or three letters, some behind a space."""
    parts = ["".join(pair) for n in (1, 2, 3) for pair in itertools.product("abc", repeat=n)]
    tokens = ["<pad>", "<s>", "</s>", "Ġ", *parts, *(f"Ġ{part}" for part in parts)]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    tokenizer = letters()
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    theirs = randomised(hf.LlamaForCausalLM(config))
    theirs.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return theirs, tokenizer, directory


def test_stop_strings(llama):
    theirs, tokenizer, directory = llama
    ours = mmjax.load(directory)
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    settings = {"max_new_tokens": 30, "repetition_penalty": 1.3}
    free = ours.generate(inputs, **settings)
    texts = [tokenizer.decode(row) for row in free]
    stops = [texts[0][12:15], texts[1][30:34], "cccc"]  # they begin and end inside of tokens
    want = new_ids(theirs, inputs, stop_strings=stops, tokenizer=tokenizer, **settings)
    found = ours.generate(inputs, stop=stops, **settings)
    np.testing.assert_array_equal(found, want)
    assert (found != free[:, : found.shape[1]]).any()
    for row, text in zip(found, texts):
        assert ours.text(row, stops) == min((text.split(stop)[0] for stop in stops), key=len).strip()
    with pytest.raises(UserError, match="beams are neither"):
        ours.generate(inputs, stop=stops, num_beams=2)


def test_what_the_generation_config_says_is_heard(llama):
    theirs, tokenizer, directory = llama
    file = directory / "generation_config.json"
    said = {"eos_token_id": [40, 52, 64, 77], "pad_token_id": 3, "repetition_penalty": 1.6, "do_sample": True, "top_p": 0.5}
    kept = file.read_text()
    file.write_text(json.dumps(said))
    try:
        theirs = hf.LlamaForCausalLM.from_pretrained(directory).eval()
        ours = mmjax.load(directory)
        padded = {"input_ids": np.where(LEFT == 1, IDS + 5, 3)}  # without a mask, the padding id is padding
        np.testing.assert_array_equal(ours.generate(padded, max_new_tokens=30), new_ids(theirs, padded, max_new_tokens=30))
        file.write_text(json.dumps({**said, "no_repeat_ngram_size": 2}))
        with pytest.raises(UserError, match="no_repeat_ngram_size = 2 is not supported"):
            mmjax.load(directory).generate(padded)
    finally:
        file.write_text(kept)


def test_what_an_old_config_says_outlives_an_export(llama, tmp_path):
    """Such a file has no generation_config.json beside it; supported or not, its settings are in the one that is written."""
    _, _, directory = llama
    shutil.copytree(directory, tmp_path / "old")
    (tmp_path / "old" / "generation_config.json").unlink()
    file = tmp_path / "old" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": 1.6, "no_repeat_ngram_size": 2, "num_beams": 1}))
    mmjax.load(tmp_path / "old").save_pretrained(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert written["repetition_penalty"] == 1.6 and written["no_repeat_ngram_size"] == 2 and written["num_beams"] == 1
    with pytest.raises(UserError, match="no_repeat_ngram_size = 2 is not supported"):
        mmjax.load(tmp_path / "new").generate({"input_ids": IDS})
