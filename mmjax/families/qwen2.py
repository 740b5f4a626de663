"""Qwen2 and Qwen2.5 (arXiv 2407.10671) in transformers' layout: a Llama with biases on queries, keys and values."""

from __future__ import annotations

from mmjax.families import language, llama
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.families.windows import read_windows, write_windows
from mmjax.models.config import ModelConfig


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    decoder = llama.read_decoder(
        fields,
        qkv_bias=True,
        output_bias=False,
        windows=windows(fields),
        num_key_value_heads=llama.kv_heads(fields, 32),
        max_position_embeddings=32768,
    )
    return ModelConfig(llm=decoder)


def windows(fields: Fields) -> tuple[int, ...]:
    """Layers from `max_window_layers` on have a window, if windows are in use at all."""
    # An explicit null means no window, where an absent field means the default.
    window = (fields.values.get("sliding_window", 4096) or 0) if fields.get("use_sliding_window", False) else 0
    first = fields.get("max_window_layers", 28)
    return read_windows(fields, fields.need("num_hidden_layers"), window, lambda i: bool(window) and i >= first)


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    decoder, block = config.llm, config.llm.block
    biases = block.qkv_bias and not block.output_bias and not block.mlp_bias
    fits = llama.plain(block) and block.norm == "rms" and block.head_dim * block.heads == block.width
    llama.require(fits and biases and not block.qk_norm, "Qwen2", "biases belong on queries, keys and values alone")
    written = llama.write_decoder(decoder, base, "qwen2", "Qwen2ForCausalLM")
    del written["head_dim"]  # always width / heads
    return {**written, "use_sliding_window": any(decoder.windows), **write_windows(decoder.windows, decoder.layers)}


FAMILY = Family(
    model_types=("qwen2",),
    about="Qwen2, Qwen2.5 (arXiv 2407.10671)",
    read_config=_read,
    write_config=_write,
    rules=llama.rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    spellings=llama.SPELLINGS,
    copies=llama.copies,
)
