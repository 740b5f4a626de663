"""Adapters on the linear port: made beside the weights they change, merged into them, taken off again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mmjax import tree
from mmjax.models.config import ModelConfig
from mmjax.models.tuning_config import LoraConfig

Params = dict[str, Any]


def linears(params: Params, adapter: LoraConfig) -> list[str]:
    """Paths (without `/kernel`) of the Linears that an adapter's targets choose.

    Raises ValueError for a target that chooses none, and for dropout where there is none.
    """
    paths = [
        path.removesuffix("/kernel")
        for path, leaf in tree.flatten(params).items()
        if path.endswith("/kernel") and len(leaf.shape) < 4 and has_port(path)  # convolutions and experts have none
    ]
    for target in adapter.targets:
        if not any(tree.matches(path, target) for path in paths):
            raise ValueError(f"adapter {adapter.name!r}: target {target!r} matches no linear layer; there are {', '.join(paths)}")
    chosen = [path for path in paths if any(tree.matches(path, target) for target in adapter.targets)]
    if adapter.dropout and (plugged := [path for path in chosen if path.startswith("llm/plugs/")]):
        raise ValueError(f"adapter {adapter.name!r} has dropout, which there is none of in plugs: {', '.join(plugged)}")
    return chosen


def has_port(path: str) -> bool:
    """Whether the Linear at a path reads adapters: those of blocks, plugs and connectors do, but not routers, heads or embeddings."""
    return (tree.is_stacked(path) or path.startswith("connector/")) and "/router" not in path


def add(key: jax.Array, params: Params, config: ModelConfig) -> Params:
    """The parameters with fresh float32 leaves for each of config.adapters that has none yet.

    lora_a [layers, in, rank] ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform with a = sqrt 5, as in PEFT), lora_b [layers, rank, out] = 0, so
    that the adapted model equals the base.
    """
    fresh = {}
    for adapter in config.adapters:
        for path in linears(params, adapter):
            leaf = f"{path}/adapters/{adapter.name}"
            kernel = tree.flatten(params)[f"{path}/kernel"]
            if f"{leaf}/lora_a" in tree.flatten(params):
                continue
            *stack, inputs, outputs = kernel.shape
            key, draw = jax.random.split(key)
            bound = inputs**-0.5
            fresh[f"{leaf}/lora_a"] = jax.random.uniform(draw, (*stack, inputs, adapter.rank), minval=-bound, maxval=bound)
            fresh[f"{leaf}/lora_b"] = jnp.zeros((*stack, adapter.rank, outputs))
    return tree.merge(params, tree.unflatten(fresh))


def merge(params: Params, config: ModelConfig) -> Params:
    """The parameters with every adapter added into its kernel (in float32, stored in the kernel's dtype) and its leaves gone."""
    scales = {adapter.name: adapter.scale for adapter in config.adapters}
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/adapters/" not in path}
    for path, lora_a in flat.items():
        if path.endswith("/lora_a"):
            linear, name = path.removesuffix("/lora_a").rsplit("/adapters/", 1)
            kernel = merged[f"{linear}/kernel"]
            change = lora_a.astype(jnp.float32) @ flat[path.removesuffix("a") + "b"].astype(jnp.float32) * scales[name]
            merged[f"{linear}/kernel"] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    return tree.unflatten(merged)
