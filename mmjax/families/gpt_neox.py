"""GPT-NeoX and Pythia (arXiv 2204.06745, 2304.01373) in transformers' layout: parallel blocks of two norms, a share of each head
rotated, queries, keys and values interleaved by head.
"""

from __future__ import annotations

from mmjax.families import language, llama
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, linear, norm, rule, transposed
from mmjax.families.rope import THETA, read_rope, rope_fields
from mmjax.models.block_config import BlockConfig, Rope
from mmjax.models.config import DecoderConfig, ModelConfig

ROTATED = 0.25  # share of a head's channels, where a config says nothing


def _rope(fields: Fields) -> Rope:
    # The common names of these two are not this family's, and its code does not read them.
    fields = Fields({k: v for k, v in fields.values.items() if k not in ("rope_theta", "partial_rotary_factor")}, fields.where)
    share, theta = fields.get("rotary_pct", ROTATED), fields.get("rotary_emb_base", THETA)
    return read_rope(fields, fraction=share, partial=True, theta=theta)


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("is_decoder", False, True)
    fields.only("quantization_config")
    width, heads = fields.get("hidden_size", 6144), fields.get("num_attention_heads", 64)
    bias = bool(fields.get("attention_bias", True))
    return ModelConfig(
        llm=DecoderConfig(
            vocab_size=fields.get("vocab_size", 50432),
            layers=fields.get("num_hidden_layers", 44),
            block=BlockConfig(
                width=width,
                heads=heads,
                kv_heads=heads,
                head_dim=width // heads,
                mlp_width=fields.get("intermediate_size", 24576),
                activation=fields.activation("hidden_act", "gelu"),
                norm="layer",
                norm_eps=fields.get("layer_norm_eps", 1e-5),
                gated_mlp=False,
                qkv_bias=bias,
                output_bias=bias,
                mlp_bias=True,
                rope=_rope(fields),
                parallel_norms=2 if fields.get("use_parallel_residual", True) else 0,
            ),
            max_positions=fields.get("max_position_embeddings", 2048),
            tied_head=fields.get("tie_word_embeddings", False),
        )
    )


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    decoder, block, rope = config.llm, config.llm.block, config.llm.block.rope
    fits = block.norm == "layer" and not block.gated_mlp and block.parallel_norms in (0, 2) and block.mlp_bias
    llama.require(fits and rope is not None and block.kv_heads == block.heads, "GPT-NeoX", "its norms or MLP are others")
    assert rope is not None
    return {
        **rope_fields(rope, base, _rope),
        "architectures": base.get("architectures") or ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": decoder.vocab_size,
        "hidden_size": block.width,
        "intermediate_size": block.mlp_width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": block.heads,
        "hidden_act": activation_name(block.activation, base.get("hidden_act")),
        "layer_norm_eps": block.norm_eps,
        "max_position_embeddings": decoder.max_positions,
        "use_parallel_residual": block.parallel_norms == 2,
        "attention_bias": block.qkv_bias,
        "tie_word_embeddings": decoder.tied_head,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.llm is not None
    block = config.llm.block
    layer, ours = "gpt_neox.layers.{i}.", "llm/layers/"
    fused = [f"{ours}attention/{name}" for name in ("query", "key", "value")]
    theirs = layer + "attention.query_key_value"
    table = [
        rule("gpt_neox.embed_in.weight", "llm/embed/embedding"),
        *norm(layer + "input_layernorm", ours + "attention_norm"),
        *norm(layer + "post_attention_layernorm", ours + "mlp_norm"),
        *norm("gpt_neox.final_layer_norm", "llm/final_norm"),
        rule(theirs + ".weight", *(f"{path}/kernel" for path in fused), form=transposed, groups=block.heads),
        *linear(layer + "attention.dense", ours + "attention/output", block.output_bias),
        *linear(layer + "mlp.dense_h_to_4h", ours + "mlp/up"),
        *linear(layer + "mlp.dense_4h_to_h", ours + "mlp/down"),
    ]
    if block.qkv_bias:
        table.append(rule(theirs + ".bias", *(f"{path}/bias" for path in fused), groups=block.heads))
    return table if config.llm.tied_head else table + linear("embed_out", "llm/head", bias=False)


def _copies(config: ModelConfig) -> dict[str, str]:
    assert config.llm is not None
    return {"embed_out.weight": "gpt_neox.embed_in.weight"} if config.llm.tied_head else {}


FAMILY = Family(
    model_types=("gpt_neox",),
    about="GPT-NeoX, Pythia (arXiv 2204.06745)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    spellings=((r"^lm_head\.", "embed_out."), (r"^(?=(embed_in|layers|final_layer_norm)\.)", "gpt_neox.")),
    copies=_copies,
    unused=(r"rotary_emb\.inv_freq$", r"\.attention\.(masked_)?bias$"),
)
