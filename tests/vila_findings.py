"""What VILA (arXiv 2312.07533) found at 7B, asked of a small model that anyone can train on a laptop.

    python -m mmjax.main --config=configs/gallery_base.py     # once: a small language model that has only read
    python -m tests.vila_findings                             # three trainings, about ten minutes; a table, and vila_findings.json

1. Interleaved pretraining with the language model frozen or updated: captions of held-out photographs with no examples and behind
   four (CIDEr-D). The paper: frozen does as well without examples, and much worse behind four.
2. Instruction tuning on pictures alone or jointly with text: the loss of held-out text before it and after. The paper: alone, what was
   learnt of text is lost; jointly, it is kept.

The trainings are those of tests/gallery.py (which says what differs from `:tiny`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax

from mmjax.allocator import keep_freed_memory
from mmjax.config import FewShot, Recipe, Validation, from_config_dict
from mmjax.config_parsing import to_dict
from mmjax.jobs import train
from tests import gallery

WAYS = {"updated, joint": "vila", "frozen, joint": "vila:frozen", "updated, pictures alone": "vila:visual"}
SHOTS = 4


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vila_findings", description=__doc__.splitlines()[0])
    gallery.add_arguments(parser, Path("workdirs/vila_findings"))
    chosen = parser.parse_args(arguments)
    keep_freed_memory()
    rows = []
    for way, name in WAYS.items():
        workdir = chosen.out / name.replace(":", "_")
        shutil.rmtree(workdir, ignore_errors=True)
        train.run(from_config_dict(to_dict(recipe(name, chosen))), workdir)
        jax.clear_caches()
        rows.append({"way": way, **figures(workdir)})
    (chosen.out / "vila_findings.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n" + table(rows))
    return 0


def recipe(name: str, chosen: argparse.Namespace) -> Recipe:
    """The gallery's, with examples before the questions, and the loss of held-out text at the end of both stages of the language model."""
    whole = gallery.photographs(name, chosen)
    plain = dataclasses.replace(whole.evaluations["val"], blind=False)
    examples = FewShot(shots=SHOTS, source=gallery.captions(chosen.data, "train", "train", whole.model.template))
    stages = {}
    for key, stage in whole.stages.items():
        text = gallery.captions(chosen.data, "val", "eval", whole.model.template, shown="words")
        held_out = Validation(sources={"text": text}, every=stage.steps, batches=16)
        stages[key] = dataclasses.replace(stage, validation=held_out) if key in ("pretrain", "sft") else stage
    evaluations = {"zero": plain, "four": dataclasses.replace(plain, few_shot=examples)}
    return dataclasses.replace(whole, stages=stages, evaluations=evaluations)


def figures(workdir: Path) -> dict[str, float]:
    found = json.loads((workdir / "results.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["stage"]: line["validation_loss"] for line in lines if line.get("validation_loss") is not None}
    return {
        "zero": found["zero_cider_d"],
        "four": found["four_cider_d"],
        "before": losses["pretrain"],
        "after": losses["sft"],
    }


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    head = "| language model in pretraining, data of instruction tuning | CIDEr-D, 0 shots | 4 shots | text loss before tuning | after |"
    lines = [head, "|" + " --- |" * head.count(" | ") + " --- |"]
    for row in rows:
        lines.append("| " + " | ".join([row["way"], *(f"{row[key]:.3f}" for key in ("zero", "four", "before", "after"))]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
