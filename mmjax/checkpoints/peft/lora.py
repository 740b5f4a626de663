"""LoRA in peft's directories, with DoRA, rsLoRA, ranks and alphas by pattern, biases, and modules saved whole.

    MODULE.lora_A.weight [rank, in], lora_B.weight [out, rank]       lora_a [in, rank], lora_b [rank, out]
    MODULE.lora_embedding_A [rank, vocab], lora_embedding_B [width, rank]    the same of the table of tokens
    MODULE.lora_B.bias, lora_magnitude_vector [out]                  lora_bias, lora_magnitude
    MODULE.base_layer.bias, OTHER.bias, SAVED.weight                 copies of our leaves
    EMBED.token_adapter.trainable_tokens_delta [k, width]            rows: values, not differences

A module that is several Linears of ours (fused queries, keys and values) is read as an adapter of each with the same lora_a. Where
these have gone ways of their own it is written with their ranks added up: all lora_a above one another, each with its own part of
lora_B and zeros elsewhere.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any, Callable

import numpy as np

from mmjax.checkpoints.peft.method import Base, Directory, Fields, Method
from mmjax.checkpoints.peft.modules import (
    PREFIX,
    Module,
    Values,
    base_row,
    by_pattern,
    changed_under,
    copied,
    fill,
    globs,
    modules,
    outputs,
    rows_of,
    sort_out,
    targeted,
    targets_of,
    tensor,
    written_copies,
)
from mmjax.checkpoints.safetensors import Stored, Tensor
from mmjax.errors import UserError
from mmjax.models import adapter_places
from mmjax.models.tuning_config import LoraConfig
from mmjax.tree import Params

SUFFIXES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "lora_magnitude",
    "lora_magnitude_vector.weight": "lora_magnitude",
    "base_layer.bias": "bias",
    "base_layer.weight": "weight",
    "token_adapter.trainable_tokens_delta": "rows",
}
# Ways of starting an adapter that also change the base's weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _problems(fields: Fields) -> list[str]:
    start, bias, rows = str(fields.get("init_lora_weights")), fields.get("bias") or "none", fields.get("trainable_token_indices")
    found = [f"bias = {bias!r}"] if bias not in ("none", "all", "lora_only") else []
    if isinstance(rows, dict) and len(rows) != 1:
        found.append(f"trainable_token_indices = {rows!r} (of more than one table)")
    return found + [f"init_lora_weights = {start!r}, which changes the base as well"] * start.startswith(_CHANGES_BASE)


def _can(module: Module) -> bool:
    return module.is_linear or module.is_table


def _read(directory: Directory, base: Base) -> tuple[LoraConfig, Params]:
    fields = directory.fields
    found, values, strange = sort_out(directory, base, SUFFIXES)
    ranks: dict[tuple[str, int | None], int] = {}
    alphas: dict[tuple[str, int | None], float] = {}
    covered: dict[str, set[int | None]] = defaultdict(set)
    missing, wrong = [], []
    dora, lora_bias = bool(fields.get("use_dora")), bool(fields.get("lora_bias"))
    for module in targeted(base, fields, _can):
        found.setdefault(module, {})
    for module, tensors in found.items():
        if tensors and not tensors.keys() & {"a", "b", "lora_bias", "lora_magnitude"}:
            continue
        kinds = {"a", "b", *["lora_magnitude"] * dora, *["lora_bias"] * (lora_bias and not module.is_table)}
        missing += [f"{PREFIX}{module.name}.{_suffix(kind, module)}" for kind in sorted(kinds - tensors.keys())]
        if not kinds <= tensors.keys():
            continue
        rank = int(by_pattern(fields.get("rank_pattern"), module, fields["r"]))
        if (tensors["a"].shape[0], tensors["b"].shape[1]) != (rank, rank):
            wrong.append(f"{tensors['a'].name} and its lora_B are of rank {tensors['a'].shape[0]}, the config asks for {rank}")
        for path in module.paths:
            at = path, module.layer
            covered[path].add(module.layer)
            ranks[at], alphas[at] = rank, float(by_pattern(fields.get("alpha_pattern"), module, fields["lora_alpha"]))
    if wrong:
        raise UserError(f"{directory.path}: {'; '.join(wrong[:10])}")
    for module, tensors in found.items():
        if (under := tensors.pop("weight", None)) is not None:
            values |= changed_under(base, module, under)
    whole = copied(base, values)
    for module, tensors in found.items():
        for kind, stored in tensors.items():
            _add_values(values, base, module, kind, stored)
    bias = fields.get("bias") or "none"
    rows = fields.get("trainable_token_indices") or ()
    adapter = LoraConfig(
        name=directory.name,
        rank=int(fields["r"]),
        alpha=float(fields["lora_alpha"]),
        targets=globs(base, covered),
        dropout=float(fields.get("lora_dropout") or 0.0),
        rank_stabilised=bool(fields.get("use_rslora")),
        rank_pattern=_pattern(base, ranks, int(fields["r"])),
        alpha_pattern=_pattern(base, alphas, float(fields["lora_alpha"])),
        dora=dora,
        bias=bias,  # type: ignore[arg-type]
        lora_bias=lora_bias,
        whole=tuple(path for path in whole if not (bias == "all" and path.endswith("/bias"))),
        token_ids=tuple(next(iter(rows.values())) if isinstance(rows, dict) else rows),
        peft=json.dumps(dict(fields)),
    )
    return adapter, fill(directory, base, adapter, values, strange, missing)


def _add_values(values: Values, base: Base, module: Module, kind: str, stored: Stored) -> None:
    def put(path: str, name: str, make: Callable[[], np.ndarray]) -> None:
        values[path, module.layer, name] = make

    for path in module.paths:
        if kind == "a":
            put(path, "lora_a", lambda: stored.read().T)
        elif kind == "b":
            put(path, "lora_b", lambda path=path: module.share(base, path, stored.read()).T)  # type: ignore[misc]
        elif kind in ("lora_bias", "lora_magnitude", "bias"):
            put(path, kind, lambda path=path: module.share(base, path, stored.read().reshape(-1)))  # type: ignore[misc]
        else:
            put(path, kind, stored.read)


def _pattern(base: Base, values: dict[tuple[str, int | None], Any], default: Any) -> tuple[tuple[str, Any], ...]:
    """What differs from the default, as globs."""
    groups: dict[Any, dict[str, set[int | None]]] = defaultdict(lambda: defaultdict(set))
    for (path, layer), value in values.items():
        if value != default:
            groups[value][path].add(layer)
    return tuple((glob, value) for value, covered in groups.items() for glob in globs(base, covered))


def _suffix(kind: str, module: Module) -> str:
    names = [suffix for suffix, of in SUFFIXES.items() if of == kind]
    return next(name for name in names if ("embedding" in name) == (module.is_table and kind in ("a", "b")))


def _write(params: Params, config: LoraConfig, base: Base, dtype: Any) -> tuple[dict[str, Any], list[Tensor]]:
    beside, copies = rows_of(params, base, config)
    scales = _scales(params, base, config)
    made, adapted = [], []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module in modules(base).values():
        parts = [beside.pop((path, module.layer), None) for path in module.paths]
        if not any(parts):
            continue
        adapted.append(module)
        factors = [scales.get((path, module.layer), 0.0) for path in module.paths]
        a, b, scale = _matrices(module, parts, factors, base)
        arrays = {"a": a, "b": b}
        for kind in ("lora_bias", "lora_magnitude"):
            if any(part and kind in part for part in parts):
                arrays[kind] = _vector(module, parts, kind, base)
        made += [tensor(f"{module.name}.{_suffix(kind, module)}", array, dtype) for kind, array in arrays.items()]
        alpha = scale * (len(a) ** 0.5 if config.rank_stabilised else len(a))
        alpha = round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha
        ranks |= {module.name: len(a)} if len(a) != config.rank else {}
        alphas |= {module.name: alpha} if alpha != config.alpha else {}
    if beside:
        lost = ", ".join(dict.fromkeys(path for path, _ in beside))
        raise UserError(f"adapter {config.name!r}: no module in the published layout for {lost}")
    tensors, saved, tokens = written_copies(base, copies, adapted, dtype, biases=config.bias != "none")
    if not (made or tensors):
        raise UserError(f"adapter {config.name!r} has no leaves to write")
    kept = json.loads(config.peft) if config.peft else {}
    names = [module.name for module in adapted]
    fields = {
        **_DEFAULTS,
        **kept,
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilised,
        "use_dora": config.dora,
        "bias": config.bias,
        "lora_bias": config.lora_bias,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": any(module.is_turned for module in adapted),
        "modules_to_save": saved or None,
        "trainable_token_indices": {tokens: list(config.token_ids)} if tokens else None,
    }
    return fields | targets_of(base, kept, names, _can), made + tensors


def _scales(params: Params, base: Base, config: LoraConfig) -> dict[tuple[str, int | None], float]:
    """Path and layer -> alpha / rank (or its root)."""
    return {
        (place.path, layer): config.scale_of(place.rank, place.alpha)
        for place in adapter_places.places(params, base.config, config)
        if place.rank
        for layer in ((None,) if place.layers is None else place.layers)
    }


def _matrices(
    module: Module, parts: list[dict[str, np.ndarray] | None], factors: list[float], base: Base
) -> tuple[np.ndarray, np.ndarray, float]:
    """lora_A [rank, in], lora_B [out, rank] and the scale of a module whose paths have these parts, or none."""
    present = [part for part in parts if part is not None]
    first, scale = present[0]["lora_a"], next(factor for factor, part in zip(factors, parts) if part is not None)
    shared = all(np.array_equal(part["lora_a"], first) for part in present)
    rank = first.shape[1] if shared else sum(part["lora_a"].shape[1] for part in present)
    rows, start = [], 0
    for path, part, factor in zip(module.paths, parts, factors):
        own = np.zeros((outputs(base, path), rank), np.float32)
        if part is not None:
            width = part["lora_a"].shape[1]
            own[:, start : start + width] = part["lora_b"].T if factor == scale else part["lora_b"].T * (factor / scale)
            start += 0 if shared else width
        rows.append(own)
    a = first.T if shared else np.concatenate([part["lora_a"].T for part in present])
    return a, module.together(rows), scale


def _vector(module: Module, parts: list[dict[str, np.ndarray] | None], kind: str, base: Base) -> np.ndarray:
    """A bias or the magnitudes [out] of a module; of a path without the adapter what changes nothing."""
    rows = []
    for path, part in zip(module.paths, parts):
        if part is not None:
            rows.append(part[kind])
        elif kind == "lora_bias":
            rows.append(np.zeros(outputs(base, path), np.float32))
        else:
            kernel = base_row(base, f"{path}/kernel", module.layer)
            rows.append(np.sqrt((kernel**2).sum(0)))
    return module.together(rows)


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


_DEFAULTS = {"init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None}

LORA = Method(
    peft_type="LORA",
    known=frozenset(
        "r lora_alpha lora_dropout target_modules exclude_modules use_rslora megatron_core bias low_cpu_mem_usage ensure_weight_tying "
        "init_lora_weights qalora_group_size rank_pattern alpha_pattern layers_to_transform layers_pattern modules_to_save "
        "trainable_token_indices lora_bias use_dora fan_in_fan_out".split()
    ),
    refused={
        "target_parameters": "LoRA of single parameters, such as fused experts",
        "megatron_config": "parallel layers of Megatron",
        "loftq_config": "a base that LoftQ has changed",
        "eva_config": "a base that EVA has changed",
        "corda_config": "a base that CorDA has changed",
        "lora_ga_config": "a base that LoRA-GA has changed",
        "layer_replication": "layers that stand more than once",
        "use_qalora": "QA-LoRA's grouped inputs",
        "use_bdlora": "block-diagonal matrices",
        "arrow_config": "routing between adapters",
        "alora_invocation_tokens": "an adapter that begins at a token",
        "kasa_config": "KaSA's singular values",
        "monteclora_config": "Monte Carlo LoRA",
        "velora_config": "VeLoRA",
    },
    problems=_problems,
    read=_read,
    writes=lambda adapter: isinstance(adapter, LoraConfig),
    write=_write,
)
