"""Language models and vision towers against transformers, from every spelling of their configs, and back."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mmjax
from mmjax.errors import UserError
from mmjax.families import FAMILIES, find

torch = pytest.importorskip("torch")

import transformers as hf  # noqa: E402

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def randomised(model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean, 0.1 if mean else 0.2)
    return model.eval()


TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 30,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 12,
}
TOWERS = {
    "clip with projection": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**TOWER, projection_dim=20)),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**TOWER)),
    "siglip without head": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**TOWER, vision_use_head=False)),
}


@pytest.mark.parametrize("name", TOWERS)
def test_vision_towers(name, tmp_path):
    theirs = randomised(TOWERS[name]())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mmjax.load(tmp_path / "theirs")
    pixels = np.random.default_rng(0).standard_normal((2, 3, 30, 30)).astype(np.float32)
    with torch.no_grad():
        reference = theirs(torch.tensor(pixels), output_hidden_states=True)
    found = ours({"pixel_values": pixels}, output_hidden_states=True)
    for key in ("last_hidden_state", "pooler_output", "image_embeds"):
        value = getattr(reference, key, None)
        if value is not None:
            assert np.abs(np.asarray(found[key]) - value.numpy()).max() < 1e-4, key
    for i, state in enumerate(reference.hidden_states):
        assert np.abs(np.asarray(found[f"hidden_states_{i}"]) - state.numpy()).max() < 1e-4
    ours.save_pretrained(tmp_path / "ours")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_two_towers(kind, tmp_path):
    config = getattr(hf, f"{kind}Config")(
        text_config={**TEXT, "eos_token_id": 49}, vision_config=TOWER, projection_dim=16
    )
    config.vision_config.hidden_size = 16
    theirs = randomised(getattr(hf, f"{kind}Model")(config))
    theirs.save_pretrained(tmp_path)
    ours = mmjax.load(tmp_path)
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, 3, 30, 30)).astype(np.float32)
    ids = np.concatenate([rng.integers(3, 49, (3, 9)), np.full((3, 3), 49)], 1)
    mask = np.concatenate([np.ones((3, 10), int), np.zeros((3, 2), int)], 1)
    with torch.no_grad():
        reference = theirs(torch.tensor(ids), torch.tensor(pixels), torch.tensor(mask))
    found = ours({"input_ids": ids, "pixel_values": pixels, "attention_mask": mask})
    for key in ("logits_per_image", "image_embeds", "text_embeds"):
        assert np.abs(np.asarray(found[key]) - getattr(reference, key).numpy()).max() < 1e-4, key


def test_a_stored_copy_of_a_tied_head_must_be_one(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    theirs = randomised(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True)))
    theirs.save_pretrained(tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    safetensors_torch.save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    mmjax.load(tmp_path)
    safetensors_torch.save_file({**tensors, "lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="different from the weight they copy.*lm_head.weight"):
        mmjax.load(tmp_path)


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(UserError, match="'falcon' is not supported here; known are .*clip, clip_text_model, clip_vision_model, .*qwen2"):
        find({"model_type": "falcon"})
    assert len({kind for family in FAMILIES for kind in family.model_types}) >= 13


def test_hf_model_type_is_read_first():
    assert find({"hf_model_type": "llama", "model_type": "something"}).model_types == ("llama",)
    assert json.dumps(find({"model_type": "llava", "mm_vision_tower": "x"}).model_types).count("llava_llama") == 1


TEXTS = {
    "clip": lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT, eos_token_id=49)),
    "clip with projection": lambda: hf.CLIPTextModelWithProjection(
        hf.CLIPTextConfig(**TEXT, eos_token_id=49, projection_dim=20)
    ),
    "siglip": lambda: hf.SiglipTextModel(hf.SiglipTextConfig(**TEXT)),
    "siglip 2": lambda: hf.Siglip2TextModel(hf.Siglip2TextConfig(**TEXT)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_towers(name, tmp_path):
    theirs = randomised(TEXTS[name]())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mmjax.load(tmp_path / "theirs")
    ids = np.concatenate([np.random.default_rng(0).integers(3, 49, (3, 9)), np.full((3, 3), 49)], 1)
    mask = np.concatenate([np.ones((3, 10), int), np.zeros((3, 2), int)], 1)
    with torch.no_grad():
        reference = theirs(torch.tensor(ids), torch.tensor(mask), output_hidden_states=True)
    found = ours({"input_ids": ids, "attention_mask": mask}, output_hidden_states=True)
    for key in ("last_hidden_state", "pooler_output", "text_embeds"):
        value = getattr(reference, key, None)
        assert value is None or np.abs(np.asarray(found[key]) - value.numpy()).max() < 1e-4, key
    assert ("text_embeds" in found) == ("projection" in name)
    for i, state in enumerate(reference.hidden_states):
        assert np.abs(np.asarray(found[f"hidden_states_{i}"]) - state.numpy()).max() < 1e-4
    ours.save_pretrained(tmp_path / "ours")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())
    with pytest.raises(UserError, match=r"\[rows, 12 at most\], not \[1, 13\]"):
        ours({"input_ids": np.ones((1, 13), int)})
