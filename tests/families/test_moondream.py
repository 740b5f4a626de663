"""moondream's layout: files both ways, rows alone and together; the recorded outputs of its own code are in tests/test_golden.py."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.checkpoints import safetensors
from mmjax.errors import UserError
from mmjax.families import moondream, writing
from mmjax.models import multimodal

CONFIG = {
    "model_type": "moondream",
    "text": {
        "dim": 64,
        "ff_dim": 48,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "vocab_size": 90,
        "max_context": 128,
    },
    "vision": {
        "enc_dim": 16,
        "enc_ff_dim": 24,
        "enc_n_layers": 2,
        "enc_n_heads": 2,
        "crop_size": 70,
        "max_crops": 6,
        "overlap_margin": 1,
        "proj_inner_dim": 40,
        "proj_out_dim": 64,
    },
    "rotary": {"rot_dim": 16},
    "bos_id": 3,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("moondream")
    config = moondream.FAMILY.read_config(CONFIG, "config.json")
    rng = np.random.default_rng(0)
    shapes = tree.flatten(multimodal.shapes(config))
    params = {p: rng.standard_normal(s.shape).astype(np.float32) * 0.2 + p.endswith("scale") for p, s in shapes.items()}
    safetensors.write(writing.tensors(tree.unflatten(params), moondream.FAMILY.rules(config, CONFIG)), path)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def inputs():
    rng = np.random.default_rng(1)
    return {
        "input_ids": rng.integers(5, 90, (2, 6)),
        "images": [rng.integers(0, 255, (*size, 3)).astype(np.uint8) for size in ((90, 200), (40, 60))],
    }


def test_pictures_in_several_tiles_together_and_alone(directory):
    model, given = mmjax.load(directory), inputs()
    found = model(given)
    assert found["tiling_0"].tolist() == [1, 3] and found["tiling_1"].tolist() == [1, 1]
    assert found["crops_uint8_0"].shape == (4, 70, 70, 3)
    assert found["reconstructed_0"].shape == (5, 3 * 3 + 2, 16)
    for row in range(2):
        alone = model({"input_ids": given["input_ids"][row : row + 1], "images": given["images"][row : row + 1]})
        assert alone["logits_0"].shape == (1, 1 + 25 + 6, 90)
        np.testing.assert_allclose(alone["logits_0"], found[f"logits_{row}"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(alone["connector_output_0"], found[f"connector_output_{row}"], rtol=1e-4, atol=1e-4)


def test_a_row_padded_on_the_right_is_the_row_alone_and_text_comes_after_what_it_reads(directory):
    model, given = mmjax.load(directory), inputs()
    mask = np.array([[1, 1, 1, 1, 0, 0], [1] * 6])
    both = model({**given, "attention_mask": mask})
    alone = model({"input_ids": given["input_ids"][:1, :4], "images": given["images"][:1]})
    np.testing.assert_allclose(both["logits_0"][:, :30], alone["logits_0"], rtol=1e-4, atol=1e-4)
    changed = np.array(given["input_ids"])
    changed[:, 3] += 1
    other = model({**given, "input_ids": changed})
    apart = np.abs(np.asarray(other["logits_0"]) - np.asarray(model(given)["logits_0"])).max(-1)[0] > 1e-5
    assert not apart[:29].any() and apart[29:].all()


def test_the_start_token_sees_the_picture(directory):
    model, given = mmjax.load(directory), inputs()
    other = model({**given, "images": [255 - given["images"][0], given["images"][1]]})["logits_0"][0, 0]
    assert np.abs(np.asarray(other) - np.asarray(model(given)["logits_0"][0, 0])).max() > 1e-3


def test_generation_goes_on_as_the_whole_sequence_says(directory):
    model, given = mmjax.load(directory), inputs()
    new = model.generate(given, max_new_tokens=4, ignore_eos=True)
    ids = np.concatenate([given["input_ids"], new], 1)
    whole = model({**given, "input_ids": ids})
    for row in range(2):
        np.testing.assert_array_equal(np.asarray(whole[f"logits_{row}"])[0, -5:-1].argmax(-1), new[row])


def test_what_is_written_is_read_back(directory, tmp_path):
    model = mmjax.load(directory)
    model.save_pretrained(tmp_path)
    one, other = (safetensors.read(path / "model.safetensors") for path in (directory, tmp_path))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name].read(), other[name].read()) for name in one)
    again = mmjax.load(tmp_path)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


@pytest.mark.parametrize(
    "given, named",
    [
        ({"input_ids": np.ones((1, 3), int)}, "takes either crops or images"),
        ({"input_ids": np.ones((3, 3), int), "crops": np.zeros((2, 3, 70, 70), np.float32)}, "3 rows for 2 pictures"),
    ],
)
def test_rows_and_pictures_must_agree(directory, given, named):
    with pytest.raises(UserError, match=named):
        mmjax.load(directory)(given)
