"""Running stacked layers by a scan: parameters have the layers on axis 0, and one body is compiled for a whole period."""

from __future__ import annotations

from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp

from mmjax.models.config import Execution

KEPT = "dear to make again"  # what jax.checkpoint_name calls so is kept by "dots": products of experts, what attention's kernel gives
Params = Mapping[str, Any]
# body(carry, layer parameters, index in the period (static), layer index (traced), extra inputs of this layer) -> carry, output
Body = Callable[[Any, Params, int, jax.Array, Any], tuple[Any, Any]]


def init_stack(init: Callable[[jax.Array], Params], key: jax.Array, layers: int) -> Params:
    """Parameters of `layers` layers, each initialised on its own, stacked on axis 0."""
    return jax.vmap(init)(jax.random.split(key, layers))


def run_stack(
    body: Body, carry: Any, params: Params, *, layers: int, period: int = 1, pattern: int = 1, extras: tuple = (), run: Execution
) -> tuple[Any, Any]:
    """Runs the first `layers` of the stacked layers; returns the carry and the outputs stacked on axis 0 (None stays None).

    extras[j] is a pytree with one row for each group, handed to the j-th layer of every group. `pattern` divides the period: what the body does
    with j depends on j % pattern. Layers of a group that follow one another and are alike, of pattern 1 and without extras, are a scan within it, so
    that one body is compiled for them. Layers that do not fill a last period are run one by one after the scan.

    Where only some of the stacked layers run (a feature tap below the top), they are picked by index inside the loop: a slice
    of the stack would copy it.
    """
    total = jax.tree.leaves(params)[0].shape[0]
    groups, rest = divmod(layers, period)
    extras = extras or (None,) * period
    runs = _runs(extras) if pattern == 1 else [(j, 1) for j in range(period)]
    whole = layers == total and not rest

    def picked(carry, held, place, j, index, extra):
        """A layer that stands at `place` of what is held (None: it is that itself), picked within what is rematerialised, so that it is not
        kept for the gradient beside the stack."""
        layer = held if place is None else jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, place, keepdims=False), held)
        return body(carry, layer, j, index, extra)

    step = _rematerialised(picked, run.remat)

    def group(carry, inputs):
        g, rows, more = inputs
        held = rows if whole else params
        outputs = []
        for first, count in runs:

            def one(carry, j, first=first):
                index = g * period + j
                place = (j if period > 1 else None) if whole else index
                return step(carry, held, place, first, index, more[first])

            if count > 1:
                carry, output = jax.lax.scan(one, carry, first + jnp.arange(count))
            else:
                carry, output = one(carry, first)
                output = jax.tree.map(lambda o: o[None], output) if period > 1 else output
            outputs.append(output)
        return carry, outputs[0] if len(outputs) == 1 else jax.tree.map(lambda *o: jnp.concatenate(o), *outputs)

    rows = params if whole else None
    if whole and period > 1:
        rows = jax.tree.map(lambda leaf: leaf.reshape(groups, period, *leaf.shape[1:]), params)
    scanned = tuple(jax.tree.map(lambda leaf: leaf[:groups], extra) for extra in extras)
    carry, outputs = jax.lax.scan(group, carry, (jnp.arange(groups), rows, scanned), unroll=max(1, min(run.unroll, groups)))
    if period > 1:
        outputs = jax.tree.map(lambda o: o.reshape(groups * period, *o.shape[2:]), outputs)
    for j in range(rest):
        index = groups * period + j
        carry, output = step(carry, params, index, j, jnp.asarray(index), jax.tree.map(lambda leaf: leaf[groups], extras[j]))
        outputs = jax.tree.map(lambda o, last: jnp.concatenate([o, last[None]]), outputs, output)
    return carry, outputs


def _runs(extras: tuple) -> list[tuple[int, int]]:
    """Layers of a period in runs, (first, how many): those that have extras alone, those without together."""
    runs: list[tuple[int, int]] = []
    for j, extra in enumerate(extras):
        bare = not jax.tree.leaves(extra)
        if bare and runs and not jax.tree.leaves(extras[j - 1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((j, 1))
    return runs


def _rematerialised(step: Callable, remat: str) -> Callable:
    """A layer's step under a rematerialisation policy: "none" keeps what the backward pass needs, "dots" keeps the products of
    activations with weights and what is named KEPT, "full" keeps the layer's input alone."""
    if remat == "none":
        return step
    policies = jax.checkpoint_policies
    policy = {
        "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)),
        "full": policies.nothing_saveable,
    }
    if remat not in policy:
        raise ValueError(f"unknown rematerialisation {remat!r}; known: none, dots, full")
    return jax.checkpoint(step, policy=policy[remat], static_argnums=(3,))
