import argparse
import collections
import io
import json
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from mmjax.checkpoints import pickles, weights
from mmjax.errors import UserError

torch = pytest.importorskip("torch")


def test_tensors_of_torch_save_are_read(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "plain": base.clone(),
        "transposed": base.t(),
        "slice": base[1:3, 2:],
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "ids": torch.arange(3),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base.clone()),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = weights.read(tmp_path)
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        read = found[name].read()
        assert read.shape == tuple(value.shape)
        assert np.array_equal(read.astype(np.float64), value.detach().double().numpy()), name


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/should_not_exist",)


def archive(path, description: bytes):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", description)
        file.writestr("archive/byteorder", "little")


def test_anything_else_is_refused_by_name(tmp_path):
    archive(tmp_path / "evil.bin", pickle.dumps({"a": Evil()}))
    with pytest.raises(UserError, match="posix.system"):
        pickles.read(tmp_path / "evil.bin")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.bin")
    with pytest.raises(UserError, match="torch.nn.modules.linear.Linear"):
        pickles.read(tmp_path / "module.bin")


class Odd:
    """Leaves a pickle that makes `function(*args)` and then changes what came out."""

    def __init__(self, function, args, state=None):
        self.made = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.made


def test_a_pickle_that_asks_for_more_than_settings_is_refused_wherever_it_asks(tmp_path):
    trap = tmp_path / "trap"
    weights = {"weight": torch.zeros(2)}
    for k, evil in enumerate(
        [
            Odd(exec, (f"open({str(trap)!r}, 'w')",)),
            Odd(getattr, ("text", "upper")),
            Odd(pathlib.Path.touch, (trap,)),
            Odd(__import__, ("os",)),
            [Odd(io.open, (str(trap), "w"))],
        ]
    ):
        torch.save({"model": weights, "args": evil}, tmp_path / f"{k}.bin")
        with pytest.raises(UserError, match="asks for"):
            pickles.read(tmp_path / f"{k}.bin")
    assert not trap.exists()


def test_settings_stand_for_nothing(tmp_path):
    """Names of packages of settings are accepted, but nothing of them is run."""
    trap = tmp_path / "trap"
    torch.save({"w": torch.zeros(2), "p": Odd(np.savetxt, (str(trap), [1]))}, tmp_path / "x.bin")
    assert list(pickles.read(tmp_path / "x.bin")) == ["w"] and not trap.exists()


TRAINED = {
    "epoch": 3,
    "lr": 1e-3,
    "name": "run",
    "best": None,
    "flags": [True, {"a": (1, 2)}, {1, 2}],
    "args": argparse.Namespace(lr=1.0, output=pathlib.Path("x"), size=torch.Size([1, 2])),
    "random": (np.random.RandomState(0).get_state(), np.float64(1.0), np.arange(3)),
    "counts": collections.defaultdict(int, a=1),
    "kind": (torch.float16, torch.device("cpu")),
}


def test_training_files_are_read_like_their_weights(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).half()
    optimizer = torch.optim.AdamW(model.float().parameters())
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    state = model.bfloat16().state_dict()  # an OrderedDict with `_metadata`
    for name, content in {
        "plain": dict(state),
        "ordered": state,
        "beside": {**state, **TRAINED},
        "model": {"model": state, "optimizer": optimizer.state_dict(), **TRAINED},
        "whisper": {"dims": {"n_mels": 80}, "model_state_dict": state},
        "lightning": {"state_dict": state, "hyper_parameters": TRAINED, "callbacks": {}},
        "twice": {"module": {"model": state, "iteration": 4}},
    }.items():
        torch.save(content, tmp_path / f"{name}.bin")
        found = pickles.read(tmp_path / f"{name}.bin")
        assert list(found) == list(state), name
        for key, value in state.items():
            assert found[key].dtype == ("int64" if key.endswith("tracked") else "bfloat16")
            assert np.array_equal(found[key].read().astype(np.float64), value.double().numpy()), key


def test_what_holds_no_or_several_sets_of_tensors_is_said(tmp_path):
    state = {"w": torch.zeros(2)}
    for content, said in [
        (TRAINED, "holds no tensors, but epoch .int.*args .argparse.Namespace"),
        ([torch.zeros(2)], "holds a list, not a dict"),
        ({"model": state, "state_dict": state}, "several sets of tensors: model, state_dict"),
        ({"a": torch.zeros(1), "projector": state}, "inside of its entries projector"),
        ({"a": torch.zeros(1), "pair": (torch.zeros(1), 2)}, "inside of its entries pair"),
    ]:
        torch.save(content, tmp_path / "x.bin")
        with pytest.raises(UserError, match=said):
            pickles.read(tmp_path / "x.bin")


def test_other_kinds_of_tensors(tmp_path):
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.attribute = "of training code"
    tensors = {"p": parameter, "f8": torch.arange(4.0).to(torch.float8_e4m3fn)[1:], "u16": torch.arange(3).to(torch.uint16)}
    torch.save(tensors, tmp_path / "x.bin")
    found = pickles.read(tmp_path / "x.bin")
    assert [found[name].read().astype(float).tolist() for name in tensors] == [[0, 1, 2], [1, 2, 3], [0, 1, 2]]
    for value, said in [
        (torch.zeros(2, dtype=torch.complex64), "of kind ComplexFloat, which are not supported"),
        (torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    ]:
        torch.save({"a": value}, tmp_path / "y.bin")
        with pytest.raises(UserError, match=said):
            pickles.read(tmp_path / "y.bin")


def test_old_and_damaged_files_are_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "noise.bin").write_bytes(b"PK\x03\x04 and no more")
    for name in ("old.bin", "noise.bin"):
        with pytest.raises(UserError, match="not a file of torch.save in its zip format"):
            pickles.read(tmp_path / name)


def test_a_tensor_cannot_be_changed_after_it_was_checked(tmp_path):
    """BUILD sets attributes of what a pickle has made: not those of tensors, and not those of what makes them."""
    torch.save({"a": torch.zeros(4)}, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    name = next(n for n in parts if n.endswith("data.pkl"))
    reduced = parts[name].rindex(b"R")  # where the tensor has been made
    for state in ({"offset": -64, "shape": (1 << 40,)}, (None, {"offset": -64})):
        build = pickle.dumps(state, 2)[2:-1] + b"b"
        changed = parts[name][: reduced + 1] + build + parts[name][reduced + 1 :]
        with zipfile.ZipFile(tmp_path / "y.bin", "w") as file:
            for n, data in parts.items():
                file.writestr(n, changed if n == name else data)
        with pytest.raises(UserError, match="does not describe tensors"):
            pickles.read(tmp_path / "y.bin")


def test_shards_of_torch_save(tmp_path):
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model-1.bin")
    with pytest.raises(UserError, match="lacks 1 of its shards: pytorch_model-2.bin"):
        weights.read(tmp_path)
    torch.save({"b": torch.ones(2)}, tmp_path / "pytorch_model-2.bin")
    assert {name: tensor.read().tolist() for name, tensor in weights.read(tmp_path).items()} == {"a": [0, 0], "b": [1, 1]}
    torch.save({"b": torch.ones(2), "a": torch.zeros(2)}, tmp_path / "pytorch_model-2.bin")
    with pytest.raises(UserError, match="tensor a is in both"):
        weights.read(tmp_path)
    torch.save({"c": torch.ones(2)}, tmp_path / "pytorch_model-2.bin")
    with pytest.raises(UserError, match="do not hold them: b"):
        weights.read(tmp_path)


def test_a_tensor_cannot_reach_outside_its_storage(tmp_path):
    whole = torch.zeros(4)
    torch.save({"a": whole}, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    name = next(n for n in parts if n.endswith("data.pkl"))
    # The shape (4,) is written as the small integer K\x04 in a tuple of one.
    assert b"K\x04\x85" in parts[name]
    parts[name] = parts[name].replace(b"K\x04\x85", b"K\x40\x85")
    with zipfile.ZipFile(tmp_path / "y.bin", "w") as file:
        for n, data in parts.items():
            file.writestr(n, data)
    with pytest.raises(UserError, match="outside its storage"):
        pickles.read(tmp_path / "y.bin")


def test_damage_anywhere_is_one_kind_of_error(tmp_path):
    """Bytes changed at random, in the description and in the archive: what is not read is refused, and takes no memory."""
    torch.save({"model": {"a": torch.zeros(3, 2), "b": torch.nn.Parameter(torch.ones(2))}, **TRAINED}, tmp_path / "x.bin")
    whole = (tmp_path / "x.bin").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.bin") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    name, rng, refused = next(n for n in parts if n.endswith("data.pkl")), np.random.default_rng(0), 0
    for k in range(300):
        damaged = bytearray(parts[name] if k % 2 else whole)
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / "y.bin").write_bytes(damaged)
        if k % 2:
            with zipfile.ZipFile(tmp_path / "y.bin", "w") as file:
                for n, data in parts.items():
                    file.writestr(n, bytes(damaged) if n == name else data)
        try:
            pickles.read(tmp_path / "y.bin")
        except UserError:
            refused += 1
    assert refused > 150
