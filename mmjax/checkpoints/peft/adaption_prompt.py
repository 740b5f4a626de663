"""LLaMA-Adapter's prompts (arXiv 2303.16199) in peft's directories: peft_type ADAPTION_PROMPT.

`base_model.model.MODULE.adaption_prompt` [1, length, width] and `adaption_gate` [1] of each of the topmost layers, MODULE being its
attention, are a row of our `prompts` and `gate`. peft has one gate for a layer, without tanh, and knows Llama and Mistral; to GPT-2 it
does something else (prompts do not pass the output Linear), and an output bias it adds a second time.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np

from mmjax import tree
from mmjax.checkpoints import weights
from mmjax.checkpoints.peft.method import Base, Directory, Method
from mmjax.checkpoints.safetensors import Tensor
from mmjax.errors import UserError
from mmjax.families.keys import Rule
from mmjax.models.adaption_prompt import sits_on
from mmjax.models.tuning_config import AdaptionPromptConfig
from mmjax.parallel.placement import row
from mmjax.tree import Params

MODELS = ("llama", "mistral")
PREFIX = "base_model.model."


def _read(directory: Directory, base: Base) -> tuple[AdaptionPromptConfig, Params]:
    fields = directory.fields
    length, count = int(fields.get("adapter_len") or 0), int(fields.get("adapter_layers") or 0)
    layers = base.config.language.layers
    if not 0 < length or not 0 < count <= layers:
        raise UserError(
            f"{directory.path}: adapter_len = {fields.get('adapter_len')!r} and adapter_layers = {fields.get('adapter_layers')!r} of "
            f"a language model with {layers} layers"
        )
    _check(base, str(directory.path))
    config = AdaptionPromptConfig(directory.name, length, count, gate="layer", gate_fn="identity")
    stored = {_spelled(name.removeprefix(PREFIX), base): tensor for name, tensor in directory.tensors.items()}
    width, made, wrong = base.config.language.block.width, {}, []
    attention = _attention(base)
    for leaf, theirs, shape in (("prompts", "adaption_prompt", (1, length, width)), ("gate", "adaption_gate", (1,))):
        rows = []
        for layer in sits_on(False, count, layers):
            name = f"{attention.replace('{i}', str(layer))}.{theirs}"
            tensor = stored.pop(name, None)
            if tensor is None or tensor.shape != shape:
                wrong.append(f"{name} is {'missing' if tensor is None else list(tensor.shape)}, not {list(shape)}")
                continue
            rows.append(np.asarray(tensor.read(), np.float32).reshape(shape[-2:] if leaf == "prompts" else shape))
        made[leaf] = np.stack(rows) if rows else np.zeros(0, np.float32)
    wrong += [f"{tensor.name} fits no layer with prompts" for tensor in stored.values()]
    if wrong:
        raise UserError(f"{directory.path}: {'; '.join(wrong[:20])}")
    for leaf, value in made.items():
        if not weights.is_finite(value):
            weights.refuse_broken([leaf], directory.path, value.dtype)
    placed = {f"llm/plugs/{directory.name}/{leaf}": jax.device_put(value) for leaf, value in made.items()}
    return config, tree.unflatten(placed)


def _write(params: Params, adapter: Any, base: Base, dtype: Any) -> tuple[dict[str, Any], list[Tensor]]:
    assert isinstance(adapter, AdaptionPromptConfig)
    flat, path = tree.flatten(params), f"llm/plugs/{adapter.name}/"
    gates = np.asarray(flat[f"{path}gate"], np.float32)
    _check(base, f"adapter {adapter.name!r}")
    reasons = {
        "its gates have a tanh": adapter.gate_fn != "identity",
        "its prompts are those of the first layers": adapter.bottom,
        "media are added to its prompts": bool(adapter.media),
        "its gates have a factor": adapter.gate_scale,
        "its gates differ from head to head": bool((gates != gates[:, :1]).any()),
    }
    if why := [reason for reason, holds in reasons.items() if holds]:
        raise UserError(f"adapter {adapter.name!r} does not fit peft's ADAPTION_PROMPT, which has one gate for a layer: {', '.join(why)}")
    prompts, module = flat[f"{path}prompts"], _module(_attention(base), base)
    kind, made = np.dtype(dtype or prompts.dtype), []
    for at, layer in enumerate(sits_on(False, adapter.depth, base.config.language.layers)):
        start = f"{PREFIX}{module.replace('{i}', str(layer))}."

        def prompt(at: int = at) -> np.ndarray:
            return np.asarray(row(prompts, at)[None], kind)

        def gate(at: int = at) -> np.ndarray:
            return np.asarray(gates[at, :1], kind)

        made.append(Tensor(f"{start}adaption_prompt", (1, *prompts.shape[1:]), kind, prompt))
        made.append(Tensor(f"{start}adaption_gate", (1,), kind, gate))
    fields = {"adapter_len": adapter.length, "adapter_layers": len(gates), "target_modules": module.rsplit(".", 1)[-1]}
    return fields, made


def _check(base: Base, where: str) -> None:
    """Raises UserError for a base that peft's ADAPTION_PROMPT does not know or does otherwise."""
    text = base.family.sections(base.foreign)["llm"] or base.foreign
    kind = text.get("model_type", base.family.model_types[0])
    if kind not in MODELS:
        raise UserError(f"{where}: peft's ADAPTION_PROMPT is for {', '.join(MODELS)}, not for a {kind}")
    if base.config.language.block.output_bias:
        raise UserError(f"{where}: peft's ADAPTION_PROMPT adds the bias of the output Linear twice, which is not supported")


def _attention(base: Base) -> str:
    """The table's name of a layer's attention, with {i} for the layer."""
    rule: Rule = next(r for r in base.rules if r.paths == ("llm/layers/attention/output/kernel",))
    return rule.name.removesuffix(".weight").rsplit(".", 1)[0]


def _module(name: str, base: Base) -> str:
    """The name of the module in memory."""
    for pattern, replacement in base.family.modules:
        name = re.sub(pattern, replacement, name)
    return name


def _spelled(name: str, base: Base) -> str:
    """A tensor's name as the key table has it."""
    for pattern, replacement in base.family.spellings:
        name = re.sub(pattern, replacement, name)
    return name


ADAPTION_PROMPT = Method(
    peft_type="ADAPTION_PROMPT",
    known=frozenset(("adapter_len", "adapter_layers", "target_modules")),
    problems=lambda fields: (
        [f"target_modules = {fields['target_modules']!r} (only self_attn)"] if fields.get("target_modules") not in (None, "self_attn") else []
    ),
    read=_read,
    writes=lambda adapter: isinstance(adapter, AdaptionPromptConfig),
    write=_write,
)
