"""LoRA adapters (arXiv 2106.09685) as the peft library keeps them: adapter_config.json and adapter_model.safetensors.

A file's `base_model.model.MODULE.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank] are our `lora_a` [in,
rank] and `lora_b` [rank, out] beside the kernel of that module.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Mapping

import jax
import numpy as np

from mmjax import tree
from mmjax.checkpoints import safetensors, weights
from mmjax.checkpoints.safetensors import Stored, Tensor
from mmjax.errors import UserError
from mmjax.families.family import Family
from mmjax.families.keys import Rule, row, transposed
from mmjax.models.adapters import has_port
from mmjax.models.tuning_config import LoraConfig
from mmjax.tree import Params

NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_TENSOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
# Fields that change nothing here: how the adapter was started, where it was put, what its base was.
_NEUTRAL = set(
    "auto_mapping base_model_name_or_path inference_mode peft_type peft_version r lora_alpha lora_dropout revision "
    "target_modules exclude_modules task_type use_rslora runtime_config megatron_core bias low_cpu_mem_usage "
    "ensure_weight_tying init_lora_weights qalora_group_size".split()
)
# Ways of starting an adapter that also change the base's weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA directory: our config, its base model's name, and its tensors."""

    config: LoraConfig
    base: str
    tensors: Mapping[str, Stored]
    directory: Path

    @property
    def rank(self) -> int:
        return self.config.rank


def read(directory: str | Path, name: str = "default") -> Adapter:
    """The adapter of a directory, under the name it is to have here; its targets are settled by `leaves`.

    Raises UserError for every field of its config that would change the result and is not supported.
    """
    directory = Path(directory)
    path = directory / "adapter_config.json"
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type = {fields.get('peft_type')!r} is not supported (only LORA)")
    start = str(fields.get("init_lora_weights"))
    unsupported = [
        f"{key} = {value!r}"
        for key, value in fields.items()
        if key not in _NEUTRAL and value not in (None, False, 0, [], {}, "none")
    ]
    if fields.get("bias", "none") != "none":
        unsupported.append(f"bias = {fields['bias']!r}")
    if start.startswith(_CHANGES_BASE):
        unsupported.append(f"init_lora_weights = {start!r}, which changes the base as well")
    if unsupported:
        raise UserError(f"{path}: not supported: {'; '.join(unsupported)}")
    config = LoraConfig(
        name=name,
        rank=int(fields["r"]),
        alpha=float(fields["lora_alpha"]),
        targets=(),
        dropout=float(fields.get("lora_dropout", 0.0)),
        rank_stabilised=bool(fields.get("use_rslora", False)),
    )
    return Adapter(config, fields.get("base_model_name_or_path") or "", weights.read(directory, NAMES), directory)


def leaves(
    adapter: Adapter, rules: list[Rule], spellings: tuple[tuple[str, str], ...], params: Params
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
                f"{adapter.directory}: {linear} is adapted in {len(present)} of {len(modules)} layers, "
                "which is not supported"
            )
        targets.append(linear)
        for side, leaf, shape in (
            ("A", "lora_a", (kernel.shape[-2], adapter.rank)),
            ("B", "lora_b", (adapter.rank, kernel.shape[-1])),
        ):
            parts = [found.pop((module, side), None) for module in modules]
            for module, part in zip(modules, parts):
                if part is None or part.shape[::-1] != shape:
                    found_shape = "missing" if part is None else list(part.shape)
                    raise UserError(
                        f"{adapter.directory}: lora_{side} of {module} is {found_shape}, not {list(shape[::-1])}"
                    )
            rows = [np.asarray(part.read().T, np.float32) for part in parts if part is not None]
            value = np.stack(rows) if of_kernel.stacked else rows[0]
            if not weights.is_finite(value):
                weights.refuse_broken([f"lora_{side} of {of_kernel.name}"], adapter.directory, value.dtype)
            made[f"{linear}/adapters/{adapter.config.name}/{leaf}"] = jax.device_put(value)
    strange += [tensor.name for tensor in found.values()]
    if strange:
        raise UserError(
            f"{adapter.directory} holds tensors that fit no linear layer of its base: {', '.join(sorted(strange)[:20])}"
        )
    return dataclasses.replace(adapter.config, targets=tuple(targets)), tree.unflatten(made)


def write(
    params: Params,
    config: LoraConfig,
    rules: list[Rule],
    family: Family,
    directory: str | Path,
    *,
    base: str = "",
    dtype: Any = None,
) -> None:
    """The adapter `config.name` among the leaves of `params`, as a directory that peft loads on the family's
    transformers class.

    Raises UserError for an adapted Linear that has no module of its own there.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
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
    safetensors.write_file(made, directory / NAMES[0])
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilised,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": "(" + "|".join(patterns) + ")",
    }
    (directory / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _linears(rules: list[Rule]) -> dict[str, Rule]:
    """Our path of each Linear that is a foreign module of its own -> the rule of its kernel."""
    alone = [r for r in rules if r.form is transposed and len(r.paths) == 1 and r.name.endswith(".weight")]
    return {
        r.paths[0].removesuffix("/kernel"): r
        for r in alone
        if r.paths[0].endswith("/kernel") and has_port(r.paths[0])
    }
