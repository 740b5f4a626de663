"""BLIP-2's first stage in LAVIS's layout: against transformers' retrieval model under LAVIS's names, and files both ways."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import UserError

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from transformers import Blip2Config, Blip2ForImageTextRetrieval  # noqa: E402

QUERIES, WIDTH, WORDS = 3, 32, 40
CONFIG = {
    "model_type": "lavis_qformer",
    "embed_dim": 20,
    "bos_token_id": WORDS - 1,
    "vision_config": {
        "embed_dim": 24, "depth": 2, "num_heads": 4, "img_size": 28, "patch_size": 14, "mlp_ratio": 2.0, "ln_vision_eps": 1e-6,
    },
    "qformer_config": {
        "hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": WORDS,
        "max_position_embeddings": 16, "cross_attention_freq": 2, "query_length": QUERIES,
    },
}  # fmt: skip
NAMES = (
    (r"^vision_model\.post_layernorm", "ln_vision"),
    (r"^vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
    (r"^vision_model\.encoder\.layers", "visual_encoder.blocks"),
    (r"layer_norm(\d)", r"norm\1"),
    (r"self_attn\.projection", "attn.proj"),
    (r"^(visual_encoder\..*)self_attn", r"\1attn"),
    (r"^qformer\.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    (r"^embeddings\.", "Qformer.bert.embeddings."),
    (r"^qformer\.encoder", "Qformer.bert.encoder"),
    (r"(attention)\.attention\.", r"\1.self."),
    (r"^vision_projection", "vision_proj"),
    (r"^text_projection", "text_proj"),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(transformers' model, a directory in LAVIS's layout with its weights)."""
    qformer = {**CONFIG["qformer_config"], "use_qformer_text_input": True, "cross_attention_frequency": 2}
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28}
    whole = Blip2Config(
        vision_config={**vision, "patch_size": 14},
        qformer_config=qformer,
        num_query_tokens=QUERIES,
        image_text_hidden_size=20,
    )
    torch.manual_seed(0)
    theirs = Blip2ForImageTextRetrieval(whole).eval()
    for name, parameter in theirs.named_parameters():
        mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean, 0.1 if mean else 0.2)
    state = {}
    for name, value in theirs.state_dict().items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = value.clone()
    for i in range(2):  # LAVIS's keys have no bias
        theirs.vision_model.encoder.layers[i].self_attn.qkv.bias.data[24:48] = 0
        bias = state.pop(f"visual_encoder.blocks.{i}.attn.qkv.bias")
        state[f"visual_encoder.blocks.{i}.attn.q_bias"] = bias[:24].clone()
        state[f"visual_encoder.blocks.{i}.attn.v_bias"] = bias[48:].clone()
    head = "Qformer.cls.predictions."
    for name, shape in (("transform.dense.weight", (WIDTH, WIDTH)), ("transform.dense.bias", WIDTH), ("bias", WORDS)):
        state[head + name] = torch.randn(shape) * 0.2
    state[head + "transform.LayerNorm.weight"], state[head + "transform.LayerNorm.bias"] = torch.ones(WIDTH), torch.zeros(WIDTH)
    state[head + "decoder.weight"] = state["Qformer.bert.embeddings.word_embeddings.weight"].clone()
    state[head + "decoder.bias"] = state[head + "bias"].clone()
    state["temp"] = torch.tensor(0.07)
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(16)[None]
    directory = tmp_path_factory.mktemp("lavis")
    safetensors_torch.save_file(state, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return theirs, directory


def given() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.standard_normal((3, 3, 28, 28)).astype(np.float32),
        "input_ids": rng.integers(3, WORDS - 1, (3, 6)),
        "attention_mask": (np.arange(6) < np.array([[6], [3], [5]])).astype(int),
    }


def test_retrieval_and_matching_equal_transformers(pair):
    theirs, directory = pair
    inputs = given()
    found = mmjax.load(directory)(inputs)
    tensors = {name.replace("image", "pixel_values"): torch.tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        compared = theirs(**tensors).logits_per_image.numpy()
        matched = theirs(**tensors, use_image_text_matching_head=True).logits_per_image.numpy()
    np.testing.assert_allclose(np.asarray(found["sim_q2t"]).max(-1), compared, atol=2e-5)
    np.testing.assert_allclose(np.asarray(found["sim_i2t"]), compared / 0.07, atol=2e-4)
    np.testing.assert_allclose(np.asarray(found["itm_logits"]), matched, atol=2e-5)


@pytest.mark.parametrize("placeholder", [None, 5])
def test_transformers_own_layout(pair, tmp_path, placeholder):
    theirs, _ = pair
    theirs.config.image_token_index = placeholder
    theirs.save_pretrained(tmp_path)
    ours, inputs = mmjax.load(tmp_path), given()
    inputs["pixel_values"] = inputs.pop("image")
    if placeholder:
        front = np.ones((3, QUERIES), int)
        inputs["input_ids"] = np.concatenate([placeholder * front, inputs["input_ids"]], 1)
        inputs["attention_mask"] = np.concatenate([front, inputs["attention_mask"]], 1)
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    for matching in (False, True):
        with torch.no_grad():
            reference = theirs(**tensors, use_image_text_matching_head=matching)
        found = ours({**inputs, "use_image_text_matching_head": matching})
        for name in ("logits_per_image", "logits_per_text") + ("image_embeds", "text_embeds") * (not matching):
            np.testing.assert_allclose(found[name], reference[name].numpy(), atol=2e-5, err_msg=name)
    ours.save_pretrained(tmp_path / "again")
    again = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "again").eval()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_what_is_written_is_read_back(pair, tmp_path):
    _, directory = pair
    ours = mmjax.load(directory)
    ours.save_pretrained(tmp_path)
    again = mmjax.load(tmp_path)
    assert again.config == ours.config
    same = tree.flatten(again.params)
    for path, leaf in tree.flatten(ours.params).items():
        assert np.array_equal(np.asarray(same[path]), np.asarray(leaf)), path
    written = safetensors_torch.load_file(tmp_path / "model.safetensors")
    before = safetensors_torch.load_file(directory / "model.safetensors")
    assert all(torch.equal(before[name], value) for name, value in written.items())
    left = {name for name in before if name not in written}
    assert left == {f"Qformer.cls.predictions.decoder.{kind}" for kind in ("weight", "bias")} | {"Qformer.bert.embeddings.position_ids"}


def test_a_head_that_is_not_tied_is_refused(pair, tmp_path):
    _, directory = pair
    state = safetensors_torch.load_file(directory / "model.safetensors")
    state["Qformer.cls.predictions.decoder.weight"] += 1
    safetensors_torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match="different from the weight they copy"):
        mmjax.load(tmp_path)
