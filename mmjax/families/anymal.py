"""The connectors of an open AnyMAL-like code base (after arXiv 2309.16058): a projector of Linears."""

from __future__ import annotations

from mmjax.families import sequential
from mmjax.families.keys import Rule
from mmjax.models.config import ConnectorConfig


def projector(layers: int, in_width: int, out_width: int, positions: int) -> ConnectorConfig:
    """A layer norm, then one Linear or an MLP of two, over every position."""
    kind = "linear" if layers == 1 else "mlp"
    return ConnectorConfig(kind, in_width, out_width, positions, depth=layers, input_norm=True)  # type: ignore[arg-type]


def projector_rules(config: ConnectorConfig) -> list[Rule]:
    return sequential.rules("proj", config)
