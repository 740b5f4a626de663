"""MobileNetV2 against transformers, and with its published weights against the outputs of the original network."""

import json

import jax
import numpy as np
import pytest

from mmjax import families
from mmjax.checkpoints import safetensors, weights
from mmjax.errors import UserError
from mmjax.families import reading, writing
from mmjax.models import multimodal
from mmjax.models.config import Execution

SETTINGS = {
    "thin": dict(depth_multiplier=0.35, image_size=64),
    "wide": dict(depth_multiplier=1.3, image_size=47, finegrained_output=False, hidden_act="relu"),
    "dilated": dict(depth_multiplier=0.2, image_size=72, output_stride=8, first_layer_is_expansion=False, min_depth=4),
    "torch": dict(
        depth_multiplier=0.2, image_size=65, output_stride=16, expand_ratio=4.0, tf_padding=False, num_channels=1
    ),
}


def _load(path, dtype="float32"):
    foreign = json.loads((path / "config.json").read_text())
    family = families.find(foreign)
    config = family.read_config(foreign, "config.json")
    shapes, rules = multimodal.shapes(config), family.rules(config, foreign)
    params = reading.load(weights.read(path), rules, shapes, dtype=dtype, unused=family.unused)
    return family, config, foreign, params


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_to_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    plain = name == "dilated"  # no classifier
    kind = transformers.MobileNetV2Model if plain else transformers.MobileNetV2ForImageClassification
    theirs = kind(transformers.MobileNetV2Config(**SETTINGS[name], num_labels=5)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            if value.dtype.is_floating_point:
                drawn = torch.randn(value.shape, generator=generator)
                fan = value[0].numel() if value.dim() > 1 else 1
                value.copy_(
                    1 + 0.3 * drawn.abs() if key.endswith(("var", "tion.weight")) and fan == 1 else drawn * fan**-0.5
                )
    theirs.save_pretrained(tmp_path / "theirs")

    family, config, foreign, params = _load(tmp_path / "theirs")
    size = SETTINGS[name]["image_size"]
    pixels = np.random.default_rng(0).normal(size=(2, config.vision.channels, size, size)).astype(np.float32)
    found = family.outputs(params, config, foreign, {"pixel_values": pixels}, Execution(), True)
    with torch.no_grad():
        inner = theirs if plain else theirs.mobilenet_v2
        expected = inner(torch.tensor(pixels), output_hidden_states=True)
        logits = None if plain else theirs(torch.tensor(pixels)).logits
    for i, state in enumerate(expected.hidden_states):
        _close(found[f"hidden_states_{i}"], state)
    _close(found["last_hidden_state"], expected.last_hidden_state)
    _close(found["pooler_output"], expected.pooler_output)
    assert ("logits" in found) != plain
    if not plain:
        _close(found["logits"], logits)

    written = family.write_config(
        config, {k: v for k, v in foreign.items() if k in ("transformers_version", "id2label")}
    )
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(written))
    safetensors.write(writing.tensors(params, family.rules(config, written)), tmp_path / "ours")
    again, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def _close(ours, theirs):
    theirs = theirs.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5 * np.abs(theirs).max())


def test_published_weights_give_the_published_outputs(data_kit):
    """The directory holds float16; the outputs were made in float32 before that rounding, hence the tolerance."""
    from PIL import Image

    folder = data_kit / "weights"
    family, config, foreign, params = _load(folder / "mobilenet_v2_hf")
    expected, arrays = json.loads((folder / "golden.json").read_text()), np.load(folder / "golden.npz")
    names = ["cat.jpg", "dogs.jpg", "burger.jpg"]
    pictures = [Image.open(folder / "golden_inputs" / name).convert("RGB").resize((224, 224), 2) for name in names]
    pixels = (np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2) / 255 - 128 / 255) / (
        128 / 255
    )
    found = family.outputs(params, config, foreign, {"pixel_values": pixels.astype(np.float32)}, Execution(), True)
    np.testing.assert_allclose(found["logits"][0], arrays["mobilenet_v2_cat_logits"], atol=0.05)
    np.testing.assert_allclose(found["pooler_output"][0], arrays["mobilenet_v2_cat_pool"][0], atol=0.05)
    last = found["hidden_states_15"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(last, arrays["mobilenet_v2_cat_block16"][0], atol=0.1)
    for logits, name in zip(np.asarray(found["logits"]), names):
        wanted = expected["mobilenet_v2_imagenet_uint8.safetensors"][name]
        assert np.argmax(logits) == wanted["top5"][0]
        np.testing.assert_allclose(logits[wanted["top5"]], wanted["top5_logits"], atol=0.05)


def test_published_weights_go_out_as_they_came_in(data_kit):
    folder = data_kit / "weights" / "mobilenet_v2_hf"
    family, config, foreign, params = _load(folder, "float16")
    assert family.write_config(config, foreign) == foreign
    stored = weights.read(folder)
    written = {tensor.name: tensor for tensor in writing.tensors(params, family.rules(config, foreign))}
    assert set(stored) == set(written)
    for name, tensor in written.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(tensor.make(), stored[name].read())


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("hidden_act", "tanh", "hidden_act = 'tanh'"),
        ("output_stride", 4, "output_stride = 4"),
        ("architectures", ["MobileNetV2ForSemanticSegmentation"], "MobileNetV2ForSemanticSegmentation"),
        ("image_size", [224, 192], "not square"),
    ],
)
def test_what_is_not_supported_is_named(field, value, said):
    with pytest.raises(UserError, match=said):
        families.find({"model_type": "mobilenet_v2"}).read_config(
            {"model_type": "mobilenet_v2", field: value}, "config.json"
        )


def test_labels_of_a_fresh_classifier():
    family = families.find({"model_type": "mobilenet_v2"})
    config = family.read_config(
        {"architectures": ["MobileNetV2ForImageClassification"], "num_labels": 3}, "config.json"
    )
    written = family.write_config(config, {})
    assert config.vision.classes == len(written["id2label"]) == 3
    assert family.read_config(written, "config.json") == config
    assert jax.eval_shape(lambda: multimodal.init(jax.random.key(0), config))["vision"]["head"]["bias"].shape == (3,)
