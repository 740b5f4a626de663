"""Training with 1, 2 and 4 real processes on this machine, killed and gone on with by other numbers of them. Not part of the suite:

    python -m tests.processes FOLDER [--steps=4] [--config=configs/quickstart.py] [--config.KEY=VALUE ...]
    python -m tests.processes FOLDER --faults

Trains the quickstart, a few steps of each stage, with its evaluation and its export: once in one process, once for every mesh of RUNS, and
once more in several starts (CHAIN), each stopped by a signal to one process and gone on with by another number of them. Prints for each the
largest difference of a step's loss from that of one process, whether all answers are the same, the largest difference of an exported
weight, and what became of the processes. Takes half an hour on two cores; a run that is in FOLDER already is not made again.

`--faults`: two processes of a small recipe, of which one meets what ends a run (FAULTS), and what each of them says."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mmjax.main import read_command

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1800  # seconds for one start, on a busy machine

# Name, processes, mesh. Where `tensor` or `fsdp` go over processes, parameters do; with data = 1 all processes read all rows.
RUNS = (
    ("one", 1, ("cpu_devices=2",)),
    ("two", 2, ("cpu_devices=1",)),
    ("two, tensor", 2, ("cpu_devices=1", "data=1", "tensor=2")),
    ("four, fsdp and tensor", 4, ("cpu_devices=1", "data=1", "fsdp=2", "tensor=2")),
)
# Processes, mesh, and after which share of all steps what is sent to the last of them.
CHAIN = (
    (2, ("cpu_devices=1",), (0.4, signal.SIGKILL)),
    (4, ("cpu_devices=1", "fsdp=2"), (0.6, signal.SIGTERM)),
    (1, ("cpu_devices=2",), None),
)
# What is wrong, and the options that make it so. A picture that is cut off breaks when it is decoded, in the process whose row it is.
FAULTS = (
    ("a loss that is not finite", ("stages.see.optimizer.learning_rate=1e30", "stages.see.sources.scenes.path=cut_0.jsonl")),
    ("one picture is cut off", ("loader.max_broken=0.5", "stages.see.sources.scenes.path=cut_1.jsonl")),
    ("many pictures are cut off", ("stages.see.sources.scenes.path=cut_8.jsonl",)),
    ("many pictures are cut off, features are kept", ("stages.see.cache_features=true", "stages.see.sources.scenes.path=cut_8.jsonl")),
    ("a file that is not there", ("stages.see.sources.scenes.path=absent.jsonl",)),
)


def main(arguments: Sequence[str]) -> None:
    if "--faults" in arguments:
        return faults(Path(next(a for a in arguments if a != "--faults")).resolve())
    folder, own = Path(arguments[0]), [a for a in arguments[1:] if a.startswith("--config.")]
    chosen = dict(a[2:].split("=", 1) for a in arguments[1:] if a not in own)
    config, steps = chosen.get("config", "configs/quickstart.py"), int(chosen.get("steps", "4"))
    recipe, _, _ = read_command([f"--config={config}", *own])
    every = [(stage, step) for stage in recipe.run for step in range(1, steps + 1)]
    given = [f"--config={config}", *(f"--config.stages.{stage}.steps={steps}" for stage in recipe.run), "--config.logging.every=1"]
    given += ["--config.logging.tensorboard=false", "--config.checkpoint.every=1", "--heartbeat=20", *own]
    given += [f"--config.evaluations.{name}.{size}" for name in recipe.evaluations for size in ("limit=48", "batch=16")]
    print(f"{'run':24}{'steps':>7}{'loss differs by':>17}{'answers':>9}{'weights by':>12}   {'exit codes, seconds'}")
    for name, count, mesh in RUNS:
        workdir = folder / name.replace(", ", "-").replace(" ", "-")
        _report(folder, name, workdir, [] if _is_done(workdir) else [_run(workdir, count, [*given, *_mesh(mesh)])])
    workdir, told = folder / "chain", []
    if not _is_done(workdir):
        for count, mesh, event in CHAIN:
            at = every[round(event[0] * len(every)) - 1] if event else None
            told.append(_run(workdir, count, [*given, *_mesh(mesh)], at, event[1] if event else None))
    _report(folder, "two, killed; four; one", workdir, told)


def faults(folder: Path) -> None:
    """The exit codes, and the last line that each of two processes says, for each of FAULTS."""
    pictures = folder / "pictures"
    _pictures(pictures)
    for number, (name, options) in enumerate(FAULTS):
        given = ["--config=tests/parallel/small_recipe.py", "--config.stages.see.cache_features=false", "--config.evaluations={}"]
        given += ["--config.stages.see.sources.scenes.kind=messages", f"--config.stages.see.sources.scenes.images={pictures}"]
        given += ["--config.stages.see.sources.scenes.options={}", "--heartbeat=20"]
        given += [f"--config.{option.replace('path=', f'path={pictures}/')}" for option in options]
        workdir = folder / str(number)

        def command(place: str, count: int, process: int) -> list[str]:
            others = [f"--coordinator={place}", f"--processes={count}", f"--process={process}"]
            return [sys.executable, "-m", "mmjax.main", *given, f"--workdir={workdir}", *others]

        with started(2, command, workdir / "logs") as processes:
            codes = ended(processes, LIMIT)
        print(f"\n{name}: {codes}", flush=True)
        for log in sorted((workdir / "logs").glob("*.log")):
            print(f"  {log.stem}: {log.read_text().strip().splitlines()[-1]}", flush=True)


def _pictures(folder: Path) -> None:
    """32 of the digits' questions with their pictures as files: cut_N.jsonl, where those of the first N are cut off."""
    from mmjax.config import Source
    from mmjax.data import messages, sources

    folder.mkdir(parents=True, exist_ok=True)
    digits = sources.open(Source(kind="digits", options={"split": "train", "task": "questions", "size": 32}))
    rows = []
    for index in range(32):
        sample = digits[index]
        name = messages.images(sample.messages)[0]["path"]
        digits.image(name).save(folder / name)
        whole = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(whole[: len(whole) // 2])
        rows.append((sample, name))
    for cut in (0, 1, 8):
        with (folder / f"cut_{cut}.jsonl").open("w") as file:
            for index, (sample, name) in enumerate(rows):
                text = json.dumps({"id": sample.id, "messages": sample.messages})
                file.write((text.replace(name, f"cut_{name}") if index < cut else text) + "\n")


def _mesh(sizes: Sequence[str]) -> list[str]:
    return [f"--config.mesh.{size}" for size in sizes]


def _is_done(workdir: Path) -> bool:
    return (workdir / "README.md").exists()


def _run(
    workdir: Path, count: int, given: Sequence[str], at: tuple[str, int] | None = None, sent: signal.Signals | None = None
) -> str:
    """Starts the processes, sends the last of them a signal after that step of that stage, and waits for all; says how they ended."""

    def command(place: str, count: int, process: int) -> list[str]:
        others = [f"--coordinator={place}", f"--processes={count}", f"--process={process}"] if count > 1 else []
        return [sys.executable, "-m", "mmjax.main", *given, f"--workdir={workdir}", *others]

    with started(count, command, workdir / "logs") as processes:
        if at is not None and sent is not None:
            wait_for_line(processes, workdir, *at, LIMIT)
            processes[-1].send_signal(sent)
        began = time.monotonic()
        codes = ended(processes, LIMIT)
    if at is None and any(codes):
        raise SystemExit(f"{workdir}: exit codes {codes}\n{said(workdir / 'logs')}")
    what = f"{sent.name} after {at[0]} {at[1]}: " if sent and at else ""
    return f"{what}{codes} after {time.monotonic() - began:.0f} s"


def _report(folder: Path, name: str, workdir: Path, told: Sequence[str]) -> None:
    ours, one = ({(line["stage"], line["step"]): line["loss"] for line in lines(place)} for place in (workdir, folder / "one"))
    if list(ours) != list(one) or len(lines(workdir)) != len(ours):
        raise SystemExit(f"{workdir}/metrics.jsonl does not have each step once, in order: {list(ours)}")
    loss = max(abs(ours[at] - one[at]) / abs(one[at]) for at in one)
    files = sorted(file.name for file in (folder / "one").glob("answers_*.jsonl"))
    same = "same" if all((workdir / file).read_text() == (folder / "one" / file).read_text() for file in files) else "differ"
    print(f"{name:24}{len(ours):>7}{loss:>17.1e}{same:>9}{weights_differ(workdir, folder / 'one'):>12.1e}   {'; '.join(told)}", flush=True)


def weights_differ(workdir: Path, other: Path) -> float:
    """The largest difference of an exported weight (the bias of keys has no gradient but rounding, of which Adam makes steps of the learning
    rate: of such a tensor any share may differ)."""
    from mmjax.checkpoints import safetensors

    ours, theirs = (safetensors.read(place / "export" / "model.safetensors") for place in (workdir, other))
    assert set(ours) == set(theirs)
    return max(float(np.abs(np.float32(ours[name].read()) - np.float32(theirs[name].read())).max()) for name in ours)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def started(
    count: int, command: Callable[[str, int, int], list[str]], folder: Path, **environment: str
) -> Iterator[list[subprocess.Popen]]:
    """`count` processes, each of the command for HOST:PORT, their number and its own; what it says goes to `folder`/N.log. None is left
    behind."""
    folder.mkdir(parents=True, exist_ok=True)
    place, processes = f"127.0.0.1:{free_port()}", []
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # which may say how many devices there are
    known = {**inherited, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment}
    try:
        for number in range(count):
            with (folder / f"{number}.log").open("a") as log:
                quiet = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
                processes.append(subprocess.Popen(command(place, count, number), cwd=ROOT, env=known, **quiet))
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def ended(processes: Sequence[subprocess.Popen], seconds: float) -> list[int]:
    """The exit codes; raises TimeoutError where they do not come within so many seconds."""
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        if time.monotonic() > until:
            raise TimeoutError(f"after {seconds} s: exit codes {[process.poll() for process in processes]}")
        time.sleep(0.05)
    return [process.returncode for process in processes]


def said(folder: Path) -> str:
    """What the processes said, the end of it."""
    return "\n".join(f"-- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("*.log")))


def lines(workdir: Path) -> list[dict]:
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for_line(processes: Sequence[subprocess.Popen], workdir: Path, stage: str, step: int, seconds: float) -> None:
    """Until that step has been written, or a process has ended."""
    until = time.monotonic() + seconds
    while not any(line["stage"] == stage and line["step"] >= step for line in lines(workdir)):
        if any(process.poll() is not None for process in processes):
            return
        if time.monotonic() > until:
            raise TimeoutError(f"{stage}, step {step} did not come within {seconds} s")
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1:])
