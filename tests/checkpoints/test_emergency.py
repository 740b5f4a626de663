"""Which runs may keep checkpoints on their machines. What they keep and get back: tests/parallel/test_processes.py."""

import types

import jax
import numpy as np
import pytest

from mmjax import config
from mmjax.checkpoints.emergency import Emergency, slices_have_processes
from mmjax.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    "owners, kept",
    [([[0, 0], [1, 1]], True), ([[0, 1], [2, 3]], True), ([[0, 1]], False), ([[0, 0], [0, 0]], False), ([[0, 1], [1, 2]], False)],
)
def test_slices_have_processes_of_their_own(owners, kept):
    devices = np.array([[types.SimpleNamespace(process_index=owner) for owner in part] for part in owners])
    assert slices_have_processes(types.SimpleNamespace(devices=devices)) is kept


def test_a_process_alone_keeps_nothing_and_says_so(tmp_path, caplog):
    options, mesh = config.Checkpoint(local=str(tmp_path / "near")), make_mesh(config.Mesh(data=2), jax.devices()[:2])
    assert Emergency.of(config.Checkpoint(), tmp_path, "see", mesh, None) is None and not caplog.text
    assert Emergency.of(options, tmp_path, "see", mesh, None) is None
    assert "checkpoint.local is not used" in caplog.text and not list(tmp_path.iterdir())
