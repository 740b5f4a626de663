"""The ways of tuning a model beside its weights, each a frozen dataclass with a name of its own: what ModelConfig.adapters lists."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """One named low-rank adapter (arXiv 2106.09685) on every Linear whose path matches one of `targets`.

    The change of a weight is lora_a @ lora_b * alpha / rank (alpha / sqrt(rank) with `rank_stabilised`, arXiv 2312.03732).
    """

    name: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


Adapter: TypeAlias = LoraConfig
Adapters: TypeAlias = tuple[Adapter, ...]
KINDS: dict[str, type[Adapter]] = {"lora": LoraConfig}
"""What a recipe calls each of them. The fields of the dataclass are what a recipe may say of one."""


def fields(kind: str) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(KINDS[kind]) if field.name != "name")
