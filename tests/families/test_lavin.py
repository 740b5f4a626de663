"""LaVIN's layout. That it computes what LaVIN's code does is checked by recorded outputs (python -m tests.golden)."""

import dataclasses

import jax
import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.checkpoints import safetensors
from mmjax.checkpoints.safetensors import Tensor
from mmjax.errors import UserError
from mmjax.families import lavin
from mmjax.model import Model
from mmjax.models import multimodal
from mmjax.models.config import Execution
from tests.models import tiny

CONFIG = {
    "model_type": "lavin",
    "clip_vision_head_dim": 16,
    "temperature": 2.0,
    "adapter_dim": 12,
    "groups": 3,
    "adapter_scale": 0.5,
    "adapter_type": "block",
    "visual_adapter_type": "router_block",
    "params": {"dim": 48, "n_layers": 3, "n_heads": 4, "vocab_size": 60, "multiple_of": 16, "hidden_proj": 20},
    "clip": {"embed_dim": 16, "image_resolution": 28, "vision_layers": 9, "vision_width": 48, "vision_patch_size": 14},
}


@pytest.fixture(scope="module")
def model():
    config = lavin.FAMILY.read_config(CONFIG, "config.json")
    return Model(config, tiny.random_params(config), lavin.FAMILY, CONFIG, Execution())


def inputs(rows=3, seed=0):
    rng = np.random.default_rng(seed)
    examples = np.concatenate([np.ones((rows, 1), int), rng.integers(3, 60, (rows, 9))], 1)
    labels = np.where(np.arange(10) < 5, 0, examples)
    return {
        "examples": examples,
        "labels": labels,
        "images": rng.normal(size=(rows, 3, 28, 28)).astype(np.float32),
        "prefix_img": np.array([7, 8]),
        "prefix_nonimg": np.array([9, 10, 11]),
        "img_indicators": np.arange(rows) % 2,
    }


def test_a_directory_goes_out_and_comes_back(model, tmp_path):
    model.save_pretrained(tmp_path)
    names = set(safetensors.read(tmp_path / "model.safetensors"))
    assert {"layers.2.adapter_mlp.conv_D.weight", "backbone.visual.transformer.resblocks.8.adapter_attn.expert_weights.bias"} <= names
    again = mmjax.load(tmp_path)
    assert again.config == model.config and again.foreign["groups"] == 3
    want, got = model(inputs()), again(inputs())
    assert set(got) == {"logits", "loss", "clip_cls_taps", "image_embeds"}
    assert got["clip_cls_taps"].shape == (3, 2, 48) and got["logits"].shape == (3, 10, 60)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
    # As parallel training names the tensors, and releases the projector's.
    renamed = [
        Tensor(f"module.{name}".replace("proj.conv_A", "proj.0").replace("proj.conv_B", "proj.2"), t.shape, t.dtype, t.read)
        for name, t in safetensors.read(tmp_path / "model.safetensors").items()
    ]
    safetensors.write_file(renamed, tmp_path / "again.safetensors")
    (tmp_path / "again.safetensors").rename(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(mmjax.load(tmp_path)(inputs())["logits"], want["logits"])


def test_rows_of_text_are_those_alone_and_generation_goes_on_as_the_whole_text_would(model):
    given = inputs()
    del given["labels"]
    alone = {name: value if name.startswith("prefix") else value[2:] for name, value in given.items() if name != "images"}
    np.testing.assert_allclose(model(alone)["logits"][0], model(given)["logits"][2], rtol=2e-4, atol=2e-4)
    prompt = {**given, "images": np.repeat(given["images"][1:2], 3, 0)}  # the first one routes all
    ids = model.generate(prompt, max_new_tokens=4, ignore_eos=True)
    for row in (1, 2):  # one with a picture, one without
        whole = {**prompt, "examples": np.concatenate([prompt["examples"], np.zeros((3, 20), int)], 1)}
        whole["examples"][row, 10:14] = ids[row]
        inserted = 2 + 2 if row % 2 else 3
        logits = model(whole)["logits"][row]
        at = 10 + inserted  # of the last id of the prompt, the modality token in front
        assert [int(logits[at + i].argmax()) for i in range(4)] == list(ids[row])


def test_what_the_layout_cannot_hold_is_said(model):
    text, pictures = model.config.adapters
    for change, said in (
        ({"visual_router": "per_sample_cls"}, "routed by the first one"),
        ({"temperature": 7.0}, "one temperature"),
    ):
        config = dataclasses.replace(model.config, adapters=(text, dataclasses.replace(pictures, **change)))
        assert said in lavin.expressible(config)
    assert "no other adapters" in lavin.expressible(dataclasses.replace(model.config, adapters=(text, pictures, tiny.LORA)))
    with pytest.raises(UserError, match="every 4th block"):
        lavin.FAMILY.read_config({**CONFIG, "clip": {**CONFIG["clip"], "vision_layers": 3}}, "config.json")
    with pytest.raises(UserError, match="adapter_type = 'repblock'"):
        lavin.FAMILY.read_config({**CONFIG, "adapter_type": "repblock"}, "config.json")


def test_full_size_is_what_the_paper_trains():
    """LaVIN-7B: 8 channels and 2 groups beside 4,096 and 1,024; the code prints 3.78M (its README: 3.8M)."""
    sizes = {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000, "multiple_of": 256}
    clip = {"embed_dim": 768, "image_resolution": 224, "vision_layers": 24, "vision_width": 1024, "vision_patch_size": 14}
    config = lavin.FAMILY.read_config({"model_type": "lavin", "params": sizes, "clip": clip}, "config.json")
    flat = tree.flatten(jax.eval_shape(lambda: multimodal.init(jax.random.key(0), config)))
    trained = sum(leaf.size for path, leaf in flat.items() if tree.adapter_of(path) or path.startswith("connector/"))
    assert trained == 3_781_296 and config.tokens_per_tile == 6
