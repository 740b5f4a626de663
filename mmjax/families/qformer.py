"""Tensor names of Q-Formers, and the fields of their shapes: transformers' (BLIP-2, InstructBLIP) and LAVIS's own.

In both a layer is a BERT's, `crossattention` stands in every so many of them, and the queries' feed-forward is `intermediate_query`
and `output_query`, the text's `intermediate` and `output`.
"""

from __future__ import annotations

from mmjax.families.family import Config
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, leading, linear, norm, numbered, rule
from mmjax.models.encoder_config import ConnectorConfig

QUERIES = rule("query_tokens", "connector/queries", form=leading(1))


def read(
    fields: Fields, latents: int, in_width: int, out_width: int, positions: int, text: bool, contrast_width: int = 0
) -> ConnectorConfig:
    """A qformer_config. `text` says whether it reads text beside the pictures."""
    fields.only("position_embedding_type", "absolute")
    every = fields.get("cross_attention_frequency", fields.get("cross_attention_freq", 2))
    return ConnectorConfig(
        kind="qformer",
        in_width=in_width,
        out_width=out_width,
        positions=positions,
        depth=fields.get("num_hidden_layers", 12),
        hidden_width=fields.get("hidden_size", 768),
        activation=fields.activation("hidden_act", "gelu"),
        latents=latents,
        heads=fields.get("num_attention_heads", 12),
        cross_every=every,
        mlp_width=fields.get("intermediate_size", 3072),
        norm_eps=fields.get("layer_norm_eps", 1e-12),
        text_vocab=fields.get("vocab_size", 30522) if text else 0,
        text_positions=fields.get("max_position_embeddings", 512) if text else 0,
        contrast_width=contrast_width,
    )


def write(config: ConnectorConfig, base: Config) -> Config:
    """The qformer_config of transformers."""
    text = {"vocab_size": config.text_vocab, "max_position_embeddings": config.text_positions} if config.text_vocab else {}
    return {
        **base,
        "hidden_size": config.inner_width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width or 4 * config.inner_width,
        "hidden_act": activation_name(config.activation, base.get("hidden_act")),
        "layer_norm_eps": config.norm_eps,
        "cross_attention_frequency": config.cross_every,
        "encoder_hidden_size": config.in_width,
        **text,
    }


def expressible(config: ConnectorConfig | None) -> str:
    """Why no published layout holds a connector as its Q-Former; "" if one can."""
    if config is None or config.kind != "qformer":
        return "its connector is a Q-Former"
    if config.head_dim not in (0, config.inner_width // config.heads):
        return "its Q-Former's heads share its width among them"
    return ""


def embedding_rules(name: str, config: ConnectorConfig, norm_name: str = "LayerNorm") -> list[Rule]:
    """The norm over queries and text, and the tables of text where it is read."""
    table = norm(f"{name}{norm_name}", "connector/embed/norm")
    if not config.text_vocab:
        return table
    return table + [
        rule(f"{name}word_embeddings.weight", "connector/embed/embedding"),
        rule(f"{name}position_embeddings.weight", "connector/embed/positions"),
    ]


def layer_rules(name: str, config: ConnectorConfig, inner: str) -> list[Rule]:
    """The layers `name`{i}; `inner` is what the module of queries, keys and values is called ("attention", or LAVIS's "self")."""
    layer, ours, crossing = name + "{i}.", "connector/layers/", "connector/cross/layers/"
    crossed = _attention(f"{layer}crossattention", f"{crossing}cross_attention", inner)
    table = _attention(f"{layer}attention", f"{ours}attention", inner)
    table += numbered(tuple(range(0, config.depth, config.cross_every)), crossed)
    for suffix, path in (("_query", "mlp"), ("", "text_mlp")):
        if suffix or config.text_vocab:
            table += linear(f"{layer}intermediate{suffix}.dense", f"{ours}{path}/up")
            table += linear(f"{layer}output{suffix}.dense", f"{ours}{path}/down")
            table += norm(f"{layer}output{suffix}.LayerNorm", f"{ours}{path}_norm")
    return table


def _attention(name: str, path: str, inner: str) -> list[Rule]:
    table: list[Rule] = []
    for part in ("query", "key", "value"):
        table += linear(f"{name}.{inner}.{part}", f"{path}/{part}")
    return table + linear(f"{name}.output.dense", f"{path}/output") + norm(f"{name}.output.LayerNorm", f"{path}_norm")
