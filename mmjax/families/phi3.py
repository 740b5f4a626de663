"""Phi-3 and Phi-4-mini (arXiv 2404.14219, 2503.01743) in transformers' layout: a Llama whose projections are stored fused."""

from __future__ import annotations

import dataclasses

from mmjax.families import language, llama
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, rule, transposed
from mmjax.models.config import ModelConfig

LENGTH = 4096  # of a config that says nothing


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(_with_longrope(config), where)
    decoder = llama.read_decoder(
        fields,
        qkv_bias=False,
        output_bias=False,
        windows=(fields.get("sliding_window", 0),),
        partial=True,
        rms_norm_eps=1e-5,
        max_position_embeddings=LENGTH,
    )
    return ModelConfig(llm=dataclasses.replace(decoder, cache_restarts=True))


def _with_longrope(config: Config) -> Config:
    """The config with its rope kind under one name: old files call longrope "su" or "yarn"."""
    for name in ("rope_scaling", "rope_parameters"):
        found = config.get(name) or {}
        if found.get("rope_type", found.get("type")) in ("su", "yarn"):
            config = {**config, name: {**found, "rope_type": "longrope"}}
    return {"original_max_position_embeddings": LENGTH, **config}


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    block = config.llm.block
    fits = llama.plain(block) and block.norm == "rms" and not (block.qkv_bias or block.mlp_bias or block.qk_norm)
    llama.require(fits and block.head_dim * block.heads == block.width, "Phi-3", "it has other norms, heads or biases")
    written = llama.write_decoder(
        config.llm, _with_longrope(base) if base else base, "phi3", "Phi3ForCausalLM", partial=True
    )
    del written["head_dim"]
    assert block.rope is not None
    length = block.rope.original_length or base.get("original_max_position_embeddings", LENGTH)
    return {**written, "sliding_window": config.llm.windows[0] or None, "original_max_position_embeddings": length}


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    layer, ours = "model.layers.{i}.", "llm/layers/"
    attention, mlp = (
        [f"{ours}{part}/{name}/kernel" for name in names]
        for part, names in (("attention", ("query", "key", "value")), ("mlp", ("gate", "up")))
    )
    return [
        *llama.around_layers(config, foreign),
        rule(layer + "self_attn.qkv_proj.weight", *attention, form=transposed),
        *linear(layer + "self_attn.o_proj", ours + "attention/output", bias=False),
        rule(layer + "mlp.gate_up_proj.weight", *mlp, form=transposed),
        *linear(layer + "mlp.down_proj", ours + "mlp/down", bias=False),
    ]


FAMILY = Family(
    model_types=("phi3",),
    about="Phi-3, Phi-4-mini (arXiv 2404.14219)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    spellings=llama.SPELLINGS,
    copies=llama.copies,
)
