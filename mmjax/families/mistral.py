"""Mistral (arXiv 2310.06825) in transformers' layout: a Llama whose layers see a sliding window."""

from __future__ import annotations

from mmjax.families import language, llama
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.models.config import ModelConfig

WINDOW = 4096  # of a config that says nothing; null means none


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    window = config.get("sliding_window", WINDOW) or 0
    decoder = llama.read_decoder(
        fields,
        qkv_bias=False,
        output_bias=False,
        windows=(window,),
        num_key_value_heads=8,
        max_position_embeddings=4096 * 32,
    )
    return ModelConfig(llm=decoder)


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    block = config.llm.block
    fits = llama.plain(block) and block.norm == "rms" and not (block.qkv_bias or block.mlp_bias or block.qk_norm)
    llama.require(fits and len(config.llm.windows) == 1, "Mistral", "its layers differ in their windows, or it has biases")
    written = llama.write_decoder(config.llm, base, "mistral", "MistralForCausalLM")
    return {**written, "sliding_window": config.llm.windows[0] or None}


FAMILY = Family(
    model_types=("mistral",),
    about="Mistral (arXiv 2310.06825)",
    read_config=_read,
    write_config=_write,
    rules=llama.rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    spellings=llama.SPELLINGS,
    copies=llama.copies,
)
