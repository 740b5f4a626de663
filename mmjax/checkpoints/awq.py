"""Weights of 4 bits in groups as they are published: AWQ's own files (llm-awq) and those of transformers (AutoAWQ's "gemm").

In both a Linear NAME has `NAME.qweight` with its codes 0..15 and `NAME.scales` in the place of `NAME.weight` [out, in]; a weight is
(code - zero) * scale, with a scale and a zero for every group of inputs of an output.

    llm-awq   qweight int16 [out / 4, in], scales [groups, out] and scaled_zeros = -scale * zero [groups, out], both filled up with rows
              of zeros to a multiple of 8 groups (16 for groups of 64, 32 for groups of 32)
    gemm      qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]

`unpacked` makes of such tensors the `NAME.weight` that a key table asks for, which keeps its codes; `llm_awq` and `gemm` pack.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping

import numpy as np

from mmjax.checkpoints.safetensors import Stored
from mmjax.errors import UserError

Arrays = dict[str, np.ndarray]
GROUPS = (128, 64, 32)
_ENDS = ("qweight", "scales", "scaled_zeros", "qzeros")
# gemm: the n-th of 8 outputs stands in the 4 bits with this number.
_GEMM_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])


@dataclasses.dataclass(frozen=True)
class Packed(Stored):
    """A weight [out, in] whose codes are in a file: `read()` dequantises it; `parts()` gives codes uint8 [out, in], scales and zeros
    uint8 [out, groups]."""

    parts: Callable[[], Arrays]
    group: int


def without_method(foreign: dict[str, Any], where: str) -> dict[str, Any]:
    """A config.json without its AWQ `quantization_config`. Raises UserError for one of another method, or with settings that are not
    read here."""
    fields = foreign.get("quantization_config") or {}
    method = fields.get("quant_method")
    if method != "awq":
        return foreign
    wrong = [
        f"{name} = {fields[name]!r}"
        for name, known in (("bits", (4,)), ("w_bit", (4,)), ("zero_point", (True,)), ("version", ("gemm", "GEMM", "gemv", "GEMV")))
        if fields.get(name) is not None and fields[name] not in known
    ]
    if str(fields.get("version", "")).lower() == "gemv" and fields.get("backend") != "llm-awq":
        wrong.append(f"version = {fields['version']!r} of {fields.get('backend') or 'autoawq'} (only that of llm-awq)")
    if wrong:
        raise UserError(f"{where}: quantization_config: {'; '.join(wrong)} is not supported")
    return {name: value for name, value in foreign.items() if name != "quantization_config"}


def unpacked(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors with one `NAME.weight` in the place of each set of packed ones; all others as they are."""
    found: dict[str, Stored] = {}
    for name, tensor in stored.items():
        linear, _, end = name.rpartition(".")
        if end in _ENDS and f"{linear}.qweight" in stored:
            if end == "qweight":
                found[f"{linear}.weight"] = _weight(linear, stored)
        else:
            found[name] = tensor
    return found


def dequantised(parts: Arrays) -> np.ndarray:
    """float32 [out, in]."""
    codes, scales, zeros = (parts[name].astype(np.float32) for name in ("codes", "scales", "zeros"))
    grouped = codes.reshape(*scales.shape, -1) - zeros[..., None]
    return (grouped * scales[..., None]).reshape(codes.shape)


def llm_awq(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> Arrays:
    """Codes [out, in] of 0..15, scales and zeros [out, groups] -> `qweight`, `scales`, `scaled_zeros` in llm-awq's layout, scales in
    their own dtype.

    Raises UserError for shapes that it has no place for: outputs are multiples of 4, inputs of 64.
    """
    outputs, inputs = codes.shape
    group = inputs // scales.shape[1]
    if outputs % 4 or inputs % 64 or group not in GROUPS:
        raise UserError(f"llm-awq's layout has no place for {outputs} outputs of {inputs} inputs in groups of {group}")
    runs = codes.astype(np.uint16).reshape(outputs // 4, 4, inputs // 64, 64)[..., _order()]
    # Four outputs take turns: 64 inputs of each make 64 numbers of 4 x 4 bits.
    nibbles = runs.transpose(0, 2, 1, 3).reshape(outputs // 4, inputs // 64, 64, 4)
    qweight = np.bitwise_or.reduce(nibbles << (4 * np.arange(4, dtype=np.uint16)), -1).reshape(outputs // 4, inputs)
    rows = np.zeros((padded_groups(inputs, group), outputs), scales.dtype)
    scaled = rows.copy()
    rows[: scales.shape[1]] = scales.T
    scaled[: scales.shape[1]] = -(scales.astype(np.float32) * zeros.astype(np.float32)).T
    return {"qweight": qweight.view(np.int16), "scales": rows, "scaled_zeros": scaled}


def from_llm_awq(qweight: np.ndarray, scales: np.ndarray, scaled_zeros: np.ndarray, group: int) -> Arrays:
    """The inverse: codes uint8 [out, in], scales and zeros uint8 [out, groups]."""
    outputs, inputs = qweight.shape[0] * 4, qweight.shape[1]
    packed = qweight.view(np.uint16).reshape(outputs // 4, inputs // 64, 64, 1)
    nibbles = packed >> (4 * np.arange(4, dtype=np.uint16)) & 15
    runs = nibbles.reshape(outputs // 4, inputs // 64, 4, 64).transpose(0, 2, 1, 3)
    codes = np.empty(runs.shape, np.uint8)
    codes[..., _order()] = runs
    rows = inputs // group
    own = scales[:rows].T
    zeros = np.round(-scaled_zeros[:rows].T.astype(np.float32) / np.where(own == 0, 1, own).astype(np.float32))
    return {"codes": codes.reshape(outputs, inputs), "scales": own, "zeros": np.clip(zeros, 0, 15).astype(np.uint8)}


def gemm(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> Arrays:
    """Codes [out, in] of 0..15, scales and zeros [out, groups] -> `qweight`, `qzeros`, `scales` in AutoAWQ's layout.

    Raises UserError unless outputs are a multiple of 8.
    """
    if codes.shape[0] % 8:
        raise UserError(f"the gemm layout has no place for {codes.shape[0]} outputs: they must be a multiple of 8")
    return {"qweight": _eights(codes), "qzeros": _eights(zeros), "scales": np.ascontiguousarray(scales.T)}


def from_gemm(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray) -> Arrays:
    """The inverse: codes uint8 [out, in], scales and zeros uint8 [out, groups]."""
    return {"codes": _from_eights(qweight), "scales": scales.T, "zeros": _from_eights(qzeros)}


def padded_groups(inputs: int, group: int) -> int:
    """Rows of llm-awq's `scales`."""
    multiple = 128 // group  # of 8 rows: kernels read those of 128 inputs at once
    return -(-(inputs // group) // (8 * multiple)) * 8 * multiple


def _eights(codes: np.ndarray) -> np.ndarray:
    """[out, n] of 0..15 -> int32 [n, out / 8]."""
    eights = codes.T.reshape(codes.shape[1], -1, 8).astype(np.uint32) << (4 * _GEMM_PLACES).astype(np.uint32)
    return np.bitwise_or.reduce(eights, -1).view(np.int32)


def _from_eights(packed: np.ndarray) -> np.ndarray:
    """int32 [n, out / 8] -> uint8 [out, n]."""
    eights = packed.view(np.uint32)[..., None] >> (4 * _GEMM_PLACES).astype(np.uint32) & 15
    return eights.reshape(len(packed), -1).astype(np.uint8).T


def _order() -> np.ndarray:
    """Which of 64 inputs stands at each place: within 32 the pairs of four runs of 8 take turns, and of the eight that come together
    the even ones stand first."""
    turns = np.arange(32).reshape(4, 4, 2).transpose(1, 0, 2).reshape(4, 8)
    half = turns.reshape(4, 4, 2).transpose(0, 2, 1).reshape(-1)
    return np.concatenate([half, half + 32])


def _weight(linear: str, stored: Mapping[str, Stored]) -> Packed:
    own = {end: stored[f"{linear}.{end}"] for end in _ENDS if f"{linear}.{end}" in stored}
    codes, file = own["qweight"], own["qweight"].file
    if set(own) == {"qweight", "scales", "scaled_zeros"} and codes.dtype.itemsize == 2:
        outputs, inputs = codes.shape[0] * 4, codes.shape[1]
        fitting = [g for g in GROUPS if inputs % g == 0 and padded_groups(inputs, g) == own["scales"].shape[0]]
        if not fitting:
            raise UserError(f"{file}: {linear}.scales has {own['scales'].shape[0]} rows, which no group size of llm-awq gives")
        group = fitting[0]

        def parts() -> Arrays:
            return from_llm_awq(codes.read(), own["scales"].read(), own["scaled_zeros"].read(), group)
    elif set(own) == {"qweight", "scales", "qzeros"} and codes.dtype.itemsize == 4:
        inputs, outputs = codes.shape[0], codes.shape[1] * 8
        group = inputs // own["scales"].shape[0]
        if own["scales"].shape[1] != outputs:
            raise UserError(f"{file}: {linear} is packed as GPTQ or in another layout than AutoAWQ's gemm, which is not supported")

        def parts() -> Arrays:
            return from_gemm(codes.read(), own["qzeros"].read(), own["scales"].read())
    else:
        held = ", ".join(f"{end} ({tensor.dtype})" for end, tensor in own.items())
        raise UserError(f"{file}: {linear} is packed as {held}, which is neither llm-awq's layout nor AutoAWQ's gemm")
    return Packed(f"{linear}.qweight", (outputs, inputs), np.dtype(np.float16), file, lambda: dequantised(parts()), parts, group)
