"""VILA's projectors (arXiv 2312.07533): their names, and their tensors below `layers`."""

from __future__ import annotations

import re
from typing import Any, Literal

from mmjax.errors import UserError
from mmjax.families import sequential
from mmjax.families.keys import Rule, linear
from mmjax.models.encoder_config import ConnectorConfig


def projector(
    name: str, in_width: int, out_width: int, positions: int, token_order: Literal["rows", "columns"]
) -> ConnectorConfig:
    """The connector that `mm_projector_type` names.

    token_order   of mlp_downsample, a name that stands for two functions: the code of VILA-1.5 hands out its tokens
                  column by column, that since December 2024 row by row. The *_fix names are always row by row.
    """
    shape: dict[str, Any] = {"in_width": in_width, "out_width": out_width, "positions": positions}
    if name == "linear":
        return ConnectorConfig("linear", **shape)
    if found := re.fullmatch(r"mlp(\d+)x_gelu", name):
        return ConnectorConfig("mlp", **shape, depth=int(found[1]))
    if name == "mlp_downsample":
        return ConnectorConfig("space_to_depth", **shape, group=2, input_norm=True, token_order=token_order)
    if name == "mlp_downsample_2x2_fix":
        return ConnectorConfig("space_to_depth", **shape, group=2, input_norm=True)
    if name == "mlp_downsample_3x3_fix":
        return ConnectorConfig("space_to_depth", **shape, group=3, input_norm=True, squeeze_width=3 * in_width)
    raise UserError(
        f"mm_projector_type = {name!r} is not supported (only linear, mlpNx_gelu, mlp_downsample[_2x2_fix|_3x3_fix])"
    )


def projector_rules(config: ConnectorConfig) -> list[Rule]:
    """Place 0 of a down-sampling projector is the regrouping, which has no tensors."""
    if config.kind == "linear":
        return linear("layers", "connector/layers_0")
    return sequential.rules("layers", config, place=int(config.kind == "space_to_depth"))
