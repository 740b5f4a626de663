"""LLaVA in transformers' layout against transformers itself, in both directions."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mmjax
from mmjax.errors import UserError

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from transformers import LlavaForConditionalGeneration  # noqa: E402

from tests.families import tiny_llava  # noqa: E402
from tests.families.tiny_llava import CLIP, SIGLIP  # noqa: E402

CASES = {
    "clip, grouped keys": (CLIP, 2, {"strategy": "default"}),
    "siglip": (SIGLIP, 4, {"layer": -1}),
}
TOKENS = 4


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    """(transformers' model, its directory, ours read from it)."""
    tower, kv_heads, settings = CASES[request.param]
    theirs = tiny_llava.model(tower, kv_heads, **settings)
    directory = tmp_path_factory.mktemp("llava")
    theirs.save_pretrained(directory)
    return theirs, directory, mmjax.load(directory)


def test_logits_and_loss_equal_transformers(pair):
    theirs, _, ours = pair
    given = tiny_llava.inputs(TOKENS)
    reference, found = tiny_llava.run(theirs, given), ours(given)
    real = given["attention_mask"] == 1
    apart = np.abs(np.asarray(found["logits"]) - reference["logits"])[real].max()
    assert apart < 2e-4
    assert abs(float(found["loss"]) - reference["loss"]) < 1e-5


def test_greedy_ids_equal_transformers(pair):
    theirs, _, ours = pair
    given = tiny_llava.inputs(TOKENS)
    prompt = {name: value for name, value in given.items() if name != "labels"}
    assert (
        ours.generate(prompt, max_new_tokens=32, ignore_eos=True).tolist()
        == tiny_llava.greedy(theirs, given, 32).tolist()
    )


def test_written_model_is_bit_identical_in_transformers(pair, tmp_path):
    theirs, _, ours = pair
    ours.save_pretrained(tmp_path)
    names = set(safetensors_torch.load_file(tmp_path / "model.safetensors"))
    assert any(name.startswith("vision_tower.vision_model.encoder.layers.0.") for name in names)
    again, report = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(state[name], value), name
    given = tiny_llava.inputs(TOKENS)
    assert np.array_equal(tiny_llava.run(again.eval(), given)["logits"], tiny_llava.run(theirs, given)["logits"])


def spelled(name: str, prefixed: bool, nested: bool) -> str:
    """A name that save_pretrained wrote (flat) in one of the four spellings."""
    if nested and name.startswith("vision_tower."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
    if prefixed:
        name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "language_model.")
        name = name if name.startswith("lm_head") else f"model.{name}"
    return name


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_four_spellings_load_alike(pair, tmp_path, prefixed, nested):
    _, directory, ours = pair
    tensors = safetensors_torch.load_file(directory / "model.safetensors")
    safetensors_torch.save_file(
        {spelled(name, prefixed, nested): value for name, value in tensors.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    from mmjax import tree

    same = tree.flatten(mmjax.load(tmp_path).params)
    for path, leaf in tree.flatten(ours.params).items():
        assert np.array_equal(np.asarray(same[path]), np.asarray(leaf)), path


def test_missing_extra_and_misshaped_tensors_are_all_listed(pair, tmp_path):
    _, directory, _ = pair
    tensors = safetensors_torch.load_file(directory / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    tensors["language_model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(5)
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(UserError) as error:
        mmjax.load(tmp_path)
    said = str(error.value)
    assert "missing (1): language_model.model.layers.1.mlp.up_proj.weight" in said
    assert "unexpected (1): language_model.model.layers.7.mlp.up_proj.weight" in said
    assert "multi_modal_projector.linear_1.bias is [5], the config asks for [32]" in said


def changed(directory, tmp_path, **fields):
    config = json.loads((directory / "config.json").read_text())
    for name, value in fields.items():
        part, _, field = name.rpartition("__")
        (config[part] if part else config)[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"text_config__rope_parameters": {"rope_type": "spiral", "factor": 2.0}}, "rope_type = 'spiral'"),
        ({"text_config__hidden_act": "tanh"}, "hidden_act = 'tanh'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"text_config__model_type": "falcon"}, "'falcon'"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy = 'cls'"),
    ],
)
def test_unsupported_fields_are_errors_that_name_them(pair, tmp_path, fields, named):
    with pytest.raises(UserError, match=named.replace("(", r"\(")):
        mmjax.load(changed(pair[1], tmp_path, **fields))


def test_placeholders_and_images_must_agree(pair):
    given = tiny_llava.inputs(TOKENS)
    given["pixel_values"] = given["pixel_values"][:-1]
    with pytest.raises(UserError, match="24 image tokens, but 5 images of 4 tokens"):
        pair[2](given)


def test_unknown_input_is_an_error_with_the_nearest_name(pair):
    with pytest.raises(UserError, match="'pixel_value'.*nearest: 'pixel_values'"):
        pair[2]({"input_ids": np.ones((1, 3), int), "pixel_value": None})


def test_several_feature_layers_and_tied_head(tmp_path):
    theirs = tiny_llava.model(
        CLIP,
        4,
        layer=[-3, -1],
        strategy="full",
        tie_word_embeddings=True,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    )
    theirs.save_pretrained(tmp_path)
    given = tiny_llava.inputs(TOKENS + 1, (2, 1))
    found = mmjax.load(tmp_path)(given)
    real = given["attention_mask"] == 1
    assert np.abs(np.asarray(found["logits"]) - tiny_llava.run(theirs, given)["logits"])[real].max() < 2e-4
    assert found["image_features"].shape == found["image_features_1"].shape == (3, 5, 24)


def test_a_tower_without_class_token_refuses_to_drop_it(tmp_path):
    tiny_llava.model(SIGLIP, 4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a patch would be lost"):
        mmjax.load(changed(tmp_path, tmp_path, vision_feature_select_strategy="default"))


def test_a_sharded_model_is_read_and_written_like_a_plain_one(pair, tmp_path):
    import jax
    from jax.sharding import AxisType

    from mmjax import tree
    from mmjax.loading import load
    from mmjax.models import multimodal
    from mmjax.parallel.sharding import param_shardings

    _, directory, ours = pair
    mesh = jax.make_mesh(
        (1, 4, 1, 2, 1), ("data", "fsdp", "expert", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 5
    )
    places = param_shardings(multimodal.shapes(ours.config), mesh)
    model = load(directory, shardings=places)
    sharded = tree.flatten(model.params)
    kernel = sharded["llm/layers/attention/query/kernel"]
    assert not kernel.sharding.is_fully_replicated
    for path, leaf in tree.flatten(ours.params).items():
        assert np.array_equal(np.asarray(sharded[path]), np.asarray(leaf)), path
    model.save_pretrained(tmp_path / "sharded")
    ours.save_pretrained(tmp_path / "plain")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("sharded", "plain"))
    assert first == second
