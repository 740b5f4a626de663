"""AWQ (arXiv 2306.00978) of a whole language model: its blocks, one after another, on calibration data.

Each block is run as it was published; what its Linears read there decides by how much their inputs are scaled, against what produces
them, and where their ranges are cut (mmjax.models.awq). The scales are folded into the producers, so that nothing is left to do
when the model runs: norms of the sublayers, the values in front of the attention's output, the gated (or ReLU's) `up` in front of `down`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import tree
from mmjax.errors import UserError
from mmjax.models import awq, decoder, quantised
from mmjax.models.attention import Mask
from mmjax.models.block import Attention, Block, Surroundings
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.models.layers import MLP, Linear, apply
from mmjax.models.quantised import Quantisation

Params = dict[str, Any]
UNCUT = ("attention/query", "attention/key")  # llm-awq leaves the ranges of these: scores are too sensitive to them


@dataclasses.dataclass(frozen=True)
class Pair:
    """Linears that read the same input, and what produces it; `inside` is the sublayer by whose output rounding is judged, "" = the
    Linear's own. Paths are those in a block."""

    producer: str
    readers: tuple[str, ...]
    inside: str = ""


def quantised_by_awq(params: Params, config: ModelConfig, tokens: np.ndarray, spec: Quantisation) -> Params:
    """The parameters with the kernels of the LLM's blocks that `spec` chooses in "int4", calibrated on int tokens [rows, T] (text alone, as
    in the paper), and with what is folded into norms, biases and kernels. Dense layers stand in memory one at a time.

    Raises UserError where `spec` is of another format, or of anything but the LLM's blocks.
    """
    llm = config.language
    quantised.require(params, spec)
    chosen = quantised.chosen(params, spec)
    strange = [path for path in chosen if not path.startswith("llm/layers/")]
    if spec.format != "int4" or strange or llm.encoder is not None:
        what = ", ".join(strange) or (spec.format if spec.format != "int4" else "an encoder-decoder")
        raise UserError(f"AWQ is of int4 in the blocks of a decoder, not of {what}")
    targets = tuple(path.removeprefix("llm/layers/").removesuffix("/kernel") for path in chosen)
    stack = tree.flatten(params["llm"]["layers"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = decoder.embed(params["llm"], llm, jnp.asarray(tokens), Execution())
    x = decoder.into_blocks(params["llm"], llm, x, positions, None, None)
    bias = decoder.position_bias(params["llm"], llm, tokens.shape[1], 0, tokens.shape[1])
    made: dict[str, list[np.ndarray]] = {}
    for i in range(llm.layers):
        layer = tree.unflatten({path: jnp.asarray(leaf[i], jnp.float32) for path, leaf in stack.items()})
        found, x = _calibrated(layer, x, bias, llm, i % len(llm.windows), targets, spec.block)
        for path, leaf in tree.flatten(found).items():
            linear = path.removesuffix("/kernel")
            parts = quantised.on_host(np.asarray(leaf), spec) if path.endswith("/kernel") and linear in targets else {"": leaf}
            for name, part in parts.items():
                kept = np.asarray(part) if name else np.asarray(part, stack[path].dtype)
                made.setdefault(f"{path}/{name}".rstrip("/"), []).append(kept)
    layers = tree.unflatten({path: jnp.asarray(np.stack(rows)) for path, rows in made.items()})
    return {**params, "llm": {**params["llm"], "layers": layers}}


@functools.partial(jax.jit, static_argnames=("config", "place", "targets", "group"))
def _calibrated(
    layer: Params, x: jax.Array, bias: jax.Array | None, config: DecoderConfig, place: int, targets: tuple[str, ...], group: int
) -> tuple[Params, jax.Array]:
    """A block's leaves with scales folded in and ranges cut, and its output, both float32; `place` in the pattern of layers."""
    around = surroundings(config, x, bias, place)
    found = search(layer, config.block, x, around, targets, group)
    scaled = fold(layer, config.block, found.scales)
    for linear in targets:
        if linear not in UNCUT:
            node, read = quantised.node(scaled, linear), found.inputs[linear]
            for pair, scale in found.scales.items():
                read = read / scale if linear in pair.readers else read
            bound = awq.clip(node["kernel"], read, group)
            scaled = tree.merge(scaled, tree.unflatten({f"{linear}/kernel": awq.clipped(node["kernel"], bound)}))
    return scaled, found.output


def surroundings(config: DecoderConfig, x: jax.Array, bias: jax.Array | None = None, place: int = 0) -> Surroundings:
    """What a block of whole rows x [rows, T, width] is run with."""
    rows, length = x.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    turns = decoder.rotations(config, positions)
    return Surroundings(Mask(causal=config.causal, window=config.windows[place]), turns[place % len(turns)], bias)


@dataclasses.dataclass(frozen=True)
class Found:
    """scales [in] of each pair; what each Linear read; the block's output."""

    scales: dict[Pair, jax.Array]
    inputs: dict[str, jax.Array]
    output: jax.Array


def pairs(block: BlockConfig, targets: tuple[str, ...]) -> list[Pair]:
    """What can be scaled against what in a block."""
    found = []
    if block.norm_place != "after" and block.parallel_norms != 1:  # else others read what the norm makes
        found.append(Pair("attention_norm", ("attention/query", "attention/key", "attention/value"), "attention"))
    if block.kv_heads == block.heads and block.heads * block.head_dim == block.width:
        found.append(Pair("attention/value", ("attention/output",)))
    if block.experts is None:
        if block.norm_place != "after" and block.parallel_norms != 1:
            found.append(Pair("mlp_norm", ("mlp/gate", "mlp/up") if block.gated_mlp else ("mlp/up",), "mlp"))
        if block.gated_mlp or block.activation == "relu":
            found.append(Pair("mlp/up", ("mlp/down",)))
    return [pair for pair in found if set(pair.readers) <= set(targets)]


def search(
    layer: Params, block: BlockConfig, x: jax.Array, around: Surroundings, targets: tuple[str, ...], group: int
) -> Found:
    """The scales of each pair of a block that is run on x [rows, T, width]."""
    inputs: dict[str, Any] = {}

    def note(run: Callable, args: tuple, kwargs: Mapping[str, Any], context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Linear | Attention | MLP) and context.method_name == "__call__":
            inputs["/".join(context.module.path)] = args[0]
        return run(*args, **kwargs)

    with nn.intercept_methods(note):
        output = apply(Block(block, run=Execution(attention="reference")), layer, x, around)

    sublayers: dict[str, Callable[[Params], jax.Array]] = {
        "attention": lambda leaves: apply(Attention(block, run=Execution(attention="reference")), leaves, inputs["attention"], around),
        "mlp": lambda leaves: apply(_mlp(block), leaves, inputs["mlp"]),
    }
    found = {}
    for pair in pairs(block, targets):
        kernels = {linear: quantised.node(layer, linear)["kernel"] for linear in pair.readers}
        read = inputs[pair.readers[0]]

        def loss(scale: jax.Array, pair: Pair = pair, kernels: dict[str, jax.Array] = kernels, read: jax.Array = read) -> jax.Array:
            rounded = {linear: awq.rounded_between(kernel, scale, group) for linear, kernel in kernels.items()}
            if not pair.inside:
                (linear,) = pair.readers
                return jnp.mean((read @ (rounded[linear] - kernels[linear])) ** 2)
            run, leaves = sublayers[pair.inside], layer[pair.inside]
            other = tree.unflatten({f"{linear.split('/')[1]}/kernel": kernel for linear, kernel in rounded.items()})
            return jnp.mean((run(tree.merge(leaves, other)) - run(leaves)) ** 2)

        found[pair] = awq.search(awq.magnitudes(read), loss)[2]
    return Found(found, inputs, output)


def fold(layer: Params, block: BlockConfig, scales: Mapping[Pair, jax.Array]) -> Params:
    """A block's leaves with each pair's readers multiplied by its scales, and its producer divided by them."""
    flat = tree.flatten(layer)
    for pair, scale in scales.items():
        for linear in pair.readers:
            flat[f"{linear}/kernel"] = flat[f"{linear}/kernel"] * scale[:, None]
        if "/" in pair.producer:
            flat[f"{pair.producer}/kernel"] = flat[f"{pair.producer}/kernel"] / scale
        elif block.norm == "rms_plus_one":
            flat[f"{pair.producer}/scale"] = (1 + flat[f"{pair.producer}/scale"]) / scale - 1
        else:
            flat[f"{pair.producer}/scale"] = flat[f"{pair.producer}/scale"] / scale
        if f"{pair.producer}/bias" in flat:
            flat[f"{pair.producer}/bias"] = flat[f"{pair.producer}/bias"] / scale
    return tree.unflatten(flat)


def _mlp(block: BlockConfig) -> MLP:
    return MLP(block.mlp_width, block.width, block.activation, block.gated_mlp, block.mlp_bias)
