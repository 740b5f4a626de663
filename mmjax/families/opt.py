"""OPT (arXiv 2205.01068) in transformers' layout: learned positions, ReLU, and in the 350M model norms behind the sublayers and
narrow embeddings.
"""

from __future__ import annotations

from mmjax.families import language, llama
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, linear, norm, rule
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import DecoderConfig, ModelConfig

OFFSET = 2  # rows of the position table that no position uses
EPS = 1e-5  # torch's own; the config has no field for it


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("layer_norm_elementwise_affine", True)
    fields.only("quantization_config")
    width, heads = fields.get("hidden_size", 768), fields.get("num_attention_heads", 12)
    bias, before = bool(fields.get("enable_bias", True)), bool(fields.get("do_layer_norm_before", True))
    length, embed_width = fields.get("max_position_embeddings", 2048), fields.get("word_embed_proj_dim", width)
    return ModelConfig(
        llm=DecoderConfig(
            vocab_size=fields.get("vocab_size", 50272),
            layers=fields.get("num_hidden_layers", 12),
            block=BlockConfig(
                width=width,
                heads=heads,
                kv_heads=heads,
                head_dim=width // heads,
                mlp_width=fields.get("ffn_dim", 3072),
                activation=fields.activation("activation_function", "relu"),
                norm="layer",
                norm_eps=EPS,
                norm_place="before" if before else "after",
                gated_mlp=False,
                qkv_bias=bias,
                output_bias=bias,
                mlp_bias=bias,
            ),
            max_positions=length,
            tied_head=fields.get("tie_word_embeddings", True),
            embed_width=0 if embed_width == width else embed_width,
            learned_positions=length + OFFSET,
            position_offset=OFFSET,
            final_norm=before and not fields.get("_remove_final_layer_norm", False),
        )
    )


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    decoder, block = config.llm, config.llm.block
    fits = block.norm == "layer" and block.norm_eps == EPS and not block.gated_mlp and block.rope is None
    llama.require(fits and decoder.position_offset == OFFSET, "OPT", "its norms, MLP or positions are others")
    return {
        **base,
        "architectures": base.get("architectures") or ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": decoder.vocab_size,
        "hidden_size": block.width,
        "ffn_dim": block.mlp_width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": block.heads,
        "activation_function": activation_name(block.activation, base.get("activation_function")),
        "max_position_embeddings": decoder.max_positions,
        "word_embed_proj_dim": decoder.input_width,
        "do_layer_norm_before": block.norm_place == "before",
        "_remove_final_layer_norm": block.norm_place == "before" and not decoder.final_norm,
        "enable_bias": block.mlp_bias,
        "tie_word_embeddings": decoder.tied_head,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.llm is not None
    decoder, block = config.llm, config.llm.block
    start, layer, ours = "model.decoder.", "model.decoder.layers.{i}.", "llm/layers/"
    table = [
        rule(start + "embed_tokens.weight", "llm/embed/embedding"),
        rule(start + "embed_positions.weight", "llm/embed/positions"),
        *norm(layer + "self_attn_layer_norm", ours + "attention_norm"),
        *norm(layer + "final_layer_norm", ours + "mlp_norm"),
        *linear(layer + "fc1", ours + "mlp/up", block.mlp_bias),
        *linear(layer + "fc2", ours + "mlp/down", block.mlp_bias),
    ]
    for theirs, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "output")):
        table += linear(f"{layer}self_attn.{theirs}", f"{ours}attention/{name}", block.qkv_bias)
    if decoder.final_norm:
        table += norm(start + "final_layer_norm", "llm/final_norm")
    if decoder.embed_width:
        table += linear(start + "project_in", "llm/embed/project_in", bias=False)
        table += linear(start + "project_out", "llm/project_out", bias=False)
    return table if decoder.tied_head else table + linear("lm_head", "llm/head", bias=False)


def _copies(config: ModelConfig) -> dict[str, str]:
    assert config.llm is not None
    return {"lm_head.weight": "model.decoder.embed_tokens.weight"} if config.llm.tied_head else {}


FAMILY = Family(
    model_types=("opt",),
    about="OPT (arXiv 2205.01068)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=language.INPUTS,
    outputs=language.counted_outputs,
    prompt=language.prompt,
    spellings=((r"^decoder\.", "model.decoder."),),
    copies=_copies,
)
