"""BERT against transformers: every class that is known, in and out, with the old spellings and what only the tensors tell."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mmjax
from mmjax.errors import UserError

torch = pytest.importorskip("torch")

import transformers as hf  # noqa: E402

SMALL = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "type_vocab_size": 3,
}
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, 60, (2, 11))
MASK = np.array([[1] * 11, [1] * 7 + [0] * 4])
LABELS = np.where((RNG.random((2, 11)) < 0.5) & (MASK == 1), IDS, -100)
CASES = {
    "BertModel": ({}, ("last_hidden_state", "pooler_output")),
    "BertForMaskedLM": ({"hidden_act": "gelu_new"}, ("logits", "loss")),
    "BertLMHeadModel": ({"is_decoder": True, "tie_word_embeddings": False}, ("logits", "loss")),
    "BertForPreTraining": ({"hidden_act": "relu"}, ("prediction_logits", "seq_relationship_logits")),
}


def randomised(model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "LayerNorm" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean, 0.1 if mean else 0.3)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_equal_to_transformers(name, tmp_path):
    settings, wanted = CASES[name]
    theirs = randomised(getattr(hf, name)(hf.BertConfig(**SMALL, **settings)))
    theirs.save_pretrained(tmp_path / "theirs")
    inputs = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": IDS % 3}
    if "loss" in wanted:
        inputs["labels"] = LABELS
    with torch.no_grad():
        reference = theirs(**{k: torch.tensor(v) for k, v in inputs.items()}, output_hidden_states=True)
    ours = mmjax.load(tmp_path / "theirs")
    found = ours(inputs, output_hidden_states=True)
    states = {f"hidden_states_{i}": state for i, state in enumerate(reference.hidden_states)}
    for key, value in {**{key: getattr(reference, key) for key in wanted}, **states}.items():
        apart = np.abs(np.asarray(found[key]) - value.numpy())
        assert (apart[MASK == 1] if apart.shape[:2] == MASK.shape else apart).max() < 1e-4, key
    ours.save_pretrained(tmp_path / "ours")
    again = getattr(hf, name).from_pretrained(tmp_path / "ours")
    state = again.state_dict()
    # Untied, the head has a second bias that nothing reads.
    tensors = {k: v for k, v in theirs.state_dict().items() if k != "cls.predictions.bias" or name != "BertLMHeadModel"}
    assert all(torch.equal(state[key], value) for key, value in tensors.items())


def test_a_decoder_generates(tmp_path):
    theirs = randomised(hf.BertLMHeadModel(hf.BertConfig(**SMALL, is_decoder=True, pad_token_id=0)))
    theirs.save_pretrained(tmp_path)
    left = MASK[:, ::-1].copy()
    settings = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0}
    with torch.no_grad():
        want = theirs.generate(torch.tensor(IDS), attention_mask=torch.tensor(left), **settings)[:, 11:].numpy()
    model = mmjax.load(tmp_path)
    found = model.generate({"input_ids": IDS, "attention_mask": left}, max_new_tokens=9)
    np.testing.assert_array_equal(found, want)


def test_old_spellings_and_what_only_the_tensors_tell(tmp_path):
    theirs = randomised(hf.BertModel(hf.BertConfig(**SMALL), add_pooling_layer=False))
    theirs.save_pretrained(tmp_path)
    old = {"weight": "gamma", "bias": "beta"}
    tensors = {}
    for key, value in load_file(tmp_path / "model.safetensors").items():
        head, last = key.rsplit(".", 1)
        tensors[f"bert.{head}.{old[last] if head.endswith('LayerNorm') else last}"] = value
    tensors["cls.seq_relationship.weight"] = np.zeros((2, 24), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    model = mmjax.load(tmp_path)
    found = model({"input_ids": IDS})
    with torch.no_grad():
        reference = theirs(torch.tensor(IDS)).last_hidden_state.numpy()
    assert np.abs(np.asarray(found["last_hidden_state"]) - reference).max() < 1e-4
    assert "pooler_output" not in found and "logits" not in found
    with pytest.raises(UserError, match="generates nothing"):
        model.generate({"input_ids": IDS})
    with pytest.raises(UserError, match="BertForMaskedLM"):
        model({"input_ids": IDS, "labels": IDS})


@pytest.mark.parametrize(
    "field, value",
    [
        ("position_embedding_type", "relative_key"),
        ("add_cross_attention", True),
        ("architectures", ["BertForTokenClassification"]),
    ],
)
def test_what_is_not_supported_is_named(field, value, tmp_path):
    hf.BertModel(hf.BertConfig(**SMALL)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(UserError, match=field if field != "architectures" else "BertForTokenClassification"):
        mmjax.load(tmp_path)
