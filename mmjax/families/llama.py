"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783) in transformers' layout. Mistral and Qwen2 are settings of the same
decoder.
"""

from __future__ import annotations

from typing import Any

from mmjax.errors import UserError
from mmjax.families import language
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, linear, norm, rule
from mmjax.families.rope import read_rope, write_rope
from mmjax.models.config import BlockConfig, DecoderConfig, ModelConfig


def read_decoder(
    fields: Fields,
    *,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool = False,
    windows: tuple[int, ...] = (0,),
    **defaults: Any,
) -> DecoderConfig:
    """The gated, RMS-normed decoder that the fields describe; `defaults` are the family's own for absent fields."""
    fields.only("quantization_config")
    fields.only("pretraining_tp", 1)  # any other value splits the products and rounds differently

    def get(name: str) -> Any:
        return fields.get(name, defaults[name]) if name in defaults else fields.need(name)

    width, heads = get("hidden_size"), get("num_attention_heads")
    kv_heads = fields.get("num_key_value_heads", defaults.get("num_key_value_heads", heads))
    head_dim = fields.get("head_dim", width // heads)
    if width % heads or heads % kv_heads or head_dim % 2:
        raise UserError(
            f"{fields.where}: hidden_size = {width} with {heads} attention heads of {head_dim} channels and {kv_heads} "
            "key heads: heads must divide hidden_size, key heads must divide heads, and channels must be even"
        )
    return DecoderConfig(
        vocab_size=get("vocab_size"),
        layers=get("num_hidden_layers"),
        block=BlockConfig(
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_width=get("intermediate_size"),
            activation=fields.activation("hidden_act", "silu"),
            norm="rms",
            norm_eps=fields.get("rms_norm_eps", 1e-6),
            gated_mlp=True,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            mlp_bias=mlp_bias,
            rope=read_rope(fields),
        ),
        max_positions=get("max_position_embeddings"),
        windows=windows,
        tied_head=fields.get("tie_word_embeddings", False),
    )


def write_decoder(decoder: DecoderConfig, base: Config, model_type: str, architecture: str) -> Config:
    """The fields that a gated decoder determines, over those of `base` (token ids and the like)."""
    block = decoder.block
    written: Config = {
        **base,
        "architectures": base.get("architectures") or [architecture],
        "model_type": model_type,
        "vocab_size": decoder.vocab_size,
        "hidden_size": block.width,
        "intermediate_size": block.mlp_width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": block.heads,
        "num_key_value_heads": block.kv_heads,
        "head_dim": block.head_dim,
        "hidden_act": activation_name(block.activation, base.get("hidden_act")),
        "rms_norm_eps": block.norm_eps,
        "max_position_embeddings": decoder.max_positions,
        "tie_word_embeddings": decoder.tied_head,
    }
    assert block.rope is not None
    if read_rope(Fields(base)) != block.rope or not base:
        written.pop("rope_scaling", None)
        written.pop("rope_theta", None)
        written["rope_parameters"] = write_rope(block.rope)
    return written


def rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    """The key table of a gated decoder."""
    assert config.llm is not None
    block = config.llm.block
    layer, ours = "model.layers.{i}.", "llm/layers/"
    table = [rule("model.embed_tokens.weight", "llm/embed/embedding")]
    table += norm(layer + "input_layernorm", ours + "attention_norm", bias=False)
    for theirs, name in (("q", "query"), ("k", "key"), ("v", "value")):
        table += linear(f"{layer}self_attn.{theirs}_proj", f"{ours}attention/{name}", block.qkv_bias)
    table += linear(layer + "self_attn.o_proj", ours + "attention/output", block.output_bias)
    table += norm(layer + "post_attention_layernorm", ours + "mlp_norm", bias=False)
    for name in ("gate", "up", "down"):
        table += linear(f"{layer}mlp.{name}_proj", f"{ours}mlp/{name}", block.mlp_bias)
    table += norm("model.norm", "llm/final_norm", bias=False)
    return table if config.llm.tied_head else table + linear("lm_head", "llm/head", bias=False)


def copies(config: ModelConfig) -> dict[str, str]:
    assert config.llm is not None
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.llm.tied_head else {}


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    bias = bool(fields.get("attention_bias", False))
    mlp_bias = bool(fields.get("mlp_bias", False))
    return ModelConfig(
        llm=read_decoder(fields, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias, max_position_embeddings=2048)
    )


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    block = config.llm.block
    written = write_decoder(config.llm, base, "llama", "LlamaForCausalLM")
    return {**written, "attention_bias": block.qkv_bias, "mlp_bias": block.mlp_bias}


FAMILY = Family(
    model_types=("llama",),
    read_config=_read,
    write_config=_write,
    rules=rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    copies=copies,
)
