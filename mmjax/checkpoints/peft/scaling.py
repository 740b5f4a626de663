"""IA3 and LN_TUNING in peft's directories.

    MODULE.ia3_l [out, 1], of feed-forward modules [1, in]    ia3 [out], ia3_input [in]
    MODULE.ln_tuning_layers.weight, .bias                     copies of a norm's scale and bias
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import numpy as np

from mmjax.checkpoints.peft.method import Base, Directory, Method
from mmjax.checkpoints.peft.modules import (
    PREFIX,
    Module,
    copied,
    fill,
    globs,
    modules,
    outputs,
    pattern_of,
    rows_of,
    sort_out,
    targeted,
    targets_of,
    tensor,
    written_copies,
)
from mmjax.checkpoints.safetensors import Tensor
from mmjax.errors import UserError
from mmjax.models.tuning_config import Ia3Config, NormConfig
from mmjax.tree import Params

_TUNED = {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"}


def _read_ia3(directory: Directory, base: Base) -> tuple[Ia3Config, Params]:
    fields = directory.fields
    found, values, strange = sort_out(directory, base, {"ia3_l": "ia3"})
    whole = copied(base, values)
    feeds = set(targeted(base, fields, _is_linear, "feedforward_modules"))
    covered: dict[str, set[int | None]] = defaultdict(set)
    feeding: dict[str, set[int | None]] = defaultdict(set)
    missing = [f"{PREFIX}{m.name}.ia3_l" for m in targeted(base, fields, _is_linear) if m not in found]
    for module, tensors in found.items():
        stored, feeds_here = tensors["ia3"], module in feeds
        for path in module.paths:
            covered[path].add(module.layer)
            if feeds_here:
                feeding[path].add(module.layer)
                values[path, module.layer, "ia3_input"] = lambda stored=stored: stored.read().reshape(-1)  # type: ignore[misc]
            else:
                values[path, module.layer, "ia3"] = lambda stored=stored, m=module, p=path: m.share(  # type: ignore[misc]
                    base, p, stored.read().reshape(-1)
                )
    kept = json.dumps(dict(fields))
    adapter = Ia3Config(directory.name, globs(base, covered), globs(base, feeding), whole, kept)
    return adapter, fill(directory, base, adapter, values, strange, missing)


def _write_ia3(params: Params, config: Ia3Config, base: Base, dtype: Any) -> tuple[dict[str, Any], list[Tensor]]:
    beside, copies = rows_of(params, base, config)
    made, adapted, feeds = [], [], []
    for module in modules(base).values():
        parts = [beside.pop((path, module.layer), None) for path in module.paths]
        present = [part for part in parts if part]
        if not present:
            continue
        adapted.append(module)
        if "ia3_input" in present[0]:
            first = present[0]["ia3_input"]
            if len(present) < len(parts) or not all("ia3_input" in part and np.array_equal(part["ia3_input"], first) for part in present):
                raise UserError(f"adapter {config.name!r}: {module.name} is one module in the published layout, and reads one input")
            feeds.append(module)
            made.append(tensor(f"{module.name}.ia3_l", first[None], dtype))
            continue
        rows = [np.ones(outputs(base, path), np.float32) if part is None else part["ia3"] for path, part in zip(module.paths, parts)]
        made.append(tensor(f"{module.name}.ia3_l", module.together(rows)[:, None], dtype))
    _require_all(config.name, beside)
    tensors, saved, _ = written_copies(base, copies, adapted, dtype)
    kept = json.loads(config.peft) if config.peft else {}
    fields = {
        "init_ia3_weights": True,
        **kept,
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(module.is_turned for module in adapted),
        **targets_of(base, kept, [m.name for m in adapted], _is_linear),
        **targets_of(base, kept, [m.name for m in feeds], _is_linear, "feedforward_modules"),
    }
    if isinstance(fields["target_modules"], str) != isinstance(fields["feedforward_modules"], str):
        fields |= {"target_modules": pattern_of(m.name for m in adapted), "feedforward_modules": pattern_of(m.name for m in feeds)}
    return {key: value for key, value in fields.items() if key not in ("layers_to_transform", "layers_pattern")}, made + tensors


def _read_norms(directory: Directory, base: Base) -> tuple[NormConfig, Params]:
    fields = directory.fields
    found, values, strange = sort_out(directory, base, _TUNED)
    whole = list(copied(base, values))
    covered: dict[str, set[int | None]] = defaultdict(set)
    missing = [f"{PREFIX}{m.name}.ln_tuning_layers.weight" for m in targeted(base, fields, lambda m: True) if m not in found]
    for module, tensors in found.items():
        if not module.is_norm:
            raise UserError(f"{directory.path}: LN_TUNING of {module.name}, which is no norm, is not supported")
        [path] = module.paths
        covered[path].add(module.layer)
        for kind, stored in tensors.items():
            values[path, module.layer, {"weight": "scale"}.get(kind, kind)] = stored.read
    adapter = NormConfig(directory.name, globs(base, covered), tuple(whole), json.dumps(dict(fields)))
    return adapter, fill(directory, base, adapter, values, strange, missing)


def _write_norms(params: Params, config: NormConfig, base: Base, dtype: Any) -> tuple[dict[str, Any], list[Tensor]]:
    _, copies = rows_of(params, base, config)
    made, names = [], []
    for module in modules(base).values():
        if not module.is_norm:
            continue
        [path] = module.paths
        own = {name: copies.pop((path, module.layer, name), None) for name in ("scale", "bias")}
        if own["scale"] is not None:
            names.append(module.name)
            tuned = {"weight": own["scale"], "bias": own["bias"]}
            made += [tensor(f"{module.name}.ln_tuning_layers.{kind}", row, dtype) for kind, row in tuned.items() if row is not None]
    tensors, saved, _ = written_copies(base, copies, [], dtype)
    kept = json.loads(config.peft) if config.peft else {}
    fields = {**kept, "modules_to_save": saved or None, **targets_of(base, kept, names, lambda m: True)}
    return {key: value for key, value in fields.items() if key not in ("layers_to_transform", "layers_pattern")}, made + tensors


def _is_linear(module: Module) -> bool:
    return module.is_linear


def _require_all(name: str, left: dict[tuple[str, int | None], Any]) -> None:
    if left:
        lost = ", ".join(dict.fromkeys(path for path, _ in left))
        raise UserError(f"adapter {name!r}: no module in the published layout for {lost}")


_TARGETS = "target_modules exclude_modules modules_to_save".split()
IA3 = Method(
    peft_type="IA3",
    known=frozenset([*_TARGETS, "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"]),
    read=_read_ia3,
    writes=lambda adapter: isinstance(adapter, Ia3Config),
    write=_write_ia3,
)
LN_TUNING = Method(
    peft_type="LN_TUNING",
    known=frozenset(_TARGETS),
    read=_read_norms,
    writes=lambda adapter: isinstance(adapter, NormConfig),
    write=_write_norms,
)
