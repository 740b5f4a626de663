"""What a compiled program says of itself: the compiler's cycles, collectives and large buffers, read from the text of optimised HLO.

XLA:TPU writes `estimated_cycles` beside each operation it has a cost for. A loop's body counts as often as the loop turns; of a
conditional's branches the dearest counts. What stands inside a fusion is costed with the fusion.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from typing import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
BYTES |= {"s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1}  # type: ignore[dict-item]
PALLAS = "tpu_custom_call"

_COMPUTATION = re.compile(r"^(ENTRY )?(%?[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%?[\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]\d*[a-z]*\d*[a-z]*\d*(?:fn)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply)=(%?[\w.\-]+)")
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation. `result` is the type as written; `rest` begins with the operands."""

    name: str
    result: str
    opcode: str
    rest: str

    @property
    def cycles(self) -> int:
        """The compiler's cycles of one run; 0 where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    @property
    def op(self) -> str:
        """The operation of our program that it comes from."""
        found = _NAME.search(self.rest)
        return found[1] if found else self.name

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%[\w.\-]+", self.rest.split(")")[0])


@dataclasses.dataclass(frozen=True)
class Collective:
    """`kind` with how often it is run a step, bytes of its whole result (or, reduce-scatter, its operand), devices of a group."""

    kind: str
    bytes: float
    group: int
    count: int
    op: str

    @property
    def moved(self) -> float:
        """Bytes that each device must receive, in all runs, by the best known algorithm on a ring."""
        share = (self.group - 1) / self.group if self.group else 0.0
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.bytes * factor * self.count


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel, which carries no cycles: its name, the element types and shapes of its operands, and how often it is run."""

    name: str
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    count: int


class Program:
    """The text of an optimised HLO module, parsed once.

    open_loops   the loops whose number of turns only the data decide; they count as one (after `runs` has been asked for)
    """

    def __init__(self, text: str):
        self.open_loops: set[str] = set()
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        here: list[Instruction] = []
        for line in text.splitlines():
            if begins := _COMPUTATION.match(line):
                here = self.computations.setdefault(begins[2], [])
                self.entry = begins[2] if begins[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                here.append(Instruction(*found.groups()))
        self._types = {i.name: i.result for found in self.computations.values() for i in found}

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation that is not inside a fusion is run in a step."""
        runs: dict[str, int] = collections.defaultdict(int)

        def visit(name: str, times: int) -> None:
            runs[name] += times
            for i in self.computations[name]:
                for called, count in self._called(i):
                    visit(called, times * count)

        visit(self.entry, 1)
        return dict(runs)

    def cycles(self) -> float:
        """The compiler's cycles of a step."""
        return sum(cycles for _, cycles in self.costs())

    def costs(self) -> Iterator[tuple[Instruction, float]]:
        """The operations that carry cycles, with those of all their runs."""
        for name, times in self.runs.items():
            for i in self.computations[name]:
                if i.cycles:
                    yield i, float(i.cycles * times)

    def collectives(self) -> list[Collective]:
        """Every collective. One that runs beside other work is written several times over, in a start, a done and what lies between."""
        found: list[Collective] = []
        seen: set[tuple[str, str]] = set()
        for name, times in self.runs.items():
            for i in self.computations[name]:
                inside = [] if i.opcode in ("while", "conditional") else self._inside(i)
                for computation, part in [(name, i), *inside]:
                    kind = part.opcode.removesuffix("-start")
                    if kind not in COLLECTIVES:
                        continue
                    if "async_collective_fusion_config" in part.rest:
                        channel = re.search(r"channel_id=(\d+)", part.rest)
                        key = (name, channel[1] if channel else part.name)
                        if key in seen:
                            continue
                        seen.add(key)
                    if kind == "all-reduce" and "all-reduce-scatter" in computation:
                        kind = "reduce-scatter"
                    # the start of an asynchronous one has its operands in front of its result
                    size = _size(part.result) if part.opcode == kind or kind == "all-reduce" else max(map(_bytes, _arrays(part.result)))
                    if part.opcode == "reduce-scatter":
                        size = sum(_size(self._types.get(operand, "")) for operand in part.operands)
                    found.append(Collective(kind, size, _group(part.rest), times, part.op))
        return found

    def kernels(self) -> list[Kernel]:
        """The Pallas kernels."""
        found = []
        for name, times in self.runs.items():
            for i in self.computations[name]:
                if i.opcode == "custom-call" and f'custom_call_target="{PALLAS}"' in i.rest:
                    shapes = [array for operand in i.operands for array in _arrays(self._types.get(operand, ""))]
                    found.append(Kernel(i.name, tuple(shapes), times))
        return found

    def large(self, least: float) -> list[tuple[str, float, str]]:
        """(operation, bytes, type) of results of at least so many bytes that are computed: a stacked weight among them was copied."""
        found: dict[str, tuple[str, float, str]] = {}
        plain = ("parameter", "get-tuple-element", "tuple", "while", "bitcast", "conditional", "opt-barrier", "constant")
        for name in self.runs:
            for i in self.computations[name]:
                if i.opcode in plain or i.opcode.endswith(("-done", "-start")):
                    continue
                for array in _arrays(i.result):
                    if _bytes(array) >= least:
                        kind = f"{array[0]}[{','.join(map(str, array[1]))}]"
                        found.setdefault(f"{i.op} {kind}", (i.op, _bytes(array), kind))
        return sorted(found.values(), key=lambda item: -item[1])

    def _called(self, i: Instruction) -> list[tuple[str, int]]:
        """Computations that an instruction runs, and how often."""
        if i.opcode == "while":
            body, condition = re.search(r"body=(%?[\w.\-]+)", i.rest), re.search(r"condition=(%?[\w.\-]+)", i.rest)
            assert body and condition
            return [(body[1], self._turns(i, condition[1]))]
        if i.opcode == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            branches = re.findall(r"%[\w.\-]+", listed[1]) if listed else re.findall(r"(?:true|false)_computation=(%[\w.\-]+)", i.rest)
            return [(max(branches, key=self._weight), 1)]
        if i.opcode in ("call", "async-start"):
            return [(name, 1) for name in _CALLED.findall(i.rest)]
        return []

    def _turns(self, i: Instruction, condition: str) -> int:
        """How often a loop turns: as the compiler says, or what its condition compares the counter with."""
        if known := re.search(r'known_trip_count[^\d]*(\d+)', i.rest):
            return int(known[1])
        bounds = [int(found[1]) for c in self.computations[condition] if c.opcode == "constant" and (found := re.match(r"(\d+)\)", c.rest))]
        if len(bounds) != 1:
            self.open_loops.add(i.op)
            return 1
        return bounds[0]

    def _weight(self, name: str) -> float:
        """The cycles of a computation with all it runs."""
        own = sum(i.cycles for i in self.computations[name])
        return own + sum(self._weight(called) * count for i in self.computations[name] for called, count in self._called(i))

    def _inside(self, i: Instruction) -> Iterator[tuple[str, Instruction]]:
        """What is inside a fusion, or another operation that wraps a computation."""
        for name in _CALLED.findall(i.rest) if i.opcode in ("fusion", "async-start", "custom-call") else ():
            for part in self.computations.get(name, ()):
                yield name, part
                yield from self._inside(part)


def _arrays(written: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, dimensions) of every array in a type."""
    return [(kind, tuple(int(n) for n in sizes.split(",") if n)) for kind, sizes in _ARRAY.findall(written) if kind in BYTES]


def _bytes(array: tuple[str, tuple[int, ...]]) -> float:
    return math.prod(array[1]) * BYTES[array[0]]


def _size(written: str) -> float:
    return sum(map(_bytes, _arrays(written)))


def _group(rest: str) -> int:
    """Devices that take part in a collective together."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    return 2 if "source_target_pairs" in rest else 0
