"""BLIP-2 and InstructBLIP in transformers' layout against transformers itself, in both directions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import UserError
from mmjax.families import composed

torch = pytest.importorskip("torch")

from tests.families import tiny_blip  # noqa: E402

CASES = {
    "opt": ("opt", False, {}),
    "t5 as it first was": ("t5", False, {"layers": 3, "every": 3}),
    "instructed llama": ("llama", True, {"layers": 4}),
    "instructed flan-t5": ("flan_t5", True, {}),
}


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    """(transformers' model, its directory, ours read from it, what makes inputs)."""
    language, instructed, settings = CASES[request.param]
    theirs = tiny_blip.model(language, instructed, **settings)
    directory = tmp_path_factory.mktemp("blip")
    theirs.save_pretrained(directory)
    return theirs, directory, mmjax.load(directory), (instructed, "t5" in language)


@pytest.mark.parametrize("images, left", [((1, 1, 2), True), ((2, 1, 0), False)])
def test_outputs_equal_transformers(pair, images, left):
    theirs, _, ours, kind = pair
    given = tiny_blip.inputs(*kind, images, left)
    reference, found = tiny_blip.run(theirs, given), ours(given)
    apart = np.abs(np.asarray(found["logits"]) - reference.logits.numpy())
    real = np.ones(apart.shape[:2], bool) if kind[1] else given["attention_mask"] == 1
    assert apart[real].max() < 2e-4
    assert abs(float(found["loss"]) - float(reference.loss)) < 1e-5
    features, queries = reference.vision_outputs.last_hidden_state, reference.qformer_outputs.last_hidden_state
    assert np.abs(np.asarray(found["image_features"]) - features.numpy()).max() < 5e-5
    assert np.abs(np.asarray(found["qformer_output"]) - queries.numpy()).max() < 5e-5


def test_greedy_ids_equal_transformers_and_do_not_depend_on_the_batch(pair):
    theirs, _, ours, kind = pair
    given = tiny_blip.inputs(*kind, (1, 1, 1))
    prompt = {name: value for name, value in given.items() if name != "labels"}
    found = ours.generate(prompt, max_new_tokens=16, ignore_eos=True)
    assert found.tolist() == tiny_blip.greedy(theirs, given, 16).tolist()
    last = {name: value[-1:] for name, value in prompt.items()}
    assert ours.generate(last, max_new_tokens=16, ignore_eos=True).tolist() == found[-1:].tolist()


def test_written_model_is_bit_identical_in_transformers(pair, tmp_path):
    theirs, directory, ours, kind = pair
    ours.save_pretrained(tmp_path)
    again, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(state[name], value), name
    given = tiny_blip.inputs(*kind)
    assert torch.equal(tiny_blip.run(again.eval(), given).logits, tiny_blip.run(theirs, given).logits)


def test_cross_attention_has_rows_only_for_the_layers_that_have_it(pair):
    _, _, ours, _ = pair
    flat, connector = tree.flatten(ours.params), ours.config.connector
    crossing = -(-connector.depth // connector.cross_every)
    assert {leaf.shape[0] for path, leaf in flat.items() if path.startswith("connector/cross/")} == {crossing}
    assert ("connector/layers/text_mlp/up/kernel" in flat) == bool(connector.text_vocab)


def test_a_caption_begins_without_a_prompt(tmp_path):
    theirs = tiny_blip.model("opt", False)
    theirs.save_pretrained(tmp_path)
    pictures = {"pixel_values": tiny_blip.inputs(False, False)["pixel_values"][:2]}
    assert mmjax.load(tmp_path).generate(pictures, 8, ignore_eos=True).tolist() == tiny_blip.greedy(theirs, pictures, 8).tolist()


def test_tied_tensors_may_be_stored(pair, tmp_path):
    """Files written before transformers 5 hold tied tensors under all their names."""
    theirs, directory, ours, _ = pair
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    same = tree.flatten(mmjax.load(tmp_path).params)
    for path, leaf in tree.flatten(ours.params).items():
        assert np.array_equal(np.asarray(same[path]), np.asarray(leaf)), path


def test_our_own_layout_holds_the_same(pair, tmp_path):
    """The whole model under `model_type` mmjax: the same outputs and continuations."""
    _, directory, ours, kind = pair
    foreign = {"model_type": "mmjax", **{name: ours.foreign[name] for name in ("text_config", "vision_config", "image_token_index")}}
    again = dataclasses.replace(ours, family=composed.FAMILY, foreign=foreign)
    again.save_pretrained(tmp_path, layout="mmjax")
    found, given = mmjax.load(tmp_path), tiny_blip.inputs(*kind, left=False)
    np.testing.assert_allclose(found(given)["loss"], ours(given)["loss"], rtol=1e-5)
    prompt = {name: value for name, value in given.items() if name != "labels"}
    assert found.generate(prompt, 6, ignore_eos=True).tolist() == ours.generate(prompt, 6, ignore_eos=True).tolist()


def test_an_instruction_must_be_there_for_each_picture(tmp_path):
    theirs = tiny_blip.model("llama", True)
    theirs.save_pretrained(tmp_path)
    ours, given = mmjax.load(tmp_path), tiny_blip.inputs(True, False)
    with pytest.raises(UserError, match=r"\[4, length\], a row for each picture"):
        ours({**given, "qformer_input_ids": given["qformer_input_ids"][:2]})
    del given["qformer_input_ids"]
    with pytest.raises(UserError, match="qformer_input_ids are missing"):
        ours(given)
