"""What may be plugged into the layers of a decoder or an encoder: a plug is a function, the layers it sits on, and its own parameters.

The leaves of a plug stand at `llm/plugs/NAME/...` (of an encoder-decoder's encoder `llm/encoder/plugs/NAME/...`, of a vision transformer
`vision/plugs/NAME/...`) with one row for each of its layers, k rows for k layers, so that they are stored, trained and counted at their
true size. Every layer is handed its row; see `rows_for`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Callable, Literal, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models.block import Extra, LayerPorts

Params = Mapping[str, Any]
LONGEST = 16  # layers of a period: they are compiled one by one


@dataclasses.dataclass(frozen=True)
class Plug:
    """One thing plugged into a port of some layers.

    port     "keys_values": call(params, query, project) -> mmjax.models.block.Extra or None, see mmjax.models.block.LayerPorts
             "inputs":      call(params, where, x) -> x, what attention or MLP reads
             "sublayer":    call(params, where, x, joined, y) -> y, what attention or MLP puts out, see LayerPorts
             "before":      call(params, x) -> x, between the previous block and this one
    layers   the layers it sits on, ascending
    draws    `call` takes a keyword `key`: this layer's, for its dropout, or None
    tells    what `call` is to say of each layer by name, as zeros of that shape: it takes a keyword `tell`, called with (name, array)
    """

    name: str
    port: Literal["keys_values", "inputs", "sublayer", "before"]
    layers: tuple[int, ...]
    call: Callable
    draws: bool = False
    tells: Mapping[str, jax.Array] | None = None


def period(plugs: Sequence[Plug], windows: int, layers: int) -> int:
    """Of a pattern of layers that repeats every `windows` of them: after how many it repeats with the plugs, if each sits on every
    n-th layer. Its layers then have places of their own in the scan's body, and no other computes anything for it. Where the two
    make no period within so many `layers`, or a plug's layers have no pattern, `windows`: a plug's rows are then copied out to all
    layers (see `rows_for`).
    """
    together = windows
    for plug in plugs:
        steps = {b - a for a, b in zip(plug.layers, plug.layers[1:])}
        together = math.lcm(together, steps.pop() if len(steps) == 1 else layers if len(plug.layers) == 1 else 1)
    return together if together <= min(layers, LONGEST) else windows


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


def extras(params: Params, plugs: Sequence[Plug], period: int, layers: int) -> tuple[dict[str, Any], ...]:
    """For each layer of the period: the rows of the plugs that sit there, one for each group. `params` has the leaves at plugs/NAME."""
    found = []
    for residue in range(period):
        groups = len(range(residue, layers, period))  # the last one may not have this residue
        rows = {plug.name: rows_for(plug, params["plugs"][plug.name], residue, period, groups) for plug in plugs}
        found.append({name: row for name, row in rows.items() if row is not None})
    return tuple(found)


def bind(
    plugs: tuple[Plug, ...],
    rows: Mapping[str, tuple[Params, jax.Array | None]],
    key: jax.Array | None = None,
    told: dict[str, dict[str, jax.Array]] | None = None,
) -> LayerPorts:
    """The plugs of one layer as functions of activations alone. `rows` has an entry for each plug present; `key` is the layer's, for
    dropout; what plugs tell of the layer is put into `told`."""
    bound: dict[str, list[Callable]] = {"keys_values": [], "inputs": [], "sublayer": [], "before": []}
    told = {} if told is None else told
    for number, plug in enumerate(plugs):
        settings: dict[str, Any] = {}
        if plug.draws:
            settings["key"] = None if key is None else jax.random.fold_in(key, number)
        if plug.tells is not None:
            told[plug.name] = dict(plug.tells)
            settings["tell"] = told[plug.name].__setitem__
        if plug.name in rows:
            bound[plug.port].append(_switched(plug, functools.partial(plug.call, **settings), *rows[plug.name]))
    return LayerPorts(**{port: tuple(calls) for port, calls in bound.items()})


def _switched(plug: Plug, call: Callable, params: Params, present: jax.Array | None) -> Callable:
    if present is None:
        return functools.partial(call, params)
    if plug.port == "keys_values":

        def gated(query: jax.Array, project: Callable) -> Extra | None:
            extra = call(params, query, project)
            if extra is None:
                return None
            if extra.gate is None:
                raise ValueError(f"plug {plug.name!r}: ungated keys and values cannot be absent from some layers of a scanned group")
            return extra._replace(gate=jnp.where(present, extra.gate, 0))

        return gated
    return lambda *args: jnp.where(present, call(params, *args), args[-1])
