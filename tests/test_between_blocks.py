"""Models of recipes that read pictures between their blocks: they answer, are written in three layouts and read back."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax import tree
from mmjax.assembly import assemble
from mmjax.config import Part, from_config_dict
from mmjax.errors import UserError
from tests.configs import expand


def assembled(name: str, directory):
    """The tiny recipe's fresh model with its gates open."""
    recipe = from_config_dict(expand.config(name, "tiny"))
    model = assemble(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype="float32")), directory)
    flat = tree.flatten(model.params)
    opened = {path: jnp.full_like(leaf, 0.7) if path.endswith("_gate") else leaf for path, leaf in flat.items()}
    return dataclasses.replace(model, params=tree.unflatten(opened))


def question(text: str, *colours: str):
    pictures = [{"type": "image", "image": Image.new("RGB", (50, 40), colour)} for colour in colours]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def inputs(model, pictures: int = 3, seed: int = 0):
    """Three rows of text with 2, 0 and 1 pictures: ids, mask, and pixels [pictures, channels, height, width]."""
    rng = np.random.default_rng(seed)
    placeholder = model.tokenizer.get_vocab()["<image>"]
    ids = rng.integers(5, 100, (3, 9))
    ids[0, 2] = ids[0, 5] = ids[2, 0] = placeholder
    side = model.config.vision.image_size
    return ids, np.ones_like(ids), rng.standard_normal((pictures, 3, side, side)).astype(np.float32)


def grid(pixels: np.ndarray) -> np.ndarray:
    """The same pixels beside their rows, [rows, media, channels, height, width]."""
    beside = np.zeros((3, 2, *pixels.shape[1:]), np.float32)
    beside[0], beside[2, 0] = pixels[:2], pixels[2]
    return beside


def test_openflamingo_answers_and_goes_into_its_own_layout_and_ours(tmp_path):
    model = assembled("openflamingo", tmp_path / "work")
    asked = [question("what is this", "red", "blue"), question("no picture"), question("what is this", "blue")]
    together = model.answers(asked, max_new_tokens=6)
    assert together == [model.answers([one], max_new_tokens=6)[0] for one in asked]
    example = model.encoder().encode(dataclasses.replace(_sample(asked[0])), generation_prompt=True)
    assert (example.ids == model.tokenizer.get_vocab()["<image>"]).sum() == 2 and example.tile_count == 2

    ids, mask, pixels = inputs(model)
    found = np.asarray(model({"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})["logits"])
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "mmjax"
    ours = mmjax.load(tmp_path / "ours")
    again = ours({"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})["logits"]
    np.testing.assert_allclose(again, found, rtol=1e-4, atol=1e-5)
    assert ours.answers(asked, max_new_tokens=6) == together

    model.save_pretrained(tmp_path / "original", layout="original")
    theirs = mmjax.load(tmp_path / "original")
    assert theirs.family.model_types == ("openflamingo",)
    given = {"lang_x": ids, "attention_mask": mask, "vision_x": grid(pixels)[:, :, None]}
    np.testing.assert_allclose(theirs(given)["logits"], found, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="does not fit transformers' IDEFICS"):
        model.save_pretrained(tmp_path / "hf", layout="hf")


def _sample(messages):
    from mmjax.data.messages import Sample, validated

    return Sample("one", validated(messages))


def test_idefics_goes_to_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers as hf

    model = assembled("idefics", tmp_path / "work")
    ids, mask, pixels = inputs(model)
    found = np.asarray(model({"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})["logits"])
    model.save_pretrained(tmp_path / "hf")
    theirs, report = hf.IdeficsForVisionText2Text.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    begun = np.cumsum(ids == model.tokenizer.get_vocab()["<image>"], 1)
    seen = (begun[..., None] == np.arange(1, 3)).astype(int)
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": grid(pixels), "image_attention_mask": seen}
    with torch.no_grad():
        wanted = theirs.eval()(**{name: torch.tensor(value) for name, value in given.items()}).logits.numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-4)
    ours = mmjax.load(tmp_path / "hf")
    np.testing.assert_allclose(ours(given)["logits"], wanted, rtol=1e-3, atol=2e-4)
    assert ours.config.llm.beyond == model.config.llm.beyond


def test_what_is_not_meant_is_said(tmp_path, monkeypatch):
    recipe = from_config_dict(expand.config("openflamingo", "tiny"))
    late = dataclasses.replace(recipe.model, cross_attention=dataclasses.replace(recipe.model.cross_attention, first=9))
    with pytest.raises(UserError, match="first is 9, and the language model has 2 blocks"):
        assemble(dataclasses.replace(recipe, model=late), tmp_path / "late")
    t5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    other = dataclasses.replace(recipe.model, llm=Part(config=t5))
    with pytest.raises(UserError, match="an encoder-decoder reads media as tokens"):
        assemble(dataclasses.replace(recipe, model=other), tmp_path / "t5")
    model = assemble(recipe, tmp_path / "without")
    monkeypatch.setattr(model.tokenizer, "get_vocab", dict)
    with pytest.raises(UserError, match="needs '<image>' among its tokenizer's tokens"):
        model.encoder()
