"""MobileNetV2 (arXiv 1801.04381): a convolutional encoder whose last feature map is a grid of tokens.

Parameters of one convolution: `kernel` [k, k, in, out] (depthwise: [k, k, 1, channels]) and the batch norm that follows it,
`norm/{scale,bias,mean,variance}` [out]. The norm keeps its four published leaves, so that a checkpoint goes out as it
came in; it is folded into the kernel each time the network runs, which costs nothing beside one picture.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mmjax.models.config import Execution, MobileNetV2Config
from mmjax.tree import Params

ACTIVATIONS = {"relu6": jax.nn.relu6, "relu": jax.nn.relu, "silu": jax.nn.silu, "swish": jax.nn.silu, "gelu": jax.nn.gelu}


def features(params: Params, config: MobileNetV2Config, pixels: jax.Array, run: Execution = Execution()) -> jax.Array:
    """The last feature map of normalised pixels [n, height, width, channels], row by row: [n, positions, feature_width]."""
    x = pixels.astype(run.dtype)
    for name, convolution in _layers(config):
        ...
    return x


