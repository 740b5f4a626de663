"""LLaMA-Adapter V2's visual projector (arXiv 2304.15010, as released): learned queries in front of the encoder's tokens, through the
blocks of a vision transformer of its own; then the queries alone, as wide as the language model.

    x = norm(project_in(features));  x = blocks([queries, x]);  norm(project_out(x[:queries]))

The blocks are pre-norm, with exact GELU and biases; all norms are layer norms with `norm_eps` (the pinned version of timm has 1e-5).

    leaves: project_in, input_norm, queries [latents, hidden_width], layers (stacked blocks), project_out, output_norm
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mmjax.models.attention import Mask
from mmjax.models.block import Block, Surroundings
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import Execution
from mmjax.models.encoder_config import ConnectorConfig
from mmjax.models.layers import Linear, Norm, apply, fan_in_uniform
from mmjax.models.stack import init_stack, run_stack
from mmjax.models.tuning_config import Adapters

Params = dict[str, Any]


def init(key: jax.Array, config: ConnectorConfig) -> Params:
    """Fresh parameters: queries ~ N(0, 1), the Linears around the blocks as torch starts them, those in them normal with variance 1/fan-in."""
    keys, width = jax.random.split(key, 5), config.inner_width
    x, around = jnp.zeros((1, 1, width)), Surroundings(Mask(causal=False))
    norm = _norm(config)
    block = block_config(config)
    return {
        "project_in": _linear(keys[0], config.in_width, width),
        "input_norm": norm.init(keys[0], x)["params"],
        "queries": jax.random.normal(keys[1], (config.latents, width)),
        "layers": init_stack(lambda k: Block(block).init(k, x, around)["params"], keys[2], config.depth),
        "project_out": _linear(keys[3], width, config.out_width),
        "output_norm": norm.init(keys[3], jnp.zeros((1, 1, config.out_width)))["params"],
    }


def connect(
    params: Params, config: ConnectorConfig, features: jax.Array, adapters: Adapters = (), run: Execution = Execution()
) -> jax.Array:
    """Features [items, positions, in_width] -> [items, latents, out_width]."""
    x = apply(Linear(config.inner_width, True, adapters), params["project_in"], features)
    x = apply(_norm(config), params["input_norm"], x)
    queries = jnp.broadcast_to(params["queries"].astype(x.dtype), (x.shape[0], config.latents, x.shape[-1]))
    block = Block(block_config(config), adapters, run=run)
    around = Surroundings(Mask(causal=False))

    def body(x, layer, j, index, extra):
        return apply(block, layer, x, around), None

    x, _ = run_stack(body, jnp.concatenate([queries, x], 1), params["layers"], layers=config.depth, run=run)
    x = apply(Linear(config.out_width, True, adapters), params["project_out"], x[:, : config.latents])
    return apply(_norm(config), params["output_norm"], x)


def block_config(config: ConnectorConfig) -> BlockConfig:
    width = config.inner_width
    return BlockConfig(
        width=width,
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.head_dim or width // config.heads,
        mlp_width=config.mlp_width or config.widening * width,
        activation=config.activation,
        norm="layer",
        norm_eps=config.norm_eps,
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def _norm(config: ConnectorConfig) -> Norm:
    return Norm("layer", config.norm_eps)


def _linear(key: jax.Array, inputs: int, outputs: int) -> Params:
    draw, bias = jax.random.split(key)
    return {"kernel": fan_in_uniform(draw, (inputs, outputs)), "bias": jax.random.uniform(bias, (outputs,), minval=-1, maxval=1) * inputs**-0.5}
