"""Nested dataclasses from and to nested dictionaries, with an account of everything that does not fit.

Nothing here knows what a recipe is: the dataclasses' own annotations say what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from typing import Any, Iterable, Literal, Mapping, TypeVar

from mmjax.errors import UserError

T = TypeVar("T")
Word = bool | str | int | float | tuple[str, ...]


def parse(kind: type[T], values: Mapping[str, Any]) -> tuple[T, list[str]]:
    """An instance of the dataclass `kind` from nested mappings, and the problems met, each naming its full dotted key.

    A key that is absent takes its default. Lists are taken for tuples and whole numbers for floats.
    """
    problems: list[str] = []
    known = [key for key in dotted_keys(values) if not unknown_keys(kind, values, [key])]
    known += [key for key in dotted_keys(to_dict(kind())) if key not in known]
    return _dataclass(kind, values, "", known, problems), problems


def to_dict(value: Any) -> Any:
    """Dataclasses as nested dictionaries, every field present; everything else as it is, mappings copied."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def unknown_keys(kind: type, values: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Those dotted keys that neither a field of `kind` nor an entry of `values` answers to.

    A dictionary of dataclasses (a recipe's stages) knows the entries it has; a free dictionary takes any key.
    """
    return [key for key in keys if not _known(kind, values, key.split("."))]


def nearest(key: str, known: Iterable[str]) -> str:
    """The known dotted key most like this one: a sibling, else one of the same last name elsewhere, else any."""
    *parents, last = key.split(".")
    known = list(known)
    siblings = [other.split(".")[-1] for other in known if other.split(".")[:-1] == parents]
    close = difflib.get_close_matches(last, siblings, n=1, cutoff=0.7)
    if close:
        return ".".join([*parents, close[0]])
    elsewhere = [other for other in known if difflib.SequenceMatcher(None, last, other.split(".")[-1]).ratio() > 0.8]
    candidates = elsewhere or known
    return max(candidates, key=lambda other: difflib.SequenceMatcher(None, key, other).ratio())


def dotted_keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every key of nested mappings, the inner nodes included."""
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            keys += dotted_keys(value, f"{prefix}{key}.")
    return keys


def parse_arguments(argument: str, words: Mapping[str, Word]) -> types.SimpleNamespace:
    """What follows the colon of `--config=configs/NAME.py:13b,peft=lora,tiny`, as attributes.

    `words` gives each name its default, which also says what it takes:
      False               a word that is there or not            {"tiny": False}             `tiny`
      a tuple             one of these, the first by default      {"size": ("7b", "13b")}     `13b` or `size=13b`
      a number or string  a value of that type                    {"data": ""}                `data=my.jsonl`
    Raises UserError for a word or value that is not among these, listing those that are.
    """
    chosen: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in argument.split(","))):
        name, value = _argument(item, words)
        if chosen.setdefault(name, value) != value:
            raise UserError(f"config argument {item!r}: {name} was already given as {chosen[name]!r}.")
    defaults = {name: word[0] if isinstance(word, tuple) else word for name, word in words.items()}
    return types.SimpleNamespace(**{**defaults, **chosen})


def _argument(item: str, words: Mapping[str, Word]) -> tuple[str, Any]:
    name, equals, value = item.partition("=")
    if not equals:
        if words.get(item) is False:
            return item, True
        for choice, allowed in words.items():
            if isinstance(allowed, tuple) and item in allowed:
                return choice, item
    word = words.get(name)
    if equals and isinstance(word, tuple) and value in word:
        return name, value
    if equals and word is not None and not isinstance(word, (bool, tuple)):
        try:
            return name, type(word)(value)
        except ValueError:
            raise UserError(f"config argument {item!r}: {name} takes {_noun(type(word))}, {value!r} is none.") from None
    known = "; ".join(_usage(name, word) for name, word in words.items()) or "none"
    raise UserError(f"config argument {item!r} is not known to this recipe. It knows: {known}.")


def _usage(name: str, word: Word) -> str:
    if isinstance(word, tuple):
        return f"{name}={'|'.join(word)} (or the bare word)"
    return name if isinstance(word, bool) else f"{name}={word!r}"


@functools.cache  # of a recipe's hundreds of keys each asks
def _fields(kind: Any) -> dict[str, Any]:
    """Field name -> type of a dataclass, annotations resolved."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _known(kind: Any, values: Any, key: list[str]) -> bool:
    if not key:
        return True
    first, *rest = key
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        inner = values.get(first, {}) if isinstance(values, Mapping) else {}
        return first in _fields(kind) and _known(_fields(kind)[first], inner, rest)
    if typing.get_origin(kind) is dict:
        item = typing.get_args(kind)[1]
        if not dataclasses.is_dataclass(item):
            return True
        return isinstance(values, Mapping) and first in values and _known(item, values[first], rest)
    return False


def _dataclass(kind: Any, values: Any, path: str, known: list[str], problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{path} must be a group of keys ({', '.join(_fields(kind))}), not {values!r}.")
        return kind()
    prefix = f"{path}." if path else ""
    fields = _fields(kind)
    for key in values:
        if key not in fields:
            near = nearest(f"{prefix}{key}", known)
            problems.append(f"{prefix}{key} is not a key of a recipe; the nearest one is {near}.")
    return kind(
        **{
            name: _value(expected, values[name], f"{prefix}{name}", known, problems)
            for name, expected in fields.items()
            if name in values
        }
    )


def _value(kind: Any, value: Any, path: str, known: list[str], problems: list[str]) -> Any:
    """`value` as the annotation `kind` wants it; what cannot be is added to `problems`."""
    if kind is Any:
        return list(value) if isinstance(value, list) else to_dict(value)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, path, known, problems)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f"{path} must be a group of keys, not {value!r}.")
            return {}
        return {key: _value(arguments[1], item, f"{path}.{key}", known, problems) for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            problems.append(f"{path} must be a list of {_noun(arguments[0], plural=True)}, not {value!r}.")
            return ()
        items = [item for entry in value for item in _split(entry)]
        return tuple(
            _value(arguments[0], item, f"{path}[{index}]", known, problems) for index, item in enumerate(items)
        )
    if origin is Literal:
        if value not in arguments:
            near = difflib.get_close_matches(str(value), [str(item) for item in arguments], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            allowed = ", ".join(repr(item) for item in arguments)
            problems.append(f"{path} is {value!r}; it must be one of {allowed}.{hint}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _value(next(item for item in arguments if item is not type(None)), value, path, known, problems)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        problems.append(f"{path} must be {_noun(kind)}, not {value!r}.")
    return value


def _split(entry: Any) -> list[Any]:
    """`a,b` on the command line is two entries; a comma within braces belongs to a glob."""
    return re.split(r",(?![^{]*\})", entry) if isinstance(entry, str) else [entry]


def _noun(kind: Any, plural: bool = False) -> str:
    one, many = {
        int: ("a whole number", "whole numbers"),
        float: ("a number", "numbers"),
        str: ("a string", "strings"),
        bool: ("true or false", "true or false"),
    }.get(kind, ("a name", "names"))
    return many if plural else one
