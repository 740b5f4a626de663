"""What a method of peft is to the files that read and write directories: its fields, and the two ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable, Mapping

from mmjax.checkpoints.safetensors import Stored, Tensor
from mmjax.families.family import Config, Family
from mmjax.families.keys import Rule
from mmjax.models.config import ModelConfig
from mmjax.models.tuning_config import Adapter
from mmjax.tree import Params

Fields = Mapping[str, Any]
# Fields of every method that change nothing here: where the adapter was made and what its base was.
NEUTRAL = frozenset(
    "auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision task_type runtime_config".split()
)


@dataclasses.dataclass(frozen=True)
class Base:
    """The model under an adapter: its shapes, its family and config.json, and its leaves (or their shapes)."""

    config: ModelConfig
    family: Family
    foreign: Config
    params: Params

    @property
    def rules(self) -> list[Rule]:
        return self.family.rules(self.config, self.foreign)


@dataclasses.dataclass(frozen=True)
class Directory:
    """An adapter's directory: its adapter_config.json, its tensors by the names of the file, the name it is to have here."""

    path: Path
    fields: Fields
    tensors: Mapping[str, Stored]
    name: str
    method: Method

    @property
    def base(self) -> str:
        """The base model's name or directory, "" where it is not said."""
        return self.fields.get("base_model_name_or_path") or ""


@dataclasses.dataclass(frozen=True)
class Method:
    """One peft_type.

    known     fields of its config that are read, or that change nothing
    refused   fields that are not supported -> what they ask for; they may only be absent, null or empty
    problems  (fields) -> what else cannot be read, e.g. values of known fields
    read      (directory, base) -> our config and its leaves
    writes    whether an adapter of ours is written by this method
    write     (params, adapter, base, dtype or None) -> the fields of its adapter_config.json and its tensors
    """

    peft_type: str
    known: frozenset[str]
    read: Callable[[Directory, Base], tuple[Adapter, Params]]
    writes: Callable[[Adapter], bool]
    write: Callable[[Params, Any, Base, Any], tuple[dict[str, Any], list[Tensor]]]
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    problems: Callable[[Fields], list[str]] = lambda fields: []
