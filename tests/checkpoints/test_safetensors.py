import json

import ml_dtypes
import numpy as np
import pytest

from mmjax.checkpoints import safetensors, weights
from mmjax.checkpoints.safetensors import Tensor
from mmjax.errors import UserError

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "c": np.array(2.5, np.float16),
    "d": np.arange(5),
    "e": np.zeros((0, 3), np.float32),
}


def tensor(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name, array.shape, array.dtype, lambda: array)


@pytest.fixture
def written(tmp_path):
    safetensors.write([tensor(name, array) for name, array in ARRAYS.items()], tmp_path)
    return tmp_path


def assert_same(found: dict) -> None:
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        read = found[name].read()
        assert read.dtype == array.dtype and read.shape == array.shape and np.array_equal(read, array)


def test_what_is_written_is_read_and_by_the_library_too(written):
    assert_same(weights.read(written))
    safe_open = pytest.importorskip("safetensors").safe_open
    with safe_open(written / "model.safetensors", "np") as file:
        for name in ("a", "c", "d"):
            assert np.array_equal(file.get_tensor(name), ARRAYS[name])


def test_shards_and_their_index(tmp_path):
    safetensors.write([tensor(name, array) for name, array in ARRAYS.items()], tmp_path, shard_bytes=60)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{k:05d}-of-00002.safetensors" for k in (1, 2)]
    assert (
        json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        == 48 + 12 + 2 + 40
    )
    assert_same(weights.read(tmp_path))


def test_reading_costs_nothing_until_a_tensor_is_used(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    big = Tensor("big", (1 << 28,), np.dtype(np.float32), lambda: np.broadcast_to(np.float32(0), (1 << 28,)))
    header = json.dumps({"big": {"dtype": "F32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 30))  # a hole: one GiB that takes no room
    assert weights.read(tmp_path)["big"].shape == big.shape


def shards(tmp_path):
    safetensors.write([tensor(name, array) for name, array in ARRAYS.items()], tmp_path, shard_bytes=60)
    return tmp_path / "model-00002-of-00002.safetensors"


def test_a_missing_shard_is_named(tmp_path):
    shards(tmp_path).unlink()
    with pytest.raises(UserError, match="lacks 1 of its shards: model-00002-of-00002"):
        weights.read(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    safetensors.write_file([tensor("d", ARRAYS["d"]), tensor("a", ARRAYS["a"])], shards(tmp_path))
    with pytest.raises(UserError, match="tensor a is in both"):
        weights.read(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    safetensors.write_file([tensor("x", ARRAYS["d"])], shards(tmp_path))
    with pytest.raises(UserError, match="do not hold them: c, d, e"):
        weights.read(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(UserError, match="outside its own folder"):
        weights.read(tmp_path)


@pytest.mark.parametrize("keep", [3, 40, -4])
def test_a_truncated_file_is_refused(written, keep):
    path = written / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        weights.read(written)


def test_a_name_that_occurs_twice_is_refused(tmp_path):
    entry = b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    header = b"{" + entry + b", " + entry + b"}"
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(UserError, match="occur twice: a"):
        weights.read(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_nan_and_infinity_are_told_from_numbers(dtype):
    limits = ml_dtypes.finfo(dtype)
    good = np.array([[0, -0.0, 1, -1], [limits.max, limits.min, limits.tiny, -limits.tiny]], dtype)
    assert weights.is_finite(good) and weights.is_finite(good[:0]) and weights.is_finite(np.array(2, dtype))
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for place in ((0, 0), (1, 3)):
            spoilt = good.copy()
            spoilt[place] = bad
            assert not weights.is_finite(spoilt), bad


def test_safetensors_are_preferred(written):
    (written / "pytorch_model.bin").write_bytes(b"never opened")
    (written / "pytorch_model.bin.index.json").write_text("never opened")
    assert_same(weights.read(written))


@pytest.mark.parametrize(
    "index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", '{"weights": {}}', '{"weight_map": {}}']
)
def test_an_index_that_is_none_is_refused(written, index):
    (written / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="not a readable index of shards"):
        weights.read(written)


def headed(directory, header, data: bytes = b"\0" * 8):
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return directory


@pytest.mark.parametrize(
    "header, said",
    [
        ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, "tensor a is stored as F4, which is not supported"),
        ({"a": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}, "stored as F8_E8M0"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "shape and the size of tensor a do not agree"),
        ({"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}, "of tensor a do not agree"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "entry of tensor a is not understood"),
        ({"a": 3}, "entry of tensor a is not understood"),
        ([1], "its header is no list of tensors"),
    ],
)
def test_a_header_that_says_something_else_is_refused(tmp_path, header, said):
    with pytest.raises(UserError, match=said):
        weights.read(headed(tmp_path, header))
