"""MiniGPT-4's own layout: against transformers' BLIP-2 around a Llama under MiniGPT-4's names, and files both ways."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import UserError
from mmjax.families import minigpt4

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from tests.families import tiny_blip  # noqa: E402
from tests.families.test_lavis import NAMES  # noqa: E402

OWN = (*NAMES, (r"^language_projection", "llama_proj"), (r"^language_model", "llama_model"))


def config(theirs, queried: bool) -> dict:
    text, qformer = theirs.config.text_config.to_dict(), theirs.config.qformer_config
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    own = {name: getattr(qformer, name) for name in fields}
    return {
        "model_type": "minigpt4",
        "has_qformer": queried,
        "num_query_token": tiny_blip.QUERIES if queried else None,
        "qformer_config": {**own, "cross_attention_freq": 2} if queried else None,
        "llama_config": {name: value for name, value in text.items() if name != "model_type"},
        "vision_config": {
            "embed_dim": 24, "depth": 2, "num_heads": 4, "img_size": 28, "patch_size": 14, "mlp_ratio": 40 / 24, "ln_vision_eps": 1e-6,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(transformers' BLIP-2 around a Llama, a directory in MiniGPT-4's layout with its weights)."""
    theirs = tiny_blip.model("llama", False)
    state = {}
    for i in range(2):  # EVA's keys have no bias
        theirs.vision_model.encoder.layers[i].self_attn.qkv.bias.data[24:48] = 0
    for name, value in theirs.state_dict().items():
        for pattern, replacement in OWN:
            name = re.sub(pattern, replacement, name)
        if name.endswith("attn.qkv.bias"):
            block = name.removesuffix("qkv.bias")
            state[block + "q_bias"], state[block + "v_bias"] = value[:24].clone(), value[48:].clone()
        else:
            state[name] = value.clone()
    directory = tmp_path_factory.mktemp("minigpt4")
    safetensors_torch.save_file(state, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config(theirs, True)))
    return theirs, directory


def test_logits_and_greedy_ids_equal_transformers(pair):
    theirs, directory = pair
    given, ours = tiny_blip.inputs(False, False, (2, 1, 0), left=False), mmjax.load(directory)
    ids = np.where(given["input_ids"] == tiny_blip.PLACEHOLDER, minigpt4.IMAGE, given["input_ids"])
    inputs = {"image": given["pixel_values"], "input_ids": ids, "attention_mask": given["attention_mask"], "labels": given["labels"]}
    reference, found = tiny_blip.run(theirs, given), ours(inputs)
    apart = np.abs(np.asarray(found["logits"]) - reference.logits.numpy())[given["attention_mask"] == 1]
    assert apart.max() < 2e-4 and abs(float(found["loss"]) - float(reference.loss)) < 1e-5
    one = {"image": given["pixel_values"][:2], "input_ids": ids[:1], "attention_mask": given["attention_mask"][:1]}
    theirs_one = {"pixel_values": one["image"], "input_ids": given["input_ids"][:1], "attention_mask": one["attention_mask"]}
    real = one["attention_mask"][0] == 1
    one, theirs_one = ({k: v[:, real] if k != "image" and k != "pixel_values" else v for k, v in d.items()} for d in (one, theirs_one))
    assert ours.generate(one, max_new_tokens=8, ignore_eos=True).tolist() == tiny_blip.greedy(theirs, theirs_one, 8).tolist()


def written_is_read_back(ours, directory, tmp_path):
    ours.save_pretrained(tmp_path)
    again = mmjax.load(tmp_path)
    assert again.config == ours.config
    for path, leaf in tree.flatten(ours.params).items():
        assert np.array_equal(np.asarray(tree.flatten(again.params)[path]), np.asarray(leaf)), path
    written, before = (safetensors_torch.load_file(d / "model.safetensors") for d in (tmp_path, directory))
    assert set(written) == set(before) and all(torch.equal(before[name], value) for name, value in written.items())


def test_what_is_written_is_read_back(pair, tmp_path):
    written_is_read_back(mmjax.load(pair[1]), pair[1], tmp_path)


def test_without_a_qformer_four_patches_become_one_token(pair, tmp_path):
    theirs, directory = pair
    state = safetensors_torch.load_file(directory / "model.safetensors")
    state = {name: value for name, value in state.items() if not name.startswith(("Qformer", "query_tokens"))}
    state["llama_proj.weight"] = torch.randn(32, 4 * 24)
    first = tmp_path / "first"
    first.mkdir()
    safetensors_torch.save_file(state, first / "model.safetensors")
    (first / "config.json").write_text(json.dumps(config(theirs, False)))
    ours, picture = mmjax.load(first), tiny_blip.inputs(False, False)["pixel_values"][:1]
    found = ours({"image": picture, "input_ids": np.array([[1, minigpt4.IMAGE, 5]])})
    with torch.no_grad():
        patches = theirs.vision_model(torch.tensor(picture)).last_hidden_state[:, 1:].reshape(1, 1, -1)
        wanted = patches @ state["llama_proj.weight"].T + state["llama_proj.bias"]
    np.testing.assert_allclose(found["connector_output"], wanted.numpy(), atol=1e-4)
    written_is_read_back(ours, first, tmp_path / "again")


def test_placeholders_and_images_must_agree(pair):
    with pytest.raises(UserError, match="1 image tokens, but 1 images of 3 tokens"):
        mmjax.load(pair[1])({"image": np.zeros((1, 3, 28, 28), np.float32), "input_ids": np.array([[1, minigpt4.IMAGE]])})


def test_the_authors_checkpoint_of_the_linear_alone(tmp_path):
    from mmjax.loading import load_connector
    from mmjax.models.encoder_config import ConnectorConfig

    state = {"llama_proj.weight": torch.randn(32, 4 * 24), "llama_proj.bias": torch.randn(32)}
    torch.save({"model": state, "optimizer": {}, "epoch": 4}, tmp_path / "pretrained_minigpt4_llama2_7b.pth")
    joined = ConnectorConfig("concat", 24, 32, 16, depth=1, group=4)
    found = load_connector(tmp_path / "pretrained_minigpt4_llama2_7b.pth", joined)["connector"]["layers_0"]
    assert np.array_equal(found["kernel"], state["llama_proj.weight"].numpy().T)
    assert np.array_equal(found["bias"], state["llama_proj.bias"].numpy())
