"""Rotary embeddings in a foreign configuration, in both spellings: `rope_parameters`, and the older `rope_theta` with
`rope_scaling`.
"""

from __future__ import annotations

from typing import Any

from mmjax.errors import UserError
from mmjax.families.fields import Fields
from mmjax.models.config import Rope

THETA = 10000.0  # where a config says nothing


def read_rope(fields: Fields, *, fraction: float = 1.0, partial: bool = False) -> Rope:
    """The rope of a config; `fraction` is the family's own default for `partial_rotary_factor`, which only `partial`
    families may set.

    Raises UserError for a kind that is not supported (yarn, dynamic, longrope, ...).
    """
    spelling = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    found = dict(fields.get(spelling, {}))
    kind = found.get("rope_type", found.get("type", "default"))
    rotated = found.get("partial_rotary_factor", fields.get("partial_rotary_factor", fraction))
    if not partial and rotated != 1.0:
        raise UserError(
            f"{fields.where}: partial_rotary_factor = {rotated} is not supported for {fields.get('model_type')}"
        )
    settings: dict[str, Any] = {
        "theta": float(found.get("rope_theta", fields.get("rope_theta", THETA))),
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
    if kind == "llama3":
        return Rope(
            kind="llama3",
            factor=float(need("factor")),
            low_frequency_factor=float(need("low_freq_factor")),
            high_frequency_factor=float(need("high_freq_factor")),
            original_length=int(need("original_max_position_embeddings")),
            **settings,
        )
    raise UserError(f"{fields.where}: {spelling}.rope_type = {kind!r} is not supported (only default, linear, llama3)")


def write_rope(rope: Rope) -> dict[str, Any]:
    """The `rope_parameters` of a config."""
    written: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.fraction != 1.0:
        written["partial_rotary_factor"] = rope.fraction
    if rope.kind != "default":
        written["factor"] = rope.factor
    if rope.kind == "llama3":
        written["low_freq_factor"] = rope.low_frequency_factor
        written["high_freq_factor"] = rope.high_frequency_factor
        written["original_max_position_embeddings"] = rope.original_length
    return written
