"""MINE (arXiv 1801.04062) as RobustGER (arXiv 2401.10446) has it: how much a language-space noise embedding knows of the audio's noise.

    T(x, a) = sigmoid(proj4 silu(proj3 (silu(proj1 mean(x)) + silu(proj2 mean(a)))))         means over time, Linears without biases

T is trained to tell noisy audio from clean by E (`estimation_loss`); held fixed, it then teaches the layers' embeddings of E to know the
noise (`distillation_loss`). E is negated in both, as the authors' code does.

    leaves: prefix [width, d] in front of E alone, proj1 [d, d / 4], proj2 [audio, d / 4], proj3 [d / 4, d / 16], proj4 [d / 16, 1]
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mmjax.models.layers import Linear, apply, fan_in_uniform

Params = dict[str, Any]


def init(key: jax.Array, width: int, audio: int, state: int) -> Params:
    """Fresh parameters for E of `state` channels, embeddings of `width` and audio features of `audio`; U(-1/sqrt(in), 1/sqrt(in))."""
    shapes = {
        "prefix": (state, width),
        "proj1": (width, width // 4),
        "proj2": (audio, width // 4),
        "proj3": (width // 4, width // 16),
        "proj4": (width // 16, 1),
    }
    keys = jax.random.split(key, len(shapes))
    return {name: {"kernel": fan_in_uniform(k, shape)} for k, (name, shape) in zip(keys, shapes.items())}


def score(params: Params, language: jax.Array, audio: jax.Array, raw: bool) -> jax.Array:
    """T of E [..., P, state], if `raw`, or of embeddings [..., P, width], and of audio features [..., time, audio]: float32 [...]."""

    def linear(name: str, x: jax.Array) -> jax.Array:
        return apply(Linear(params[name]["kernel"].shape[-1], False), params[name], x)

    x, a = language.astype(jnp.float32).mean(-2), audio.astype(jnp.float32).mean(-2)
    if raw:
        x = linear("prefix", x)
    h = jax.nn.silu(linear("proj1", x)) + jax.nn.silu(linear("proj2", a))
    return jax.nn.sigmoid(linear("proj4", jax.nn.silu(linear("proj3", h))))[..., 0]


def estimation_loss(params: Params, noise: jax.Array, noisy: jax.Array, clean: jax.Array) -> jax.Array:
    """Of each sample [n], for MINE's own parameters: noise [n, P, state], noisy and clean audio [n, time, audio]."""
    return score(params, -noise, clean, raw=True) - score(params, -noise, noisy, raw=True)


def distillation_loss(params: Params, embeddings: jax.Array, noisy: jax.Array) -> jax.Array:
    """Of each sample [n], for what made the embeddings [layers, n, P, width]: the mean over layers. MINE is held fixed."""
    fixed = jax.lax.stop_gradient(params)
    return -jax.vmap(lambda layer: score(fixed, -layer, noisy, raw=False))(embeddings).mean(0)
