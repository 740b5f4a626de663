"""What a run says about itself: a line for each logging step, metrics.jsonl, TensorBoard, the first table."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp

from mmjax import flops, tree
from mmjax.models import quantised
from mmjax.training.trainable import Selection
from mmjax.tree import Params

if TYPE_CHECKING:
    from mmjax.data.pipeline import Info


class Journal:
    """A JSONL file whose lines carry `stage` and `step`, and which can be taken back to the step of a checkpoint. Other processes write
    beside it, into NAME-N.jsonl."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """The whole lines; one that a kill cut short is left out."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def last(self, stage: str) -> int:
        """The last step of a stage that has a line; 0 where none has."""
        return max((line["step"] for line in self.read() if line["stage"] == stage), default=0)

    def rewind(self, run: Sequence[str], stage: str, step: int) -> None:
        """Drops what lies beyond `step` of `stage`: the run is about to do it again."""
        self.gather()
        done = run.index(stage)
        kept = [
            line
            for line in self.read()
            if line["stage"] not in run[done:] or (line["stage"] == stage and line["step"] <= step)
        ]
        self._replace(kept)

    def gather(self) -> None:
        """Brings in what other processes have written, each line once."""
        others = sorted(self.path.parent.glob(f"{self.path.stem}-*{self.path.suffix}"))
        if others:
            lines = [json.dumps(line) for journal in (self, *map(Journal, others)) for line in journal.read()]
            self._replace([json.loads(line) for line in dict.fromkeys(lines)])
        for other in others:
            other.unlink()

    def _replace(self, lines: Sequence[Mapping[str, Any]]) -> None:
        beside = self.path.with_suffix(".new")
        beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        beside.replace(self.path)

    def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line. What is not a finite number becomes null, since JSON has no other word for it."""
        numbers = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **numbers}) + "\n")


class Board:
    """TensorBoard: one graph for each stage and figure, over the stage's steps."""

    def __init__(self, folder: Path, stage: str, first_step: int):
        import tensorboardX  # here, since it brings in torch for seconds where that happens to be installed

        # Events after a kill are purged where the run goes on.
        self._writer = tensorboardX.SummaryWriter(str(folder / stage), purge_step=first_step, flush_secs=10)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Speed:
    """Rates over the last steps that are done.

    cost     FLOPs of the stage, see mmjax.flops; encoded: the encoder runs (it does not where its features are cached)
    window   steps that the rates are taken over. The first step, which compiles, counts until there is another.
    """

    def __init__(self, cost: flops.Flops, encoded: bool, window: int):
        self.cost, self.encoded = cost, encoded
        self._paused = 0.0
        self._done: collections.deque[tuple[float, Info, float]] = collections.deque(maxlen=window + 1)
        self._start = time.perf_counter()

    def count(self, info: Info, wait: float) -> None:
        """A step is done; its batch was waited for `wait` seconds."""
        self._done.append((time.perf_counter() - self._paused, info, wait))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside (validation) is not training."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """step_seconds, tokens_per_second (real tokens), samples_per_second, padding and loader_wait (shares), peak_memory (bytes), and
        mfu where the device's peak is known. Rows of other processes are taken to be like this one's."""
        first, *steps = self._done
        start, steps = (first[0], steps) if steps else (self._start, [first])
        seconds, infos = steps[-1][0] - start, [info for _, info, _ in steps]
        device = jax.devices()[0]
        values = {
            "step_seconds": seconds / len(steps),
            "tokens_per_second": sum(info.tokens / info.share for info in infos) / seconds,
            "samples_per_second": sum(info.samples / info.share for info in infos) / seconds,
            "padding": sum(info.padding for info in infos) / len(infos),
            "loader_wait": sum(wait for _, _, wait in steps) / seconds,
            "peak_memory": peak_memory(),
        }
        done = sum(self._flops(info) / info.share for info in infos)
        mfu = flops.mfu(done, seconds, jax.device_count(), device.device_kind)
        return values if mfu is None else {**values, "mfu": mfu}

    def _flops(self, info: Info) -> float:
        read, written = info.tokens - info.answers, info.answers
        shares = [[n / info.samples] * info.samples if n and info.samples else [] for n in (read, written)]
        # of an encoder-decoder what its encoder reads stands apart
        lengths, sources = reversed(shares) if written else shares
        return sum(self.cost.count(lengths, info.supervised, info.tiles, self.encoded, sources).values())


def peak_memory() -> int:
    """Bytes: the most that a local device has held, or, on devices that do not count (CPUs), this process."""
    held = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if any(held):
        return max(held)
    kibibytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibytes


def format_line(stage: str, step: int, steps: int, values: Mapping[str, Any], seconds_left: float) -> str:
    """The line of the log for a step."""
    words = [f"{stage} {step}/{steps}"]
    if "loss" in values:
        parts = [f"{name[5:]} {value:.3f}" for name, value in values.items() if name.startswith("loss_")]
        words.append(
            f"loss {values['loss']:.4f}{' (' + ', '.join(parts) + ')' if parts else ''}  grad {values['gradient_norm']:.3g}  lr {values['learning_rate']:.3g}  "
            f"{values['tokens_per_second']:,.0f} tok/s  {values['samples_per_second']:,.1f} samples/s  "
            f"padding {values['padding']:.1%}  loader {values['loader_wait']:.1%}  {values['peak_memory'] / 2**30:.2f} GiB"
        )
        words.append(f"MFU {values['mfu']:.1%}" if "mfu" in values else "MFU - (peak unknown)")
    if "validation_loss" in values:
        words.append(f"held-out loss {values['validation_loss']:.4f}")
    words.append(f"{_shown_time(seconds_left)} left")
    return "  ".join(words)


def parameter_table(params: Params, selection: Selection) -> str:
    """Parts with their parameters, those that a stage trains, and bytes as held."""
    parts: dict[str, Params] = {}
    for path, leaf in tree.flatten(params).items():
        name = "adapters" if tree.adapter_of(path) else path.split("/")[0]
        parts.setdefault(name, {})[path] = leaf
    lines = [f"{'part':12} {'parameters':>15} {'trainable':>15} {'bytes':>12}"]
    rows = {**parts, "total": {path: leaf for leaves in parts.values() for path, leaf in leaves.items()}}
    for name, leaves in rows.items():
        size = quantised.count(tree.unflatten(leaves))
        held = sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves.values())
        lines.append(f"{name:12} {size:15,} {selection.count(leaves):15,} {held / 2**20:8,.1f} MiB")
    return "\n".join(lines)


class Clock:
    """How long the rest of a stage will take."""

    def __init__(self, start: int, steps: int):
        self._first, self._steps = start + 1, steps
        self.restart()

    def restart(self) -> None:
        """The first step, which compiles, is done."""
        self._began = time.perf_counter()

    def left(self, step: int) -> float:
        """Seconds."""
        done = max(1, step - self._first)
        return (time.perf_counter() - self._began) / done * (self._steps - step)


@dataclasses.dataclass
class Best:
    """The validation losses of a stage: the last, the lowest, and how many there were since the lowest."""

    last: float | None = None
    loss: float = math.inf
    since: int = 0

    def see(self, loss: float) -> None:
        self.last = loss
        self.since = 0 if loss < self.loss else self.since + 1
        self.loss = min(self.loss, loss)


def _shown_time(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
