"""Parameters as the rest of the house sees them: a nested dict of arrays whose leaves have paths and are chosen by globs.

A path joins the keys with '/', e.g. `llm/layers/attention/query/kernel`. In a glob `*` stays within one component, `**`
spans any number of them, and `{a,b}` lists alternatives; `layers[20:24]` after a component chooses a range of the
stacked layers (axis 0 of every leaf below it).
"""

from __future__ import annotations

import functools
import re
from typing import Any, Mapping, Sequence

Params = dict[str, Any]

_RANGE = re.compile(r"\[(-?\d*):(-?\d*)\]")
_STACK = re.compile(r"(/layers|/plugs/[^/]+)(?=/)")


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested dict by path, in the dict's own order."""
    flat = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, path + "/"))
        else:
            flat[path] = value
    return flat


def take(params: Params) -> dict[str, Any]:
    """The leaves by path, the given dict left empty: of what they are replaced by, a leaf at a time, nobody keeps the old ones alive."""
    flat = flatten(params)
    params.clear()
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The nested dict whose leaves have these paths."""
    nested: Params = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return nested


def merge(*trees: Mapping[str, Any]) -> Params:
    """One tree with the leaves of all; a leaf of a later tree takes the place of an earlier one's."""
    merged: Params = {}
    for tree in trees:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                below = merged.get(key)
                merged[key] = merge(below, value) if isinstance(below, Mapping) else merge(value)
            else:
                merged[key] = value
    return merged


@functools.lru_cache(maxsize=4096)
def _expression(glob: str) -> re.Pattern[str]:
    pattern, i, depth = "", 0, 0
    glob = _RANGE.sub("", glob)
    while i < len(glob):
        if glob.startswith("**/", i):
            pattern, i = pattern + r"(?:[^/]+/)*", i + 3
            continue
        if glob.startswith("**", i):
            pattern, i = pattern + r".*", i + 2
            continue
        char = glob[i]
        if char == "*":
            pattern += r"[^/]*"
        elif char == "{":
            pattern, depth = pattern + "(?:", depth + 1
        elif char == "}" and depth:
            pattern, depth = pattern + ")", depth - 1
        elif char == "," and depth:
            pattern += "|"
        else:
            pattern += re.escape(char)
        i += 1
    return re.compile(pattern + r"\Z")


def matches(path: str, glob: str) -> bool:
    """Whether the glob (its layer range aside) names this path."""
    return _expression(glob).match(path) is not None


def is_stacked(path: str) -> bool:
    """Whether axis 0 of the leaf counts layers: of a stack of blocks, or of a plug that sits on some of them."""
    return "/layers/" in path or "/plugs/" in path


def adapter_of(path: str) -> str:
    """The name of the adapter whose leaf this is, wherever it stands; "" for any other."""
    found = re.search(r"(?:/(?:adapters|prompts|plugs)|^mine)/([^/]+)/", path)
    return found[1] if found and found[1] != "cross_attention" else ""


def at_layers(path: str, layers: Sequence[int], depth: int) -> list[str]:
    """Globs that name these layers (ascending) of a stacked path, of `depth` in all."""
    if len(layers) == depth:
        return [path]
    starts = [layer for layer in layers if layer - 1 not in layers]
    stops = [layer + 1 for layer in layers if layer + 1 not in layers]
    return [_STACK.sub(rf"\1[{start}:{stop}]", path, count=1) for start, stop in zip(starts, stops)]


def layer_range(glob: str) -> tuple[int | None, int | None] | None:
    """The layer range a glob carries: (20, 24) for `vision/layers[20:24]/**`, None where it has none."""
    found = _RANGE.search(glob)
    if found is None:
        return None
    start, stop = found.groups()
    return (int(start) if start else None, int(stop) if stop else None)
