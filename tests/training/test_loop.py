"""A run is the same whether or not it was killed; a NaN names its samples; frozen bytes stay; the end is what was best."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mmjax import config, tree
from mmjax.checkpoints.store import Checkpoint, newest, overlay
from mmjax.errors import UserError
from mmjax.models import multimodal
from mmjax.parallel.mesh import make_mesh
from mmjax.parallel.sharding import param_shardings
from mmjax.training import loop
from mmjax.training.trainable import select
from tests import CHEAP_XLA_FLAGS
from tests.training import small_run, tiny

ROOT = Path(__file__).resolve().parents[2]


def _lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _losses(workdir: Path) -> list[tuple]:
    keys = ("stage", "step", "loss", "gradient_norm", "learning_rate")
    return [(*(line[key] for key in keys), line.get("validation_loss")) for line in _lines(workdir)]


def _start(workdir: Path, cache: Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "XLA_FLAGS": CHEAP_XLA_FLAGS,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.small_run", str(workdir)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _wait_for_line(process: subprocess.Popen, workdir: Path, count: int, before: int = 0) -> None:
    """Until this start (which replaces the file, whose number was `before`) has written so many lines in all."""
    file = workdir / "metrics.jsonl"
    while process.poll() is None:
        if file.exists() and file.stat().st_ino != before and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    process = _start(folder / "run", folder / "cache")
    assert process.wait() == 0, process.stderr.read().decode()
    return folder


def test_the_log_has_every_step_once_with_all_its_figures(whole):
    lines = _lines(whole / "run")
    assert [(line["stage"], line["step"]) for line in lines] == [
        (stage, step) for stage in ("read", "tune") for step in range(1, 13)
    ]
    for figure in ("loss", "gradient_norm", "learning_rate", "tokens_per_second", "samples_per_second", "padding",
                   "loader_wait", "peak_memory", "epoch"):  # fmt: skip
        assert all(np.isfinite(line[figure]) for line in lines), figure
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 8, 12]
    skipped = [json.loads(line) for line in (whole / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"], line["id"]) for line in skipped] == [("read", 6, "bad5"), ("tune", 6, "bad5")]


def test_killed_at_any_moment_it_goes_on_bit_identically(whole, tmp_path):
    workdir, chance = tmp_path / "run", random.Random(0)
    file = workdir / "metrics.jsonl"
    for place in (chance.randint(1, 11), chance.randint(12, 23)):
        before = file.stat().st_ino if file.exists() else 0
        process = _start(workdir, whole / "cache")
        _wait_for_line(process, workdir, place, before)
        process.kill()
        process.wait()
    with file.open("a") as stream:
        stream.write('{"stage": "tune", "st')  # a line that a kill cut short
    process = _start(workdir, whole / "cache")
    assert process.wait() == 0, process.stderr.read().decode()
    assert _losses(workdir) == _losses(whole / "run")


def test_every_stage_reloads_from_the_workdir(whole):
    fresh = jax.tree.map(np.zeros_like, tiny.params(small_run.MODEL))
    first, last = newest(whole / "run", ("read",)), newest(whole / "run", ("read", "tune"))
    assert first.ended and last.ended and (first.step, last.step) == (12, 12)
    read, tuned = (tree.flatten(overlay(dict(fresh), found)) for found in (first, last))
    start = tree.flatten(tiny.params(small_run.MODEL))
    for path in start:
        changed_first = not np.array_equal(read[path], start[path])
        changed_last = not np.array_equal(tuned[path], read[path])
        trained_first = path.startswith("llm/embed/") or (path.startswith("llm/layers/") and path.endswith("/kernel"))
        trained_last = "/lora_" in path or (path.startswith("llm/layers/") and path.endswith("/scale"))
        assert (changed_first, changed_last) == (trained_first, trained_last), path  # frozen bytes are unchanged


def test_only_trainable_leaves_have_optimizer_state(whole):
    manifest = newest(whole / "run", ("read", "tune")).manifest
    trained = [name for name in manifest["leaves"] if name.startswith("trained/")]
    moments = [entry for entry in manifest["optimizer"] if entry[1]]
    assert len(moments) == 2 * len(trained)


def test_sigterm_saves_and_a_loss_that_is_not_finite_stops_with_the_samples(tmp_path):
    recipe = dataclasses.replace(small_run.RECIPE, run=("read",), checkpoint=config.Checkpoint(every=0))

    class Interrupting(small_run.Data):
        def batches(self, start_step=0):
            for batch, info in super().batches(start_step):
                if info.step == 7:  # fetched while step 5 or so runs
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch, info

    with pytest.raises(SystemExit) as stop:
        small_run.run(tmp_path, recipe, lambda name, _: (Interrupting(12, 0), None))
    assert stop.value.code == 143
    saved = newest(tmp_path, ("read",))
    assert 1 <= saved.step <= 8 and not saved.ended
    assert _lines(tmp_path)[-1]["step"] == saved.step

    with pytest.raises(UserError) as error:
        small_run.run(tmp_path, recipe, lambda name, _: (small_run.Data(12, 0, broken=9), None))
    assert "step 10" in str(error.value) and "9-2" in str(error.value) and "9-1" not in str(error.value)
    assert newest(tmp_path, ("read",)).step == saved.step
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 10))


def test_early_stopping_ends_with_the_best_weights(tmp_path):
    stage = dataclasses.replace(
        small_run.RECIPE.stages["read"],
        optimizer=config.Optimizer(learning_rate=0.1, schedule="constant", warmup_ratio=0.0),
        validation=config.Validation(every=1, batches=1, patience=3),
    )
    recipe = dataclasses.replace(
        small_run.RECIPE, stages={"read": stage}, run=("read",), logging=config.Logging(every=4)
    )
    params = small_run.run(tmp_path, recipe, lambda name, _: (small_run.Data(12, 0), small_run.Data(1, 1000)))
    losses = [line["validation_loss"] for line in _lines(tmp_path)]
    lowest = int(np.argmin(losses)) + 1
    assert len(losses) == lowest + 3 < 12
    final = newest(tmp_path, ("read",))
    assert final.ended and final.step == len(losses)
    path = tmp_path / "checkpoints" / "read" / f"{lowest:08d}"
    best = Checkpoint(path, json.loads((path / "manifest.json").read_text()))
    assert list((tmp_path / "tensorboard" / "read").iterdir())
    for name, leaf in best.leaves().items():
        np.testing.assert_array_equal(final.leaves()[name], leaf)
    saved = tree.flatten(overlay(multimodal.shapes(small_run.MODEL), final))
    for path, leaf in tree.flatten(params).items():  # what the run returns is what it saved
        np.testing.assert_array_equal(leaf, saved[path])


def test_no_leaf_is_held_twice():
    """What a stage begins with is taken from its caller; frozen kernels are given back as bits of the same memory."""
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), tiny.params(small_run.MODEL))
    selection = select(params, ("llm/**/lora_*",), "")
    shardings = param_shardings(params, make_mesh(config.Mesh(data=1), jax.devices()[:1]))
    before = {path: leaf.unsafe_buffer_pointer() for path, leaf in tree.flatten(params).items()}
    trainable, frozen = loop._divided(params, shardings, selection, "float32", "bfloat16")
    assert not params
    held = tree.flatten(frozen)
    assert held["llm/layers/mlp/up/kernel"].dtype == np.uint16 and len(held) + len(tree.flatten(trainable)) == len(before)
    assert all(leaf.unsafe_buffer_pointer() == before[path] for path, leaf in held.items())
    released = tree.flatten(loop.release(frozen))
    assert all(leaf.dtype == "bfloat16" and leaf.unsafe_buffer_pointer() == before[path] for path, leaf in released.items())
