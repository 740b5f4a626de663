"""Every recipe at its `tiny` size learns a few handwriting scenes by heart; each in a process of its own, on one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.configs import expand

ROOT = Path(__file__).resolve().parents[2]
OTHERS = {"continue_from_hf", "flickr8k", "gallery_base", "quickstart"}  # not published systems
RECIPES = sorted({name for name, _ in expand.variants()} - OTHERS)


@pytest.mark.parametrize("name", RECIPES)
def test_tiny_recipe_learns_a_few_scenes_by_heart(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.configs.overfit", name, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for stage, (first, last) in json.loads(done.stdout.splitlines()[-1]).items():
        assert last < 0.9 * first, f"{stage}: the loss went from {first:.3f} to {last:.3f}"
