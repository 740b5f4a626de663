"""GPT-2 (Radford et al., 2019) in transformers' layout: learned positions, weights stored [in, out], projections fused."""

from __future__ import annotations

from mmjax.families import language, llama
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, linear, norm, rule
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import DecoderConfig, ModelConfig


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    fields.only("quantization_config")
    width, heads = fields.get("n_embd", 768), fields.get("n_head", 12)
    length = fields.get("n_positions", 1024)
    return ModelConfig(
        llm=DecoderConfig(
            vocab_size=fields.get("vocab_size", 50257),
            layers=fields.get("n_layer", 12),
            block=BlockConfig(
                width=width,
                heads=heads,
                kv_heads=heads,
                head_dim=width // heads,
                mlp_width=fields.get("n_inner", 4 * width),
                activation=fields.activation("activation_function", "gelu_new"),
                norm="layer",
                norm_eps=fields.get("layer_norm_epsilon", 1e-5),
                gated_mlp=False,
                qkv_bias=True,
                output_bias=True,
                mlp_bias=True,
                scale=0.0 if fields.get("scale_attn_weights", True) else 1.0,
            ),
            max_positions=length,
            tied_head=fields.get("tie_word_embeddings", True),
            learned_positions=length,
        )
    )


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    decoder, block = config.llm, config.llm.block
    fits = block.norm == "layer" and block.norm_place == "before" and not block.gated_mlp and block.rope is None
    fits = fits and block.mlp_bias and block.kv_heads == block.heads and block.scale in (0.0, 1.0)
    llama.require(fits and not decoder.position_offset, "GPT-2", "its norms, MLP or positions are others")
    return {
        **base,
        "architectures": base.get("architectures") or ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": decoder.vocab_size,
        "n_embd": block.width,
        "n_inner": None if block.mlp_width == 4 * block.width else block.mlp_width,
        "n_layer": decoder.layers,
        "n_head": block.heads,
        "activation_function": activation_name(block.activation, base.get("activation_function", "gelu_new")),
        "layer_norm_epsilon": block.norm_eps,
        "n_positions": decoder.max_positions,
        "scale_attn_weights": block.scale == 0.0,
        "tie_word_embeddings": decoder.tied_head,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.llm is not None
    layer, ours = "transformer.h.{i}.", "llm/layers/"
    table = [
        rule("transformer.wte.weight", "llm/embed/embedding"),
        rule("transformer.wpe.weight", "llm/embed/positions"),
        *norm(layer + "ln_1", ours + "attention_norm"),
        *norm(layer + "ln_2", ours + "mlp_norm"),
        *norm("transformer.ln_f", "llm/final_norm"),
    ]
    fused = [f"{ours}attention/{name}" for name in ("query", "key", "value")]
    table.append(rule(layer + "attn.c_attn.weight", *(f"{path}/kernel" for path in fused), axis=1))
    table.append(rule(layer + "attn.c_attn.bias", *(f"{path}/bias" for path in fused)))
    for theirs, name in (("attn.c_proj", "attention/output"), ("mlp.c_fc", "mlp/up"), ("mlp.c_proj", "mlp/down")):
        table += [rule(f"{layer}{theirs}.weight", f"{ours}{name}/kernel"), rule(f"{layer}{theirs}.bias", f"{ours}{name}/bias")]
    return table if config.llm.tied_head else table + linear("lm_head", "llm/head", bias=False)


def _copies(config: ModelConfig) -> dict[str, str]:
    assert config.llm is not None
    return {"lm_head.weight": "transformer.wte.weight"} if config.llm.tied_head else {}


FAMILY = Family(
    model_types=("gpt2",),
    about="GPT-2 (Radford et al., 2019)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    spellings=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),),
    copies=_copies,
    unused=(r"\.attn\.bias$", r"\.attn\.masked_bias$"),
)
