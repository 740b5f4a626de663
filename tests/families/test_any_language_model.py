"""A vision tower in front of every decoder-only language model: written where transformers' llava can hold it, and read back."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

import mmjax
from mmjax import vocabulary
from mmjax.assembly import assemble
from mmjax.config import Image, Model, Part, Recipe, Source, Stage
from mmjax.errors import UserError
from tests.families.test_language_zoo import FAMILIES, published
from tests.models import tiny

torch = pytest.importorskip("torch")

import transformers as hf  # noqa: E402

TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = Part(config={"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **TOWER})
# Other names of tensors, a bias on the head, soft caps: transformers' llava has no place for them.
OWN_LAYOUT = {"phi", "gpt2", "gpt_neox", "mpt", "opt", "gemma2"}


@pytest.mark.parametrize("name", FAMILIES)
def test_in_a_multimodal_model(name, tmp_path):
    published(*FAMILIES[name], tmp_path / "llm")
    vocabulary.train(["a cat sat on the mat"], kind="word").save_pretrained(tmp_path / "llm")
    llm = json.loads((tmp_path / "llm" / "config.json").read_text())
    recipe = Recipe(
        model=Model(
            llm=Part(path=str(tmp_path / "llm")),
            vision=VISION,
            feature_layers=(-1,),
            image=Image(aspect="squash"),
            template="plain",
        )
    )
    model = assemble(recipe, tmp_path / "work")
    assert model.config.language.vocab_size == llm["vocab_size"]
    model.save_pretrained(tmp_path / "out")
    kind = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert kind == ("mmjax" if name in OWN_LAYOUT else "llava")
    again = mmjax.load(tmp_path / "out")
    placeholder = again.foreign["image_token_index"]
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 60, (2, 9))
    ids[:, 1:5] = placeholder
    inputs = {"input_ids": ids, "pixel_values": rng.standard_normal((2, 3, 28, 28)).astype(np.float32)}
    found = np.asarray(again(inputs)["logits"])
    if kind == "llava":
        theirs, report = hf.LlavaForConditionalGeneration.from_pretrained(
            tmp_path / "out", output_loading_info=True, attn_implementation="eager"
        )
        assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            reference = theirs.eval()(**{key: torch.tensor(value) for key, value in inputs.items()}).logits.numpy()
        assert np.abs(found - reference).max() < 2e-5 * np.abs(reference).max()
    jax.clear_caches()


@pytest.mark.parametrize(
    "mask, llm",
    [
        ("prefix", {"model_type": "llama", "num_key_value_heads": 2}),
        ("media", {"model_type": "git_text"}),
    ],
)
def test_a_mask_goes_with_the_model(mask, llm, tmp_path):
    """GIT's decoder counts the text alone, wherever the picture stands; transformers' llava has no such masks."""
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    recipe = Recipe(model=Model(llm=Part(config={**llm, **shape}), vision=VISION, feature_layers=(-1,), template="plain", mask=mask))
    recipe = dataclasses.replace(recipe, stages={"s": Stage(sources={"digits": Source("digits", options={"size": 4})})}, run=("s",))
    model = assemble(recipe, tmp_path / "work")
    config = model.config
    model = dataclasses.replace(model, params=tiny.random_params(config))
    with pytest.raises(UserError, match=f"its mask is causal, not '{mask}'"):
        model.save_pretrained(tmp_path, layout="hf")
    model.save_pretrained(tmp_path)
    again = mmjax.load(tmp_path)
    assert again.config.mask == mask
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 60, (2, 9))
    ids[:, 2:6] = again.foreign["image_token_index"]
    inputs = {"input_ids": ids, "pixel_values": rng.standard_normal((2, 3, 28, 28)).astype(np.float32)}
    found = np.asarray(again(inputs)["logits"])
    changed = {**inputs, "input_ids": np.where(np.arange(9) == 8, 5, ids)}
    moved = np.abs(np.asarray(again(changed)["logits"]) - found).max(-1) > 1e-5
    assert moved[:, :8].all() == (mask == "prefix") == moved[:, :8].any()
    answer = {**inputs, "labels": np.where(np.arange(9) >= 7, ids, -100)}
    assert np.array_equal(np.asarray(again(answer)["logits"]), found) == (mask == "media")
