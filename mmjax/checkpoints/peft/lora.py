"""LoRA (arXiv 2106.09685) in peft's directories.

A file's `base_model.model.MODULE.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank] are our `lora_a` [in,
rank] and `lora_b` [rank, out] beside the kernel of that module.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import numpy as np

from mmjax import tree
from mmjax.checkpoints import weights
from mmjax.checkpoints.peft.method import Base, Directory, Fields, Method
from mmjax.checkpoints.safetensors import Stored, Tensor
from mmjax.errors import UserError
from mmjax.families.keys import Rule, row, transposed
from mmjax.models.adapters import has_port
from mmjax.models.tuning_config import LoraConfig
from mmjax.tree import Params

_TENSOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
# Ways of starting an adapter that also change the base's weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _problems(fields: Fields) -> list[str]:
    start, bias = str(fields.get("init_lora_weights")), fields.get("bias", "none")
    found = [f"bias = {bias!r}"] if bias != "none" else []
    return found + [f"init_lora_weights = {start!r}, which changes the base as well"] * start.startswith(_CHANGES_BASE)


def _config(directory: Directory) -> LoraConfig:
    fields = directory.fields
    return LoraConfig(
        name=directory.name,
        rank=int(fields["r"]),
        alpha=float(fields["lora_alpha"]),
        targets=(),
        dropout=float(fields.get("lora_dropout", 0.0)),
        rank_stabilised=bool(fields.get("use_rslora", False)),
    )


def _read(directory: Directory, base: Base) -> tuple[LoraConfig, Params]:
    return leaves(_config(directory), directory, base.rules, base.family.spellings, base.params)


def leaves(
    config: LoraConfig, adapter: Directory, rules: list[Rule], spellings: tuple[tuple[str, str], ...], params: Params
) -> tuple[LoraConfig, Params]:
    """The adapter's config with its targets, and its leaves; `params` (or their shapes) are those of the base.

    Raises UserError for tensors that fit no Linear of the base, and for a Linear adapted in some of its layers only.
    """
    found: dict[tuple[str, str], Stored] = {}
    strange = []
    for name, tensor in adapter.tensors.items():
        match = _TENSOR.match(name)
        if match is None:
            strange.append(name)
            continue
        module = f"{match['module']}.weight"
        for pattern, replacement in spellings:
            module = re.sub(pattern, replacement, module)
        found[module.removesuffix(".weight"), match["side"]] = tensor
    flat, made, targets = tree.flatten(params), {}, []
    for linear, of_kernel in _linears(rules).items():
        kernel = flat.get(f"{linear}/kernel")
        if kernel is None:
            continue
        modules = [of_kernel.foreign_name(at).removesuffix(".weight") for at in of_kernel.index(kernel.shape)]
        present = [module for module in modules if (module, "A") in found]
        if not present:
            continue
        if len(present) < len(modules):
            raise UserError(
                f"{adapter.path}: {linear} is adapted in {len(present)} of {len(modules)} layers, "
                "which is not supported"
            )
        targets.append(linear)
        for side, leaf, shape in (
            ("A", "lora_a", (kernel.shape[-2], config.rank)),
            ("B", "lora_b", (config.rank, kernel.shape[-1])),
        ):
            parts = [found.pop((module, side), None) for module in modules]
            for module, part in zip(modules, parts):
                if part is None or part.shape[::-1] != shape:
                    found_shape = "missing" if part is None else list(part.shape)
                    raise UserError(
                        f"{adapter.path}: lora_{side} of {module} is {found_shape}, not {list(shape[::-1])}"
                    )
            rows = [np.asarray(part.read().T, np.float32) for part in parts if part is not None]
            value = np.stack(rows) if of_kernel.stacked else rows[0]
            if not weights.is_finite(value):
                weights.refuse_broken([f"lora_{side} of {of_kernel.name}"], adapter.path, value.dtype)
            made[f"{linear}/adapters/{config.name}/{leaf}"] = jax.device_put(value)
    strange += [tensor.name for tensor in found.values()]
    if strange:
        raise UserError(
            f"{adapter.path} holds tensors that fit no linear layer of its base: {', '.join(sorted(strange)[:20])}"
        )
    return dataclasses.replace(config, targets=tuple(targets)), tree.unflatten(made)


def _write(params: Params, config: LoraConfig, base: Base, dtype: Any) -> tuple[dict[str, Any], list[Tensor]]:
    rules, family = base.rules, base.family
    flat, templates = tree.flatten(params), _linears(rules)
    end = f"/adapters/{config.name}/lora_a"
    adapted = [path.removesuffix(end) for path in flat if path.endswith(end)]
    homeless = [path for path in adapted if path not in templates]
    if homeless or not adapted:
        lost = ", ".join(homeless) or "any of its leaves"
        raise UserError(f"adapter {config.name!r}: no module in the published layout for {lost}")
    made, patterns = [], []
    for path in adapted:
        module = templates[path].name
        for pattern, replacement in family.modules:
            module = re.sub(pattern, replacement, module)
        module = module.removesuffix(".weight")
        patterns.append(r"\d+".join(re.escape(part) for part in module.split("{i}")))
        for side, leaf in (("A", "lora_a"), ("B", "lora_b")):
            array = flat[f"{path}/adapters/{config.name}/{leaf}"]
            kind = np.dtype(dtype or array.dtype)
            for i in range(array.shape[0]) if "{i}" in module else [None]:
                name = module if i is None else module.replace("{i}", str(templates[path].number(i)))
                shape = tuple(array.shape[-2:][::-1])

                def make(array=array, i=i, kind=kind) -> np.ndarray:
                    return np.asarray(row(array, i).T, kind)

                made.append(Tensor(f"base_model.model.{name}.lora_{side}.weight", shape, kind, make))
    fields = {
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilised,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": "(" + "|".join(patterns) + ")",
    }
    return fields, made


def _linears(rules: list[Rule]) -> dict[str, Rule]:
    """Our path of each Linear that is a foreign module of its own -> the rule of its kernel."""
    alone = [r for r in rules if r.form is transposed and len(r.paths) == 1 and r.name.endswith(".weight")]
    return {
        r.paths[0].removesuffix("/kernel"): r
        for r in alone
        if r.paths[0].endswith("/kernel") and has_port(r.paths[0])
    }


LORA = Method(
    peft_type="LORA",
    known=frozenset(
        "r lora_alpha lora_dropout target_modules exclude_modules use_rslora megatron_core bias low_cpu_mem_usage ensure_weight_tying "
        "init_lora_weights qalora_group_size".split()
    ),
    refused=dict.fromkeys(
        "rank_pattern alpha_pattern layers_to_transform layers_pattern modules_to_save trainable_token_indices lora_bias use_dora "
        "fan_in_fan_out target_parameters megatron_config loftq_config eva_config corda_config layer_replication use_qalora arrow_config "
        "alora_invocation_tokens kasa_config lora_ga_config monteclora_config use_bdlora velora_config".split(),
        "not read",
    ),
    problems=_problems,
    read=_read,
    writes=lambda adapter: isinstance(adapter, LoraConfig),
    write=_write,
)
