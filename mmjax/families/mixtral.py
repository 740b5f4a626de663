"""Mixtral (arXiv 2401.04088) in transformers' layout: a Mistral whose MLPs are mixtures of experts."""

from __future__ import annotations

from mmjax.families import language, llama
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, rule, transposed
from mmjax.models.block_config import Experts
from mmjax.models.config import ModelConfig

THETA = 1e6


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("router_jitter_noise", 0.0, 0)
    experts = Experts(fields.get("num_local_experts", 8), fields.get("num_experts_per_tok", 2))
    decoder = llama.read_decoder(
        fields,
        qkv_bias=False,
        output_bias=False,
        windows=(fields.get("sliding_window", 0),),
        theta=THETA,
        block={"experts": experts},
        num_key_value_heads=llama.kv_heads(fields, 8),
        rms_norm_eps=1e-5,
        max_position_embeddings=4096 * 32,
    )
    return ModelConfig(llm=decoder)


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    block, experts = config.llm.block, config.llm.block.experts
    fits = block.norm == "rms" and not block.qkv_bias and len(config.llm.windows) == 1
    llama.require(fits and experts is not None, "Mixtral", "it has no experts, or other norms or biases")
    assert experts is not None
    return {
        **llama.write_decoder(config.llm, base, "mixtral", "MixtralForCausalLM", theta=THETA),
        "sliding_window": config.llm.windows[0] or None,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    theirs, ours = "model.layers.{i}.block_sparse_moe.", "llm/layers/mlp/"
    table = llama.rules(config, foreign) + linear(theirs + "gate", ours + "router", bias=False)
    for name, path in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        table.append(rule(theirs + "experts.{e}." + name + ".weight", f"{ours}experts_{path}/kernel", form=transposed))
    return table


FAMILY = Family(
    model_types=("mixtral",),
    about="Mixtral (arXiv 2401.04088)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    spellings=llama.SPELLINGS,
    copies=llama.copies,
    modules=((r"\.block_sparse_moe\.", ".mlp."),),
)
