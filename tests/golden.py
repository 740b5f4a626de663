"""Compares the package with recorded references: `python -m tests.golden DIR [DIR ...]`.

A directory holds config.json, inputs.npz, outputs.npz and usually weights; one that holds several of them stands for all of
them. What is run is decided by `model_type` and
the fields of config.json alone. One line for each directory; exit code 0 only if nothing failed and nothing was
unsupported.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any, Callable

import jax
import numpy as np

import mmjax
from mmjax.data import encoding, images, messages, templates, tiling
from mmjax.families import FAMILIES
from mmjax.preprocessing import read_tokenizer
from tests import golden_parts, golden_quantised

TOLERANCE = 2e-4  # relative to the largest value of the reference
NOTES = ("generated_margin",)  # about the outputs, not of them
# Inputs with a row for each image, or for each row of text.
MEDIA = ("pixel_values", "images", "image_sizes", "vision_x", "qformer_input_ids", "qformer_attention_mask")
Arrays = dict[str, Any]


@dataclasses.dataclass
class Result:
    """`status`: PASS, FAIL or UNSUPPORTED."""

    status: str
    compared: int = 0
    present: int = 0
    difference: float = 0.0
    relative: float = 0.0
    why: str = ""


class Unsupported(Exception):
    pass


def main(directories: list[str]) -> int:
    jax.config.update("jax_default_matmul_precision", "highest")
    results = []
    for name in (case for directory in directories for case in cases(Path(directory))):
        result = run(name)
        results.append(result)
        outputs = f"{result.compared}/{result.present}"
        line = f"{name}  {result.status}  {outputs}  {result.difference:.2e}  {result.relative:.2e}"
        print(line + (f"  {result.why}" if result.why else ""), flush=True)
    counts = [sum(r.status == status for r in results) for status in ("PASS", "FAIL", "UNSUPPORTED")]
    print("{} passed, {} failed, {} unsupported".format(*counts))
    return 0 if results and counts[0] == len(results) else 1


def cases(directory: Path) -> list[Path]:
    """The directory itself, or the recorded ones below it."""
    below = sorted(found.parent for found in directory.glob("*/**/outputs.npz"))
    return [directory] if (directory / "outputs.npz").is_file() or not below else below


def run(directory: Path) -> Result:
    """One directory's result."""
    if not (directory / "config.json").is_file():
        return Result("FAIL", why="no config.json")
    config = json.loads((directory / "config.json").read_text())
    inputs = dict(np.load(directory / "inputs.npz")) if (directory / "inputs.npz").is_file() else {}
    reference = dict(np.load(directory / "outputs.npz"))
    wanted = {name: value for name, value in reference.items() if name not in NOTES}
    try:
        compute = computation(config)
        found = compute(directory, config, inputs, set(wanted))
    except Unsupported as error:
        return Result("UNSUPPORTED", 0, len(wanted), why=str(error))
    except Exception as error:  # one that goes wrong says so, and the others are run
        return Result("FAIL", 0, len(wanted), why=" ".join(f"{type(error).__name__}: {error}".split())[:400])
    missing = sorted(set(wanted) - set(found))
    difference = relative = 0.0
    wrong = []
    if "generated_ids" in found:  # some references went on from their first rows only, or for fewer tokens
        rows, tokens = wanted["generated_ids"].shape
        found["generated_ids"] = found["generated_ids"][:rows, :tokens]
    for name in sorted(set(wanted) & set(found)):
        apart, allowed = _apart(np.asarray(found[name]), wanted[name], name, inputs, reference)
        scale = float(np.abs(wanted[name].astype(np.float64)).max()) if wanted[name].size else 0.0
        difference, relative = max(difference, apart), max(relative, apart / scale if scale else apart)
        if not apart <= allowed:
            wrong.append(name)
    why = "; ".join(
        [f"differs: {', '.join(wrong)}"] * bool(wrong) + [f"not computed: {', '.join(missing)}"] * bool(missing)
    )
    status = "FAIL" if wrong or missing else "PASS"
    if wrong and "note" in config:
        why += f" (the reference says of itself: {config['note']})"
    elif wrong and directory.name.endswith("_quirk"):
        why += " (recorded as a quirk of the reference; the package keeps to the clean rule)"
    return Result(status, len(wanted) - len(missing), len(wanted), difference, relative, why)


def _apart(found: np.ndarray, wanted: np.ndarray, name: str, inputs: Arrays, reference: Arrays) -> tuple[float, float]:
    """The largest difference at real positions, and what is allowed."""
    if found.shape != wanted.shape:
        return float("inf"), 0.0
    if np.issubdtype(wanted.dtype, np.integer):
        return float(np.abs(found.astype(np.int64) - wanted).max(initial=0)), 0.0
    difference = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
    mask = reference.get("spliced_attention_mask", inputs.get("attention_mask"))
    if mask is not None and "num_image_positions" in reference:  # rows begin with an image that has no placeholders
        mask = np.pad(mask, ((0, 0), (int(reference["num_image_positions"]), 0)), constant_values=1)
    if mask is not None and difference.shape[:2] == mask.shape:
        difference = np.where(mask.reshape(*mask.shape, *[1] * (difference.ndim - 2)) != 0, difference, 0)
    largest = float(difference.max(initial=0))
    scale = float(np.abs(wanted).max(initial=0))
    return (largest if np.isfinite(largest) else float("inf")), TOLERANCE * scale


def computation(config: Arrays) -> Callable[[Path, Arrays, Arrays, set[str]], Arrays]:
    """What computes the outputs of a golden of this type. Raises Unsupported."""
    kind = config["model_type"]
    if "hf_model_type" not in config and kind in PARTS:
        return PARTS[kind]
    if any((config.get("hf_model_type") or kind) in family.model_types for family in FAMILIES):
        return whole_model
    if kind.startswith("peft_") and "adapter_dir" in config:
        return golden_parts.beside_weights
    raise Unsupported(config.get("hf_model_type") or kind)


def whole_model(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    model = mmjax.load(directory)
    if listed := [inputs[f"image_{k}"] for k in range(len(inputs)) if f"image_{k}" in inputs]:
        # a list of arrays, each under a name of its own
        inputs = {name: value for name, value in inputs.items() if not re.fullmatch(r"image_\d+", name)} | {"images": listed}
    given = {name: value for name, value in inputs.items() if name in model.family.inputs}
    if unknown := sorted(set(inputs) - set(given)):
        raise Unsupported(f"inputs {', '.join(unknown)}")
    found: Arrays = dict(model(given, output_hidden_states=any("hidden_states_" in name for name in wanted)))
    if "generated_ids" in wanted:
        flags = {**config, **config.get("golden_flags", {})}
        prompt = _prompt(given, flags.get("generate_row", -1), flags.get("generate_images"))
        new = 16 if "generated_tokens" not in flags else flags["generated_tokens"]
        # BLIP-2's were recorded as the last of (queries + new) tokens: transformers' own continuation, which ours equals from
        # its first token on (tests/families/test_blip_2.py), holds the recorded ones from that place on.
        skipped = config.get("num_query_tokens", 0)
        ids, scores = model.generate(prompt, max_new_tokens=skipped + new, ignore_eos=True, return_scores=True)
        found["generated_ids"], found["generated_scores"] = ids[:, skipped:], scores[:, skipped:]
    return golden_parts.with_samples(found, wanted, inputs)


def _prompt(inputs: Arrays, row: int, images: Any) -> Arrays:
    """The inputs that were generated from: all rows, or one of them without its padding, with its images (a number of
    them, or a range; or those that stand beside the row; where nothing is said and there are as many as rows, each has its own).
    """
    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "position_ids") and "decoder_" not in name}
    if row < 0:
        return inputs
    text = "input_ids" if "input_ids" in inputs else "lang_x"
    keep = inputs["attention_mask"][row] != 0 if "attention_mask" in inputs else slice(None)
    ids = inputs[text][row : row + 1, keep]
    prompt = {text: ids, "attention_mask": np.ones_like(ids)}
    prompt |= {name: inputs[name][row : row + 1, keep] for name in ("image_attention_mask",) if name in inputs}
    given = next((len(inputs[name]) for name in ("pixel_values", "images") if name in inputs), 0)
    own = [row, row + 1] if given == len(inputs[text]) else [0, None]
    first, last = images if isinstance(images, list) else own if images is None else (0, images)
    for name in MEDIA:
        if name in inputs:
            beside = name == "vision_x" or "image_attention_mask" in inputs
            prompt[name] = inputs[name][row : row + 1] if beside else inputs[name][first:last]
    return prompt


def label_mask(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    if config["template"] not in templates.NAMES:
        raise Unsupported(f"template {config['template']}")
    tokenizer = read_tokenizer(directory.parent / config["tokenizer"])
    encoder = encoding.Encoder(tokenizer, templates.get(config["template"], tokenizer), tokens_per_image=1)
    found: Arrays = {}
    for k, row in enumerate(config["conversations"]):
        example = encoder.encode(messages.from_llava(row, str(k)))
        found[f"input_ids_{k}"] = np.where(example.media >= 0, config["image_token_index"], example.ids)
        found[f"labels_{k}"] = np.where(example.labels == encoding.IGNORED, config["ignore_index"], example.labels)
    return found


def image_processor(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    pipeline = config["pipeline"]
    processor = _image_processor(pipeline, {**config, **config["effective_processor_config"]})
    found: Arrays = {}
    for name in (n for n in inputs if n.startswith("image_")):
        k, size = name.removeprefix("image_"), inputs[name].shape[:2]
        tiles = processor.normalise(processor.tiles(inputs[name]))
        pixels = tiles.transpose(0, 3, 1, 2)
        if pipeline == "llava_original_pad":  # LLaVA's own function returns single pictures
            pixels = pixels[0]
        if pipeline == "llava_next":  # a batch of pictures of several tiles
            pixels = pixels[None]
            found[f"image_sizes_{k}"] = np.array([images.size_of(inputs[name])])
        if pipeline == "internvl":
            found[f"num_patches_{k}"] = np.array([processor.count(*size)])
        if isinstance(processor.tiling, tiling.SmartResize):
            pixels = tiling.patch_rows(tiles, config["effective_processor_config"]["temporal_patch_size"])
            layout = processor.tiling.layout(*size, processor.shape[:2])
            found[f"image_grid_thw_{k}"] = np.array([[1, layout.rows, layout.columns]])
        found[f"pixel_values_{k}"] = pixels
    return found


def _image_processor(pipeline: str, settings: Arrays) -> images.ImageProcessor:
    size = settings.get("crop_size", settings["size"])
    tile = size.get("height", settings.get("patch_size")), size.get("width", settings.get("patch_size"))
    cut: tiling.Tiling | None = None
    if pipeline in ("llava_next", "llava_original_anyres"):
        written = settings["image_grid_pinpoints"]
        canvases = written if settings["pinpoint_order"] == "(height,width)" else [canvas[::-1] for canvas in written]
        cut = tiling.AnyRes(tuple((height // tile[0], width // tile[1]) for height, width in canvases))
    elif pipeline == "internvl":
        cut = tiling.DynamicTiles(settings["min_patches"], settings["max_patches"])
    elif pipeline == "qwen2_vl":
        cut = tiling.SmartResize(size["shortest_edge"], size["longest_edge"], settings["merge_size"])
    elif pipeline not in ("clip", "git", "siglip", "blip", "idefics", "llava_original_pad"):
        raise Unsupported(f"pipeline {pipeline}")
    family = _of_pipeline(pipeline)
    return images.ImageProcessor(
        tile,
        {"clip": "crop", "git": "crop", "llava_original_pad": "pad"}.get(pipeline, "squash"),
        tuple(settings.get("image_mean", family[0])),
        tuple(settings.get("image_std", family[1])),
        settings["resample"],
        0 if cut else settings["size"].get("shortest_edge", 0),
        cut,
    )


def _of_pipeline(pipeline: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from mmjax.families import clip_vision, siglip_vision

    module = siglip_vision if pipeline == "siglip" else clip_vision
    return module.MEAN, module.STD


PARTS = {"label_mask": label_mask, "image_processor": image_processor, **golden_parts.PARTS, **golden_quantised.PARTS}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
