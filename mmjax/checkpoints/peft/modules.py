"""The modules of a base as peft knows them, and what of them stands where among our leaves.

A module is named as it is in memory on the family's transformers class. Files may know it otherwise: by the names of the base's
own files, by those of an older transformers, or by those of a class without the head (`layers.0` for `model.layers.0`).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Callable, Iterable, Mapping

import jax
import numpy as np

from mmjax import tree
from mmjax.checkpoints import weights
from mmjax.checkpoints.peft.method import Base, Directory, Fields
from mmjax.checkpoints.safetensors import Stored, Tensor
from mmjax.errors import UserError
from mmjax.families.keys import Piece, Rule, joined, same, transposed
from mmjax.models import adapter_places, adapters
from mmjax.models.tuning_config import Adapter
from mmjax.parallel.placement import row
from mmjax.tree import Params

PREFIX = "base_model.model."
# (path of ours, layer or None, name of the leaf) -> that layer of it
Values = dict[tuple[str, int | None, str], Callable[[], np.ndarray]]
_EMBEDDING = f"{adapter_places.EMBED}/embedding"


@dataclasses.dataclass(frozen=True)
class Module:
    """A module with a weight: its names, the rule of that weight, and the layer of our leaves that it is (None: they have none)."""

    name: str
    table_name: str
    rule: Rule = dataclasses.field(compare=False)
    layer: int | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Those of ours that it holds, one after another."""
        return tuple(path.rpartition("/")[0] for path in self.rule.paths)

    @property
    def is_linear(self) -> bool:
        return all(path.endswith("/kernel") for path in self.rule.paths) and self.rule.form in (transposed, same)

    @property
    def is_turned(self) -> bool:
        """Whether it keeps its weight [in, out] (transformers' Conv1D)."""
        return self.is_linear and self.rule.form is same

    @property
    def is_table(self) -> bool:
        return self.rule.paths == (_EMBEDDING,)

    @property
    def is_norm(self) -> bool:
        return self.rule.paths[0].endswith("/scale")

    def share(self, base: Base, path: str, whole: np.ndarray) -> np.ndarray:
        """What a path of ours has of an array that counts the module's outputs on axis 0."""
        sizes = [outputs(base, p) // self.rule.groups for p in self.paths]
        k = self.paths.index(path)
        along = dataclasses.replace(self.rule, form=same, axis=0)
        return Piece("", along, sum(sizes[:k]), sum(sizes[: k + 1]), ()).cut(whole)

    def together(self, parts: list[np.ndarray]) -> np.ndarray:
        """The module's array of the parts of its paths, each counting outputs on axis 0."""
        return joined(dataclasses.replace(self.rule, form=same, axis=0), parts)


def modules(base: Base) -> dict[str, Module]:
    """All modules with a weight that has a place among our leaves, by name; a head that is tied to the table of tokens among them."""
    found, flat = {}, tree.flatten(base.params)
    table = [r for r in base.rules if r.name.endswith(".weight") and "{e}" not in r.name and r.paths[0] in flat]
    tied = base.config.llm is not None and base.config.llm.has_head and base.config.llm.tied_head
    copies = {**base.family.copies(base.config), **base.family.copies_in(base.config, base.foreign)} if tied else {}
    originals = {r.name for r in table if r.paths == (_EMBEDDING,)}
    table += [Rule(name, (f"{adapter_places.HEAD}/kernel",), transposed) for name, of in copies.items() if of in originals]
    for rule in table:
        shape = flat[rule.paths[0]].shape if rule.paths[0] in flat else ()
        for at in rule.index(shape):
            own = rule.foreign_name(at).removesuffix(".weight")
            name = in_memory(base, own)
            found[name] = Module(name, own, rule, at[0] if at else None)
    return found


def in_memory(base: Base, name: str) -> str:
    """The name that a module or parameter of the table has in memory."""
    for pattern, replacement in base.family.modules:
        name = re.sub(pattern, replacement, name)
    return name


def spellings(base: Base, name: str) -> Iterable[str]:
    """What a file's name may be in the table."""
    for candidate in (name, f"model.{name}", name.removeprefix("model.")):
        yield candidate
        spelled = f"{candidate}.weight"
        for pattern, replacement in base.family.spellings:
            spelled = re.sub(pattern, replacement, spelled)
        yield spelled.removesuffix(".weight")


def sort_out(
    directory: Directory, base: Base, suffixes: Mapping[str, str]
) -> tuple[dict[Module, dict[str, Stored]], Values, dict[str, Stored]]:
    """The directory's tensors: module -> kind -> tensor, for names that end in one of `suffixes` (suffix -> kind); copies of whole
    leaves, as values; and those that fit nothing."""
    known = modules(base)
    by_name = {m.table_name: m for m in known.values()} | known
    whole = _whole(base)
    found: dict[Module, dict[str, Stored]] = {}
    copies: Values = {}
    strange = {}
    for full, tensor in directory.tensors.items():
        name = full.removeprefix(PREFIX)
        suffix = next((s for s in suffixes if name.endswith(f".{s}")), None)
        if suffix is not None:
            module = next((by_name[s] for s in spellings(base, name.removesuffix(f".{suffix}")) if s in by_name), None)
            if module is not None and suffixes[suffix] not in found.get(module, {}):
                found.setdefault(module, {})[suffixes[suffix]] = tensor
                continue
        parent, _, last = name.replace(".modules_to_save.", ".").rpartition(".")
        hit = next((whole[f"{s}.{last}"] for s in spellings(base, parent) if f"{s}.{last}" in whole), None)
        if hit is None:
            strange[full] = tensor
            continue
        copies |= _copies(base, *hit, tensor)
    return found, copies, strange


def _whole(base: Base) -> dict[str, tuple[Rule, tuple[int, ...]]]:
    """The base's tensors by name: its rule, and which row of our leaves it is."""
    flat, found = tree.flatten(base.params), {}
    rules = [*base.rules, *(m.rule for m in modules(base).values() if m.paths == (adapter_places.HEAD,))]
    for rule in rules:
        at_head = rule.paths[0] not in flat
        if at_head and rule.paths != (f"{adapter_places.HEAD}/kernel",):
            continue
        for at in rule.index(() if at_head else flat[rule.paths[0]].shape):
            name = rule.foreign_name(at)
            found[name] = found[in_memory(base, name)] = rule, at
    return found


def _copies(base: Base, rule: Rule, at: tuple[int, ...], tensor: Stored) -> Values:
    flat, start = tree.flatten(base.params), 0
    made: Values = {}
    for path in rule.paths:
        shape = flat[path].shape[rule.stacked :] if path in flat else flat[_EMBEDDING].shape[::-1]
        foreign = rule.form.shape(tuple(shape))
        stop = start + (foreign[rule.axis] // rule.groups if foreign else 1)
        piece = Piece(tensor.name, rule, start, stop, foreign)
        site, _, name = path.rpartition("/")
        made[site, at[0] if at else None, name] = lambda piece=piece: rule.form.ours(piece.cut(tensor.read()))  # type: ignore[misc]
        start = stop
    return made


def changed_under(base: Base, module: Module, stored: Stored) -> Values:
    """What a file's own copy of the weight under an adapter (peft keeps that of tables) says anew: nothing where it is as in the base. A
    head that is tied to the table changes with it."""
    whole = module.rule.form.ours(stored.read())
    [path] = module.rule.paths
    flat = tree.flatten(base.params)
    now = flat[path] if path in flat else flat[_EMBEDDING].T
    if whole.shape == tuple(now.shape) and np.array_equal(np.asarray(whole.astype(now.dtype)), np.asarray(now)):
        return {}
    site, _, name = path.rpartition("/")
    made: Values = {(site, module.layer, name): lambda: whole}
    if module.is_table and any(m.paths == (adapter_places.HEAD,) and f"{adapter_places.HEAD}/kernel" not in flat for m in modules(base).values()):
        made[adapter_places.HEAD, None, "kernel"] = lambda: whole.T
    return made


def targeted(base: Base, fields: Fields, can: Callable[[Module], bool], key: str = "target_modules") -> list[Module]:
    """The modules that a config's `target_modules` (or another field) chooses, by peft's rules, among those that `can` be."""
    wanted, excluded, saved = fields.get(key), fields.get("exclude_modules"), fields.get("modules_to_save") or []
    layers, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern") or []
    indices = [layers] if isinstance(layers, int) else layers or []
    shapes = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([patterns] if isinstance(patterns, str) else patterns)] or [r".*?\.[^.]*\.(\d+)\."]

    def chosen(name: str, module: Module) -> bool:
        if _named(excluded, name) or any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in saved):
            return False
        if wanted == "all-linear":
            return module.is_linear and module.paths != (adapter_places.HEAD,)
        if not isinstance(wanted, str) and name not in (wanted or []) and indices:
            number = next((int(m[1]) for shape in shapes if (m := re.match(shape, name))), None)
            return _named(wanted, name) and number in indices
        return _named(wanted, name)

    def names(module: Module) -> set[str]:
        own = {module.name, module.table_name}
        return own | {n.removeprefix("model.") for n in own}

    return [m for m in modules(base).values() if can(m) and any(chosen(name, m) for name in names(m))]


def _named(names: Any, name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == n or name.endswith(f".{n}") for n in names or [])


def by_pattern(pattern: Mapping[str, Any] | None, module: Module, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    for name in (module.name, module.table_name):
        for key, value in (pattern or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
    return default


def globs(base: Base, covered: Mapping[str, set[int | None]]) -> tuple[str, ...]:
    """Path -> layers as targets of ours."""
    flat, made = tree.flatten(base.params), []
    for path, layers in covered.items():
        if None in layers:
            made.append(path)
            continue
        depth = next(leaf.shape[0] for p, leaf in flat.items() if p.rpartition("/")[0] == path)
        made += tree.at_layers(path, sorted(layer for layer in layers if layer is not None), depth)
    return tuple(made)


def fill(directory: Directory, base: Base, adapter: Adapter, values: Values, strange: Iterable[str], missing: Iterable[str]) -> Params:
    """The adapter's leaves, of the values read. Raises UserError listing what is missing, what is too much, and what has another
    shape."""
    config = dataclasses.replace(base.config, adapters=(adapter,))
    shapes = {path: leaf for path, leaf in tree.flatten(base.params).items() if "/adapters/" not in path}
    under = jax.eval_shape(lambda params: params, tree.unflatten(shapes))
    drawn = tree.flatten(jax.eval_shape(lambda p: adapters.draw(jax.random.key(0), p, config), under))
    lacking, wrong, used, made = list(missing), [], set(), {}
    for place in adapter_places.places(under, config, adapter):
        for name in adapter_places.names(place, drawn):
            shape, rows = drawn[f"{place.at}/{name}"].shape, []
            for layer in (None,) if place.layers is None else place.layers:
                key = (place.path, layer, name)
                used.add(key)
                if key not in values:
                    lacking.append(f"{name} of {place.path}" + ("" if layer is None else f" in layer {layer}"))
                    continue
                row = np.asarray(values[key](), np.float32)
                if row.shape != tuple(shape[layer is not None :]):
                    wrong.append(f"{name} of {place.path} is {list(row.shape)}, not {list(shape[layer is not None :])}")
                rows.append(row)
            if len(rows) == (1 if place.layers is None else len(place.layers)) and not wrong:
                whole = rows[0] if place.layers is None else np.stack(rows)
                if not weights.is_finite(whole):
                    weights.refuse_broken([f"{name} of {place.path}"], directory.path, whole.dtype)
                made[f"{place.at}/{name}"] = jax.device_put(whole)
    beyond = [f"{name} of {path}" for path, layer, name in values if (path, layer, name) not in used]
    problems = {"missing": lacking, "of another shape": wrong, "that fit nothing in its base": [*strange, *dict.fromkeys(beyond)]}
    if any(problems.values()):
        said = [f"  {what} ({len(names)}): {', '.join(names[:20])}" for what, names in problems.items() if names]
        raise UserError("\n".join([f"{directory.path}: the adapter's tensors do not fit its config and its base:", *said]))
    return tree.unflatten(made)


def copied(base: Base, values: Values) -> tuple[str, ...]:
    """The leaves that copies read so far are of."""
    return tuple(dict.fromkeys(f"{path}/{name}" for path, _, name in values))


def rows_of(
    params: Params, base: Base, adapter: Adapter
) -> tuple[dict[tuple[str, int | None], dict[str, np.ndarray]], dict[tuple[str, int | None, str], np.ndarray]]:
    """An adapter's float32 leaves layer by layer: beside Linears and tables, path and layer -> name -> array; and the copies."""
    flat = tree.flatten(params)
    beside: dict[tuple[str, int | None], dict[str, np.ndarray]] = {}
    copies: dict[tuple[str, int | None, str], np.ndarray] = {}
    for place in adapter_places.places(params, base.config, adapter):
        for name in adapter_places.names(place, flat):
            whole = np.asarray(row(flat[f"{place.at}/{name}"]), np.float32)
            for k, layer in enumerate((None,) if place.layers is None else place.layers):
                one = whole if layer is None else whole[k]
                if place.copies:
                    copies[place.path, layer, name] = one
                else:
                    beside.setdefault((place.path, layer), {})[name] = one
    return beside, copies


def written_copies(
    base: Base, copies: dict[tuple[str, int | None, str], np.ndarray], adapted: list[Module], dtype: Any, biases: bool = False
) -> tuple[list[Tensor], list[str], str]:
    """The tensors of an adapter's copies, the names of the modules saved whole, and of the one of which rows are. With `biases` those of
    modules that are not saved whole stand alone."""
    made, saved, tokens = [], [], ""
    around, wrapped = modules(base), {(path, module.layer): module for module in adapted for path in module.paths}
    if (rows := copies.pop((adapter_places.EMBED, None, "rows"), None)) is not None:
        tokens = next(m.name for m in around.values() if m.is_table)
        made.append(tensor(f"{tokens}.token_adapter.trainable_tokens_delta", rows, dtype))
    table: dict[str, tuple[Rule, tuple[int, ...]]] = {name: found for name, found in _whole(base).items() if in_memory(base, name) == name}
    for name, (rule, at) in table.items():
        layer = at[0] if at else None
        keys = [(*path.rpartition("/")[::2], layer) for path in rule.paths]
        held = [copies.pop((site, layer, leaf), None) for site, leaf, _ in keys]
        if all(row is None for row in held):
            continue
        parent, _, last = name.rpartition(".")
        rows_now = [base_row(base, path, layer) if row is None else row for path, row in zip(rule.paths, held)]
        if (keys[0][0], layer) in wrapped:
            parent = f"{parent}.base_layer"
        elif not (biases and last == "bias"):
            saved.append(parent)
        made.append(tensor(f"{parent}.{last}", joined(rule, [rule.form.foreign(row) for row in rows_now]), dtype))
    saved = list(dict.fromkeys(saved))
    there = {t.name for t in made}
    for name, (rule, at) in table.items():  # a module is saved with all it has
        if name.rpartition(".")[0] in saved and PREFIX + name not in there:
            rows_now = [base_row(base, path, at[0] if at else None) for path in rule.paths]
            made.append(tensor(name, joined(rule, [rule.form.foreign(row) for row in rows_now]), dtype))
    if copies:
        lost = ", ".join(dict.fromkeys(f"{path}/{name}" for path, _, name in copies))
        raise UserError(f"no module in the published layout for the copies of {lost}")
    return made, saved, tokens


def base_row(base: Base, path: str, layer: int | None) -> np.ndarray:
    """One layer of a leaf of the base, float32."""
    flat = tree.flatten(base.params)
    leaf = flat[path] if path in flat else flat[_EMBEDDING].T
    return np.asarray(row(leaf, layer), np.float32)


def tensor(name: str, array: np.ndarray, dtype: Any) -> Tensor:
    kind = np.dtype(dtype or np.float32)
    return Tensor(PREFIX + name, array.shape, kind, lambda: np.ascontiguousarray(array, kind))


def outputs(base: Base, path: str) -> int:
    """How many outputs a Linear, or the table of tokens (its width), has."""
    flat = tree.flatten(base.params)
    if path == adapter_places.EMBED:
        return int(flat[_EMBEDDING].shape[1])
    return int(flat[f"{path}/kernel"].shape[-1] if f"{path}/kernel" in flat else flat[_EMBEDDING].shape[0])


def targets_of(
    base: Base, kept: Mapping[str, Any], names: list[str], can: Callable[[Module], bool], key: str = "target_modules"
) -> dict[str, Any]:
    """What a config says of these targets: as it was `kept` where that still chooses them, else their names."""
    if kept and {module.name for module in targeted(base, kept, can, key)} == set(names):
        return {key: kept.get(key)}
    return {key: pattern_of(names), "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}


def pattern_of(names: Iterable[str]) -> str:
    """A regular expression for exactly these names of modules, those that differ in one number together."""
    groups: dict[tuple[str, str], list[int]] = {}
    alone = []
    for name in names:
        if match := re.match(r"(.*?\.)(\d+)(\..*)$", name):
            groups.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            alone.append(re.escape(name))
    made = [f"{re.escape(a)}({'|'.join(map(str, sorted(numbers)))}){re.escape(b)}" for (a, b), numbers in groups.items()]
    return "(" + "|".join(made + alone) + ")"
