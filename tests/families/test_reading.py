"""Leaves read onto several devices, and written from them: each part once, and never more than it needs."""

import types

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmjax import config, tree
from mmjax.checkpoints import safetensors
from mmjax.checkpoints.safetensors import Stored, Tensor
from mmjax.families import keys, reading, writing
from mmjax.families.keys import rule
from mmjax.models.quantised import NAMED
from mmjax.parallel import placement
from mmjax.parallel.mesh import make_mesh

LAYERS, INPUTS, OUTPUTS = 3, 128, 16
KERNEL = "llm/layers/mlp/up/kernel"
SHAPES = {KERNEL: (LAYERS, INPUTS, OUTPUTS), "llm/layers/norm/scale": (LAYERS, INPUTS), "llm/embed/embedding": (24, INPUTS)}
SPECS = {KERNEL: PartitionSpec(None, "fsdp", "tensor"), "llm/embed/embedding": PartitionSpec("tensor", "fsdp")}
RULES = [
    rule("layers.{i}.up", KERNEL, form=keys.transposed),
    rule("layers.{i}.norm", "llm/layers/norm/scale"),
    rule("embed", "llm/embed/embedding"),
]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def stored():
    rng, made = np.random.default_rng(0), {}
    for r in RULES:
        shape = SHAPES[r.paths[0]]
        for at in r.index(shape):
            made[r.foreign_name(at)] = rng.standard_normal(r.form.shape(shape[r.stacked :])).astype(ml_dtypes.bfloat16)
    return {name: Stored(name, a.shape, a.dtype, "file", lambda a=a: a) for name, a in made.items()}


def shapes():
    return tree.unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()})


def places(mesh, specs=SPECS):
    return tree.unflatten({path: NamedSharding(mesh, specs.get(path, PartitionSpec())) for path in SHAPES})


@pytest.fixture
def read(monkeypatch):
    """Bytes that are taken from the files."""
    taken, fill = [], reading._fill
    monkeypatch.setattr(reading, "_fill", lambda to, array: taken.append(array.nbytes) or fill(to, array))
    return taken


def test_each_part_is_read_once(mesh, stored, read):
    """However many devices hold it: the norm is on all eight, the others on two each."""
    plain = tree.flatten(reading.load(stored, RULES, shapes(), dtype="bfloat16"))
    whole = sum(read)
    read.clear()
    spread = tree.flatten(reading.load(stored, RULES, shapes(), dtype="bfloat16", shardings=places(mesh)))
    assert sum(read) == whole == sum(tensor.read().nbytes for tensor in stored.values())
    for path, leaf in plain.items():
        assert spread[path].sharding.spec == SPECS.get(path, PartitionSpec())
        np.testing.assert_array_equal(np.asarray(spread[path]), np.asarray(leaf))


def test_a_process_reads_only_what_its_devices_hold(mesh, stored, read, monkeypatch):
    """One with the first of the eight devices: of what another has it sees not even that it is broken."""
    monkeypatch.setattr(placement.Parts, "placed", lambda parts: parts)
    own = NamedSharding(mesh, SPECS[KERNEL]).addressable_devices_indices_map(SHAPES[KERNEL])[mesh.devices.flat[0]]
    sharding = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: {"own": own})
    broken = dict(stored)
    kernel = stored["layers.1.up"].read().copy()
    kernel[-1, -1] = np.nan
    broken["layers.1.up"] = Stored("layers.1.up", kernel.shape, kernel.dtype, "file", lambda: kernel)
    found = {}
    pieces = keys.pieces(RULES, tree.flatten(shapes()))[KERNEL]
    leaf = reading._dense(broken, pieces, SHAPES[KERNEL], np.dtype(ml_dtypes.bfloat16), sharding, found)
    (part,) = leaf._made.values()
    assert part.shape == (LAYERS, INPUTS // 2, OUTPUTS // 2) and sum(read) == part.nbytes and not found
    np.testing.assert_array_equal(part[2], stored["layers.2.up"].read()[: OUTPUTS // 2, : INPUTS // 2].T)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_quantised_parts_are_those_of_the_whole(mesh, stored, name):
    plain = tree.flatten(reading.load(stored, RULES, shapes(), dtype="bfloat16", quantisation=NAMED[name]))
    where = {f"{KERNEL}/codes": NamedSharding(mesh, SPECS[KERNEL])}
    shardings = tree.unflatten({path: where.get(path, NamedSharding(mesh, PartitionSpec())) for path in plain})
    spread = tree.flatten(reading.load(stored, RULES, shapes(), dtype="bfloat16", quantisation=NAMED[name], shardings=shardings))
    assert list(spread) == list(plain) and not spread[f"{KERNEL}/codes"].sharding.is_fully_replicated
    for path, leaf in plain.items():
        np.testing.assert_array_equal(np.asarray(spread[path]), np.asarray(leaf))


def test_spread_leaves_are_written_byte_for_byte(mesh, stored, tmp_path):
    for where, shardings in (("plain", None), ("spread", places(mesh))):
        params = reading.load(stored, RULES, shapes(), dtype="bfloat16", shardings=shardings)
        writing.write(writing.tensors(params, RULES), tmp_path / where, together=shardings is not None)
    first, second = ((tmp_path / where / "model.safetensors").read_bytes() for where in ("plain", "spread"))
    assert first == second


def test_tensors_are_made_in_the_order_in_which_they_are_written(tmp_path):
    """Processes that hold parts of them must agree on it."""
    made = []
    kinds = {"b": np.float32, "a": np.float16, "c": np.float32, "d": np.float16}
    tensors = [
        Tensor(name, (4,), np.dtype(kind), lambda name=name, kind=kind: made.append(name) or np.zeros(4, kind))
        for name, kind in kinds.items()
    ]
    safetensors.write(tensors, tmp_path, shard_bytes=24)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert made == [tensor.name for tensor in safetensors.in_order(tensors, 24)] == ["b", "a", "c", "d"]


def test_bits_are_the_same_memory(mesh):
    """What is held as bits and given back as numbers is nowhere copied."""
    part = placement.Parts((4, 8), NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    part.fill((), np.arange(32).reshape(4, 8).astype(ml_dtypes.bfloat16))
    numbers = part.placed()
    bits = placement.viewed(numbers, np.uint16)
    again = placement.viewed(bits, ml_dtypes.bfloat16)
    addresses = [[shard.data.unsafe_buffer_pointer() for shard in a.addressable_shards] for a in (numbers, bits, again)]
    assert addresses[0] == addresses[1] == addresses[2] and bits.dtype == np.uint16
    np.testing.assert_array_equal(np.asarray(again), np.asarray(numbers))
    np.testing.assert_array_equal(placement.row(bits, 2), np.asarray(numbers)[2])
