"""LLaMA (arXiv 2302.13971) as its authors publish it: fields of params.json, and the names `layers.N.attention.wq.weight` and so on.

Rotary embedding turns neighbouring channels there, and the two halves of a head here: rows of queries and keys, and whatever is added to
those, are told apart by `turned`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mmjax.errors import UserError
from mmjax.families.family import Config
from mmjax.families.fields import Fields
from mmjax.families.keys import Form, Rule, norm, rule, same, transposed
from mmjax.families.llama import plain, require
from mmjax.models.block_config import BlockConfig, Rope
from mmjax.models.config import DecoderConfig

# Their names of the Linears of a layer, ours, and whether rotary embedding turns what they put out.
LINEARS = {
    "attention.wq": ("attention/query", True),
    "attention.wk": ("attention/key", True),
    "attention.wv": ("attention/value", False),
    "attention.wo": ("attention/output", False),
    "feed_forward.w1": ("mlp/gate", False),
    "feed_forward.w2": ("mlp/down", False),
    "feed_forward.w3": ("mlp/up", False),
}


def read_decoder(fields: Fields) -> DecoderConfig:
    """The decoder that the fields of params.json describe."""
    width, heads = fields.need("dim"), fields.need("n_heads")
    kv_heads = fields.get("n_kv_heads", heads)
    if width % heads or heads % kv_heads or width // heads % 2:
        raise UserError(
            f"{fields.where}: dim = {width} with {heads} heads and {kv_heads} key heads: heads must divide dim, key heads heads, and a "
            "head's channels must be even"
        )
    vocab = fields.need("vocab_size")
    if vocab < 1:
        raise UserError(f"{fields.where}: vocab_size = {vocab}, and there are no weights that would say how large the vocabulary is")
    return DecoderConfig(
        vocab_size=vocab,
        layers=fields.need("n_layers"),
        block=BlockConfig(
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width // heads,
            mlp_width=mlp_width(width, fields.get("multiple_of", 256), fields.get("ffn_dim_multiplier", 1.0)),
            activation="silu",
            norm="rms",
            norm_eps=fields.get("norm_eps", 1e-5),
            gated_mlp=True,
            qkv_bias=False,
            output_bias=False,
            mlp_bias=False,
            rope=Rope(theta=fields.get("rope_theta", 10000.0)),
        ),
        max_positions=fields.get("max_seq_len", 2048),
    )


def write_decoder(decoder: DecoderConfig, base: Config) -> Config:
    """The fields that describe a decoder, over those of `base`. Raises UserError where there are none for it."""
    block = decoder.block
    simple = plain(block) and block.norm == "rms" and not any(decoder.windows) and not decoder.tied_head
    biased = block.qkv_bias or block.output_bias or block.mlp_bias or block.qk_norm
    rope = block.rope is not None and block.rope == Rope(theta=block.rope.theta)
    square = block.heads * block.head_dim == block.width
    require(simple and not biased and rope and square, "LLaMA in its authors' layout", "its blocks, its head or its positions are others")
    assert block.rope is not None
    width: Config = {name: base[name] for name in ("multiple_of", "ffn_dim_multiplier") if name in base}
    if mlp_width(block.width, width.get("multiple_of", 256), width.get("ffn_dim_multiplier") or 1.0) != block.mlp_width:
        width = _rounding(block.width, block.mlp_width)
    return {
        **{key: value for key, value in base.items() if key != "ffn_dim_multiplier"},
        "dim": block.width,
        "n_layers": decoder.layers,
        "n_heads": block.heads,
        **({"n_kv_heads": block.kv_heads} if block.kv_heads != block.heads or "n_kv_heads" in base else {}),
        "vocab_size": decoder.vocab_size,
        **width,
        "norm_eps": block.norm_eps,
        **({"rope_theta": block.rope.theta} if block.rope.theta != 10000.0 or "rope_theta" in base else {}),
        "max_seq_len": decoder.max_positions,
    }


def mlp_width(width: int, multiple_of: int, factor: float) -> int:
    """Two thirds of four widths, times a factor, rounded up."""
    hidden = int(factor * int(8 * width / 3)) if factor != 1.0 else int(8 * width / 3)
    return multiple_of * -(-hidden // multiple_of)


def _rounding(width: int, hidden: int) -> Config:
    """multiple_of, and a factor where it needs one, that make an MLP of `hidden`."""
    multiple = next((m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if hidden % m == 0 and mlp_width(width, m, 1.0) == hidden), 0)
    if multiple:
        return {"multiple_of": multiple}
    multiple = next(m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if hidden % m == 0)
    return {"multiple_of": multiple, "ffn_dim_multiplier": (hidden - multiple / 2) / int(8 * width / 3)}


def rules(decoder: DecoderConfig) -> list[Rule]:
    """The key table of the decoder."""
    layer, ours, head_dim = "layers.{i}.", "llm/layers/", decoder.block.head_dim
    table = [rule("tok_embeddings.weight", "llm/embed/embedding")]
    for theirs, (name, turns) in LINEARS.items():
        table.append(rule(f"{layer}{theirs}.weight", f"{ours}{name}/kernel", form=turned(transposed, head_dim, turns)))
    return [
        *table,
        *norm(layer + "attention_norm", ours + "attention_norm", bias=False),
        *norm(layer + "ffn_norm", ours + "mlp_norm", bias=False),
        *norm("norm", "llm/final_norm", bias=False),
        rule("output.weight", "llm/head/kernel", form=transposed),
    ]


def turned(form: Form, head_dim: int, turns: bool = True) -> Form:
    """The form of a tensor whose first axis [heads * head_dim] has neighbouring channels turned together, ours the two halves of a head."""
    if not turns:
        return form
    half = head_dim // 2

    def to_halves(a: np.ndarray) -> np.ndarray:
        return a.reshape(-1, half, 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)

    def to_neighbours(a: np.ndarray) -> np.ndarray:
        return a.reshape(-1, 2, half, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)

    return dataclasses.replace(form, ours=lambda a: form.ours(to_halves(a)), foreign=lambda a: to_neighbours(form.foreign(a)))


def vector(head_dim: int, turns: bool) -> Form:
    """The form of a bias."""
    return turned(same, head_dim, turns)


def with_vocabulary(config: Config, stored: Any, prefix: str = "") -> Config:
    """The config with the size of the vocabulary, which params.json leaves to the tokenizer (-1)."""
    table = stored.get(f"{prefix}tok_embeddings.weight")
    return config if table is None or (config.get("vocab_size") or -1) > 0 else {**config, "vocab_size": table.shape[0]}
