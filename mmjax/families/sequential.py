"""A connector whose Linears stand in a torch Sequential, as in LLaVA, VILA and AnyMAL-like code: NAME.0, NAME.1, ..."""

from __future__ import annotations

from mmjax.families.keys import Rule, linear, norm
from mmjax.models import connectors
from mmjax.models.encoder_config import ConnectorConfig


def rules(name: str, config: ConnectorConfig, place: int = 0) -> list[Rule]:
    """The rules of a connector's norms and Linears, the first of them at `place`. Activations take a place as well."""
    table = []
    if config.input_norm:
        table += norm(f"{name}.{place}", "connector/input_norm")
        place += 1
    for i in range(len(connectors.widths(config))):
        table += linear(f"{name}.{place}", f"connector/layers_{i}", config.bias)
        place += 2
        if i == 0 and config.squeeze_width:
            table += norm(f"{name}.{place}", "connector/squeeze_norm")
            place += 1
    return table
