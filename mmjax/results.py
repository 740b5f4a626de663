"""WORKDIR/results.json: every figure a job shows, as flat names to numbers, so that a program can read what a person sees."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Mapping


def record(workdir: Path, figures: Mapping[str, float]) -> None:
    """Adds figures to those of earlier jobs; a figure of the same name is replaced. The file is never seen half written.

    A figure that is not finite becomes null, since JSON has no other word for it."""
    path = workdir / "results.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    shown = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    workdir.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.new")
    beside.write_text(json.dumps({**known, **shown}, indent=1) + "\n")
    os.replace(beside, path)
