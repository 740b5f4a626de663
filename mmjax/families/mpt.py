"""MPT (MosaicML, 2023) in transformers' layout: ALiBi in the place of positions, no biases at all, projections fused.

transformers makes the MLP four times as wide and takes slopes down to 2 ** -8, whatever `expansion_ratio` and `alibi_bias_max`
say (published files say the same); so it is done here.
"""

from __future__ import annotations

from mmjax.errors import UserError
from mmjax.families import language, llama
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, norm, rule, transposed
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import DecoderConfig, ModelConfig

WIDER = 4  # how much wider the MLP is than the rest
ALIBI = 8.0  # largest exponent of the slopes


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("quantization_config")
    fields.only("logit_scale")
    attention = Fields(fields.get("attn_config", {}), f"{where}: attn_config")
    attention.only("attn_type", "multihead_attention")
    attention.only("alibi", True)
    for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id"):
        attention.only(name, False)
    width, heads = fields.get("d_model", 2048), fields.get("n_heads", 16)
    if width % heads:
        raise UserError(f"{where}: n_heads = {heads} must divide d_model = {width}")
    return ModelConfig(
        llm=DecoderConfig(
            vocab_size=fields.get("vocab_size", 50368),
            layers=fields.get("n_layers", 24),
            block=BlockConfig(
                width=width,
                heads=heads,
                kv_heads=heads,
                head_dim=width // heads,
                mlp_width=WIDER * width,
                activation="gelu",
                norm="layer",
                norm_bias=False,
                norm_eps=fields.get("layer_norm_epsilon", 1e-5),
                gated_mlp=False,
                qkv_bias=False,
                output_bias=False,
                mlp_bias=False,
                scale=float(attention.get("softmax_scale", 0.0)),
                clip_qkv=float(attention.get("clip_qkv", 0.0)),
            ),
            max_positions=fields.get("max_seq_len", 2048),
            tied_head=fields.get("tie_word_embeddings", True),
            alibi=ALIBI,
        )
    )


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    decoder, block = config.llm, config.llm.block
    fits = block.norm == "layer" and not block.norm_bias and not block.mlp_bias and block.mlp_width == WIDER * block.width
    llama.require(fits and decoder.alibi == ALIBI and block.activation == "gelu", "MPT", "its norms, MLP or positions are others")
    attention = {
        **base.get("attn_config", {}),
        "alibi": True,
        "softmax_scale": block.scale or None,
        "clip_qkv": block.clip_qkv or None,
    }
    return {
        **base,
        "architectures": base.get("architectures") or ["MptForCausalLM"],
        "model_type": "mpt",
        "vocab_size": decoder.vocab_size,
        "d_model": block.width,
        "n_layers": decoder.layers,
        "n_heads": block.heads,
        "layer_norm_epsilon": block.norm_eps,
        "max_seq_len": decoder.max_positions,
        "tie_word_embeddings": decoder.tied_head,
        "attn_config": attention,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.llm is not None
    layer, ours = "transformer.blocks.{i}.", "llm/layers/"
    fused = [f"{ours}attention/{name}/kernel" for name in ("query", "key", "value")]
    table = [
        rule("transformer.wte.weight", "llm/embed/embedding"),
        *norm(layer + "norm_1", ours + "attention_norm", bias=False),
        *norm(layer + "norm_2", ours + "mlp_norm", bias=False),
        *norm("transformer.norm_f", "llm/final_norm", bias=False),
        rule(layer + "attn.Wqkv.weight", *fused, form=transposed),
        *linear(layer + "attn.out_proj", ours + "attention/output", bias=False),
        *linear(layer + "ffn.up_proj", ours + "mlp/up", bias=False),
        *linear(layer + "ffn.down_proj", ours + "mlp/down", bias=False),
    ]
    return table if config.llm.tied_head else table + linear("lm_head", "llm/head", bias=False)


def _copies(config: ModelConfig) -> dict[str, str]:
    assert config.llm is not None
    return {"lm_head.weight": "transformer.wte.weight"} if config.llm.tied_head else {}


FAMILY = Family(
    model_types=("mpt",),
    about="MPT (MosaicML, 2023)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    spellings=((r"^(?=(wte|blocks|norm_f)\.)", "transformer."),),
    copies=_copies,
)
