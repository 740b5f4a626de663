"""Goldens of weights in few bits: the package's number formats, AWQ's searches and its packed layout. All that is done here is to map
names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import tree
from mmjax.checkpoints import awq as layouts
from mmjax.checkpoints import weights
from mmjax.errors import UserError
from mmjax.families import llama, reading
from mmjax.models import awq, calibration, multimodal, number_formats
from mmjax.models.block import Block
from mmjax.models.config import Execution
from mmjax.models.kernels import matmul
from mmjax.models.layers import apply

Arrays = dict[str, Any]
NAMES = {"absmax_codes": "absmax_uint8", "nested_absmax": "nested_absmax", "offset": "offset"}


def nf4(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    """The reference cuts the weight into blocks row after row, wherever rows end: it is one long column here. What its file holds must
    be the same."""
    if config["quant_type"] != "nf4" or config.get("nested_blocksize") not in (None, number_formats.NESTED):
        raise UserError(f"quant_type {config['quant_type']}, nested_blocksize {config['nested_blocksize']} is not supported")
    weight, block, double = inputs["weight"], config["blocksize"], config["double_quant"]
    leaves = number_formats.to_nf4(jnp.asarray(weight).reshape(-1, 1), block, double)
    dense = number_formats.dense(leaves, weight.size).reshape(weight.shape)
    found = {
        "packed": leaves["codes"],
        "absmax": number_formats.maxima(leaves)[:, 0],
        "codebook": number_formats.NF4,
        "nested_code": number_formats.dynamic_levels(),
        "dequantized": dense,
        "y": jnp.asarray(inputs["x"]) @ dense.T,
        **{theirs: leaves[ours].reshape(-1) for ours, theirs in NAMES.items() if ours in leaves},
    }
    if weight.shape[1] % block == 0:  # then no block goes on into the next output, and a kernel of a model has the same ones
        own = number_formats.to_nf4(jnp.asarray(weight).T, block, double)
        found["packed"] = own["codes"].T.reshape(-1, 1)
        found["dequantized"] = number_formats.dense(own, weight.shape[1]).T
        found["y"] = matmul(jnp.asarray(inputs["x"]), own)
    if not np.array_equal(_file(directory)["layer.weight"], leaves["codes"]):
        raise UserError("the codes in model.safetensors are others")
    return {name: found[name] for name in wanted if name in found}


def _file(directory: Path) -> Arrays:
    return {name: tensor.read() for name, tensor in weights.read(directory).items()}


def awq_linear(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    if config["w_bit"] != 4 or not config["zero_point"]:
        raise UserError(f"w_bit {config['w_bit']}, zero_point {config['zero_point']} is not supported")
    kernel, x, bias = jnp.asarray(inputs["weight"]).T, jnp.asarray(inputs["x"]), inputs.get("bias")
    group = config["q_group_size"] if config["q_group_size"] > 0 else kernel.shape[0]
    leaves = number_formats.to_int4(kernel, group)
    codes, dense = np.asarray(number_formats.unpacked(leaves["codes"])).T, number_formats.dense(leaves, kernel.shape[0])
    scales, zeros = np.asarray(leaves["scales"]).T, np.asarray(leaves["zeros"]).T
    found = {
        "codes": codes.astype(np.int64),
        "scales": scales,
        "zeros": zeros.astype(np.float32),
        "dequantized": dense.T,
        "linear_output": matmul(x[:16], leaves) + (0 if bias is None else bias),
    }
    if config.get("pack"):
        for start, dtype in (("packed_", np.float32), ("packed_fp16_", np.float16)):
            packed = layouts.llm_awq(codes, scales.astype(dtype), zeros)
            found |= {start + name: array for name, array in packed.items()}
            found |= {f"{start}bias": bias.astype(dtype)} if bias is not None else {}
    if config.get("clip"):
        found["clip_max"] = np.asarray(awq.clip(kernel, x, group)).T[..., None]
    if config.get("search"):
        losses, best, scale = awq.search(
            awq.magnitudes(x), lambda s: jnp.mean((x @ (awq.rounded_between(kernel, s, group) - kernel)) ** 2)
        )
        found |= {"search_loss_per_ratio": losses, "search_best_ratio_index": best, "search_best_scales": scale}
    return {name: found[name] for name in wanted if name in found}


def awq_block(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    """The search over a Llama's first block; outputs are named after its modules.

    What is recorded under `folded__` are the block's weights as they are in model.safetensors, bit by bit, not what folding makes of
    them (the recording went on to share memory with weights that were put back afterwards). So that is what they are compared
    with, and folding by the block's output after it, and in tests/models/test_calibration.py.
    """
    if config["w_bit"] != 4 or not config["zero_point"]:
        raise UserError(f"w_bit {config['w_bit']}, zero_point {config['zero_point']} is not supported")
    shape = llama.FAMILY.read_config({"model_type": "llama", **config["llm_config"]}, "llm_config")
    rules = llama.FAMILY.rules(shape, {})
    params = reading.load(weights.read(directory), rules, multimodal.shapes(shape), dtype="float32", where=directory)
    block, x = shape.language.block, jnp.asarray(inputs["hidden_states"])
    layer = jax.tree.map(lambda leaf: leaf[0], params["llm"]["layers"])
    around = calibration.surroundings(shape.language, x)
    names = {r.paths[0].removeprefix("llm/layers/"): r.name.removeprefix("model.layers.{i}.") for r in rules}
    targets = tuple(path.removesuffix("/kernel") for path in names if path.endswith("/kernel") and "head" not in path)
    searched = calibration.search(layer, block, x, around, targets, config["q_group_size"])
    folded = calibration.fold(layer, block, searched.scales)

    def module(path: str) -> str:
        found = names.get(f"{path}/kernel") or names[f"{path}/scale"]
        return found.removesuffix(".weight")

    found = {
        f"scale__{module(pair.producer)}__to__{'+'.join(map(module, pair.readers))}": scale
        for pair, scale in searched.scales.items()
    }
    for path, leaf in tree.flatten(layer).items():
        found[f"folded__{names[path]}"] = leaf.T if path.endswith("/kernel") else leaf
    found["block_output"] = searched.output
    found["block_output_after_folding"] = apply(Block(block, run=Execution(attention="reference")), folded, x, around)
    return {name: found[name] for name in wanted if name in found}


PARTS = {"peft_qlora_nf4": nf4, "awq_linear": awq_linear, "awq_block_search": awq_block}
