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


def test_entries_that_are_no_tensors_are_named(tmp_path):
    torch.save({"weight": torch.zeros(2), "epoch": 3}, tmp_path / "x.bin")
    with pytest.raises(UserError, match="not tensors: epoch"):
        pickles.read(tmp_path / "x.bin")


def test_old_and_damaged_files_are_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "noise.bin").write_bytes(b"PK\x03\x04 and no more")
    for name in ("old.bin", "noise.bin"):
        with pytest.raises(UserError, match="not a file of torch.save in its zip format"):
            pickles.read(tmp_path / name)


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
