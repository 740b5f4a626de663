"""Bottleneck adapters as AdapterHub's library `adapters` keeps them: adapter_config.json, and adapter.safetensors or pytorch_adapter.bin.

    is_one(fields)                       whether an adapter_config.json is of this library
    read(path, base)                     our config and its leaves, made for the model under it
    write(params, adapter, base, path)   a directory for `model.load_adapter(path, use_safetensors=True)`

Tensors are called after the module that an adapter sits in, `LAYER.output_adapters.adapters.NAME.adapter_down.0.weight` (_MODULES). Formats and
formulas are those of adapters 1.3.0; its other methods, and Compacter's and invertible adapters, are refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

import jax

from mmjax import tree
from mmjax.checkpoints import safetensors, weights
from mmjax.checkpoints.peft.method import Base
from mmjax.errors import UserError
from mmjax.families import keys, reading, writing
from mmjax.models import bottleneck, plugged
from mmjax.models.config import ModelConfig
from mmjax.models.tuning_config import BottleneckConfig, Part
from mmjax.parallel import placement
from mmjax.tree import Params

VERSION = "adapters.1.3.0"
NAMES = ("adapter.safetensors", "pytorch_adapter.bin")
ACTIVATIONS = {"relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
# model_type -> where the adapters behind attention and behind the MLP are, from the layer on.
_LAYERED = ("attention_adapters.adapters", "output_adapters.adapters")
_MODULES = {
    "llama": _LAYERED,
    "mistral": _LAYERED,
    "gpt2": _LAYERED,
    "clip_vision_model": _LAYERED,
    "vit": ("attention_adapters.adapters", "output.output_adapters.adapters"),
    "bert": ("attention.output.adapters", "output.adapters"),
    "t5": ("layer.0.adapters", "layer.{mlp}.adapters"),
    "mt5": ("layer.0.adapters", "layer.{mlp}.adapters"),
}
# Fields of a config that are read, or change nothing where the others are as they must be.
_READ = frozenset(
    "mh_adapter output_adapter reduction_factor non_linearity original_ln_before ln_before ln_after is_parallel scaling leave_out dropout "
    "residual_before_ln init_weights init_weights_seed inv_adapter_reduction_factor".split()
)
# What the others must be.
_ONLY: dict[str, Any] = {
    "original_ln_after": True,
    "adapter_residual_before_ln": False,
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "phm_layer": False,
    "stochastic_depth": 0.0,
}
# Of methods that are refused, and unread without them.
_UNREAD = frozenset(
    "phm_dim factorized_phm_W shared_W_phm shared_phm_rule factorized_phm_rule phm_c_init phm_init_range learn_phm "
    "hypercomplex_nonlinearity phm_rank phm_bias architecture".split()
)


def is_one(fields: Mapping[str, Any]) -> bool:
    """Whether this is the adapter_config.json of the `adapters` library (peft's has a peft_type)."""
    return "peft_type" not in fields and "config" in fields


def base_name(fields: Mapping[str, Any]) -> str:
    """The base model's name or directory, "" where it is not said."""
    return fields.get("model_name") or ""


def read(path: Path, base: Base, name: str = "") -> tuple[BottleneckConfig, Params]:
    """Our config of a directory's adapter, under its own name or this one, and its leaves (no others).

    Raises UserError for a field that changes the result and is not supported, and for tensors that are missing, unexpected or of another
    shape.
    """
    where = path / "adapter_config.json"
    fields = json.loads(where.read_text())
    adapter = _config(fields, name or fields.get("name") or "default", base, where)
    stored, theirs = weights.read(path, NAMES), fields.get("name") or "default"
    stored = {n: tensor for n, tensor in keys.renamed(stored, base.family.spellings).items()}
    shapes = jax.eval_shape(lambda: plugged.init(jax.random.key(0), adapter, base.config))
    assert shapes is not None
    rules = _rules(adapter, base, theirs)
    twice = (r"\.adapter_down\.0\.(weight|bias)$",) if adapter.norm_before else ()  # the norm, once more
    leaves = reading.load(stored, rules, shapes, dtype="float32", where=path, unused=twice)
    return adapter, leaves


def write(params: Params, adapter: BottleneckConfig, base: Base, path: Path, *, base_name: str = "", dtype: Any = None) -> None:
    """The adapter among the leaves of `params`, as a directory that the library loads over `base_name`."""
    hidden = plugged.stack(base.config, adapter.parts[0], adapter.name)[0].width
    rules = _rules(adapter, base, adapter.name)
    theirs = {p: leaf for p, leaf in tree.flatten(params).items() if tree.adapter_of(p) == adapter.name}
    tensors = writing.tensors(tree.unflatten(theirs), rules, dtype)
    if adapter.norm_before:
        again = [t for t in tensors if ".adapter_norm_before." in t.name]
        tensors += [safetensors.Tensor(t.name.replace("adapter_norm_before", "adapter_down.0"), t.shape, t.dtype, t.make) for t in again]
    fields = {
        "config": _fields(adapter, base.config),
        "hidden_size": hidden,
        "model_class": (base.foreign.get("architectures") or [""])[0],
        "model_name": base_name,
        "model_type": base.family.model_types[0],
        "name": adapter.name,
        "version": VERSION,
    }
    written = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    writing.write_adapter(tensors, path, NAMES[0], written, together=placement.crosses(params))


def _config(fields: Mapping[str, Any], name: str, base: Base, where: Path) -> BottleneckConfig:
    config = fields["config"]
    if not isinstance(config, dict) or config.get("architecture") is not None:
        said = config.get("architecture") if isinstance(config, dict) else config
        raise UserError(f"{where}: only bottleneck adapters of AdapterHub are supported, not {said!r}")
    wrong = [f"{key} = {config[key]!r} (only {value!r})" for key, value in _ONLY.items() if config.get(key, value) != value]
    wrong += [f"{key}, which is not known here" for key in sorted(set(config) - _READ - set(_ONLY) - _UNREAD)]
    activation = ACTIVATIONS.get(str(config.get("non_linearity", "relu")).lower())
    parallel, joined = bool(config.get("is_parallel", False)), bool(config.get("original_ln_before", False))
    if activation is None:
        wrong.append(f"non_linearity = {config['non_linearity']!r} (only {', '.join(ACTIVATIONS)})")
    if not isinstance(config.get("scaling", 1.0), int | float):
        wrong.append(f"scaling = {config['scaling']!r} (only numbers)")
    if not isinstance(config.get("reduction_factor", 16), int | float):
        wrong.append(f"reduction_factor = {config['reduction_factor']!r} (only one for all layers)")
    if joined and not parallel and config.get("residual_before_ln", True) is not True:
        wrong.append(f"residual_before_ln = {config['residual_before_ln']!r} (only True)")
    places = tuple(place for place, key in (("attention", "mh_adapter"), ("mlp", "output_adapter")) if config.get(key))
    if not places:
        wrong.append("neither mh_adapter nor output_adapter")
    if wrong:
        raise UserError(f"{where}: not supported: {'; '.join(wrong)}")
    return BottleneckConfig(
        name,
        reduction=float(config.get("reduction_factor", 16)),
        places=places,  # type: ignore[arg-type]
        reads="input" if parallel else "joined" if joined else "output",
        activation=activation,  # type: ignore[arg-type]
        scale=float(config.get("scaling", 1.0)),
        norm_before=bool(config.get("ln_before", False)),
        norm_after=bool(config.get("ln_after", False)),
        dropout=float(config.get("dropout", 0.0)),
        parts=_parts(base.config),
        layers=_layers(base.config, set(config.get("leave_out") or ()), where),
    )


def _fields(adapter: BottleneckConfig, model: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    block, _ = plugged.stack(model, adapter.parts[0], adapter.name)
    if adapter.activation not in names or set(adapter.parts) != set(_parts(model)):
        raise UserError(f"adapter {adapter.name!r}: AdapterHub's library has it in {', '.join(_parts(model))}, with {', '.join(names)}")
    reduction = block.width / bottleneck.inner_width(adapter, block.width)
    if int(block.width // reduction) != bottleneck.inner_width(adapter, block.width):
        raise UserError(f"adapter {adapter.name!r}: no reduction_factor gives {adapter.width} of {block.width} channels")
    return {
        "mh_adapter": "attention" in adapter.places,
        "output_adapter": "mlp" in adapter.places,
        "reduction_factor": int(reduction) if reduction == int(reduction) else reduction,
        "non_linearity": names[adapter.activation],
        "original_ln_before": adapter.reads == "joined",
        "ln_before": adapter.norm_before,
        "ln_after": adapter.norm_after,
        "is_parallel": adapter.reads == "input",
        "scaling": adapter.scale,
        "residual_before_ln": True,
        "leave_out": _left_out(adapter, model),
        "dropout": adapter.dropout,
        "init_weights": "mam_adapter",
        "init_weights_seed": None,
        "inv_adapter_reduction_factor": None,
        **_ONLY,
    }


def _parts(model: ModelConfig) -> tuple[Part, ...]:
    """The stacks of blocks in the order in which the library counts their layers."""
    if model.llm is None:
        return ("vision",)
    return ("encoder", "llm") if model.llm.encoder is not None else ("llm",)


def _counts(model: ModelConfig) -> list[range]:
    """The library's numbers of the layers of each part."""
    found, start = [], 0
    for part in _parts(model):
        layers = plugged.stack(model, part, "")[1]
        found.append(range(start, start + layers))
        start += layers
    return found


def _layers(model: ModelConfig, left_out: set[int], where: Path) -> tuple[int, ...]:
    kept = [tuple(i - numbers.start for i in numbers if i not in left_out) for numbers in _counts(model)]
    if all(len(layers) == len(numbers) for layers, numbers in zip(kept, _counts(model))):
        return ()
    if len(set(kept)) > 1 or not kept[0]:
        raise UserError(f"{where}: leave_out = {sorted(left_out)}: not the same layers of encoder and decoder, or all, which is not supported")
    return kept[0]


def _left_out(adapter: BottleneckConfig, model: ModelConfig) -> list[int]:
    return [i for numbers in _counts(model) for i in numbers if adapter.layers and i - numbers.start not in adapter.layers]


def _rules(adapter: BottleneckConfig, base: Base, name: str) -> list[keys.Rule]:
    """The key table of the adapter's leaves, below `adapters.{name}.`"""
    kind = next((kind for kind in base.family.model_types if kind in _MODULES), None)
    if kind is None:
        raise UserError(
            f"AdapterHub's layout is known here for {', '.join(_MODULES)}, not for a {base.family.model_types[0]}; a workdir keeps the adapter"
        )
    table = []
    for part in adapter.parts:
        stack, output = plugged.STACKS[part], f"{plugged.STACKS[part]}/layers/attention/output/kernel"
        layer = next(rule.name for rule in base.rules if output in rule.paths).split("{i}.")[0] + "{i}."
        last = 2 if plugged.stack(base.config, part, name)[0].memory_width else 1
        for place, module in zip(("attention", "mlp"), _MODULES[kind]):
            if place in adapter.places:
                theirs, ours = f"{layer}{module.format(mlp=last)}.{name}.", f"{stack}/plugs/{adapter.name}/{place}/"
                table += _of_place(adapter, theirs, ours)
    return keys.numbered(adapter.layers, table)


def _of_place(adapter: BottleneckConfig, theirs: str, ours: str) -> list[keys.Rule]:
    table = []
    for module, leaf in ((f"adapter_down.{int(adapter.norm_before)}", "down"), ("adapter_up", "up")):
        table += [
            keys.rule(f"{theirs}{module}.weight", ours + leaf, form=keys.transposed),
            keys.rule(f"{theirs}{module}.bias", f"{ours}{leaf}_bias"),
        ]
    for norm, there in (("norm_before", adapter.norm_before), ("norm_after", adapter.norm_after)):
        table += keys.norm(f"{theirs}adapter_{norm}", ours + norm) if there else []
    return table
