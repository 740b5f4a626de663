"""The text half of a two-tower model (CLIP, SigLIP): tokens to one embedding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mmjax.models.attention import Mask
from mmjax.models.block import Block, Surroundings
from mmjax.models.config import Execution
from mmjax.models.encoder_config import TextTowerConfig
from mmjax.models.layers import Linear, Norm, apply, fan_in_normal
from mmjax.models.stack import init_stack, run_stack

Params = dict[str, Any]


def init(key: jax.Array, config: TextTowerConfig) -> Params:
    """Fresh float32 parameters."""
    keys = jax.random.split(key, 4)
    width = config.block.width
    x = jnp.zeros((1, 1, width))
    params: Params = {
        "embed": {"embedding": jax.random.normal(keys[0], (config.vocab_size, width)) * 0.02},
        "positions": jax.random.normal(keys[1], (config.max_positions, width)) * 0.02,
        "layers": init_stack(lambda k: Block(config.block).init(k, x, Surroundings(Mask()))["params"], keys[2], config.layers),
        "final_norm": Norm(config.block.norm, config.block.norm_eps).init(key, x)["params"],
    }
    if config.projection:
        params["projection"] = {"kernel": fan_in_normal(keys[3], (width, config.projection))}
        if config.projection_bias:
            params["projection"]["bias"] = jnp.zeros(config.projection)
    return params


def encode(
    params: Params, config: TextTowerConfig, tokens: jax.Array, run: Execution, segments: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Tokens int [n, length] -> `states` [layers + 1, n, length, width], `last` (after the final norm), `pooled` [n, width] and
    `embedding` [n, projection], if the tower has a projection. `segments` [n, length] is 0 at padding that may not be seen."""
    x = params["embed"]["embedding"][tokens] + params["positions"][: tokens.shape[1]]
    x = x.astype(run.dtype)
    block = Block(config.block, run=run)
    # Padding is not seen, but sees: SigLIP pools the last position, whatever stands there.
    everyone = None if segments is None else jnp.ones_like(segments)
    mask = Mask(causal=config.causal, query_segments=everyone, key_segments=segments)

    def body(x, layer, j, index, extra):
        x = apply(block, layer, x, Surroundings(mask))
        return x, x

    last, states = run_stack(body, x, params["layers"], layers=config.layers, run=run)
    last = apply(Norm(config.block.norm, config.block.norm_eps), params["final_norm"], last)
    if config.pooling == "last":
        pooled = last[:, -1]
    else:
        # Old CLIP files name 2 as the end of text, whose true id is the largest of the vocabulary.
        at = jnp.argmax(tokens if config.end_of_text == 2 else tokens == config.end_of_text, -1)
        pooled = jnp.take_along_axis(last, at[:, None, None], 1)[:, 0]
    found = {"states": jnp.concatenate([x[None], states]), "last": last, "pooled": pooled}
    if config.projection:
        found["embedding"] = apply(Linear(config.projection, config.projection_bias), params["projection"], pooled)
    return found
