"""The connectors of an open AnyMAL-like code base (after arXiv 2309.16058): Linears, and a resampler."""

from __future__ import annotations

from typing import Literal

from mmjax.families import sequential
from mmjax.families.keys import Rule, linear, norm, rule, transposed
from mmjax.models.encoder_config import ConnectorConfig


def projector(layers: int, in_width: int, out_width: int, positions: int) -> ConnectorConfig:
    """A layer norm, then one Linear or an MLP of two, over every position."""
    kind: Literal["linear", "mlp"] = "linear" if layers == 1 else "mlp"
    return ConnectorConfig(kind, in_width, out_width, positions, depth=layers, input_norm=True)


def projector_rules(config: ConnectorConfig) -> list[Rule]:
    return sequential.rules("proj", config)


def resampler_rules(config: ConnectorConfig) -> list[Rule]:
    """Of a cross_self_perceiver at the language model's width. Queries, keys and values are one tensor, as in torch."""
    layer = "connector/layers"
    return [
        rule("latents", "connector/latents"),
        *linear("input_proj", "connector/project_in"),
        *norm("layers.{i}.cross_attn_norm", f"{layer}/cross_attention_norm"),
        *norm("layers.{i}.context_norm", f"{layer}/media_norm"),
        *_attention("layers.{i}.cross_attn", f"{layer}/cross_attention"),
        *norm("layers.{i}.self_attn_norm", f"{layer}/attention_norm"),
        *_attention("layers.{i}.self_attn", f"{layer}/attention"),
        *norm("layers.{i}.ff_norm", f"{layer}/mlp_norm"),
        *linear("layers.{i}.ff.net.0", f"{layer}/mlp/up"),
        *linear("layers.{i}.ff.net.3", f"{layer}/mlp/down"),
        *norm("norm", "connector/norm"),
    ]


def _attention(name: str, path: str) -> list[Rule]:
    parts = ("query", "key", "value")
    return [
        rule(f"{name}.in_proj_weight", *(f"{path}/{part}/kernel" for part in parts), form=transposed),
        rule(f"{name}.in_proj_bias", *(f"{path}/{part}/bias" for part in parts)),
        *linear(f"{name}.out_proj", f"{path}/output"),
    ]
