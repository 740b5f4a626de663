"""PaliGemma, whose prompts are seen both ways, and GIT and Gemma 3, whose images are, against transformers in both directions, every parameter
drawn."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import mmjax
from mmjax import tree, vocabulary
from mmjax.assembly import assemble
from mmjax.config import Connector, Image, Model, Part, Recipe
from mmjax.errors import UserError
from mmjax.families import find

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

import transformers as hf  # noqa: E402

PLACEHOLDER, TOKENS, SIDE = 97, 4, 56
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vision_use_head": False,
    "layer_norm_eps": 1e-5,
}
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 128,
}

GIT = {
    **{name: TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    "max_position_embeddings": 64,
    "vision_config": {**TOWER, "image_size": SIDE, "patch_size": 28},
}


def paligemma(text, **settings):
    vision = hf.SiglipVisionConfig(**TOWER, image_size=SIDE, patch_size=28)
    config = hf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32, image_token_index=PLACEHOLDER, **settings)
    return hf.PaliGemmaForConditionalGeneration(config)


def gemma3(**text):
    """A window shorter than a picture; layers sliding, full, sliding."""
    vision = hf.SiglipVisionConfig(**TOWER, image_size=SIDE, patch_size=14)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = hf.Gemma3TextConfig(**{**TEXT, "num_key_value_heads": 2}, sliding_window=3, query_pre_attn_scalar=20, layer_types=kinds, **text)
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=TOKENS, image_token_index=PLACEHOLDER)
    return hf.Gemma3ForConditionalGeneration(config)


def git(**settings):
    return hf.GitForCausalLM(hf.GitConfig(**GIT, **settings))


SYSTEMS = {
    "paligemma": lambda: paligemma(hf.GemmaConfig(**TEXT)),
    "paligemma 2, whose prompts are longer than its window": lambda: paligemma(
        hf.Gemma2Config(**TEXT, sliding_window=6, query_pre_attn_scalar=20), tie_word_embeddings=False
    ),
    "gemma 3": lambda: gemma3(),
    "git": lambda: git(),
    "git, tied": lambda: git(tie_word_embeddings=True, hidden_act="relu"),
}


def randomised(model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = "norm" in name.lower() and name.endswith("weight")
        torch.nn.init.normal_(parameter, 1.0 if norm else 0.0, 0.1 if norm else 0.2)
    return model.eval()


def rows(images_per_row=(1, 0, 3, 2), answer: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of text with so many images in it and an answer behind, padded on the left."""
    rng = np.random.default_rng(seed)
    prompts, kinds = [], []
    for row, count in enumerate(images_per_row):
        ids = list(rng.integers(3, 90, 2 + row))
        for _ in range(count):
            ids += [PLACEHOLDER] * TOKENS + list(rng.integers(3, 90, 2))
        kinds.append([0] * len(ids) + [1] * answer)
        prompts.append(ids + list(rng.integers(3, 90, answer)))
    length = max(map(len, prompts))

    def padded(lists, fill=0):
        return np.array([[fill] * (length - len(row)) + row for row in lists])

    ids, types = padded(prompts), padded(kinds)
    pixels = rng.standard_normal((sum(images_per_row), 3, SIDE, SIDE)).astype(np.float32)
    return {
        "input_ids": ids,
        "attention_mask": padded([[1] * len(row) for row in prompts]),
        "token_type_ids": types,
        "labels": np.where(types == 1, ids, -100),
        "pixel_values": pixels,
    }


def captions(answer: int = 3, pictures: int = 4, seed: int = 1) -> dict[str, np.ndarray]:
    """Rows of text behind an image, padded: with an answer on the right, without one on the left."""
    rng = np.random.default_rng(seed)
    lengths = np.array([7, 4, 2, 6])
    mask = (np.arange(7) < lengths[:, None]).astype(int)
    mask = mask if answer else mask[:, ::-1]
    ids = np.where(mask == 1, rng.integers(3, 90, mask.shape), 0)
    return {
        "input_ids": ids,
        "attention_mask": np.ascontiguousarray(mask),
        "labels": np.where(mask == 1, ids, -100),
        "pixel_values": rng.standard_normal((pictures, 3, SIDE, SIDE)).astype(np.float32),
    }


def given_to(theirs, **settings):
    if theirs.config.model_type == "git":
        return captions(**settings)
    given = rows(**settings)
    if theirs.config.model_type == "gemma3":
        given["token_type_ids"] = (given["input_ids"] == PLACEHOLDER).astype(int)
    return given


def torch_inputs(given):
    return {name: torch.tensor(value) for name, value in given.items()}


def run(theirs, given):
    with torch.no_grad():
        return theirs(**torch_inputs(given))


@pytest.fixture(scope="module", params=list(SYSTEMS))
def pair(request, tmp_path_factory):
    """(transformers' model, its directory, ours read from it)."""
    theirs = randomised(SYSTEMS[request.param]())
    directory = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(directory)
    return theirs, directory, mmjax.load(directory)


def test_logits_and_loss_equal_transformers(pair):
    theirs, _, ours = pair
    given = given_to(theirs)
    reference, found = run(theirs, given), ours(given)
    wanted = reference.logits.numpy()
    real = given["attention_mask"] == 1
    front = wanted.shape[1] - real.shape[1]  # image tokens without placeholders
    real = np.pad(real, ((0, 0), (front, 0)), constant_values=True)
    assert np.abs(np.asarray(found["logits"]) - wanted)[real].max() < 2e-5 * np.abs(wanted[real]).max()
    assert abs(float(found["loss"]) - float(reference.loss)) < 1e-5 * max(1, float(reference.loss))


def test_greedy_ids_equal_transformers(pair):
    theirs, _, ours = pair
    given = {name: value for name, value in given_to(theirs, answer=0).items() if name != "labels"}
    with torch.no_grad():
        wanted = theirs.generate(**torch_inputs(given), max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = ours.generate(given, max_new_tokens=24, ignore_eos=True)
    assert found.tolist() == wanted[:, given["input_ids"].shape[1] :].tolist()


def test_written_model_is_bit_identical_in_transformers(pair, tmp_path):
    theirs, _, ours = pair
    ours.save_pretrained(tmp_path)
    again, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.eval().state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(state[name], value), name
    given = given_to(theirs)
    assert torch.equal(run(again, given).logits, run(theirs, given).logits)


def test_names_in_memory_are_read_as_well(pair, tmp_path):
    """And published files' `vision_model.`, and copies of tied weights."""
    theirs, directory, ours = pair
    published = {"vision_tower.": "vision_tower.vision_model."}
    named = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in published.items():
            name = name.replace(old, new)
        named[name] = tensor.clone()
    safetensors_torch.save_file(named, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    same = tree.flatten(mmjax.load(tmp_path).params)
    for path, leaf in tree.flatten(ours.params).items():
        assert np.array_equal(np.asarray(same[path]), np.asarray(leaf)), path


def test_a_batch_equals_its_rows_alone(pair):
    theirs, _, ours = pair
    given = given_to(theirs, answer=0)
    first = given["attention_mask"][1].argmax()
    images = slice(1, 2 if theirs.config.model_type == "git" else 1)
    alone = {name: value[images] if name == "pixel_values" else value[1:2, first:] for name, value in given.items()}
    both = [np.asarray(ours.generate(each, max_new_tokens=4, return_scores=True)[1]) for each in (given, alone)]
    assert np.allclose(both[0][1], both[1][0], rtol=1e-4, atol=1e-4)


def test_configs_are_read_as_they_were_written(pair):
    theirs, directory, ours = pair
    config = json.loads((directory / "config.json").read_text())
    family = find(config)
    assert family.read_config(family.write_config(ours.config, config), "again") == ours.config


def test_without_kinds_of_tokens_a_row_is_a_prompt(tmp_path):
    theirs = randomised(SYSTEMS["paligemma"]())
    theirs.save_pretrained(tmp_path)
    given = {name: value for name, value in rows((1, 1), answer=0).items() if name in ("input_ids", "pixel_values")}
    wanted = run(theirs, given).logits.numpy()
    # the first row is shorter: its padding is no padding here, as for transformers
    assert np.allclose(mmjax.load(tmp_path)(given)["logits"], wanted, rtol=1e-4, atol=1e-4)


def test_a_projection_of_another_width_is_named():
    config = json.loads(SYSTEMS["paligemma"]().config.to_json_string())
    with pytest.raises(UserError, match="projection_dim = 64"):
        find(config).read_config({**config, "projection_dim": 64}, "config.json")


def test_git_reads_videos_by_either_name_of_their_embeddings(tmp_path):
    theirs = randomised(git(num_image_with_embedding=3))
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(3)
    given = {"input_ids": rng.integers(3, 90, (2, 4)), "pixel_values": rng.standard_normal((2, 3, 3, SIDE, SIDE)).astype(np.float32)}
    wanted = run(theirs, given).logits.numpy()
    assert np.allclose(mmjax.load(tmp_path)(given)["logits"], wanted, rtol=1e-4, atol=1e-4)
    file = tmp_path / "model.safetensors"
    tensors = {name.replace("img_temporal", "img_temperal"): t for name, t in safetensors_torch.load_file(file).items()}
    safetensors_torch.save_file(tensors, file)
    ours = mmjax.load(tmp_path)
    assert np.allclose(ours(given)["logits"], wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="4 frames, but the model has embeddings of 3"):
        ours({**given, "pixel_values": np.zeros((2, 4, 3, SIDE, SIDE), np.float32)})


def test_gemma_3_without_kinds_of_tokens_is_causal(tmp_path):
    theirs = randomised(gemma3(rope_parameters={"full_attention": {"rope_type": "linear", "factor": 4.0}}))
    theirs.save_pretrained(tmp_path)
    given = {name: value for name, value in rows().items() if name not in ("token_type_ids", "labels")}
    real, wanted = given["attention_mask"] == 1, run(theirs, given).logits.numpy()
    assert np.abs(np.asarray(mmjax.load(tmp_path)(given)["logits"]) - wanted)[real].max() < 2e-5 * np.abs(wanted[real]).max()


def test_gemma_3_needs_a_map_that_its_tokens_divide():
    config = json.loads(gemma3().config.to_json_string())
    with pytest.raises(UserError, match="mm_tokens_per_image = 9 are no square that divides the 4 x 4 patches"):
        find(config).read_config({**config, "mm_tokens_per_image": 9}, "config.json")


@pytest.mark.parametrize(
    "name, connector",
    [
        ("paligemma", Connector(kind="linear")),
        ("gemma 3", Connector(kind="linear", bias=False, grid=2, input_norm=True, norm="rms_plus_one", norm_eps=1e-5)),
    ],
)
def test_a_recipe_takes_its_parts_from_one_directory(name, connector, tmp_path):
    theirs = randomised(SYSTEMS[name]())
    theirs.save_pretrained(tmp_path / "theirs")
    vocabulary.train(["a cat sat on the mat"], kind="word").save_pretrained(tmp_path / "theirs")
    whole, part = mmjax.load(tmp_path / "theirs"), Part(path=str(tmp_path / "theirs"))
    section = Model(
        llm=part,
        vision=part,
        connector=dataclasses.replace(connector, path=part.path),
        feature_layers=(-1,),
        post_norm=True,
        image=Image(aspect="squash"),
        mask=whole.config.mask,
        template="plain",
    )
    model = assemble(Recipe(model=section), tmp_path / "work")
    assert model.config == whole.config
    for path, leaf in tree.flatten(whole.params).items():
        assert np.array_equal(np.asarray(tree.flatten(model.params)[path]), np.asarray(leaf)), path
