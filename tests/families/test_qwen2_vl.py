"""Qwen2-VL in transformers' layout against transformers, in both directions, every parameter drawn: pictures of several shapes."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import UserError
from mmjax.families import find
from mmjax.models import vit

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

import transformers as hf  # noqa: E402

IMAGE, BEGIN, END = 97, 98, 99
TEXT = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 2, 3]},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
GRIDS = np.array([[1, 4, 6], [1, 2, 2], [1, 6, 2], [1, 2, 8]])  # the first row has two pictures, the second none, the others one


def build(**settings):
    config = hf.Qwen2VLConfig(text_config=TEXT, vision_config=TOWER, image_token_id=IMAGE, **settings)
    theirs = hf.Qwen2VLForConditionalGeneration(config)
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        scale = ("norm" in name or "ln_q" in name) and name.endswith("weight")
        torch.nn.init.normal_(parameter, 1.0 if scale else 0.0, 0.1 if scale else 0.2)
    return theirs.eval()


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows padded on the left, text before and behind pictures."""
    rng = np.random.default_rng(seed)
    counts = GRIDS.prod(1) // 4
    rows = [list(rng.integers(3, 90, 2 + row)) for row in range(4)]
    for row, picture in ((0, 0), (0, 1), (2, 2), (3, 3)):
        rows[row] += [BEGIN, *[IMAGE] * counts[picture], END, *rng.integers(3, 90, 2)]
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + row for row in rows])
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == IMAGE).astype(int),
        "pixel_values": rng.standard_normal((GRIDS.prod(1).sum(), 3 * 2 * 16)).astype(np.float32),
        "image_grid_thw": GRIDS,
    }


def run(theirs, given):
    with torch.no_grad():
        return theirs(**{name: torch.tensor(value) for name, value in given.items()})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen2_vl")
    theirs = build()
    theirs.save_pretrained(directory)
    return theirs, directory, mmjax.load(directory)


def test_logits_and_loss_equal_transformers(pair):
    theirs, _, ours = pair
    given = inputs()
    given["labels"] = np.where((given["attention_mask"] == 1) & (given["input_ids"] < 90), given["input_ids"], -100)
    reference, found, real = run(theirs, given), ours(given), given["attention_mask"] == 1
    wanted = reference.logits.numpy()
    assert np.abs(np.asarray(found["logits"]) - wanted)[real].max() < 2e-5 * np.abs(wanted[real]).max()
    assert abs(float(found["loss"]) - float(reference.loss)) < 1e-5 * float(reference.loss)
    assert found["connector_output"].shape == (GRIDS.prod(1).sum() // 4, 48)


def test_greedy_ids_go_on_behind_the_largest_position(pair):
    theirs, _, ours = pair
    given = inputs()
    with torch.no_grad():
        tensors = {name: torch.tensor(value) for name, value in given.items()}
        wanted = theirs.generate(**tensors, max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = ours.generate(given, max_new_tokens=24, ignore_eos=True)
    assert found.tolist() == wanted[:, given["input_ids"].shape[1] :].tolist()


def test_written_model_is_bit_identical_in_transformers(pair, tmp_path):
    theirs, directory, ours = pair
    ours.save_pretrained(tmp_path)
    again, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.eval().state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(state[name], value), name
    assert torch.equal(run(again, inputs()).logits, run(theirs, inputs()).logits)
    config = json.loads((directory / "config.json").read_text())
    bare = {"vision_config": {}, "text_config": {}, "image_token_id": IMAGE}
    assert find(config).read_config(find(config).write_config(ours.config, bare), "from nothing") == ours.config


def test_published_files_have_the_text_among_the_rest(pair, tmp_path):
    """As in Qwen/Qwen2-VL-2B-Instruct: no text_config, `type` mrope, a tied head; and names as they are in memory."""
    theirs = build(tie_word_embeddings=True)
    config = json.loads(theirs.config.to_json_string())
    text, rope = config.pop("text_config"), TEXT["rope_parameters"]
    kept = {name: text[name] for name in TEXT if name != "rope_parameters"}
    flat = {**config, **kept, "rope_theta": 500.0, "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    (tmp_path / "config.json").write_text(json.dumps({**flat, "rms_norm_eps": text["rms_norm_eps"]}))
    named = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    safetensors_torch.save_file(named, tmp_path / "model.safetensors")
    ours, given = mmjax.load(tmp_path), inputs()
    wanted = run(theirs, given).logits.numpy()[given["attention_mask"] == 1]
    assert np.abs(np.asarray(ours(given)["logits"])[given["attention_mask"] == 1] - wanted).max() < 2e-5 * np.abs(wanted).max()
    written = ours.family.write_config(ours.config, ours.foreign)
    assert "text_config" not in written and written["rope_scaling"]["type"] == "mrope"
    assert "lm_head.weight" not in {r.name for r in ours.family.rules(ours.config, ours.foreign)}
    assert "llm/head/kernel" not in tree.flatten(ours.params)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"image_grid_thw": GRIDS * [2, 1, 1]}, "image_grid_thw are"),
        ({"image_grid_thw": GRIDS[:3]}, "pixel_values are"),
        ({"mm_token_type_ids": np.zeros_like(inputs()["input_ids"])}, "mm_token_type_ids are 1 where"),
        ({"image_grid_thw": GRIDS[::-1]}, "which is not one picture"),
    ],
)
def test_inputs_that_do_not_belong_together(pair, change, named):
    with pytest.raises(UserError, match=named):
        pair[2]({**inputs(), **change})


def test_a_tower_that_turns_by_places_must_be_told_them(pair):
    pixels = np.zeros((1, 16, 16, 3), np.float32)
    with pytest.raises(ValueError, match="where each patch stands"):
        vit.hidden_states(pair[2].params["vision"], pair[2].config.vision, pixels, pair[2].run)
