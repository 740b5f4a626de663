"""Phi-1.5 and Phi-2 (arXiv 2309.05463) in transformers' layout: parallel blocks, part of each head rotated, biases
everywhere.
"""

from __future__ import annotations

from mmjax.families import language, llama
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, linear, norm, rule
from mmjax.families.rope import read_rope, rope_fields
from mmjax.models.block_config import BlockConfig, Rope
from mmjax.models.config import DecoderConfig, ModelConfig

ROTATED = 0.5  # share of a head's channels, where a config says nothing


def _rope(fields: Fields) -> Rope:
    return read_rope(fields, fraction=ROTATED, partial=True)


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("quantization_config")
    width, heads = fields.need("hidden_size"), fields.need("num_attention_heads")
    return ModelConfig(
        llm=DecoderConfig(
            vocab_size=fields.need("vocab_size"),
            layers=fields.need("num_hidden_layers"),
            block=BlockConfig(
                width=width,
                heads=heads,
                kv_heads=fields.get("num_key_value_heads", heads),
                head_dim=fields.get("head_dim", width // heads),
                mlp_width=fields.need("intermediate_size"),
                activation=fields.activation("hidden_act", "gelu_new"),
                norm="layer",
                norm_eps=fields.get("layer_norm_eps", 1e-5),
                gated_mlp=False,
                qkv_bias=True,
                output_bias=True,
                mlp_bias=True,
                rope=_rope(fields),
                parallel_norms=1,
                qk_norm="layer" if fields.get("qk_layernorm", False) else "",
            ),
            max_positions=fields.get("max_position_embeddings", 2048),
            tied_head=fields.get("tie_word_embeddings", False),
            head_bias=True,
        )
    )


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    decoder, block, rope = config.llm, config.llm.block, config.llm.block.rope
    fits = block.norm == "layer" and block.parallel_norms == 1 and block.mlp_bias and not block.gated_mlp
    llama.require(fits and rope is not None and decoder.head_bias, "Phi", "its norms, MLP or head are others")
    assert rope is not None
    return {
        **rope_fields(rope, base, _rope),
        "architectures": base.get("architectures") or ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": decoder.vocab_size,
        "hidden_size": block.width,
        "intermediate_size": block.mlp_width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": block.heads,
        "num_key_value_heads": block.kv_heads,
        "hidden_act": activation_name(block.activation, base.get("hidden_act", "gelu_new")),
        "layer_norm_eps": block.norm_eps,
        "max_position_embeddings": decoder.max_positions,
        **({} if block.head_dim * block.heads == block.width else {"head_dim": block.head_dim}),
        "qk_layernorm": bool(block.qk_norm),
        "tie_word_embeddings": decoder.tied_head,
    }


def rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.llm is not None
    layer, ours = "model.layers.{i}.", "llm/layers/"
    table = [rule("model.embed_tokens.weight", "llm/embed/embedding")]
    table += norm(layer + "input_layernorm", ours + "attention_norm")
    for theirs, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("dense", "output")):
        table += linear(f"{layer}self_attn.{theirs}", f"{ours}attention/{name}")
    table += linear(layer + "mlp.fc1", ours + "mlp/up") + linear(layer + "mlp.fc2", ours + "mlp/down")
    for theirs, name in (("q", "query"), ("k", "key")) if config.llm.block.qk_norm else ():
        table += norm(f"{layer}self_attn.{theirs}_layernorm", f"{ours}attention/{name}_norm")
    table += norm("model.final_layernorm", "llm/final_norm")
    return table + ([rule("lm_head.bias", "llm/head/bias")] if config.llm.tied_head else linear("lm_head", "llm/head"))


FAMILY = Family(
    model_types=("phi",),
    about="Phi-1.5, Phi-2 (arXiv 2309.05463)",
    read_config=_read,
    write_config=_write,
    rules=rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    spellings=llama.SPELLINGS,
    copies=llama.copies,
)
