"""Tries every recipe at its `tiny` size on real photographs, with the picture and without it.

    python -m mmjax.main --config=configs/gallery_base.py     # once: a small language model that has only read
    python -m tests.gallery                                   # every recipe: a table, and gallery.json beside it
    python -m tests.gallery llava15 git                       # some of them

A recipe runs through all of its own stages. What is changed beside sizes: its language model is the base's and its encoder
MobileNetV2, trained on ImageNet and frozen throughout (its features from the last layer are computed once), and a language model that a
recipe begins from nothing is as large as the base's; its data are Flickr8k's captions (documents of several pictures where it reads
interleaved documents, the captions alone where it reads text); its learning rates suit small models; its system message is empty; and a
Q-Former is trained as a whole where a recipe begins from a published one. Then it describes 500 held-out photographs, the same with the
photographs shuffled among them, and without any.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mmjax import tree
from mmjax.architecture import model_config
from mmjax.config import Evaluation, Mesh, Optimizer, Part, Recipe, Source, Stage, from_config_dict
from mmjax.config_parsing import to_dict
from mmjax.data import templates
from mmjax.models import multimodal
from mmjax.models.config import ModelConfig
from mmjax.preprocessing import read_tokenizer
from mmjax.training.trainable import select
from tests.configs import expand

SAMPLES = 8_000  # captions a recipe is trained on, over all stages
ROWS, IN_ROW = 4, 6  # rows of a step, and captions that a row has room for
JOINED = 3  # photographs with their captions in one document
TEXT = 40  # tokens of a caption and what its template puts around it
RATE = 3e-3
WIDTH = 64  # of a perceiver between the encoder and the blocks that read it
SIZE = 160  # side of the pictures; those of Flickr8k are stored at this size
HELD_OUT = 500
PICTURES = 2000  # training photographs, each with five captions
DOCUMENTS = ("mmc4", "obelics", "mimic_it")
PROMPT = "Describe the image."


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gallery", description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help="names of recipes, with arguments after a colon; none = all")
    add_arguments(parser, Path("workdirs/gallery"))
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    names = chosen.recipes or expand.systems()
    if chosen.alone:
        return _train(photographs(names[0], chosen), chosen.out)
    rows = []
    for name in names:
        workdir = chosen.out / re.sub(r"[:,=]", "_", name)
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.mkdir(parents=True)
        settings = [f"--{key}={getattr(chosen, key)}" for key in ("llm", "vision", "data", "samples")]
        command = [sys.executable, "-m", "tests.gallery", name, "--alone", f"--out={workdir}", *settings]
        began, used = time.perf_counter(), _processor_seconds()
        with (workdir / "log.txt").open("w") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        spent = {"seconds": time.perf_counter() - began, "processor_seconds": _processor_seconds() - used}
        rows.append({**_row(name, workdir, code), **spent})
        print(line(rows[-1]), flush=True)
    (chosen.out / "gallery.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n" + table(rows))
    return 0 if all(row["beats"] for row in rows) else 1


def add_arguments(parser: argparse.ArgumentParser, out: Path) -> None:
    parser.add_argument("--llm", type=Path, default=Path("workdirs/gallery_base/export"), help="directory of the small base model")
    parser.add_argument("--vision", type=Path, default=Path("../shared/data/weights/mobilenet_v2_hf"), help="a MobileNetV2")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/flickr8k"), help="directory of Flickr8k")
    parser.add_argument("--out", type=Path, default=out, help="where workdirs and the table go")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="captions a recipe is trained on")


def photographs(name: str, chosen: argparse.Namespace) -> Recipe:
    """The recipe `:tiny`, with the published parts and the photographs that were chosen."""
    name, _, argument = name.partition(":")
    full = from_config_dict(expand.config(name, argument))
    small = from_config_dict(expand.config(name, f"{argument},tiny"))
    parts = {"llm": _llm(full, small, chosen.llm), "vision": Part(path=str(chosen.vision))}
    seen: dict[str, Any] = {"feature_layers": (-1,), "post_norm": False, "keep_class_token": False}
    seen["image"] = dataclasses.replace(small.model.image, size=SIZE)
    connector = small.model.connector
    if small.model.cross_attention.every and not connector.hidden_width:  # else as wide as MobileNetV2's 1280 channels
        connector = dataclasses.replace(connector, hidden_width=WIDTH)
    if parts["llm"].path:  # its tokenizer does not know the template's marks
        tokenizer = read_tokenizer(chosen.llm)
        named = {small.model.template, *(stage.template for stage in small.stages.values())} - {""}
        marks = [mark for template in named for mark in templates.markers(template) if not templates.is_token(tokenizer, mark)]
        seen["new_tokens"] = tuple(dict.fromkeys([*small.model.new_tokens, *sorted(marks)]))
        if connector.text_vocab:  # one word more than the tokenizer that it reads with
            connector = dataclasses.replace(connector, text_vocab=len(tokenizer) + 1)
    model = dataclasses.replace(small.model, **parts, **seen, connector=connector, system="", dtype="float32")
    recipe = dataclasses.replace(small, model=model, mesh=Mesh(cpu_devices=2))
    config = model_config(recipe)
    params = multimodal.shapes(config)
    samples = chosen.samples // len(full.run)
    stages = {}
    for stage in full.run:
        stages[stage] = _stage(recipe, stage, full.stages[stage], chosen.data, config, params, samples)
    last = stages[full.run[-1]]
    held_out = Evaluation(
        source=captions(chosen.data, "val", "eval", last.template or model.template),
        metrics=("bleu", "cider"),
        blind=True,
        max_new_tokens=24,
        batch=100,
        limit=HELD_OUT,
    )
    return dataclasses.replace(
        recipe,
        stages=stages,
        evaluations={"val": held_out},
        checkpoint=dataclasses.replace(recipe.checkpoint, every=0, keep_best=0),
        logging=dataclasses.replace(recipe.logging, every=20, tensorboard=False),
    )


def captions(data: Path, part: str, split: str, template: str, **options) -> Source:
    """Flickr8k's captions, as a stage of this template reads them."""
    images = "images_train-*.tar" if part == "train" else f"images_{part}.tar"
    prompt = "" if template == "plain" else PROMPT
    options = {"split": split, "prompt": prompt, **options}
    limit = 5 * PICTURES if split == "train" else 0
    return Source(kind="captions", path=f"{data}/captions_{part}.jsonl.gz", images=f"{data}/{images}", limit=limit, options=options)


def line(row: dict) -> str:
    figures = [f"{row[key]:.3f}" if row[key] is not None else "-" for key in ("seen", "shuffled", "withheld")]
    verdict = "beats its blind twin" if row["beats"] else "DOES NOT beat its blind twin"
    return f"{row['name']:<18} CIDEr-D {figures[0]}  shuffled {figures[1]}  withheld {figures[2]}  {row['seconds']:.0f} s ({row['processor_seconds']:.0f} s of processor)  {verdict}"


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    head = "| recipe | stages | CIDEr-D | photographs shuffled | withheld | ratio | BLEU-4 | seconds | of processor |"
    lines = [head, "|" + " --- |" * head.count(" | ") + " --- |"]
    for row in rows:
        if row["seen"] is None:
            lines.append(f"| {row['name']} | failed | | | | | | {row['seconds']:.0f} | {row['processor_seconds']:.0f} |")
            continue
        ratio = row["seen"] / max(row["shuffled"], 1e-9)
        cells = [row["name"], ", ".join(row["stages"]), *(f"{row[k]:.3f}" for k in ("seen", "shuffled", "withheld"))]
        lines.append("| " + " | ".join([*cells, f"{ratio:.1f}", f"{row['bleu4']:.1f}", f"{row['seconds']:.0f}", f"{row['processor_seconds']:.0f}"]) + " |")
    return "\n".join(lines)


def _train(recipe: Recipe, workdir: Path) -> int:
    from mmjax.allocator import keep_freed_memory
    from mmjax.jobs import train

    keep_freed_memory()
    logging.getLogger("jax").setLevel(logging.ERROR)
    train.run(from_config_dict(to_dict(recipe)), workdir)
    return 0


def _processor_seconds() -> float:
    """Of all finished processes that this one started, over all cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _row(name: str, workdir: Path, code: int) -> dict:
    found = json.loads((workdir / "results.json").read_text()) if code == 0 else {}
    seen, shuffled, withheld = (found.get(f"cider_d{suffix}") for suffix in ("", "_shuffled", "_withheld"))
    stages = json.loads((workdir / "recipe.json").read_text())["run"] if code == 0 else []
    beats = seen is not None and seen >= 1.5 * shuffled and seen > withheld
    figures = {"seen": seen, "shuffled": shuffled, "withheld": withheld, "bleu4": found.get("bleu4")}
    return {"name": name, "stages": stages, **figures, "beats": beats}


def _llm(full: Recipe, small: Recipe, path: Path) -> Part:
    """The directory in place of what is published; where the recipe begins from nothing, or with an encoder-decoder, its own at the base's size."""
    own = small.model.llm
    if (full.model.path or full.model.llm.path) and own.config.get("model_type") not in ("t5", "mt5"):
        return Part(path=str(path))
    base = json.loads((path / "config.json").read_text())
    sizes = {field: base[field] for field in ("hidden_size", "intermediate_size", "num_hidden_layers") if field in own.config}
    return Part(config={**own.config, **sizes})


def _stage(
    recipe: Recipe, name: str, full: Stage, data: Path, config: ModelConfig, params: multimodal.Params, samples: int
) -> Stage:
    small = recipe.stages[name]
    leaves = [path for path in tree.flatten(params) if not path.startswith("vision/")]
    published = recipe.model.connector.kind == "qformer"  # of which there is no small one: it is trained as a whole
    globs = [*small.trainable, *(["connector/**"] if published and small.objective == "language" else [])]
    there = [glob for glob in globs if any(tree.matches(path, glob) for path in leaves)]
    sources = {key: _source(source, data, small.template or recipe.model.template) for key, source in full.sources.items()}
    rows, in_row = max(ROWS, small.accumulate * 2), IN_ROW
    if not small.packing:
        in_row = max(1, *(source.join for source in sources.values()))
        rows *= IN_ROW // in_row
    return dataclasses.replace(
        small,
        trainable=tuple(there),
        sources=sources,
        validation=dataclasses.replace(small.validation, sources={}, every=0),
        steps=max(1, samples // (rows * in_row)),
        rows=rows,
        length=TEXT if small.objective == "contrastive" else in_row * (config.tokens_per_tile + TEXT),
        tiles=in_row if small.tiles else 0,
        cache_features=True,
        optimizer=_optimizer(small.optimizer, list(select(params, there, name).leaves)),
        dtype="float32",
        remat="none",
    )


def _optimizer(published: Optimizer, trained: list[str]) -> Optimizer:
    """The published one with a rate for small models; the rates of parts stay in proportion."""
    there = {glob: rate for glob, rate in published.multipliers.items() if any(tree.matches(path, glob) for path in trained)}
    chosen = {"learning_rate": RATE, "schedule": "cosine", "warmup_steps": 0, "warmup_ratio": 0.1, "clip_norm": 1.0}
    return dataclasses.replace(published, multipliers=there, **chosen)


def _source(source: Source, data: Path, template: str) -> Source:
    if not source.images and source.kind not in DOCUMENTS:
        return captions(data, "train", "train", template, shown="words")
    join = JOINED if source.kind in DOCUMENTS or source.join > 1 else 1
    kept = {"weight": source.weight, "loss_weight": source.loss_weight, "join": join}
    return dataclasses.replace(captions(data, "train", "train", template), **kept)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main(sys.argv[1:]))
