"""What each of several processes holds that load, train and write a model together, measured: `python -m tests.processes_7b DIR` (to be run
by hand; it takes 28 GB on disk and 17 GB of memory).

Writes a Llama of 7B parameters in bfloat16 to DIR (see tests.load_7b). Four processes on this machine, a CPU device each, then put
LLaVA's model together over the mesh tensor=4 (with fsdp each would gather a layer, which XLA:CPU does in float32), train its connector
for some steps, save the checkpoint and write the whole in Hugging Face's layout. All the while each one's anonymous memory is sampled (what is mapped from the files does not count: the system can drop
it at any time). `--small` tries it with 1/40 of the size. DIR is deleted afterwards.

Fails where a process takes more than its own shards, the largest tensor and 1 GiB, or where what is written is not what was read.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import config
from tests import load_7b

PROCESSES = 4
BESIDE = 2**30  # what a process may take beside its shards and the largest tensor: Python, JAX, programs, one layer of the step
STEPS = 2
HEARTBEAT = 600  # seconds: a machine whose memory is nearly full stands still at times
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}


def recipe(directory: Path) -> config.Recipe:
    align = config.Stage(
        sources={"captions": config.Source(kind="digits", options={"task": "caption", "size": 64})},
        steps=STEPS,
        rows=PROCESSES,
        length=48,
        packing=False,
        template="plain",
        optimizer=config.Optimizer(learning_rate=1e-3),
        dtype="bfloat16",
        remat="full",
    )
    return config.Recipe(
        name="processes",
        model=config.Model(
            llm=config.Part(path=str(directory / "llm")),
            vision=config.Part(config=TOWER),
            feature_layers=(-2,),
            template="v1",
            dtype="bfloat16",
        ),
        stages={"align": align},
        run=("align",),
        mesh=config.Mesh(data=1, tensor=PROCESSES),
        logging=config.Logging(every=1, tensorboard=False),
    )


class WithoutTorch(PathFinder):
    """Finds no torch: only the tests have it, and transformers would import it where it is, for 0.2 GB."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


def act(directory: Path, address: str, process: int) -> None:
    """One of the processes: prints what it held in each phase, and what it owns."""
    from mmjax.allocator import keep_freed_memory

    sys.meta_path[:] = [WithoutTorch if finder is PathFinder else finder for finder in sys.meta_path]
    keep_freed_memory()  # as the command does
    phase, peaks, done = ["start"], dict[str, int](), threading.Event()

    def watch() -> None:
        while not done.wait(load_7b.SAMPLE_SECONDS):
            peaks[phase[0]] = max(peaks.get(phase[0], 0), load_7b.anonymous("self"))

    from mmjax.parallel import cluster

    threading.Thread(target=watch, daemon=True).start()
    with cluster.joined(cluster.Asked(address, PROCESSES, process, heartbeat=HEARTBEAT)):
        owned = _run(directory, phase)
    done.set()
    print("RESULT", json.dumps({"peaks": peaks, "owned": owned}), flush=True)


def _run(directory: Path, phase: list[str]) -> int:
    import jax

    from mmjax import tree
    from mmjax.assembly import assemble
    from mmjax.checkpoints.store import Store
    from mmjax.jobs.train import _pipelines
    from mmjax.parallel.mesh import make_mesh
    from mmjax.parallel.sharding import param_shardings
    from mmjax.training.loop import Run, train
    from mmjax.training.termination import noting_sigterm

    asked = recipe(directory)
    workdir, mesh = directory / "workdir", make_mesh(asked.mesh)
    workdir.mkdir(exist_ok=True)
    logging.basicConfig(level=logging.INFO)
    phase[0] = "load"
    model = assemble(asked, workdir, functools.partial(param_shardings, mesh=mesh))
    jax.block_until_ready(model.params)
    owned = sum(s.data.nbytes for leaf in tree.flatten(model.params).values() for s in leaf.addressable_shards)
    phase[0] = "train and save"
    with noting_sigterm() as terminating:
        store = Store(workdir, asked.checkpoint, model.bases)
        params = train(
            Run(asked, workdir, mesh, store, terminating),
            model.config,
            model.params,
            set(model.own),
            lambda name, params: _pipelines(name, asked, dataclasses.replace(model, params=params), mesh, workdir),
        )
        store.close()
    phase[0] = "write"
    dataclasses.replace(model, params=params).save_pretrained(directory / "written", layout="hf", dtype="bfloat16")
    return owned


def prepare(directory: Path, sizes: dict[str, int]) -> tuple[int, int]:
    """Writes the language model and its tokenizer; returns the bytes of the whole and of its largest tensor."""
    from mmjax import vocabulary
    from mmjax.data import templates
    from mmjax.data.digits import DigitScenes

    total = load_7b.write(directory / "llm", sizes)
    template = templates.get("plain", None, "")
    texts = (segment.text for sample in DigitScenes(task="caption", size=64) for segment in template.segments(sample.messages))
    vocabulary.train(texts, kind="word", markers=templates.markers("v1")).save_pretrained(directory / "llm")
    return total, 2 * sizes["hidden_size"] * max(sizes["vocab_size"], sizes["intermediate_size"])


def equal(directory: Path) -> bool:
    """Whether the language model was written as it was read, vocabulary rows that it got aside."""
    from mmjax.checkpoints import weights

    before, after = weights.read(directory / "llm"), weights.read(directory / "written")
    names = {name: next(n for n in after if f".{n}".endswith(f".{name.removeprefix('model.')}")) for name in before}
    return all(np.array_equal(tensor.read(), after[names[name]].read()[: tensor.shape[0]]) for name, tensor in before.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a directory that does not exist yet")
    parser.add_argument("--small", action="store_true", help="1/40 of the size")
    parser.add_argument("--layers", type=int, help="of so many layers alone: less memory, and the same beside a process's shards")
    parser.add_argument("--act", nargs=2, metavar=("ADDRESS", "PROCESS"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.act:
        return act(chosen.directory, chosen.act[0], int(chosen.act[1]))
    if chosen.directory.exists():
        raise SystemExit(f"{chosen.directory} exists already; name one that does not, it is deleted in the end")
    try:
        sizes = dict(load_7b.SIZES["small" if chosen.small else "7b"])
        sizes["num_hidden_layers"] = chosen.layers or sizes["num_hidden_layers"]
        total, largest = prepare(chosen.directory, sizes)
        print(f"{total / 1e9:.2f} GB of weights, the largest tensor {largest / 1e9:.2f} GB", flush=True)
        began = time.perf_counter()
        results = run_all(chosen.directory)
        print(f"loaded, trained, saved and written by {PROCESSES} processes in {time.perf_counter() - began:.0f} s")
        failed = not equal(chosen.directory)
        print("written as it was read" if not failed else "FAIL: what was written is not what was read")
    finally:
        shutil.rmtree(chosen.directory, ignore_errors=True)
    for number, result in enumerate(results):
        peak, allowed = max(result["peaks"].values()), result["owned"] + largest + BESIDE
        phases = ", ".join(f"{name} {bytes / 1e9:.2f}" for name, bytes in result["peaks"].items())
        print(f"process {number}: {peak / 1e9:.2f} GB at most ({phases}); own shards {result['owned'] / 1e9:.2f} GB, allowed {allowed / 1e9:.2f} GB: "
              f"{'pass' if peak <= allowed else 'FAIL'}")  # fmt: skip
        failed |= peak > allowed
    if failed:
        raise SystemExit(1)


def run_all(directory: Path) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.processes_7b", str(directory), "--act", address]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    started = [subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True, env=environment) for number in range(PROCESSES)]
    try:
        said = [process.communicate()[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise SystemExit(f"processes failed with the exit codes {[process.returncode for process in started]}")
    return [json.loads(next(line for line in text.splitlines() if line.startswith("RESULT")).removeprefix("RESULT")) for text in said]


if __name__ == "__main__":
    main()
