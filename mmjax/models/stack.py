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
    body: Body, carry: Any, params: Params, *, layers: int, period: int = 1, extras: tuple = (), run: Execution
) -> tuple[Any, Any]:
    """Runs the first `layers` of the stacked layers; returns the carry and the outputs stacked on axis 0 (None stays None).

    extras[j] is a pytree with one row for each group, handed to the j-th layer of every group. Layers that do not fill a last
    period are run one by one after the scan.

    Where only some of the stacked layers run (a feature tap below the top), they are picked by index inside the loop: a slice
    of the stack would copy it.
    """
    total = jax.tree.leaves(params)[0].shape[0]
    groups, rest = divmod(layers, period)
    extras = extras or (None,) * period
    step = _rematerialised(body, run.remat)

    def group(carry, inputs):
        g, rows, more = inputs
        outputs = []
        for j in range(period):
            index = g * period + j
            if rows is None:
                layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), params)
            else:
                layer = jax.tree.map(lambda leaf: leaf[j], rows) if period > 1 else rows
            carry, output = step(carry, layer, j, index, more[j])
            outputs.append(output)
        return carry, outputs[0] if period == 1 else jax.tree.map(lambda *o: jnp.stack(o), *outputs)

    rows = None
    if layers == total and not rest:
        rows = params if period == 1 else jax.tree.map(lambda leaf: leaf.reshape(groups, period, *leaf.shape[1:]), params)
    scanned = tuple(jax.tree.map(lambda leaf: leaf[:groups], extra) for extra in extras)
    carry, outputs = jax.lax.scan(group, carry, (jnp.arange(groups), rows, scanned), unroll=max(1, min(run.unroll, groups)))
    if period > 1:
        outputs = jax.tree.map(lambda o: o.reshape(groups * period, *o.shape[2:]), outputs)
    for j in range(rest):
        index = groups * period + j
        layer = jax.tree.map(lambda leaf: leaf[index], params)
        carry, output = step(carry, layer, j, jnp.asarray(index), jax.tree.map(lambda leaf: leaf[groups], extras[j]))
        outputs = jax.tree.map(lambda o, last: jnp.concatenate([o, last[None]]), outputs, output)
    return carry, outputs


def _rematerialised(body: Body, remat: str) -> Body:
    """The body under a rematerialisation policy: "none" keeps what the backward pass needs, "dots" keeps the products of
    activations with weights and what is named KEPT, "full" keeps the layer's input alone."""
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = {
        "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)),
        "full": policies.nothing_saveable,
    }
    if remat not in policy:
        raise ValueError(f"unknown rematerialisation {remat!r}; known: none, dots, full")
    return jax.checkpoint(body, policy=policy[remat], static_argnums=(2,))
