"""RobustGER's prompts with a language-space noise embedding (arXiv 2401.10446): adaption prompts whose keys and values are moved by it.

A sample comes with E [P, width], the differences between the sentence embeddings of its N-best hypotheses: how far they disagree is how
noisy the speech was. In every layer that has prompts (see mmjax.models.adaption_prompt), for each head and prompt,

    keys   = k_prompts + norm(E key)         * key_gate               key: Linear without a bias, value: one with
    values = v_prompts + norm(E value)       * value_gate             gates: 0 at the beginning, one for each channel

and the heads' gate is what it is, without tanh. `intermediate` are E key and E value, which the audio noise distillation reads (see
mmjax.models.mine).

    leaves, k rows for k layers:   prompts [k, P, width], gate [k, heads], key, value (Linears), key_norm, value_norm,
                                   key_gate, value_gate [k, P, heads, head_dim]
"""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp

from mmjax.models import ports
from mmjax.models.adaption_prompt import Beside, laid_out, seen_by_number, sits_on
from mmjax.models.block import Extra
from mmjax.models.config import DecoderConfig
from mmjax.models.layers import Linear, Norm, apply
from mmjax.models.tuning_config import Adapters, NoisePromptConfig

Params = dict[str, Any]
NAMES = ("key", "value")


def init(key: jax.Array, config: NoisePromptConfig, llm: DecoderConfig) -> Params:
    """Fresh leaves: gates 0; prompts and Linears ~ N(0, 0.02), as the authors' code base starts them."""
    rows, block = len(sits_on(False, config.depth, llm.layers)), llm.block
    keys = jax.random.split(key, 3)
    leaves: Params = {
        "prompts": 0.02 * jax.random.normal(keys[0], (rows, config.length, block.width)),
        "gate": jnp.zeros((rows, block.heads)),
    }
    for name, draw in zip(NAMES, keys[1:]):
        out = block.heads * block.head_dim
        leaves[name] = {"kernel": 0.02 * jax.random.normal(draw, (rows, config.channels, out))}
        leaves[f"{name}_norm"] = {"scale": jnp.ones((rows, out))}
        leaves[f"{name}_gate"] = jnp.zeros((rows, config.length, block.heads, block.head_dim))
    leaves["value"]["bias"] = jnp.zeros((rows, block.heads * block.head_dim))
    return leaves


def plug(config: NoisePromptConfig, llm: DecoderConfig, beside: Beside | None, adapters: Adapters = ()) -> ports.Plug:
    """The prompts, moved by the embeddings [rows, media, P, width] of the batch (None: it has none)."""
    heads, groups = llm.block.heads, llm.block.heads // llm.block.kv_heads

    def call(params: Params, query: jax.Array, project: Callable) -> Extra:
        found = [jnp.repeat(a, groups, 2) for a in project(params["prompts"].astype(query.dtype)[None])]
        if beside is None:
            return Extra(found[0], found[1], params["gate"])
        moved = []
        for name, plain in zip(NAMES, found):
            noise = embedded(params, config, name, beside.tokens.astype(query.dtype), adapters)
            noise = apply(Norm("rms", 1e-5), params[f"{name}_norm"], noise)
            noise = noise.reshape(*noise.shape[:-1], heads, -1) * params[f"{name}_gate"].astype(noise.dtype)
            plain = plain[:, None]  # [1, 1, P, heads, dim]; a sample without an embedding sees them as they are
            rows = jnp.broadcast_to(plain, (noise.shape[0], *plain.shape[1:]))
            moved.append(laid_out(jnp.concatenate([rows, plain + noise], 1)))
        count = beside.tokens.shape[1] + 1
        return Extra(moved[0], moved[1], params["gate"], mask=seen_by_number(beside.number + 1, count, config.length))

    return ports.Plug(config.name, "keys_values", sits_on(False, config.depth, llm.layers), call)


def embedded(params: Params, config: NoisePromptConfig, name: str, noise: jax.Array, adapters: Adapters = ()) -> jax.Array:
    """One layer's "key" or "value" embedding [..., P, heads * head_dim] of E [..., P, width], before its norm."""
    features = params[name]["kernel"].shape[-1]
    return apply(Linear(features, name == "value", adapters), params[name], noise)


def intermediate(leaves: Params, config: NoisePromptConfig, noise: jax.Array) -> jax.Array:
    """The embeddings of all layers, of each the key's and then the value's: [2 * layers, ..., P, heads * head_dim]."""
    found = [jax.vmap(lambda layer, name=name: embedded(layer, config, name, noise))(leaves) for name in NAMES]
    return jnp.stack(found, 1).reshape(-1, *found[0].shape[1:])
