"""Key tables: one list of rules between foreign tensors and our leaves, read in both directions.

A rule names a foreign tensor and the leaf (or leaves) that it holds. `{i}` in the name stands for the layer, `{e}` for the
expert: such tensors are the rows of one stacked leaf [layers, ...] or [layers, experts, ...]. mmjax.families.reading fills leaves
from files, mmjax.families.writing makes foreign tensors of leaves.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Callable, Iterable, Mapping

import numpy as np

from mmjax import tree
from mmjax.checkpoints.safetensors import Stored
from mmjax.errors import UserError
from mmjax.tree import Params

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """How a foreign tensor is laid out: its shape from ours, and the array both ways (views where possible)."""

    shape: Callable[[Shape], Shape]
    ours: Callable[[np.ndarray], np.ndarray]
    foreign: Callable[[np.ndarray], np.ndarray]


same = Form(lambda shape: shape, lambda a: a, lambda a: a)
transposed = Form(lambda shape: shape[::-1], lambda a: a.T, lambda a: a.T)
"""torch's Linear: [out, in]; ours [in, out]."""
convolution = Form(
    lambda s: (s[3], s[2], s[0], s[1]), lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)
)
"""torch's Conv2d: [out, in, height, width]; ours [height, width, in, out]."""
counter = Form(lambda shape: (), lambda a: a, lambda a: a)
"""A count of training steps that torch keeps beside a leaf and nothing reads: passed over on reading, written as 0."""


def patches(channels: int) -> Form:
    """A convolution over square patches: [out, channels, p, p]; ours [(row, column, channel), out]."""

    def side(pixels: int) -> int:
        return round((pixels // channels) ** 0.5)

    return Form(
        lambda s: (s[1], channels, side(s[0]), side(s[0])),
        lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
        lambda a: a.reshape(side(a.shape[0]), side(a.shape[0]), channels, a.shape[1]).transpose(3, 2, 0, 1),
    )


def flat_patches(channels: int) -> Form:
    """A Linear over square patches whose pixels are laid out (channel, row, column): [out, channels * p * p]; ours
    [(row, column, channel), out]."""
    square = patches(channels)

    def whole(a: np.ndarray) -> np.ndarray:
        side = round((a.shape[1] // channels) ** 0.5)
        return a.reshape(len(a), channels, side, side)

    return Form(
        lambda s: (s[1], s[0]), lambda a: square.ours(whole(a)), lambda a: square.foreign(a).reshape(a.shape[1], -1)
    )


def leading(ones: int) -> Form:
    """The same behind so many axes of size 1."""
    return Form(
        lambda s: (1,) * ones + s, lambda a: a.reshape(a.shape[ones:]), lambda a: a.reshape((1,) * ones + a.shape)
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """The foreign tensor(s) `name` hold the leaves `paths`, in this form, one after another on the foreign axis `axis`.

    groups   into how many equal runs that axis is cut, each of which holds its share of every leaf (GPT-NeoX: one for each head)
    numbers  what `{i}` is for the 1st, 2nd, ... row of the leaf, where that is not 0, 1, ... (a plug's layers)
    """

    name: str
    paths: tuple[str, ...]
    form: Form = same
    axis: int = 0
    groups: int = 1
    numbers: tuple[int, ...] = ()

    @property
    def stacked(self) -> int:
        """How many leading axes of the leaves are spread over tensors."""
        return ("{i}" in self.name) + ("{e}" in self.name)

    def index(self, shape: Shape) -> list[tuple[int, ...]]:
        """For a leaf of this shape, which rows of it the foreign tensors hold, in order."""
        return list(np.ndindex(*shape[: self.stacked]))

    def foreign_name(self, at: tuple[int, ...]) -> str:
        """The tensor that holds this row."""
        axes = [axis for axis in ("{i}", "{e}") if axis in self.name]
        name = self.name
        for axis, i in zip(axes, at):
            name = name.replace(axis, str(self.number(i) if axis == "{i}" else i))
        return name

    def number(self, row: int) -> int:
        """What `{i}` is for this row of the leaf."""
        return self.numbers[row] if self.numbers else row


def rule(name: str, *paths: str, form: Form = same, axis: int = 0, groups: int = 1) -> Rule:
    return Rule(name, paths, form, axis, groups)


def linear(name: str, path: str, bias: bool = True) -> list[Rule]:
    """The rules of a torch Linear: `name`.weight and `name`.bias."""
    rules = [rule(f"{name}.weight", f"{path}/kernel", form=transposed)]
    return rules + [rule(f"{name}.bias", f"{path}/bias")] if bias else rules


def norm(name: str, path: str, bias: bool = True) -> list[Rule]:
    """The rules of a norm: `name`.weight and `name`.bias."""
    rules = [rule(f"{name}.weight", f"{path}/scale")]
    return rules + [rule(f"{name}.bias", f"{path}/bias")] if bias else rules


def numbered(numbers: tuple[int, ...], rules: Iterable[Rule]) -> list[Rule]:
    """The same rules for leaves whose rows are these layers."""
    return [dataclasses.replace(r, numbers=numbers) if "{i}" in r.name else r for r in rules]


def prefixed(prefix: str, rules: Iterable[Rule]) -> list[Rule]:
    """The same rules for foreign names that begin with `prefix`."""
    return [dataclasses.replace(r, name=prefix + r.name) for r in rules]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where one row of a leaf is (or all of it, if it is not stacked): `start:stop` of each group on an axis of a foreign tensor."""

    name: str
    rule: Rule
    start: int
    stop: int
    shape: Shape  # of the whole foreign tensor

    def cut(self, whole: np.ndarray) -> np.ndarray:
        """This piece of the foreign tensor, in the foreign form."""
        if len(self.rule.paths) == 1:
            return whole
        axis, groups = self.rule.axis, self.rule.groups
        if groups == 1:
            return whole[(slice(None),) * axis + (slice(self.start, self.stop),)]
        parts = whole.reshape(*whole.shape[:axis], groups, -1, *whole.shape[axis + 1 :])
        parts = parts[(slice(None),) * (axis + 1) + (slice(self.start, self.stop),)]
        return parts.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 1 :])


def joined(r: Rule, parts: list[np.ndarray]) -> np.ndarray:
    """The foreign tensor made of its parts, in the foreign form."""
    if len(parts) == 1:
        return parts[0]
    if r.groups == 1:
        return np.concatenate(parts, r.axis)
    apart = [p.reshape(*p.shape[: r.axis], r.groups, -1, *p.shape[r.axis + 1 :]) for p in parts]
    whole = np.concatenate(apart, r.axis + 1)
    return whole.reshape(*whole.shape[: r.axis], -1, *whole.shape[r.axis + 2 :])


def renamed(stored: Mapping[str, Stored], spellings: Iterable[tuple[str, str]]) -> dict[str, Stored]:
    """The tensors under the names of the key table, whichever of its spellings the file uses.

    spellings: (regular expression, replacement), applied in order. Raises UserError where two tensors become the same.
    """
    found: dict[str, Stored] = {}
    for name, tensor in stored.items():
        for pattern, replacement in spellings:
            name = re.sub(pattern, replacement, name)
        if name in found:
            raise UserError(f"{tensor.file}: {found[name].name} and {tensor.name} are two spellings of the same tensor")
        found[name] = tensor
    return found


def names(r: Rule, shapes: Params) -> list[str]:
    """The foreign names that a rule stands for."""
    return [piece.name for row in pieces([r], tree.flatten(shapes)).values() for piece in row]


def pieces(rules: list[Rule], flat: Mapping[str, Any]) -> dict[str, list[Piece]]:
    """For each leaf, the pieces of its rows (one where it is not stacked)."""
    found: dict[str, list[Piece]] = {}
    for r in rules:
        if r.form is counter:
            continue
        for path in r.paths:
            if path in found:
                raise ValueError(f"two rules fill {path}")
            if path not in flat:
                raise ValueError(f"rule {r.name} fills {path}, which the model does not have")
        shapes = [r.form.shape(tuple(flat[path].shape[r.stacked :])) for path in r.paths]
        whole = shapes[0]
        if len(shapes) > 1:
            whole = (*whole[: r.axis], sum(shape[r.axis] for shape in shapes), *whole[r.axis + 1 :])
        start = 0
        for path, shape in zip(r.paths, shapes):
            stop = start + (shape[r.axis] // r.groups if shape else 1)
            names = [r.foreign_name(at) for at in r.index(flat[path].shape)]
            found[path] = [Piece(name, r, start, stop, whole) for name in names]
            start = stop
    return found
