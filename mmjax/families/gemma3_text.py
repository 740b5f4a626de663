"""Gemma 3's text model (arXiv 2503.19786) in transformers' layout: a Gemma with norms on queries and keys, most of whose layers see a
window, and have a rotary embedding of their own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mmjax.families import gemma, llama
from mmjax.families.family import Config
from mmjax.families.fields import Fields
from mmjax.families.rope import read_rope, write_rope
from mmjax.families.windows import read_windows, write_windows
from mmjax.models.block_config import Rope
from mmjax.models.config import DecoderConfig, ModelConfig

DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}
THETA, LOCAL_THETA = 1e6, 1e4
PATTERN = 6  # of so many layers the last one sees everything, where the config lists no kinds
ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq")


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("attn_logit_softcapping", None)
    full, local = _ropes(fields)
    plain = Fields({**{k: v for k, v in config.items() if k not in ROPE_FIELDS}, "rope_parameters": write_rope(full)}, where)
    layers, pattern = fields.get("num_hidden_layers", DEFAULTS["num_hidden_layers"]), fields.get("sliding_window_pattern", PATTERN)
    windows = read_windows(fields, layers, fields.get("sliding_window", 4096), lambda i: (i + 1) % pattern != 0)
    decoder = gemma.read_decoder(
        plain,
        "hidden_activation",
        windows=windows,
        block={
            "norm": "rms_plus_one",
            "norm_place": "both",
            "qk_norm": "rms_plus_one",
            "scale": float(fields.get("query_pre_attn_scalar", 256)) ** -0.5,
        },
        **DEFAULTS,
    )
    ropes = tuple(local if window else full for window in windows)
    cap = float(fields.get("final_logit_softcapping", 0.0))
    block = dataclasses.replace(decoder.block, rope=full)
    return ModelConfig(llm=dataclasses.replace(decoder, block=block, ropes=ropes, logit_softcap=cap))


def _ropes(fields: Fields) -> tuple[Rope, Rope]:
    """The rotary embeddings of layers that see everything, and of those that see a window."""
    given = fields.get("rope_parameters", {})
    full, local = (dict(given.get(kind) or {}) for kind in ("full_attention", "sliding_attention"))
    full.update(fields.get("rope_scaling") or {})
    full.setdefault("rope_theta", fields.get("rope_theta", THETA))
    local.setdefault("rope_theta", fields.get("rope_local_base_freq", LOCAL_THETA))
    rest = {name: value for name, value in fields.values.items() if name not in ROPE_FIELDS}
    read = [read_rope(Fields({**rest, "rope_parameters": found}, fields.where)) for found in (full, local)]
    return read[0], read[1]


def _write(config: ModelConfig, base: Config) -> Config:
    decoder, block = config.language, config.language.block
    fits = gemma.fits(dataclasses.replace(decoder, block=dataclasses.replace(block, qk_norm="")), "both")
    fits = fits and block.qk_norm == "rms_plus_one" and block.qk_norm_over == "head" and not block.softcap and block.rope is not None
    llama.require(fits, "Gemma 3", "its norms, biases or scores are others")
    bare = {name: value for name, value in base.items() if name not in ROPE_FIELDS}
    written = llama.write_decoder(decoder, bare, "gemma3_text", "Gemma3ForCausalLM", activation="hidden_activation")
    return {
        **{name: value for name, value in written.items() if name != "rope_parameters"},
        **_rope_fields(decoder, base),
        **write_windows(decoder.windows, decoder.layers),
        "attention_bias": block.qkv_bias,
        "query_pre_attn_scalar": gemma.query_scalar(block.scale, base),
        "final_logit_softcapping": decoder.logit_softcap or None,
    }


def _rope_fields(decoder: DecoderConfig, base: Config) -> Config:
    """The fields of the rotary embeddings: those of `base` where it has these already."""
    full = decoder.block.rope
    assert full is not None
    before = _ropes(Fields(base)) if base else None
    local = next((rope for rope, window in zip(decoder.ropes, decoder.windows) if window), before[1] if before else Rope(LOCAL_THETA))
    if before == (full, local):
        return {name: base[name] for name in ROPE_FIELDS if name in base}
    return {"rope_parameters": {"full_attention": write_rope(full), "sliding_attention": write_rope(local)}}


FAMILY = dataclasses.replace(
    gemma.FAMILY,
    model_types=("gemma3_text",),
    about="Gemma 3's text model (arXiv 2503.19786)",
    read_config=_read,
    write_config=_write,
)
