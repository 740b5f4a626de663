"""Gemma (arXiv 2403.08295) and Gemma 2 (arXiv 2408.00118) in transformers' layout: scaled embeddings, norms around 1; Gemma 2
also has norms behind its sublayers, soft caps, and a window in every second layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mmjax.families import language, llama
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.windows import read_windows, write_windows
from mmjax.models.config import DecoderConfig, ModelConfig

DEFAULTS: dict[str, Any] = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def _read(config: Config, where: str) -> ModelConfig:
    # The first published files say "gelu" and mean its tanh approximation.
    if config.get("hidden_act") == "gelu":
        config = {**config, "hidden_act": "gelu_pytorch_tanh"}
    decoder = read_decoder(Fields(config, where), "hidden_act", block={"norm": "rms_plus_one"}, num_key_value_heads=16)
    return ModelConfig(llm=decoder)


def _read_second(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    layers = fields.need("num_hidden_layers")
    decoder = read_decoder(
        fields,
        "hidden_activation",
        num_key_value_heads=4,
        windows=read_windows(fields, layers, config.get("sliding_window", 4096) or 0, lambda i: i % 2 == 0),
        block={
            "norm": "rms_plus_one",
            "norm_place": "both",
            "scale": float(fields.get("query_pre_attn_scalar", 256)) ** -0.5,
            "softcap": float(config.get("attn_logit_softcapping", 50.0) or 0),
        },
    )
    cap = float(config.get("final_logit_softcapping", 30.0) or 0)
    return ModelConfig(llm=dataclasses.replace(decoder, logit_softcap=cap))


def read_decoder(fields: Fields, activation: str, **settings: Any) -> DecoderConfig:
    fields.only("use_bidirectional_attention", False)
    bias = bool(fields.get("attention_bias", False))
    """The decoder with what all Gemmas share; `activation` is the name of its field."""
    defaults = {**DEFAULTS, activation: "gelu_pytorch_tanh"}
    decoder = llama.read_decoder(
        fields, qkv_bias=bias, output_bias=bias, activation=activation, **{**defaults, **settings}
    )
    return dataclasses.replace(decoder, embed_scale=decoder.block.width**0.5)


def fits(decoder: DecoderConfig, place: str) -> bool:
    """Whether a decoder is a Gemma with norms at this place."""
    block = decoder.block
    return (
        llama.plain(block)
        and block.norm == "rms_plus_one"
        and block.norm_place == place
        and not block.qk_norm
        and not block.mlp_bias
        and block.qkv_bias == block.output_bias
        and decoder.embed_scale == block.width**0.5
    )


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    decoder = config.llm
    llama.require(fits(decoder, "before") and not any(decoder.windows), "Gemma", "its norms or biases are others")
    written = llama.write_decoder(decoder, base, "gemma", "GemmaForCausalLM")
    return {**written, "attention_bias": decoder.block.qkv_bias}


def _write_second(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    decoder, block = config.llm, config.llm.block
    llama.require(fits(decoder, "both"), "Gemma 2", "its norms or biases are others")
    return {
        **llama.write_decoder(decoder, base, "gemma2", "Gemma2ForCausalLM", activation="hidden_activation"),
        **write_windows(decoder.windows, decoder.layers),
        "attention_bias": block.qkv_bias,
        "query_pre_attn_scalar": query_scalar(block.scale, base),
        "attn_logit_softcapping": block.softcap or None,
        "final_logit_softcapping": decoder.logit_softcap or None,
    }


def query_scalar(scale: float, base: Config) -> Any:
    """`query_pre_attn_scalar` for this scale of the scores: that of `base` where it means the same."""
    before = base.get("query_pre_attn_scalar", 256)
    if base and float(before) ** -0.5 == scale:
        return before
    exact = round(scale**-2, 6)
    return int(exact) if exact == int(exact) else exact


FAMILY = Family(
    model_types=("gemma",),
    about="Gemma (arXiv 2403.08295)",
    read_config=_read,
    write_config=_write,
    rules=llama.rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    spellings=llama.SPELLINGS,
    copies=llama.copies,
)
SECOND = dataclasses.replace(
    FAMILY,
    model_types=("gemma2",),
    about="Gemma 2 (arXiv 2408.00118)",
    read_config=_read_second,
    write_config=_write_second,
)
