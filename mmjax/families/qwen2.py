"""Qwen2 and Qwen2.5 (arXiv 2407.10671) in transformers' layout: a Llama with biases on queries, keys and values."""

from __future__ import annotations

from mmjax.errors import UserError
from mmjax.families import language, llama
from mmjax.families.family import Config, Family
from mmjax.families.fields import Fields
from mmjax.models.config import ModelConfig


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    decoder = llama.read_decoder(
        fields,
        qkv_bias=True,
        output_bias=False,
        windows=_windows(fields),
        num_key_value_heads=fields.need("num_attention_heads"),
        max_position_embeddings=32768,
    )
    return ModelConfig(llm=decoder)


def _windows(fields: Fields) -> tuple[int, ...]:
    """One window for each layer, as short as its period: layers from `max_window_layers` on have one, if windows are in
    use at all.
    """
    layers = fields.need("num_hidden_layers")
    window = fields.get("sliding_window", 4096) if fields.get("use_sliding_window", False) else 0
    first = fields.get("max_window_layers", 28)
    kinds = fields.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown or len(kinds) != layers:
        raise UserError(f"{fields.where}: layer_types = {kinds!r} is not supported")
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return next(windows[:n] for n in range(1, layers + 1) if windows == (windows[:n] * layers)[:layers])


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    if not config.llm.block.qkv_bias or config.llm.block.output_bias or config.llm.block.mlp_bias:
        raise UserError("this decoder is not a Qwen2: biases belong on queries, keys and values, and nowhere else")
    windows = (config.llm.windows * config.llm.layers)[: config.llm.layers]
    written = llama.write_decoder(config.llm, base, "qwen2", "Qwen2ForCausalLM")
    del written["head_dim"]  # always width / heads
    if config.llm.block.head_dim * config.llm.block.heads != config.llm.block.width:
        raise UserError("this decoder is not a Qwen2: its heads do not add up to its width")
    return {
        **written,
        "use_sliding_window": any(windows),
        "sliding_window": max(windows) or None,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


FAMILY = Family(
    model_types=("qwen2",),
    read_config=_read,
    write_config=_write,
    rules=llama.rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    copies=llama.copies,
)
