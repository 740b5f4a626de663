"""The mesh's sizes."""

import jax
import pytest

from mmjax import config
from mmjax.errors import UserError
from mmjax.parallel.mesh import AXES, data_shards, make_mesh


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
