"""Two real processes are one: they stop together after SIGTERM to one of them, go on, and train and answer what one process does.

`python -m tests.processes` does more of it, with whole recipes, and takes longer."""

from __future__ import annotations

import json
import signal
import sys

import numpy as np
import pytest

from mmjax.checkpoints.store import newest
from tests import CHEAP_XLA_FLAGS, processes
from tests.training import small_run

LIMIT = 600  # seconds, on a busy machine
CHEAP = {"XLA_FLAGS": CHEAP_XLA_FLAGS, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The workdir of two starts of two processes, the first stopped by SIGTERM to one of them."""
    folder = tmp_path_factory.mktemp("two")
    workdir, cheap = folder / "run", {**CHEAP, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}

    def command(place: str, count: int, process: int) -> list[str]:
        return [sys.executable, "-m", "tests.training.small_run", str(workdir), place, str(count), str(process)]

    with processes.started(2, command, folder / "stopped", **cheap) as both:
        processes.wait_for_line(both, workdir, "tune", 2, LIMIT)
        both[1].send_signal(signal.SIGTERM)
        assert processes.ended(both, LIMIT) == [143, 143], processes.said(folder / "stopped")
    before, saved = processes.lines(workdir), newest(workdir, ("tune",)).step
    assert 2 <= saved < 12 and [line["step"] for line in before] == list(range(1, saved + 1))
    with processes.started(2, command, folder / "finished", **cheap) as both:
        assert processes.ended(both, LIMIT) == [0, 0], processes.said(folder / "finished")
    assert processes.lines(workdir)[:saved] == before
    return workdir


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The workdir of this process alone."""
    workdir = tmp_path_factory.mktemp("one")
    small_run.run_on_two(workdir)
    return workdir


def test_two_processes_are_one(two, one):
    ours, theirs = processes.lines(two), processes.lines(one)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, 13))
    for name in ("loss", "gradient_norm", "validation_loss"):
        np.testing.assert_allclose([line.get(name, 0) for line in ours], [line.get(name, 0) for line in theirs], rtol=1e-5)
    assert json.loads((two / "answers.json").read_text()) == json.loads((one / "answers.json").read_text())
    saved, expected = newest(two, ("tune",)).leaves(), newest(one, ("tune",)).leaves()
    for name, leaf in expected.items():
        np.testing.assert_allclose(saved[name], leaf, atol=1e-5, rtol=1e-4)


def test_a_killed_process_gets_the_state_from_what_the_other_has_kept(two, one, tmp_path):
    """The workdir has no checkpoint; process 1, the second slice, has one on what stands for its machine's disk, and sends it to process 0."""
    workdir, kept = tmp_path / "run", tmp_path / "kept"
    cheap = {**CHEAP, "JAX_COMPILATION_CACHE_DIR": str(two.parent / "cache")}

    def command(place: str, count: int, process: int) -> list[str]:
        return [sys.executable, "-m", "tests.training.small_run", str(workdir), place, str(count), str(process), str(kept)]

    with processes.started(2, command, tmp_path / "killed", **cheap) as both:
        processes.wait_for_line(both, workdir, "tune", 6, LIMIT)
        both[0].kill()
        assert 0 not in processes.ended(both, LIMIT), processes.said(tmp_path / "killed")
    assert newest(workdir, ("tune",)) is None and [path.name for path in kept.glob("*/tune/*/*") if path.name.isdecimal()]
    before = processes.lines(workdir)
    assert len(before) >= 6
    with processes.started(2, command, tmp_path / "finished", **cheap) as both:
        assert processes.ended(both, LIMIT) == [0, 0], processes.said(tmp_path / "finished")
    ours, theirs = processes.lines(workdir), processes.lines(one)
    assert ours[:4] == before[:4]  # not done again
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=1e-5)
    assert not list(kept.glob("*/tune/*/*"))  # the stage is over


def test_one_journal_of_both_is_left(two):
    skipped = [json.loads(line) for line in (two / "skipped.jsonl").read_text().splitlines()]
    assert [(line["step"], line["id"]) for line in skipped] == [(6, "bad5")]  # of process 1
    assert not list(two.glob("*-1.jsonl"))
