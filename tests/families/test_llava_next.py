"""LLaVA-NeXT and InternVL in transformers' layouts against transformers itself, in both directions; and LLaVA's own layout of 1.6."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.data.images import ImageProcessor
from mmjax.data.picture_tokens import PictureTokens
from mmjax.data.tiling import AnyRes
from mmjax.errors import UserError

torch = pytest.importorskip("torch")

import transformers  # noqa: E402

from tests.families import tiny_llava  # noqa: E402

PLACEHOLDER, SIDE, TOKENS = 97, 28, 4
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 14,
}
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
SIZES = ((40, 60), (100, 30), (28, 28), (20, 77), (63, 41), (200, 190))


def drawn(config, kind):
    torch.manual_seed(0)
    built = kind(config).eval()
    for name, parameter in built.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean, 0.1 if mean else 0.2)
    return built


def next_model(text, tower, **more):
    config = transformers.LlavaNextConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=PLACEHOLDER,
        image_grid_pinpoints=[[rows * SIDE, columns * SIDE] for rows, columns in GRIDS],
        **more,
    )
    return drawn(config, transformers.LlavaNextForConditionalGeneration)


NEXT = {
    "clip, llama": lambda: next_model(transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**TOWER)),
    "clip, mistral, two layers": lambda: next_model(
        transformers.MistralConfig(**TEXT, sliding_window=None),
        transformers.CLIPVisionConfig(**TOWER),
        vision_feature_layer=[-3, -2],
        multimodal_projector_bias=False,
    ),
    "siglip, qwen2": lambda: next_model(
        transformers.Qwen2Config(**TEXT),
        transformers.SiglipVisionConfig(**TOWER),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    ),
}


def rows_of(lengths, images_per_row, seed=0):
    """Left-padded rows with so many images among text, each of so many placeholders."""
    rng, rows, left = np.random.default_rng(seed), [], list(lengths)
    for row, count in enumerate(images_per_row):
        ids = list(rng.integers(3, 90, 3 + row)) if row != 1 else []
        for _ in range(count):
            ids += [PLACEHOLDER] * left.pop(0) + list(rng.integers(3, 90, 2))
        rows.append(ids or list(rng.integers(3, 90, 5)))
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + row for row in rows])
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    labels = np.where((ids != PLACEHOLDER) & (mask == 1), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def next_inputs(images_per_row=(1, 2, 0, 3)):
    pictures = PictureTokens(TOKENS, (SIDE, SIDE), AnyRes(GRIDS), "spatial_unpad")
    sizes = SIZES[: sum(images_per_row)]
    counts = [pictures.tiles(size) for size in sizes]
    pixels = np.zeros((len(sizes), max(counts), 3, SIDE, SIDE), np.float32)
    rng = np.random.default_rng(1)
    for picture, count in zip(pixels, counts):
        picture[:count] = rng.standard_normal(picture[:count].shape)
    rows = rows_of([len(pictures.order(size)) for size in sizes], images_per_row)
    return {**rows, "pixel_values": pixels, "image_sizes": np.array(sizes)}


def internvl_model():
    vision = {**TOWER, "hidden_size": 32, "image_size": [SIDE, SIDE], "patch_size": [7, 7], "use_mean_pooling": False}
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**vision, attention_bias=True, use_qk_norm=True),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=PLACEHOLDER,
        tie_word_embeddings=False,
        vision_feature_layer=-2,
    )
    return drawn(config, transformers.InternVLForConditionalGeneration)


def internvl_inputs(tiles=(3, 1, 5), images_per_row=(1, 2, 0)):
    rows = rows_of([count * 4 for count in tiles], images_per_row)
    pixels = np.random.default_rng(1).standard_normal((sum(tiles), 3, SIDE, SIDE)).astype(np.float32)
    return {**rows, "pixel_values": pixels}


CASES = {**{name: (build, next_inputs) for name, build in NEXT.items()}, "internvl": (internvl_model, internvl_inputs)}


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from its directory, inputs)."""
    build, inputs = CASES[request.param]
    theirs, directory = build(), tmp_path_factory.mktemp("tiles")
    theirs.save_pretrained(directory)
    return theirs, mmjax.load(directory), inputs()


def test_logits_and_greedy_ids_equal_transformers(pair):
    theirs, ours, given = pair
    reference, found = tiny_llava.run(theirs, given), ours(given)
    real = given["attention_mask"] == 1
    assert np.abs(np.asarray(found["logits"]) - reference["logits"])[real].max() < 2e-4
    assert abs(float(found["loss"]) - reference["loss"]) < 1e-5
    prompt = {name: value for name, value in given.items() if name != "labels"}
    assert ours.generate(prompt, 16, ignore_eos=True).tolist() == tiny_llava.greedy(theirs, given, 16).tolist()


def test_a_written_model_is_bit_identical_in_transformers(pair, tmp_path):
    theirs, ours, _ = pair
    ours.save_pretrained(tmp_path)
    again, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.fixture(scope="module")
def anyres(tmp_path_factory):
    """A LLaVA-NeXT around CLIP and Llama."""
    directory = tmp_path_factory.mktemp("anyres")
    NEXT["clip, llama"]().save_pretrained(directory)
    return mmjax.load(directory)


def test_a_row_alone_is_the_row_in_its_batch(anyres):
    given = next_inputs((1, 2))
    keep = given["attention_mask"][1] == 1
    alone = anyres({"input_ids": given["input_ids"][1:, keep], "pixel_values": given["pixel_values"][1:],
                    "image_sizes": given["image_sizes"][1:]})  # fmt: skip
    together = anyres({name: value for name, value in given.items() if name != "labels"})
    np.testing.assert_allclose(alone["logits"][0], together["logits"][1][keep], atol=2e-5)
    np.testing.assert_allclose(alone["connector_output_1"], together["connector_output_2"], atol=5e-6)
    flat = np.concatenate([p[:n] for p, n in zip(given["pixel_values"], (5, 4, 3))])
    same = anyres({**{n: v for n, v in given.items() if n != "labels"}, "pixel_values": flat})
    np.testing.assert_array_equal(same["logits"], together["logits"])


def test_what_does_not_agree_is_said_in_numbers(anyres):
    given = next_inputs((1, 1))
    with pytest.raises(UserError, match=r"hold 36 image tokens, but the pictures have 38: 14 of 40 x 60, 24 of 200 x 190"):
        anyres({**given, "image_sizes": np.array([[40, 60], [200, 190]]), "pixel_values": np.zeros((2, 5, 3, SIDE, SIDE))})
    with pytest.raises(UserError, match="image_sizes are missing"):
        anyres({name: value for name, value in given.items() if name != "image_sizes"})
    with pytest.raises(UserError, match=r"\[images, tiles, channels, 28, 28\]"):
        anyres({**given, "pixel_values": given["pixel_values"][..., :14]})
    with pytest.raises(UserError, match="2 pictures of 2 tiles; their sizes say"):
        anyres({**given, "pixel_values": given["pixel_values"][:, :2]})


def test_a_class_token_has_no_place_in_the_map(tmp_path):
    next_model(
        transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**TOWER), vision_feature_select_strategy="full"
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reads this vision tower's class token"):
        mmjax.load(tmp_path)


def test_llavas_own_layout_of_the_same_model(anyres, tmp_path):
    """The tensors, canvases as (width, height), and the outputs for a list of pictures."""
    cut = dataclasses.replace(anyres, image_processor=ImageProcessor(SIDE, "squash", tiling=AnyRes(GRIDS)))
    cut.save_pretrained(tmp_path, layout="original")
    own = mmjax.load(tmp_path)
    assert own.foreign["image_grid_pinpoints"][0] == [2 * SIDE, SIDE] and own.foreign["image_aspect_ratio"] == "anyres"
    assert own.image_processor.tiling == AnyRes(GRIDS)
    params = tree.flatten(own.params)
    for path, leaf in tree.flatten(anyres.params).items():
        assert np.array_equal(params[path], leaf), path
    given = next_inputs((1, 2))
    theirs = anyres({name: value for name, value in given.items() if name != "labels"})
    images = [picture[:count] for picture, count in zip(given["pixel_values"], (5, 4, 3))]
    rows = []
    for ids, mask in zip(given["input_ids"], given["attention_mask"]):
        ids = ids[mask == 1]
        first = (ids == PLACEHOLDER) & np.append(True, ids[:-1] != PLACEHOLDER)
        rows.append(np.where(first, -200, ids)[(ids != PLACEHOLDER) | first])
    for row, ids in enumerate(rows):
        some = slice(0, 1) if row == 0 else slice(1, 3)
        found = own({"input_ids": ids[None], "images": images[some], "image_sizes": given["image_sizes"][some, ::-1]})
        expected = np.asarray(theirs["logits"])[row][given["attention_mask"][row] == 1]
        np.testing.assert_allclose(found["logits"][0], expected, atol=2e-5)
    with pytest.raises(UserError, match="image 0 has 5 tiles, but by its size of 60 x 300 it has 4"):
        own({"input_ids": rows[0][None], "images": images[:1], "image_sizes": np.array([[60, 300]])})
    with pytest.raises(UserError, match="image_sizes"):
        own({"input_ids": rows[0][None], "images": images[:1]})


def test_an_original_model_without_a_file_of_its_processor_cuts_as_its_config_says(anyres, tmp_path):
    cut = dataclasses.replace(anyres, image_processor=ImageProcessor(SIDE, "squash", tiling=AnyRes(GRIDS)))
    cut.save_pretrained(tmp_path, layout="original")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    processor = mmjax.load(tmp_path).image_processor
    assert processor.tiling == AnyRes(GRIDS, rounded=False) and processor.aspect == "squash"
