"""Qwen3 (arXiv 2505.09388) in transformers' layout: a Llama with a norm on each head's queries and keys."""

from __future__ import annotations

from mmjax.families import language, llama, qwen2
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.windows import write_windows
from mmjax.models.config import ModelConfig


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    bias = bool(fields.get("attention_bias", False))
    decoder = llama.read_decoder(
        fields,
        qkv_bias=bias,
        output_bias=bias,
        windows=qwen2.windows(fields),
        block={"qk_norm": "rms"},
        head_dim=128,
        num_key_value_heads=llama.kv_heads(fields, 32),
        max_position_embeddings=32768,
    )
    return ModelConfig(llm=decoder)


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    decoder, block = config.llm, config.llm.block
    fits = llama.plain(block) and block.qk_norm == "rms" and block.qkv_bias == block.output_bias and not block.mlp_bias
    llama.require(fits, "Qwen3", "its queries and keys have no norm, or it has other biases")
    written = llama.write_decoder(decoder, base, "qwen3", "Qwen3ForCausalLM")
    windows = write_windows(decoder.windows, decoder.layers)
    return {**written, "attention_bias": block.qkv_bias, "use_sliding_window": any(decoder.windows), **windows}


FAMILY = Family(
    model_types=("qwen3",),
    about="Qwen3 (arXiv 2505.09388)",
    read_config=_read,
    write_config=_write,
    rules=llama.rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    spellings=llama.SPELLINGS,
    copies=llama.copies,
)
