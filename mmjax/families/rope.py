"""Rotary embeddings in a foreign configuration, in both spellings: `rope_parameters`, and the older `rope_theta` with
`rope_scaling`.
"""

from __future__ import annotations

import math
from typing import Any, Callable

from mmjax.errors import UserError
from mmjax.families.family import Config
from mmjax.families.fields import Fields
from mmjax.models.block_config import Rope

THETA = 10000.0  # where a config says nothing


def read_rope(fields: Fields, *, fraction: float = 1.0, partial: bool = False, theta: float = THETA) -> Rope:
    """The rope of a config; `fraction` is the family's own default for `partial_rotary_factor`, which only `partial`
    families may set, `theta` its default for `rope_theta`.

    Raises UserError for a kind that is not known, and for a field that its kind needs and lacks.
    """
    spelling = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    found = {name: value for name, value in dict(fields.get(spelling, {})).items() if value is not None}
    if any(isinstance(value, dict) for value in found.values()):
        raise UserError(f"{fields.where}: {spelling} that differ by kind of layer are not supported here")
    kind = found.get("rope_type", found.get("type", "default"))
    rotated = found.get("partial_rotary_factor", fields.get("partial_rotary_factor", fraction))
    if not partial and rotated != 1.0:
        raise UserError(
            f"{fields.where}: partial_rotary_factor = {rotated} is not supported for {fields.get('model_type')}"
        )
    settings: dict[str, Any] = {
        "theta": float(found.get("rope_theta", fields.get("rope_theta", theta))),
        "fraction": float(rotated),
    }

    def need(name: str) -> Any:
        if name not in found:
            raise UserError(f"{fields.where}: {spelling} of type {kind} has no {name}")
        return found[name]

    if kind == "default":
        return Rope(**settings)
    if kind == "linear":
        return Rope(kind="linear", factor=float(need("factor")), **settings)
    longest = fields.get("max_position_embeddings")
    if kind == "dynamic":
        return Rope(kind="dynamic", factor=float(need("factor")), max_length=int(longest or need("max_length")), **settings)
    # Phi-3 has the trained length beside its rope parameters; it counts more than one inside of them.
    original = fields.get("original_max_position_embeddings", found.get("original_max_position_embeddings", longest))
    if original is None:
        raise UserError(f"{fields.where}: {spelling} of type {kind} needs original_max_position_embeddings")
    settings["original_length"] = int(original)
    if kind == "llama3":
        return Rope(
            kind="llama3",
            factor=float(need("factor")),
            low_frequency_factor=float(need("low_freq_factor")),
            high_frequency_factor=float(need("high_freq_factor")),
            **settings,
        )
    if kind in ("yarn", "longrope", "su"):
        factor = float(found["factor"]) if "factor" in found else (longest or original) / original
        given = found.get("attention_factor")
        if kind == "yarn":
            return Rope(
                kind="yarn",
                factor=factor,
                beta_fast=float(found.get("beta_fast") or 32),
                beta_slow=float(found.get("beta_slow") or 1),
                truncate=bool(found.get("truncate", True)),
                attention_factor=_yarn_attention(found, factor) if given is None else float(given),
                **settings,
            )
        natural = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return Rope(
            kind="longrope",
            factor=factor,
            short_factors=tuple(map(float, need("short_factor"))),
            long_factors=tuple(map(float, need("long_factor"))),
            attention_factor=natural if given is None else float(given),
            **settings,
        )
    raise UserError(
        f"{fields.where}: {spelling}.rope_type = {kind!r} is not supported "
        "(only default, linear, dynamic, llama3, yarn, longrope)"
    )


def _yarn_attention(found: dict[str, Any], factor: float) -> float:
    """YaRN's temperature (arXiv 2309.00071, equation 22), or the ratio of two that DeepSeek's configs ask for."""

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    one, all_ = found.get("mscale"), found.get("mscale_all_dim")
    return temperature(one) / temperature(all_) if one and all_ else temperature(1.0)


def write_rope(rope: Rope) -> dict[str, Any]:
    """The `rope_parameters` of a config."""
    written: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind, "partial_rotary_factor": rope.fraction}
    if rope.kind != "default":
        written["factor"] = rope.factor
    if rope.original_length:
        written["original_max_position_embeddings"] = rope.original_length
    if rope.kind == "llama3":
        written["low_freq_factor"] = rope.low_frequency_factor
        written["high_freq_factor"] = rope.high_frequency_factor
    if rope.kind in ("yarn", "longrope"):
        written["attention_factor"] = rope.attention_factor
    if rope.kind == "yarn":
        written.update(beta_fast=rope.beta_fast, beta_slow=rope.beta_slow, truncate=rope.truncate)
    if rope.kind == "longrope":
        written.update(short_factor=list(rope.short_factors), long_factor=list(rope.long_factors))
    return written


def rope_fields(rope: Rope, base: Config, read: Callable[[Fields], Rope]) -> Config:
    """The fields of `base` (a config.json, or {}) with this rope: unchanged where it has it already, as `read` reads it."""
    if base and read(Fields(base)) == rope:
        return base
    old = ("rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base")
    return {**{name: value for name, value in base.items() if name not in old}, "rope_parameters": write_rope(rope)}
