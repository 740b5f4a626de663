"""MobileNetV2 (arXiv 1801.04381): a convolutional encoder whose last feature map is a grid of tokens.

Parameters of one convolution are its `kernel` [size, size, in, out] (depthwise: [size, size, 1, channels]) and the batch norm
behind it, `norm/{scale,bias,mean,variance}` [out]. The norm keeps its four published leaves, so that a checkpoint goes out
as it came in; it is folded into the kernel whenever the network runs, which costs nothing beside one picture. It always
runs on the stored statistics: there is no training mode that updates them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mmjax.models.config import Execution
from mmjax.models.encoder_config import FeatureSpec, MobileNetV2Config, divisible
from mmjax.models.layers import Linear, apply
from mmjax.models.tuning_config import Adapters

Params = dict[str, Any]
Padding = list[tuple[int, int]]  # before and after, of height and width

ACTIVATIONS = {"relu6": jax.nn.relu6, "relu": jax.nn.relu, "silu": jax.nn.silu}


def features(
    params: Params,
    config: MobileNetV2Config,
    spec: FeatureSpec,
    pixels: jax.Array,
    run: Execution,
    adapters: Adapters = (),
) -> jax.Array:
    """What the connector reads of normalised pixels [n, height, width, channels]: [n, positions, feature_width], the last map row
    by row. Raises ValueError for any other feature spec: the maps below have other sizes, and there is no class token and no
    last norm to keep. (A convolution has no adapter port.)
    """
    if spec != FeatureSpec():
        raise ValueError(
            f"MobileNetV2 has one map of features, layers (-1,) with no class token and no post-norm; got {spec}"
        )
    last = maps(params, config, pixels, run)[-1]
    return last.reshape(last.shape[0], -1, last.shape[-1])


def maps(params: Params, config: MobileNetV2Config, pixels: jax.Array, run: Execution) -> list[jax.Array]:
    """The output of every block of `network`, each [n, height, width, channels]."""
    x, found = pixels.astype(run.dtype), []
    for block in network(config):
        y = x
        for convolution in block.convolutions:
            y = _convolve(convolution, _leaves(params, convolution.path), config, y)
        x = x + y if block.residual else y
        found.append(x)
    return found


def pooled(last: jax.Array) -> jax.Array:
    """The mean over the last map [n, height, width, channels]: float32 [n, channels]."""
    return jnp.mean(last.astype(jnp.float32), axis=(1, 2))


def classify(params: Params, config: MobileNetV2Config, pixels: jax.Array, run: Execution) -> jax.Array:
    """Normalised pixels [n, height, width, channels] -> float32 class logits [n, classes]."""
    return logits(params, config, pooled(maps(params, config, pixels, run)[-1]))


def logits(params: Params, config: MobileNetV2Config, state: jax.Array) -> jax.Array:
    """float32 class logits [n, classes] of pooled features [n, channels]."""
    return apply(Linear(config.classes), params["head"], state).astype(jnp.float32)


def init(key: jax.Array, config: MobileNetV2Config) -> Params:
    """Fresh float32 parameters: He-normal kernels, norms that change nothing."""
    params: Params = {}
    convolutions = [c for block in network(config) for c in block.convolutions]
    keys = jax.random.split(key, len(convolutions) + 1)
    for key, c in zip(keys, convolutions):
        *above, last = c.path.split("/")
        node = params
        for name in above:
            node = node.setdefault(name, {})
        inputs = 1 if c.depthwise else c.inputs
        deviation = (2.0 / (c.size * c.size * inputs)) ** 0.5
        ones, zeros = jnp.ones(c.outputs), jnp.zeros(c.outputs)
        node[last] = {
            "kernel": deviation * jax.random.normal(key, (c.size, c.size, inputs, c.outputs)),
            "norm": {"scale": ones, "bias": zeros, "mean": zeros, "variance": ones},
        }
    if config.classes:
        kernel = 0.01 * jax.random.normal(keys[-1], (config.feature_width, config.classes))
        params["head"] = {"kernel": kernel, "bias": jnp.zeros(config.classes)}
    return params


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One convolution with its norm, at `path` below the encoder's parameters."""

    path: str
    size: int
    inputs: int
    outputs: int
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False
    activated: bool = True


@dataclasses.dataclass(frozen=True)
class Block:
    convolutions: tuple[Convolution, ...]
    residual: bool = False


def network(config: MobileNetV2Config) -> tuple[Block, ...]:
    """The whole network in order: the stem, sixteen inverted residuals, the last 1x1 convolution."""
    c = config
    widths = [c.scaled(w) for w in (16, *[24] * 2, *[32] * 3, *[64] * 4, *[96] * 3, *[160] * 3, 320)]
    strides = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
    first = c.scaled(32)
    stem = [Convolution("stem/first", 3, c.channels, first, stride=2)]
    if not c.first_layer_is_expansion:
        stem.append(Convolution("stem/expand", 1, first, first))
    stem.append(Convolution("stem/depthwise", 3, first, first, depthwise=True))
    stem.append(Convolution("stem/reduce", 1, first, widths[0], activated=False))
    blocks = [Block(tuple(stem))]

    reached, dilation = 2, 1
    for i, stride in enumerate(strides):
        # Beyond the output stride the map is no longer made smaller: what follows a stride is dilated instead.
        if reached == c.output_stride:
            step, spread, dilation = 1, dilation, dilation * stride
        else:
            step, spread, reached = stride, 1, reached * stride
        inputs, outputs, name = widths[i], widths[i + 1], f"blocks_{i}"
        inner = divisible(round(inputs * c.expand_ratio), c.depth_divisible_by, c.min_depth)
        inside = (
            Convolution(f"{name}/expand", 1, inputs, inner),
            Convolution(f"{name}/depthwise", 3, inner, inner, stride=step, dilation=spread, depthwise=True),
            Convolution(f"{name}/reduce", 1, inner, outputs, activated=False),
        )
        blocks.append(Block(inside, residual=step == 1 and inputs == outputs))
    blocks.append(Block((Convolution("final", 1, widths[-1], c.feature_width),)))
    return tuple(blocks)


def _leaves(params: Params, path: str) -> Params:
    for key in path.split("/"):
        params = params[key]
    return params


def _convolve(c: Convolution, leaves: Params, config: MobileNetV2Config, x: jax.Array) -> jax.Array:
    """Pad, convolve, norm and activate: [n, height, width, in] -> [n, height / stride, width / stride, out]."""
    norm = {name: leaf.astype(jnp.float32) for name, leaf in leaves["norm"].items()}
    scale = norm["scale"] * lax.rsqrt(norm["variance"] + config.norm_eps)
    kernel = (leaves["kernel"].astype(jnp.float32) * scale).astype(x.dtype)
    bias = (norm["bias"] - norm["mean"] * scale).astype(x.dtype)
    if c.size == 1:
        y = jnp.einsum("nhwi,io->nhwo", x, kernel[0, 0])
    else:
        padding = [_padding(c, size, config.tf_padding) for size in x.shape[1:3]]
        if c.depthwise:
            # Measured on XLA:CPU: 17 pictures a second with grouped convolutions, 90 with shifted products.
            y = (shifted if jax.default_backend() == "cpu" else grouped)(x, kernel, padding, c)
        else:
            y = lax.conv_general_dilated(
                x, kernel, (c.stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
    y = y + bias
    return ACTIVATIONS[config.activation](y) if c.activated else y


def _padding(c: Convolution, size: int, tensorflow: bool) -> tuple[int, int]:
    """Zeros before and after one side of `size` pixels: TensorFlow's SAME puts the odd one after, torch's padding is even."""
    if not tensorflow:
        return (c.size // 2 * c.dilation,) * 2
    total = max(c.size - (size % c.stride or c.stride), 0)
    return total // 2 * c.dilation, (total - total // 2) * c.dilation


def grouped(x: jax.Array, kernel: jax.Array, padding: Padding, c: Convolution) -> jax.Array:
    """A depthwise convolution as XLA has it: x [n, height, width, channels], kernel [size, size, 1, channels]."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (c.stride,) * 2,
        padding,
        rhs_dilation=(c.dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=c.inputs,
    )


def shifted(x: jax.Array, kernel: jax.Array, padding: Padding, c: Convolution) -> jax.Array:
    """The same as a sum of shifted products."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    reach = (c.size - 1) * c.dilation
    height, width = ((side - reach - 1) // c.stride + 1 for side in x.shape[1:3])
    total = jnp.zeros((), x.dtype)
    for i in range(c.size):
        for j in range(c.size):
            top, left = i * c.dilation, j * c.dilation
            bottom, right = top + (height - 1) * c.stride + 1, left + (width - 1) * c.stride + 1
            total = total + x[:, top : bottom : c.stride, left : right : c.stride] * kernel[i, j, 0]
    return total
