"""What a transformer block is, as frozen dataclasses: its norms, rotary embedding, experts. See mmjax.models.config."""

from __future__ import annotations

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "squared_relu"]


NormKind = Literal["rms", "rms_plus_one", "layer"]
"""RMS norm (arXiv 1910.07467); the same with 1 added to its scale (Gemma); layer norm (arXiv 1607.06450)."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864) and its published context extensions; see mmjax.models.rope.

    `fraction` of each head's channels is rotated, the rest passes through (phi, GPT-NeoX).
    `sections` says how many angles of a head each axis of a position turns, the axes taking turns (M-RoPE, arXiv 2409.12191);
    () = a position is one number, or all its axes are the same.

    axial                     every one of the `sections` has all the frequencies
    factor, original_length   of every other extension
    low/high_frequency_factor     llama3
    max_length                    dynamic: positions up to here are not scaled
    beta_fast, beta_slow, truncate    yarn: where the passage between scaled and unscaled wavelengths lies
    short_factors, long_factors   longrope: divisors of each angle, for inputs up to `original_length` and beyond it
    attention_factor              yarn, longrope: what cosines and sines are multiplied by
    """

    theta: float = 10000.0
    fraction: float = 1.0
    sections: tuple[int, ...] = ()
    kind: Literal["default", "axial", "linear", "dynamic", "yarn", "longrope", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 0
    max_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in the MLP's place (arXiv 2401.04088): each token goes to the `chosen` experts that its router rates
    highest, and their outputs are added by the softmax of those ratings. No token is ever dropped."""

    count: int
    chosen: int


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One transformer block: attention and MLP, each with a norm and a residual.

    norm_place      "before": x + f(norm(x)); "after": norm(x + f(x)) (BERT); "both": x + norm'(f(norm(x))) (Gemma 2)
    norm_bias       of layer norms
    key_bias        whether keys have a bias where queries and values have one (EVA's have none)
    parallel_norms  0: attention, then the MLP. Else both read the same x, x + attention(norm(x)) + mlp(norm'(x)), through
                    1 norm (phi) or 2 (GPT-NeoX)
    qk_norm         a norm on queries and keys, over each head's channels or over all of them; qk_norm_eps 0 = norm_eps
    scale           of the scores; 0 = 1 / sqrt(head_dim)
    softcap         scores become softcap * tanh(scores / softcap); 0 = none
    clip_qkv        queries, keys and values are clipped to +- this; 0 = not
    layer_scale     a learned factor for each channel of what attention and MLP add (arXiv 2103.17239)
    wide_residual   the residual stream and the MLP's output are float32 whatever the activations are (T5's outgrow float16)
    memory_width    width of the states that a cross-attention between attention and MLP reads; 0 = no cross-attention
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    activation: Activation
    norm: NormKind
    norm_eps: float
    gated_mlp: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    rope: Rope | None = None
    norm_place: Literal["before", "after", "both"] = "before"
    norm_bias: bool = True
    key_bias: bool = True
    parallel_norms: Literal[0, 1, 2] = 0
    qk_norm: NormKind | Literal[""] = ""
    qk_norm_over: Literal["head", "width"] = "head"
    qk_norm_eps: float = 0.0
    scale: float = 0.0
    softcap: float = 0.0
    clip_qkv: float = 0.0
    layer_scale: bool = False
    wide_residual: bool = False
    experts: Experts | None = None
    memory_width: int = 0
