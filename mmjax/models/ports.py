"""What may be plugged into a decoder's layers: a plug is a function, the layers it sits on, and its own parameters.

The leaves of a plug stand at `llm/plugs/NAME/...` with one row for each of its layers, k rows for k layers, so that they are
stored, trained and counted at their true size. The decoder hands every layer its row; see `rows_for`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Literal, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models.block import LayerPorts

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Plug:
    """One thing plugged into a port of some layers.

    port     "keys_values": call(params, query) -> (keys, values, gate or None)
             "sublayer":    call(params, where, x, y) -> y
             "before":      call(params, x) -> x, between the previous block and this one
    layers   the decoder layers it sits on, ascending
    """

    name: str
    port: Literal["keys_values", "sublayer", "before"]
    layers: tuple[int, ...]
    call: Callable


def rows_for(plug: Plug, leaves: Params, residue: int, period: int, groups: int) -> tuple[Params, jax.Array | None] | None:
    """The rows of a plug for layers residue, residue + period, ... (one for each group), as scan inputs.

    Returns None where no such layer has the plug, (rows, None) where all have it, and (rows, present [groups] bool) where only
    some have it: rows of the others are copies that `bind` switches off.
    """
    place = {layer: row for row, layer in enumerate(plug.layers)}
    wanted = [place.get(group * period + residue) for group in range(groups)]
    if all(row is None for row in wanted):
        return None
    if wanted == list(range(len(plug.layers))):
        return leaves, None
    index = np.array([0 if row is None else row for row in wanted])
    rows = jax.tree.map(lambda leaf: leaf[index], leaves)
    present = None if None not in wanted else jnp.array([row is not None for row in wanted])
    return rows, present


def bind(plugs: tuple[Plug, ...], rows: Mapping[str, tuple[Params, jax.Array | None]]) -> LayerPorts:
    """The plugs of one layer as functions of activations alone. `rows` has an entry for each plug present."""
    bound: dict[str, list[Callable]] = {"keys_values": [], "sublayer": [], "before": []}
    for plug in plugs:
        if plug.name in rows:
            bound[plug.port].append(_switched(plug, *rows[plug.name]))
    return LayerPorts(**{port: tuple(calls) for port, calls in bound.items()})


def _switched(plug: Plug, params: Params, present: jax.Array | None) -> Callable:
    if present is None:
        return lambda *args: plug.call(params, *args)
    if plug.port == "keys_values":

        def gated(query: jax.Array):
            keys, values, gate = plug.call(params, query)
            if gate is None:
                raise ValueError(f"plug {plug.name!r}: ungated keys and values cannot be absent from some layers of a scanned group")
            return keys, values, jnp.where(present, gate, 0)

        return gated
    return lambda *args: jnp.where(present, plug.call(params, *args), args[-1])
