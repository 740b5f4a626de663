"""Adapters as the peft library keeps them: adapter_config.json and adapter_model.safetensors (older: adapter_model.bin).

    read(path, name)                            the directory, its config checked
    leaves(directory, base)                     our config of it and its leaves, made for the model under it
    write(params, adapter, base, path)          a directory that peft loads on the family's transformers class

Each group of methods has a file of its own, which hands out a `Method` for each of its peft_types; METHODS lists them.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mmjax import tree
from mmjax.checkpoints import weights
from mmjax.checkpoints.peft import adaption_prompt, lora, prompts, scaling
from mmjax.checkpoints.peft.method import NEUTRAL, Base, Directory, Method
from mmjax.errors import UserError
from mmjax.families import writing
from mmjax.models.tuning_config import Adapter
from mmjax.parallel import placement
from mmjax.tree import Params

log = logging.getLogger(__name__)

METHODS: tuple[Method, ...] = (
    lora.LORA,
    scaling.IA3,
    scaling.LN_TUNING,
    prompts.PROMPT,
    prompts.P_TUNING,
    prompts.MULTITASK,
    prompts.PREFIX,
    adaption_prompt.ADAPTION_PROMPT,
)
NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_UNSET: tuple[Any, ...] = (None, False, 0, [], {}, "", "none")


def read(path: str | Path, name: str = "default") -> Directory:
    """The adapter of a directory, under the name it is to have here. No tensor is read yet.

    Raises UserError for methods that are not supported, and for every field of its config that would change the result and is not
    supported. Fields that nobody knows are kept and written again.
    """
    path = Path(path)
    file = path / "adapter_config.json"
    try:
        fields = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    kind = fields.get("peft_type")
    method = next((method for method in METHODS if method.peft_type == kind), None)
    if method is None:
        known = ", ".join(method.peft_type for method in METHODS)
        raise UserError(f"{file}: peft_type = {kind!r} is not supported; supported are {known}")
    refused = [f"{key} = {fields[key]!r} ({why})" for key, why in method.refused.items() if fields.get(key) not in _UNSET]
    refused += method.problems(fields)
    if refused:
        raise UserError(f"{file}: not supported: {'; '.join(refused)}")
    unknown = sorted(set(fields) - NEUTRAL - method.known - set(method.refused))
    if unknown:
        log.warning("%s: fields that are not known here are kept, and change nothing: %s", file, ", ".join(unknown))
    return Directory(path, fields, weights.read(path, NAMES), name, method)


def leaves(directory: Directory, base: Base) -> tuple[Adapter, Params]:
    """Our config of the adapter, and its leaves (no others).

    Raises UserError listing tensors that are missing, that fit nothing in the base, or that have another shape.
    """
    return directory.method.read(directory, base)


def write(params: Params, adapter: Adapter, base: Base, path: str | Path, *, base_name: str = "", dtype: Any = None) -> None:
    """The adapter among the leaves of `params`, as a directory that peft loads over `base_name`; tensors in `dtype`, or as they are held.

    Raises UserError for a method that peft does not have, and for leaves that have no place in its layout.
    """
    method = next((method for method in METHODS if method.writes(adapter)), None)
    if method is None:
        raise UserError(f"adapter {adapter.name!r}: peft has no such method; a workdir or `merge` keeps it")
    together = placement.crosses(params)
    if together:  # an adapter is small
        own = {p: placement.row(leaf) for p, leaf in tree.flatten(params).items() if tree.adapter_of(p) == adapter.name}
        params = tree.merge(params, tree.unflatten(own))
    fields, tensors = method.write(params, adapter, base, dtype)
    common = {"peft_type": method.peft_type, "base_model_name_or_path": base_name, "inference_mode": True}
    written = json.dumps({"task_type": "CAUSAL_LM", **fields, **common}, indent=2) + "\n"
    writing.write_adapter(tensors, Path(path), NAMES[0], written, together=together)
