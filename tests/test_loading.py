"""Directories that are not what they should be: each is an error that says what is wrong and what to do."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.checkpoints import safetensors, weights
from mmjax.checkpoints.safetensors import Tensor
from mmjax.config import Model, Part, Recipe
from mmjax.config_checks import missing_files
from mmjax.errors import UserError
from tests import load_7b

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GATE, NORM, HEAD = "model.layers.1.mlp.gate_proj.weight", "model.norm.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A bfloat16 checkpoint in several shards."""
    directory = tmp_path_factory.mktemp("made") / "llama"
    load_7b.write(directory, SIZES)
    return directory


@pytest.fixture
def arrays(llama):
    return {name: np.array(tensor.read()) for name, tensor in weights.read(llama).items()}


def rewritten(llama: Path, arrays: dict[str, np.ndarray], directory: Path) -> Path:
    """The checkpoint with these arrays, in one file."""
    shutil.copy(llama / "config.json", directory)
    safetensors.write([Tensor(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()], directory)
    return directory


def test_every_leaf_is_what_the_files_hold(llama, arrays):
    for dtype in ("bfloat16", "float32", "float16"):
        flat = tree.flatten(mmjax.load(llama, dtype).params)
        assert {leaf.dtype for leaf in flat.values()} == {np.dtype(dtype)}
        np.testing.assert_array_equal(flat["llm/layers/mlp/gate/kernel"][1], arrays[GATE].T.astype(dtype))
        np.testing.assert_array_equal(flat["llm/head/kernel"], arrays[HEAD].T.astype(dtype))
        np.testing.assert_array_equal(flat["llm/final_norm/scale"], arrays[NORM].astype(dtype))


def test_leaves_are_not_copied_on_their_way(llama, monkeypatch):
    """A CPU takes over what was read: the largest leaf would else be there twice."""
    from mmjax.parallel import placement

    made, aligned = [], placement.aligned
    monkeypatch.setattr(placement, "aligned", lambda *given: made.append(aligned(*given)) or made[-1])
    leaves = tree.flatten(mmjax.load(llama, "bfloat16").params)
    assert {leaf.unsafe_buffer_pointer() for leaf in leaves.values()} == {array.ctypes.data for array in made}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_named(llama, arrays, tmp_path, value):
    arrays[GATE][3, 5] = arrays[NORM][0] = value
    rewritten(llama, arrays, tmp_path)
    with pytest.raises(UserError, match=f"2 tensors hold NaN or infinity: {GATE}, {NORM}. .*check_finite=False"):
        mmjax.load(tmp_path)
    kernel = mmjax.load(tmp_path, check_finite=False).params["llm"]["layers"]["mlp"]["gate"]["kernel"]
    assert int((~np.isfinite(np.asarray(kernel))).sum()) == 1


def test_numbers_too_large_for_the_chosen_type(llama, arrays, tmp_path):
    arrays[NORM] = np.full(32, 1e5, np.float32)
    rewritten(llama, arrays, tmp_path)
    with pytest.raises(UserError, match=r"\(or numbers too large for float16\): model.norm.weight"), np.errstate(over="ignore"):
        mmjax.load(tmp_path, "float16")
    mmjax.load(tmp_path, "bfloat16")


def test_integers_are_no_weights(llama, arrays, tmp_path):
    arrays[GATE] = np.ones(arrays[GATE].shape, np.int8)
    with pytest.raises(UserError, match=rf"integers, as in a quantised .*\(1\): {GATE} holds int8"):
        mmjax.load(rewritten(llama, arrays, tmp_path))


def test_eight_bit_floats_are_read_as_the_numbers_they_are(llama, arrays, tmp_path):
    arrays[GATE] = arrays[GATE].astype(ml_dtypes.float8_e4m3fn)
    kernel = mmjax.load(rewritten(llama, arrays, tmp_path)).params["llm"]["layers"]["mlp"]["gate"]["kernel"][1]
    np.testing.assert_array_equal(kernel, arrays[GATE].astype(np.float32).T)


def test_empty_and_misshaped_tensors_are_listed(llama, arrays, tmp_path):
    arrays[GATE], arrays[NORM] = np.zeros((0, 32), np.float32), np.zeros((32, 1), np.float32)
    del arrays[HEAD]
    arrays["model.layers.7.mlp.gate_proj.weight"] = np.zeros((0,), np.float32)
    with pytest.raises(UserError) as error:
        mmjax.load(rewritten(llama, arrays, tmp_path))
    for line in (
        f"missing (1): {HEAD}",
        "unexpected (1): model.layers.7.mlp.gate_proj.weight",
        f"of another shape (2): {GATE} is [0, 32], the config asks for [48, 32]; {NORM} is [32, 1], the config asks for [32]",
    ):
        assert line in str(error.value)


def test_safetensors_come_before_files_of_torch_save(llama, arrays, tmp_path):
    rewritten(llama, arrays, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    mmjax.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pytorch_model.bin is not a file of torch.save"):
        mmjax.load(tmp_path)


COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def cache(llama, tmp_path, monkeypatch):
    """A cache with one repository in two revisions, as the hub's own client lays it out; returns its snapshots by revision."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--llama-7b"
    blobs = repository / "blobs"
    blobs.mkdir(parents=True)
    (repository / "refs").mkdir()
    for number, path in enumerate(sorted(llama.iterdir())):
        shutil.copy(path, blobs / str(number))
    for revision, commit in COMMITS.items():
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        for number, path in enumerate(sorted(llama.iterdir())):
            (repository / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{number}")
    return {revision: repository / "snapshots" / commit for revision, commit in COMMITS.items()}


def test_a_repository_in_the_cache_is_loaded_by_its_name(cache, llama):
    wanted = mmjax.load(llama).params["llm"]["final_norm"]["scale"]
    for reference in ("some/llama-7b", "some/llama-7b@v2", f"some/llama-7b@{COMMITS['v2']}"):
        np.testing.assert_array_equal(mmjax.load(reference).params["llm"]["final_norm"]["scale"], wanted)
        assert not missing_files(Recipe(model=Model(llm=Part(path=reference))), "export")
    with pytest.raises(UserError, match="some/llama-7b@v3 is neither .*`hf download some/llama-7b --revision v3`"):
        mmjax.load("some/llama-7b@v3")
    with pytest.raises(UserError, match="some/other is neither a directory nor .*`hf download some/other`"):
        mmjax.load("some/other")


def test_what_a_partial_snapshot_lacks_is_said_exactly(cache):
    shards = sorted(path.name for path in cache["main"].glob("*.safetensors"))
    (cache["main"] / shards[1]).unlink()
    (cache["v2"] / shards[0]).resolve().unlink()  # the link is there, what it points to is not
    with pytest.raises(UserError, match=f"lacks 2 of its shards: .*`hf download some/llama-7b {shards[0]} {shards[1]}`"):
        mmjax.load("some/llama-7b")
    with pytest.raises(UserError, match=f"`hf download some/llama-7b {shards[0]} --revision {COMMITS['v2']}`"):
        mmjax.load("some/llama-7b@v2")
    for path in cache["main"].glob("model*"):
        path.unlink()
    with pytest.raises(UserError, match="has no weights: .*Download the rest .*`hf download some/llama-7b`"):
        mmjax.load("some/llama-7b")
    (cache["main"] / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json .*`hf download some/llama-7b`"):
        mmjax.load("some/llama-7b")


def test_a_directory_that_lacks_something_is_to_be_copied_again(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    (tmp_path / "copy" / index["weight_map"][NORM]).unlink()
    with pytest.raises(UserError, match="lacks 1 of its shards: .*Copy or download them again"):
        mmjax.load(tmp_path / "copy")
