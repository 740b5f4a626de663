"""Resampler and gated cross-attention of Flamingo's open implementations (arXiv 2204.14198), in their layouts.

open_flamingo   layers.N.0 (attention), layers.N.1 (MLP); keys and values in one tensor
otter           layers.N, layers.N.feed_forward
flamingo_mini   as open_flamingo, with keys and values apart in the resampler, time_pos_emb for the frames, and
                alpha_* for gates
"""

from __future__ import annotations

from typing import Literal

from mmjax.families.keys import Form, Rule, leading, norm, rule, transposed
from mmjax.models.encoder_config import ConnectorConfig

Layout = Literal["open_flamingo", "otter", "flamingo_mini"]

spaced = Form(lambda s: (s[0], 1, s[1]), lambda a: a[:, 0], lambda a: a[:, None])
"""Rows [n, 1, width] of a table; ours [n, width]."""


def resampler_rules(config: ConnectorConfig, layout: Layout) -> list[Rule]:
    attention, mlp = (
        ("layers.{i}", "layers.{i}.feed_forward") if layout == "otter" else ("layers.{i}.0", "layers.{i}.1")
    )
    table = [
        rule("latents", "connector/latents"),
        *norm(f"{attention}.norm_media", "connector/layers/media_norm"),
        *norm(f"{attention}.norm_latents", "connector/layers/cross_attention_norm"),
        *_attention(attention, "connector/layers/cross_attention", apart=layout == "flamingo_mini"),
        *_mlp(mlp, "connector/layers"),
        *norm("norm", "connector/norm"),
    ]
    if config.frames and layout == "flamingo_mini":
        table.append(rule("time_pos_emb", "connector/frame_embeddings", form=spaced))
    elif config.frames:
        table.append(rule("frame_embs", "connector/frame_embeddings"))
    if config.media:
        table.append(rule("media_time_embs", "connector/media_embeddings", form=spaced))
    return table


def gated_cross_attention_rules(layout: Layout, name: str = "", path: str = "") -> list[Rule]:
    """Of one block, below the foreign prefix `name` and our prefix `path`; a name with {i} is of stacked blocks."""
    mlp = {"open_flamingo": "ff", "otter": "feed_forward", "flamingo_mini": "ffw"}[layout]
    gates = ("alpha_attn", "alpha_ffw") if layout == "flamingo_mini" else ("attn_gate", "ff_gate")
    return [
        *norm(f"{name}attn.norm", f"{path}cross_attention_norm"),
        *_attention(f"{name}attn", f"{path}cross_attention"),
        *_mlp(f"{name}{mlp}", path.removesuffix("/")),
        rule(name + gates[0], f"{path}cross_attention_gate", form=leading(1)),
        rule(name + gates[1], f"{path}mlp_gate", form=leading(1)),
    ]


def _attention(name: str, path: str, apart: bool = False) -> list[Rule]:
    keys, values = f"{path}/key/kernel", f"{path}/value/kernel"
    read: list[tuple[str, tuple[str, ...]]] = [("to_k", (keys,)), ("to_v", (values,))]
    read = read if apart else [("to_kv", (keys, values))]
    read += [("to_q", (f"{path}/query/kernel",)), ("to_out", (f"{path}/output/kernel",))]
    return [rule(f"{name}.{part}.weight", *paths, form=transposed) for part, paths in read]


def _mlp(name: str, path: str) -> list[Rule]:
    """A Sequential of norm, Linear, activation and Linear."""
    linears = [
        rule(f"{name}.{k}.weight", f"{path}/mlp/{part}/kernel", form=transposed) for k, part in ((1, "up"), (3, "down"))
    ]
    return norm(f"{name}.0", f"{path}/mlp_norm") + linears
