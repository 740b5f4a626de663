"""T5 in its versions against transformers: outputs, loss, generation, and the way back."""

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
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_heads": 3,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
RNG = np.random.default_rng(0)
IDS = RNG.integers(2, 60, (4, 17))
MASK = np.array([[1] * 17, [1] * 9 + [0] * 8, [0] * 5 + [1] * 12, [1] + [0] * 16])
LABELS = np.where(RNG.random((4, 6)) < 0.8, RNG.integers(2, 60, (4, 6)), -100)
CASES = {
    "v1.0": (hf.T5ForConditionalGeneration, hf.T5Config, {}),
    "v1.1": (hf.T5ForConditionalGeneration, hf.T5Config, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": (hf.MT5ForConditionalGeneration, hf.MT5Config, {"feed_forward_proj": "gated-silu"}),
}


def randomised(model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "layer_norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean, 0.1 if mean else 1.0 if "shared" in name else 0.3)
    return model.eval()


def untied(directory):
    """Gives a saved model a head of its own, as version 1.1 has it."""
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = np.random.default_rng(5).normal(0, 0.3, tensors["shared.weight"].shape).astype(np.float32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """transformers' model and ours."""
    kind, config, settings = CASES[request.param]
    directory = tmp_path_factory.mktemp("t5")
    theirs = randomised(kind(config(**{**SMALL, **settings})))
    theirs.save_pretrained(directory)
    if request.param == "v1.1":
        untied(directory)
        theirs = kind.from_pretrained(directory).eval()
    return theirs, mmjax.load(directory)


def reference(theirs, inputs):
    with torch.no_grad():
        return theirs(**{k: torch.tensor(v) for k, v in inputs.items()}, output_hidden_states=True)


def test_equal_to_transformers(pair, tmp_path):
    theirs, ours = pair
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    want, found = reference(theirs, inputs), ours(inputs, output_hidden_states=True)
    states = {f"decoder_hidden_states_{i}": state for i, state in enumerate(want.decoder_hidden_states)}
    states |= {f"encoder_hidden_states_{i}": state for i, state in enumerate(want.encoder_hidden_states)}
    for name, value in {"logits": want.logits, "loss": want.loss, **states}.items():
        apart = np.abs(np.asarray(found[name]) - value.numpy()) / np.abs(value.numpy()).max()
        assert (apart[MASK == 1] if apart.shape[:2] == MASK.shape else apart).max() < 1e-5, name
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["decoder_start_token_id"] == 0
    again = type(theirs).from_pretrained(tmp_path).eval()
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())
    assert torch.equal(reference(again, inputs).logits, want.logits)


def test_the_decoders_own_mask_and_inputs(pair):
    theirs, ours = pair
    mask = np.array([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0] * 4 + [1] * 2])
    ids = np.where(LABELS < 0, 0, LABELS)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    apart = np.abs(np.asarray(ours(inputs)["logits"]) - reference(theirs, inputs).logits.numpy())
    assert apart[mask == 1].max() < 1e-4
    with pytest.raises(UserError, match="decoder_input_ids"):
        ours({"input_ids": IDS})


@pytest.mark.parametrize("kind", [hf.T5EncoderModel, hf.T5Model])
def test_parts_of_it(kind, tmp_path):
    theirs = randomised(kind(hf.T5Config(**SMALL)))
    theirs.save_pretrained(tmp_path)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if kind is hf.T5Model:
        inputs["decoder_input_ids"] = IDS[:, :3]
    model = mmjax.load(tmp_path)
    found = np.asarray(model(inputs)["last_hidden_state"])
    want = reference(theirs, inputs).last_hidden_state.numpy()
    real = MASK == 1 if kind is hf.T5EncoderModel else np.ones((4, 3), bool)
    assert np.abs(found - want)[real].max() < 1e-4
    model.save_pretrained(tmp_path / "ours")
    state = kind.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())
    with pytest.raises(UserError, match="generates nothing"):
        model.generate(inputs)


def test_float16_does_not_overflow(tmp_path):
    """What the MLPs add to the residual stream grows past float16's largest number."""
    theirs = randomised(hf.T5ForConditionalGeneration(hf.T5Config(**SMALL)))
    for half in (theirs.encoder, theirs.decoder):
        for block in half.block:
            block.layer[-1].DenseReluDense.wo.weight.data *= 4e4
    theirs.half().save_pretrained(tmp_path)
    inputs = {"input_ids": IDS[:1], "decoder_input_ids": IDS[:1, :4]}
    want = mmjax.load(tmp_path)(inputs, output_hidden_states=True)
    assert max(np.abs(value).max() for name, value in want.items() if name.startswith("decoder_hidden_states")) > 65504
    found = np.asarray(mmjax.load(tmp_path, dtype="float16")(inputs)["logits"])
    assert np.abs(found - want["logits"]).max() < 0.03 * np.abs(want["logits"]).max()
