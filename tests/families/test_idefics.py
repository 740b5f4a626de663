"""IDEFICS in transformers' layout against transformers itself, in both directions."""

from __future__ import annotations

import numpy as np
import pytest

import mmjax
from mmjax.errors import UserError

torch = pytest.importorskip("torch")

import transformers as hf  # noqa: E402

SIDE, MORE = 28, 3
CASES = {
    "resampler, vector gates, norms of queries and keys, more tokens, every second layer": (2, 4, True, "vector", True, MORE),
    "all positions, one gate, every layer": (1, 3, False, "float", False, 0),
}


def built(every, layers, resampler, gates, normed, more, tied=False):
    vision = {"embed_dim": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE}
    perceiver = {
        "use_resampler": resampler,
        "resampler_depth": 2,
        "resampler_head_dim": 6,
        "resampler_n_heads": 3,
        "resampler_n_latents": 5,
        "qk_layer_norms_perceiver": normed,
    }
    config = hf.IdeficsConfig(
        vocab_size=97,
        additional_vocab_size=more,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        alpha_type=gates,
        cross_layer_interval=every,
        qk_layer_norms=normed,
        use_resampler=resampler,
        vision_config=vision,
        perceiver_config=perceiver,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = hf.IdeficsForVisionText2Text(config).eval()
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.6 if "alpha" in name else 0.0
        torch.nn.init.normal_(parameter, mean, 0.1 if mean == 1 else 0.2)
    return model


def inputs(more: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Four rows padded on the left: text before the first of two pictures, no picture, one, and positions that see two."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 97 + more, (4, 11))
    mask = np.array([[0] * padding + [1] * (11 - padding) for padding in (0, 4, 2, 0)])
    seen = np.zeros((4, 11, 2), int)
    seen[0, 3:7, 0] = seen[0, 7:, 1] = 1
    seen[2, 4:, 0] = 1
    seen[3, 2:5, 0] = seen[3, 5:, :] = 1
    ids = np.where(mask == 1, ids, 0)
    follows = np.pad(mask, ((0, 0), (1, 0)))[:, :-1] == 1  # the first token follows padding, which means nothing
    labels = np.where((mask == 1) & follows & (rng.random(ids.shape) < 0.6), ids, -100)
    pixels = rng.standard_normal((4, 2, 3, SIDE, SIDE)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "image_attention_mask": seen, "pixel_values": pixels, "labels": labels}


def reference(theirs, given):
    tensors = {name: torch.tensor(value) for name, value in given.items() if name != "labels"}
    with torch.no_grad():
        return theirs(**tensors)


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from its directory, the case)."""
    case = CASES[request.param]
    theirs = built(*case)
    directory = tmp_path_factory.mktemp("idefics")
    theirs.save_pretrained(directory)
    return theirs, mmjax.load(directory), case


def test_outputs_and_loss_equal_transformers(pair):
    theirs, ours, (_, _, resampler, _, _, more) = pair
    given = inputs(more)
    wanted, found = reference(theirs, given), ours(given)
    real = given["attention_mask"] == 1
    assert np.abs(np.asarray(found["logits"]) - wanted.logits.numpy())[real].max() < 2e-4
    features = wanted.image_outputs.last_hidden_state.numpy()
    assert np.abs(np.asarray(found["image_features"]).reshape(features.shape) - features).max() < 1e-4
    assert ("connector_output" in found) == resampler
    # transformers cannot take this loss where there are more tokens than the table has
    labels = torch.tensor(given["labels"][:, 1:])
    loss = torch.nn.functional.cross_entropy(wanted.logits[:, :-1].transpose(1, 2), labels, ignore_index=-100)
    assert abs(float(found["loss"]) - float(loss)) < 1e-4


def test_each_row_is_what_it_is_alone(pair):
    _, ours, (*_, more) = pair
    given = inputs(more)
    together = np.asarray(ours(given)["logits"])
    for row in range(4):
        keep = given["attention_mask"][row] == 1
        alone = {name: value[row : row + 1] for name, value in given.items() if name != "labels"}
        alone |= {name: alone[name][:, keep] for name in ("input_ids", "attention_mask", "image_attention_mask")}
        found = np.asarray(ours(alone)["logits"])
        np.testing.assert_allclose(together[row][keep], found[0], rtol=1e-4, atol=1e-4)


def test_greedy_ids_equal_transformers(pair):
    theirs, ours, (*_, more) = pair
    prompt = {name: value for name, value in inputs(more).items() if name != "labels"}
    tensors = {name: torch.tensor(value) for name, value in prompt.items()}
    with torch.no_grad():
        ids = theirs.generate(**tensors, max_new_tokens=16, do_sample=False, eos_token_id=-1, pad_token_id=0)
    wanted = ids[:, prompt["input_ids"].shape[1] :].tolist()
    assert ours.generate(prompt, max_new_tokens=16, ignore_eos=True).tolist() == wanted


def test_written_model_is_bit_identical_in_transformers(pair, tmp_path):
    theirs, ours, (*_, more) = pair
    ours.save_pretrained(tmp_path)
    again, report = hf.IdeficsForVisionText2Text.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(state[name], value), name
    given = inputs(more)
    assert torch.equal(reference(again.eval(), given).logits, reference(theirs, given).logits)


def test_a_tied_head_takes_its_additional_rows_from_the_embeddings(tmp_path):
    theirs = built(1, 2, True, "float", True, MORE, tied=True)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, given = mmjax.load(tmp_path / "theirs"), inputs(MORE)
    real = given["attention_mask"] == 1
    apart = np.asarray(ours(given)["logits"]) - reference(theirs, given).logits.numpy()
    assert np.abs(apart)[real].max() < 2e-4
    ours.save_pretrained(tmp_path / "ours")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("theirs", "ours")]
    assert len(files[0]) and mmjax.load(tmp_path / "ours").config == ours.config


def test_media_and_masks_must_agree(pair):
    _, ours, (*_, more) = pair
    given = inputs(more)
    with pytest.raises(UserError, match="without image_attention_mask"):
        ours({name: value for name, value in given.items() if name != "image_attention_mask"})
    with pytest.raises(UserError, match=r"image_attention_mask is \[4, 11, 2\], not \[4, 11, 1\]"):
        ours({**given, "image_attention_mask": given["image_attention_mask"][..., :1]})
    with pytest.raises(UserError, match="no pixel_values are given"):
        ours({name: value for name, value in given.items() if name != "pixel_values"})
