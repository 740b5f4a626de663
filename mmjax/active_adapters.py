"""Which of a model's adapters act in a call, and how much: for all rows alike, or for each row of its own."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Mapping, Sequence, TypeAlias

import jax.numpy as jnp

from mmjax.errors import UserError
from mmjax.models.adapter_places import BESIDE, WEIGHTS
from mmjax.models.config import ModelConfig
from mmjax.tree import Params

Chosen: TypeAlias = str | Sequence[str] | Mapping[str, float]
Choice: TypeAlias = Chosen | Sequence[Chosen]
"""A name, several, or names with weights: {"a": 1.0, "b": 0.5}; or a list with one of these (not a mere name) for each row."""


def choose(params: Params, config: ModelConfig, choice: Choice) -> tuple[Params, ModelConfig]:
    """Parameters and shapes with these adapters acting, in the model's own order; () is the model under all of them.

    Which adapters act is part of the shapes, so that each choice compiles once; how much is data. Raises UserError for a name that the
    model does not have, and for weights of adapters that are only there or not.
    """
    rows = _rows(choice, [adapter.name for adapter in config.adapters])
    acting = tuple(a for a in config.adapters if any(row.get(a.name, 0.0) for row in rows))
    weights: dict[str, Any] = {}
    for adapter in acting:
        own = [float(row.get(adapter.name, 0.0)) for row in rows]
        if set(own) == {1.0}:
            continue
        if not isinstance(adapter, BESIDE):
            raise UserError(
                f"adapter {adapter.name!r} adds positions, keys or modules, which are there or not: it takes weight 1 in all rows of a call"
            )
        weights[adapter.name] = jnp.float32(own[0]) if len(set(own)) == 1 else jnp.array(own, jnp.float32)
    params = {part: leaves for part, leaves in params.items() if part != WEIGHTS}
    return {**params, WEIGHTS: weights} if weights else params, dataclasses.replace(config, adapters=acting)


def _rows(choice: Choice, known: list[str]) -> list[dict[str, float]]:
    """The weights of each row, or of all in one."""
    each = isinstance(choice, Sequence) and not isinstance(choice, str) and any(not isinstance(one, str) for one in choice)
    if each and any(isinstance(one, str) for one in choice):
        raise UserError("adapters are names, or for each row a list of names or a dict of weights; this list has both")
    rows = [_weights(one) for one in choice] if each else [_weights(choice)]  # type: ignore[union-attr, arg-type]
    for name in {name for row in rows for name in row} - set(known):
        near = difflib.get_close_matches(name, known, 1)
        nearest = f" (nearest: {near[0]!r})" if near else ""
        raise UserError(f"unknown adapter {name!r}{nearest}; this model has {', '.join(known) or 'none'}")
    return rows


def _weights(chosen: Chosen) -> dict[str, float]:
    if isinstance(chosen, str):
        return {chosen: 1.0}
    return dict(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(chosen, 1.0)
