"""Every vision encoder against transformers, every parameter drawn, at its own picture size and at others, and back."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.architecture import model_config
from mmjax.assembly import assemble
from mmjax.config import Image, Part
from mmjax.errors import UserError
from mmjax.families import find
from mmjax.flops import training_flops
from mmjax.model import Model
from mmjax.models import multimodal
from mmjax.models.config import Execution
from mmjax.preprocessing import image_processor
from mmjax.training.trainable import select

torch = pytest.importorskip("torch")

import transformers as hf  # noqa: E402

from tests.families import tiny_llava  # noqa: E402
from tests.test_assembly import recipe  # noqa: E402

SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
MLP = {**SHAPE, "intermediate_size": 40}
NAFLEX = {**{k: v for k, v in MLP.items() if k not in ("image_size", "patch_size")}, "num_patches": 16, "patch_size": 4}
TEXT = {**SHAPE, "intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 12}
# Height and width: the tower's own; with pixels that fill no patch; smaller and larger, neither of them square.
OWN, ODD, SMALL, LARGE = (28, 28), (33, 29), (14, 21), (63, 42)


def vit(**settings):
    return hf.ViTModel(hf.ViTConfig(**MLP, **settings))


def classifier(kind: str, **settings):
    return getattr(hf, f"{kind}ForImageClassification")(getattr(hf, f"{kind}Config")(**settings))


def internvl(**settings):
    return hf.InternVLVisionModel(hf.InternVLVisionConfig(**{**MLP, **settings}))


TOWERS = {
    "vit": lambda: vit(qkv_bias=False, pooler_output_size=10, pooler_act="gelu"),
    "vit, no pooler": lambda: hf.ViTModel(hf.ViTConfig(**MLP, hidden_act="relu"), add_pooling_layer=False),
    "vit, classes": lambda: classifier("ViT", **MLP, num_labels=5, head_dim=10),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SHAPE, mlp_ratio=2, use_mask_token=False, qkv_bias=False)),
    "dinov2, gated, classes": lambda: classifier("Dinov2", **SHAPE, mlp_ratio=3, use_swiglu_ffn=True, num_labels=3),
    "registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=3, use_swiglu_ffn=True, num_register_tokens=3)
    ),
    "registers, classes": lambda: classifier("Dinov2WithRegisters", **SHAPE, mlp_ratio=2, num_register_tokens=2),
    "blip 2": lambda: hf.Blip2VisionModel(hf.Blip2VisionConfig(**MLP, hidden_act="gelu_pytorch_tanh")),
    "blip 2, no bias": lambda: hf.Blip2VisionModel(hf.Blip2VisionConfig(**MLP, qkv_bias=False)),
    "instructblip": lambda: hf.InstructBlipVisionModel(hf.InstructBlipVisionConfig(**MLP)),
    "internvl": lambda: internvl(
        image_size=[28, 28],
        norm_type="rms_norm",
        use_qk_norm=True,
        layer_norm_eps=1e-3,
        use_mean_pooling=False,
        use_mask_token=True,
    ),
    "internvl, no positions": lambda: internvl(use_absolute_position_embeddings=False, attention_bias=True),
    "clip": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**MLP, projection_dim=20)),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**MLP)),
}
ASKED = ("vit", "blip", "instructblip", "clip", "siglip")  # transformers interpolates in these where it is asked to, in others always


def randomised(model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = 1.0 if ("norm" in name and name.endswith("weight")) or "lambda" in name else 0.0
        torch.nn.init.normal_(parameter, mean, 0.2)
    return model.eval()


def run(model, given: dict[str, np.ndarray], **more) -> dict[str, np.ndarray]:
    """transformers' outputs by the names of ours."""
    with torch.no_grad():
        out = model(**{k: torch.tensor(v) for k, v in given.items()}, output_hidden_states=True, **more)
    found = {}
    for name, value in out.items():
        if torch.is_tensor(value):
            found[name] = value.numpy()
        elif name == "hidden_states":
            found |= {f"{name}_{i}": state.numpy() for i, state in enumerate(value)}
        elif name.endswith("_model_output"):
            part = name.removesuffix("_model_output")
            found |= {f"{part}_{k}": value[k].numpy() for k in ("last_hidden_state", "pooler_output")}
    return found


def compare(found, reference: dict[str, np.ndarray], real: np.ndarray | None = None) -> None:
    assert reference and set(reference) <= set(found)
    for name, wanted in reference.items():
        value = np.asarray(found[name])
        assert value.shape == wanted.shape, name
        if real is not None and wanted.shape[:2] == real.shape and wanted.ndim == 3:
            assert not value[~real].any()
            value, wanted = value[real], wanted[real]
        assert np.abs(value - wanted).max() < 1e-5 * np.abs(wanted).max() + 1e-6, name


def written_back(theirs, ours, path, **settings):
    """What transformers reads of what we write, tensor for tensor the model that we read."""
    ours.save_pretrained(path)
    again, report = type(theirs).from_pretrained(path, output_loading_info=True, **settings)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in theirs.state_dict().items())
    return again.eval()


def pixels(*size: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"pixel_values": np.random.default_rng(seed).standard_normal((2, 3, *size)).astype(np.float32)}


@pytest.mark.parametrize("name", TOWERS)
def test_towers(name, tmp_path):
    theirs = randomised(TOWERS[name]())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mmjax.load(tmp_path / "theirs")
    usual = (LARGE,) if "," in name else (OWN, LARGE)
    for size in {"registers": (OWN, SMALL, LARGE), "siglip": (ODD, LARGE)}.get(name, usual):
        asked = {"interpolate_pos_encoding": True} if name.startswith(ASKED) else {}
        compare(ours(pixels(*size), output_hidden_states=True), run(theirs, pixels(*size), **asked))
    settings = {"add_pooling_layer": False} if name == "vit, no pooler" else {}
    again, reference = written_back(theirs, ours, tmp_path / "ours", **settings), run(theirs, pixels(*OWN))
    assert all(np.array_equal(value, reference[key]) for key, value in run(again, pixels(*OWN)).items())
    if name == "internvl":
        assert json.loads((tmp_path / "ours" / "config.json").read_text())["image_size"] == [28, 28]


def patches(shapes: list[tuple[int, int]], length: int) -> dict[str, np.ndarray]:
    """NaFlex inputs, with noise where they are padded."""
    values = np.random.default_rng(0).standard_normal((len(shapes), length, 48)).astype(np.float32)
    seen = np.arange(length) < np.prod(shapes, 1)[:, None]
    return {"pixel_values": values, "pixel_attention_mask": seen.astype(int), "spatial_shapes": np.array(shapes)}


@pytest.mark.parametrize("head", [True, False])
def test_pictures_of_unequal_shapes(head, tmp_path):
    theirs = randomised(hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**NAFLEX, vision_use_head=head)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mmjax.load(tmp_path / "theirs")
    given = patches([(2, 5), (4, 4), (7, 3), (1, 2)], 23)
    found = ours(given, output_hidden_states=True)
    compare(found, run(theirs, given), given["pixel_attention_mask"] != 0)
    del given["pixel_attention_mask"]
    assert np.array_equal(ours(given)["last_hidden_state"], found["last_hidden_state"])
    written_back(theirs, ours, tmp_path / "ours")
    with pytest.raises(UserError, match=r"of 9 patches at most"):
        ours({"pixel_values": given["pixel_values"][:, :9], "spatial_shapes": given["spatial_shapes"]})


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "Siglip2"])
def test_two_towers(kind, tmp_path):
    image = NAFLEX if kind == "Siglip2" else MLP
    text = {**TEXT, "eos_token_id": 49}
    config = getattr(hf, f"{kind}Config")(text_config=text, vision_config=image, projection_dim=24)
    theirs = randomised(getattr(hf, f"{kind}Model")(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mmjax.load(tmp_path / "theirs")
    ids = np.concatenate([np.random.default_rng(0).integers(3, 49, (3, 9)), np.full((3, 3), 49)], 1)
    text = {"input_ids": ids, "attention_mask": np.concatenate([np.ones((3, 10), int), np.zeros((3, 2), int)], 1)}
    if kind == "Siglip2":
        given = {**text, **patches([(3, 5), (4, 4)], 17)}
        compare(ours(given), run(theirs, given), given["pixel_attention_mask"] != 0)
    else:
        given = {**text, **pixels(*LARGE)}
        reference = run(theirs, given, interpolate_pos_encoding=True)
        compare(ours({**given, "interpolate_pos_encoding": True}), reference)
        with pytest.raises(UserError, match="63 x 42 need interpolated positions"):
            ours({**given, "interpolate_pos_encoding": False})
    written_back(theirs, ours, tmp_path / "ours")


UNSUPPORTED = [
    ({"model_type": "vit", "architectures": ["ViTForMaskedImageModeling"]}, "ViTForMaskedImageModeling"),
    ({"model_type": "vit", "image_size": [28, 42]}, r"image_size = \[28, 42\] is not square"),
    ({"model_type": "vit", "pooler_act": "sigmoid"}, "pooler_act = 'sigmoid'"),
    ({"model_type": "vit", "hidden_size": 50}, "hidden_size = 50 is not a multiple"),
    ({"model_type": "dinov2", "architectures": ["Dinov2Backbone"]}, "Dinov2Backbone"),
    ({"model_type": "dinov2", "hidden_act": "mish"}, "hidden_act = 'mish'"),
    ({"model_type": "dinov2_with_registers", "patch_size": [14, 7]}, "patch_size"),
    ({"model_type": "internvl_vision", "norm_type": "batch_norm"}, "norm_type = 'batch_norm'"),
    ({"model_type": "blip_2_vision_model", "num_channels": 4}, "num_channels = 4"),
    ({"model_type": "siglip2_vision_model", "num_patches": 20}, "num_patches = 20"),
    ({"model_type": "siglip2_vision_model", "quantization_config": {}}, "quantization_config"),
    ({"model_type": "siglip2", "architectures": ["Siglip2ForImageClassification"]}, "Siglip2ForImageClassification"),
    ({"model_type": "siglip", "architectures": ["SiglipForImageClassification"]}, "SiglipForImageClassification"),
    ({"model_type": "clip", "architectures": ["CLIPForImageClassification"]}, "CLIPForImageClassification"),
]


@pytest.mark.parametrize("fields, named", UNSUPPORTED, ids=[named for _, named in UNSUPPORTED])
def test_unsupported_fields_are_errors_that_name_them(fields, named):
    with pytest.raises(UserError, match=named):
        find(fields).read_config({"text_config": {}, "vision_config": {}, **fields}, "config.json")


def llava(vision, strategy: str = "default"):
    text = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1}
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=hf.LlamaConfig(**text, num_attention_heads=4),
        image_token_index=tiny_llava.PLACEHOLDER,
        vision_feature_select_strategy=strategy,
    )
    return randomised(hf.LlavaForConditionalGeneration(config))


def asked(tokens: int, *size: int) -> dict[str, np.ndarray]:
    return {**tiny_llava.inputs(tokens, (1, 1)), **pixels(*size)}


def logits(model, given: dict[str, np.ndarray]) -> np.ndarray:
    found = np.asarray(model(given)["logits"] if isinstance(model, Model) else tiny_llava.run(model, given)["logits"])
    return found[given["attention_mask"] == 1]


LLAVA = {
    "vit": (hf.ViTConfig(**MLP), 16, OWN, "default"),
    "vit, with its class token": (hf.ViTConfig(**MLP), 17, OWN, "full"),
    "dinov2, larger": (hf.Dinov2Config(**SHAPE, mlp_ratio=2), 54, LARGE, "default"),
    "registers, smaller": (
        # transformers drops the first position and hands on the registers
        hf.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2, num_register_tokens=3),
        9,
        SMALL,
        "default",
    ),
    "internvl": (hf.InternVLVisionConfig(**MLP, norm_type="rms_norm", use_qk_norm=True), 16, OWN, "default"),
}


@pytest.mark.parametrize("name", LLAVA)
def test_every_tower_in_llava(name, tmp_path):
    vision, tokens, size, strategy = LLAVA[name]
    theirs = llava(vision, strategy)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, given = mmjax.load(tmp_path / "theirs"), asked(tokens, *size)
    reference = logits(theirs, given)
    assert np.abs(logits(ours, given) - reference).max() < 1e-5 * np.abs(reference).max()
    written_back(theirs, ours, tmp_path / "ours")


@pytest.mark.parametrize("kind, layout", [("clip", "hf"), ("clip", "mmjax"), ("dinov2", "hf")])
def test_a_model_at_another_size_goes_out_and_comes_back(kind, layout, tmp_path):
    """What interpolates positions by itself is written with those stored, anything else with those that it has."""
    vision = hf.CLIPVisionConfig(**MLP) if kind == "clip" else hf.Dinov2Config(**SHAPE, mlp_ratio=2)
    llava(vision).save_pretrained(tmp_path / "theirs")
    model = mmjax.load(tmp_path / "theirs")
    model = dataclasses.replace(
        model,
        config=model.config.at_size(42),
        image_processor=image_processor(model.config, size=42),
    )
    assert model.config.tokens_per_tile == 36
    given = asked(36, 42, 42)
    wanted = logits(model, given)
    path = tmp_path / "out"
    model.save_pretrained(path, layout=layout)
    again = mmjax.load(path)
    assert again.config.tokens_per_tile == 36 and again.config.vision.image_size == 42
    assert np.abs(logits(again, given) - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert again.config.vision.native_side == (6 if (kind, layout) == ("clip", "hf") else 4)
    if layout == "hf":
        theirs = hf.LlavaForConditionalGeneration.from_pretrained(path).eval()
        assert np.abs(logits(theirs, given) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_a_tower_without_a_place_in_llava_is_written_in_our_layout(tmp_path):
    llava(hf.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2)).save_pretrained(tmp_path / "theirs")
    model = mmjax.load(tmp_path / "theirs")
    features = dataclasses.replace(model.config.features, keep_registers=False)
    connector = dataclasses.replace(model.config.connector, positions=16)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, features=features, connector=connector))
    with pytest.raises(UserError, match="registers"):
        model.save_pretrained(tmp_path / "hf", layout="hf")
    model.save_pretrained(tmp_path / "ours", layout="mmjax")
    given = asked(16, *OWN)
    again = mmjax.load(tmp_path / "ours")
    assert np.array_equal(logits(again, given), logits(model, given))
    leaves = tree.flatten(again.params)
    assert all(np.array_equal(leaves[path], leaf) for path, leaf in tree.flatten(model.params).items())


PARTS = {
    "vit": MLP,
    "dinov2": SHAPE,
    "dinov2_with_registers": {**SHAPE, "use_swiglu_ffn": True},
    "siglip2_vision_model": NAFLEX,
    "blip_2_vision_model": MLP,
    "internvl_vision": {**MLP, "image_size": [28, 28]},
}


@pytest.mark.parametrize("kind", PARTS)
def test_every_encoder_is_a_part_of_recipes_at_another_size(kind, tmp_path):
    """Fresh, by shapes alone: what the connector reads, what a step costs, what is written."""
    fields = {"model_type": kind, **PARTS[kind]}
    side = 6 * fields["patch_size"]
    config = model_config(recipe(tmp_path, vision=Part(config=fields), image=Image(size=side)), 64)
    assert config.vision.native_side == 4 and config.connector.positions == config.vision.positions == 36
    shapes = multimodal.shapes(config)
    images = jax.ShapeDtypeStruct((1, 2, side, side, 3), jax.numpy.uint8)
    features = functools.partial(multimodal.vision_features, config=config, run=Execution())
    found = jax.eval_shape(lambda params, images: features(params, images=images), shapes, images)
    assert found.shape == (1, 2, 36, 24)
    selection = select(shapes, ("vision/**",), "stage")
    at_home = training_flops(dataclasses.replace(config, vision=config.vision.at_size(side * 4 // 6)), selection)
    assert training_flops(config, selection).per_tile["vision"] > 2 * at_home.per_tile["vision"]
    written = find(fields).write_config(config, fields)
    assert find(fields).read_config(written, "").vision == config.vision.at_size(side * 4 // 6)


def test_training_at_another_size_moves_the_stored_positions(tmp_path):
    theirs = randomised(hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2)))
    theirs.save_pretrained(tmp_path / "published")
    section = dict(vision=Part(path=str(tmp_path / "published")), image=Image(size=42), feature_layers=(-1,))
    model = assemble(recipe(tmp_path, **section, adapters={}), tmp_path)
    assert model.image_processor.size == 42 and model.config.vision.image_size == 42
    picture = pixels(42, 42)
    stored = model.params["vision"]["positions"]

    def features(positions):
        params = {"vision": {**model.params["vision"], "positions": positions}}
        images = picture["pixel_values"].transpose(0, 2, 3, 1)
        return multimodal.vision_features(params, model.config, jax.numpy.asarray(images), model.run)

    wanted = run(theirs, picture)["hidden_states_2"][:, 5:]
    assert np.abs(features(stored) - wanted).max() < 1e-5 * np.abs(wanted).max()
    moved = jax.grad(lambda positions: (features(positions) ** 2).sum())(stored)
    assert moved.shape == (17, 24) and (np.abs(moved).max(1) > 0).all()
