"""The mesh's sizes."""

import dataclasses
import math
import types

import jax
import numpy as np
import pytest

from mmjax import config
from mmjax.config import Recipe, to_config_dict
from mmjax.errors import UserError
from mmjax.main import _override
from mmjax.parallel.mesh import AXES, arranged, data_shards, make_mesh, own_shards
from mmjax.parallel.presets import PRESETS, mesh_sizes


def test_one_axis_takes_what_is_left():
    mesh = make_mesh(config.Mesh(data=-1, fsdp=2, tensor=2))
    assert mesh.axis_names == AXES and dict(mesh.shape) == dict(data=2, fsdp=2, tensor=2, sequence=1, expert=1)
    assert data_shards(mesh) == 4
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    "sizes", [dict(data=3), dict(data=16), dict(data=4), dict(data=-1, fsdp=-1), dict(data=0), dict(data=3, expert=2)]
)
def test_sizes_that_do_not_fit_are_errors(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(config.Mesh(**sizes))


def test_by_itself_weights_are_divided_over_all_devices():
    assert dict(make_mesh(PRESETS["auto"]).shape) == dict(data=1, fsdp=8, tensor=1, sequence=1, expert=1)
    assert dict(make_mesh(PRESETS["auto"], jax.devices()[:1]).shape) == dict.fromkeys(AXES, 1)


@pytest.mark.parametrize("name", [name for name in PRESETS if ":" in name])
def test_a_preset_fits_its_slice(name):
    sizes = [getattr(PRESETS[name], axis) for axis in AXES]
    assert math.prod(sizes) == math.prod(map(int, name.split(":")[1].split("x")))


def test_the_command_line_takes_names_and_sizes():
    def given(*arguments: str) -> config.Mesh:
        changed = _override(to_config_dict(Recipe(mesh=config.Mesh(sequence=2))), list(arguments))
        return config.Mesh(**changed.mesh.to_dict())

    assert given("--config.mesh=v5e:16x16") == config.Mesh(data=1, fsdp=64, tensor=4)
    assert given("--config.mesh=fsdp=4,tensor=2") == config.Mesh(data=-1, fsdp=4, tensor=2)
    assert given("--config.mesh=auto", "--config.mesh.tensor=2") == config.Mesh(data=0, fsdp=-1, tensor=2)
    assert given("--config.mesh.fsdp=4") == config.Mesh(fsdp=4, sequence=2)


@pytest.mark.parametrize("text", ["v5e:4x4", "fsdp=4,heads=2", "fsdp", "fsdp=two", ""])
def test_other_words_for_a_mesh_are_errors(text):
    with pytest.raises(UserError, match="fsdp=64,tensor=4.*v5e:16x16"):
        mesh_sizes(text)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What of a TPU decides where it stands in a mesh."""

    coords: tuple[int, ...]
    slice_index: int
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"


def test_slices_are_parts_of_data():
    chips = [Chip((x, y, 0), number) for number in (1, 0) for x in range(4) for y in range(4)]
    grid = arranged((4, 4, 2, 1, 1), chips, slices=2)
    assert np.vectorize(lambda chip: chip.slice_index)(grid).reshape(4, -1).tolist() == [[0] * 8] * 2 + [[1] * 8] * 2
    with pytest.raises(UserError, match="2 slices, which do not divide data=1"):
        make_mesh(config.Mesh(data=1, fsdp=-1), chips)


@pytest.mark.parametrize(
    "sizes, processes, shards",
    [
        (dict(data=4), 2, [(0, 1), (2, 3)]),
        (dict(data=2, fsdp=2), 4, [(0,), (1,), (2,), (3,)]),
        (dict(data=2, tensor=2), 2, [(0,), (1,)]),
        (dict(tensor=2), 2, [(0,), (0,)]),  # one shard over both: they bring the same rows
        (dict(data=2, tensor=2), 4, [(0,), (0,), (1,), (1,)]),
        (dict(fsdp=2, sequence=2), 4, [(0,), (0,), (1,), (1,)]),
    ],
)
def test_a_process_brings_the_rows_of_its_devices_shards(monkeypatch, sizes, processes, shards):
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    count = int(np.prod(list(shape.values())))
    devices = [types.SimpleNamespace(process_index=i * processes // count) for i in range(count)]
    mesh = types.SimpleNamespace(shape=shape, devices=np.array(devices, object).reshape(*shape.values()))
    for process, own in enumerate(shards):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        assert own_shards(mesh) == own


def test_shards_may_lie_apart(monkeypatch):
    devices = [types.SimpleNamespace(process_index=process) for process in (0, 1, 0, 1)]
    mesh = types.SimpleNamespace(shape=dict(data=4, fsdp=1, expert=1), devices=np.array(devices, object).reshape(4, 1, 1, 1, 1))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert own_shards(mesh) == (1, 3)
