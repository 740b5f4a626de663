"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783) in transformers' layout. Mistral, Qwen, Gemma, Mixtral and Phi-3 are settings
of the same decoder, and share what stands here.
"""

from __future__ import annotations

from typing import Any, Mapping

from mmjax.errors import UserError
from mmjax.families import language
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, linear, norm, rule
from mmjax.families.rope import THETA, read_rope, rope_fields
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import DecoderConfig, ModelConfig


def read_decoder(
    fields: Fields,
    *,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool = False,
    windows: tuple[int, ...] = (0,),
    theta: float = THETA,
    partial: bool = False,
    activation: str = "hidden_act",
    block: Mapping[str, Any] = {},
    **defaults: Any,
) -> DecoderConfig:
    """The gated, RMS-normed decoder that the fields describe.

    theta, partial   see mmjax.families.rope.read_rope
    activation       the name of the activation's field
    block            what else the family sets in its blocks
    defaults         the family's own values for absent fields
    """
    fields.only("quantization_config")
    fields.only("pretraining_tp", 1)  # any other value splits the products and rounds differently

    def get(name: str) -> Any:
        return fields.get(name, defaults[name]) if name in defaults else fields.need(name)

    width, heads = get("hidden_size"), get("num_attention_heads")
    kv_heads = fields.get("num_key_value_heads", defaults.get("num_key_value_heads", heads))
    head_dim = fields.get("head_dim", defaults.get("head_dim", width // heads))
    if (width % heads and head_dim == width // heads) or heads % kv_heads or head_dim % 2:
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
            activation=fields.activation(activation, defaults.get(activation, "silu")),
            norm_eps=fields.get("rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)),
            gated_mlp=True,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            mlp_bias=mlp_bias,
            rope=read_rope(fields, theta=theta, partial=partial),
            **{"norm": "rms", **block},
        ),
        max_positions=get("max_position_embeddings"),
        windows=windows,
        tied_head=fields.get("tie_word_embeddings", defaults.get("tie_word_embeddings", False)),
    )


def kv_heads(fields: Fields, absent: int) -> int:
    """What `num_key_value_heads` means where it is absent, and where it is null: as many as there are heads."""
    return fields.need("num_attention_heads") if "num_key_value_heads" in fields.values else absent


def write_decoder(
    decoder: DecoderConfig,
    base: Config,
    model_type: str,
    architecture: str,
    theta: float = THETA,
    partial: bool = False,
    activation: str = "hidden_act",
) -> Config:
    """The fields that a gated decoder determines, over those of `base` (token ids and the like)."""
    block = decoder.block
    assert block.rope is not None
    return {
        **rope_fields(block.rope, base, lambda fields: read_rope(fields, theta=theta, partial=partial)),
        "architectures": base.get("architectures") or [architecture],
        "model_type": model_type,
        "vocab_size": decoder.vocab_size,
        "hidden_size": block.width,
        "intermediate_size": block.mlp_width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": block.heads,
        "num_key_value_heads": block.kv_heads,
        "head_dim": block.head_dim,
        activation: activation_name(block.activation, base.get(activation)),
        "rms_norm_eps": block.norm_eps,
        "max_position_embeddings": decoder.max_positions,
        "tie_word_embeddings": decoder.tied_head,
    }


def require(ok: bool, name: str, why: str) -> None:
    """Raises UserError where a decoder is not what a family can hold."""
    if not ok:
        raise UserError(f"this decoder is not a {name}: {why}")


def plain(block: BlockConfig) -> bool:
    """Whether a block is a Llama's but for its norms, biases and scores."""
    return block.gated_mlp and not block.parallel_norms and block.experts is None and not block.memory_width


def rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    """The key table of a gated decoder."""
    assert config.llm is not None
    block = config.llm.block
    layer, ours = "model.layers.{i}.", "llm/layers/"
    table = around_layers(config, foreign)
    for theirs, name in (("q", "query"), ("k", "key"), ("v", "value")):
        table += linear(f"{layer}self_attn.{theirs}_proj", f"{ours}attention/{name}", block.qkv_bias)
        if block.qk_norm and name != "value":
            table += norm(f"{layer}self_attn.{theirs}_norm", f"{ours}attention/{name}_norm", bias=False)
    table += linear(layer + "self_attn.o_proj", ours + "attention/output", block.output_bias)
    if block.experts is None:
        for name in ("gate", "up", "down"):
            table += linear(f"{layer}mlp.{name}_proj", f"{ours}mlp/{name}", block.mlp_bias)
    return table


def around_layers(config: ModelConfig, foreign: Config) -> list[Rule]:
    """The part of the key table that all gated decoders share: embeddings, norms and head."""
    assert config.llm is not None
    layer, ours = "model.layers.{i}.", "llm/layers/"
    table = [rule("model.embed_tokens.weight", "llm/embed/embedding")]
    names = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if config.llm.block.norm_place == "both":
        names = {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "attention_post_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_post_norm",
        }
    for theirs, name in names.items():
        table += norm(layer + theirs, ours + name, bias=False)
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
    require(plain(block) and block.norm == "rms" and not any(config.llm.windows), "Llama", "its blocks are others")
    written = write_decoder(config.llm, base, "llama", "LlamaForCausalLM")
    return {**written, "attention_bias": block.qkv_bias, "mlp_bias": block.mlp_bias}


# The base class alone writes its tensors without `model.`.
SPELLINGS = ((r"^(?=(embed_tokens|layers|norm|final_layernorm)\.)", "model."),)

FAMILY = Family(
    model_types=("llama",),
    about="Llama 1 to 3, Vicuna, TinyLlama (arXiv 2302.13971)",
    read_config=_read,
    write_config=_write,
    rules=rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    spellings=SPELLINGS,
    copies=copies,
)
