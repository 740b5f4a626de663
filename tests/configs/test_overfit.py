"""Every recipe at its `tiny` size learns a few handwriting scenes by heart, one after the other in one process on one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import CHEAP_XLA_FLAGS
from tests.configs import expand

ROOT = Path(__file__).resolve().parents[2]
RECIPES = expand.systems()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    directory = tmp_path_factory.mktemp("overfit")
    environment = {**os.environ, "XLA_FLAGS": CHEAP_XLA_FLAGS}
    command = [sys.executable, "-m", "tests.configs.overfit", str(directory), *RECIPES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((directory / "losses.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_tiny_recipe_learns_a_few_scenes_by_heart(name, found):
    assert "failed" not in found[name], found[name]["failed"]
    for stage, (first, last) in found[name].items():
        assert last < 0.9 * first, f"{stage}: the loss went from {first:.3f} to {last:.3f}"
