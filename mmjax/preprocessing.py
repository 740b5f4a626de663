"""Image processors and tokenizers as Hugging Face directories hold them, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmjax.data.images import ImageProcessor
from mmjax.data.templates import Template
from mmjax.data.tiling import AnyRes, DynamicTiles, OverlappingTiles, SmartResize, Tiling
from mmjax.errors import UserError
from mmjax.families.fields import Fields
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "<image>"
CONNECTOR_TOKENIZER = "qformer_tokenizer"  # the folder of what a Q-Former reads
# The image processors to which one number as `size` means both sides; to the others it means the shortest edge.
BOTH_SIDES = ("Siglip", "Blip", "Idefics", "GotOcr2")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def image_processor(config: ModelConfig, *, aspect: str = "", size: int = 0) -> ImageProcessor:
    """The processor of an encoder: its own size, aspect, mean and deviation."""
    return ImageProcessor(size or config.picture_size, aspect or config.image_aspect, config.image_mean, config.image_std)


def read_image_processor(directory: Path, config: ModelConfig) -> ImageProcessor | None:
    """The one in a directory's preprocessor_config.json (or in processor_config.json, where transformers 5 puts it);
    None without any.
    """
    values: dict[str, Any] | None = None
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = directory / name
        if path.is_file():
            found = json.loads(path.read_text())
            values = found.get("image_processor", found if name.startswith("pre") else None)
            if values is not None:
                break
    if values is None:
        return None
    fields = Fields({"processor_class": found.get("processor_class"), **values}, str(path))
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        fields.only(switch, True)
    if abs(fields.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise UserError(f"{path}: rescale_factor = {values['rescale_factor']} is not supported (only 1/255)")
    kind = str(values.get("image_processor_type", values.get("feature_extractor_type", "")))
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    size = fields.get("size", fields.get("image_size", {}))
    if isinstance(size, int):
        size = {"height": size, "width": size} if kind.startswith(BOTH_SIDES) else {"shortest_edge": size}
    mean, std = (tuple(fields.get(name, getattr(config, name))) for name in ("image_mean", "image_std"))
    resample = fields.get("resample", 3)
    tiled = _tiled(kind, size, fields)
    if tiled is not None:
        return ImageProcessor(tiled[0], "squash", mean, std, resample, tiling=tiled[1])
    crop = fields.get("crop_size", {})
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    cropped = fields.get("do_center_crop", "shortest_edge" in size and "Siglip" not in kind)
    if cropped:
        height, width = crop.get("height", size.get("shortest_edge")), crop.get("width", size.get("shortest_edge"))
        edge = size.get("shortest_edge", 0)
    else:
        height, width = size.get("height"), size.get("width")
        edge = 0
    if not height or not width:
        raise UserError(f"{path}: size = {size} and crop_size = {crop} do not say how large a picture becomes")
    return ImageProcessor(
        size=height if height == width else (height, width),
        aspect="pad" if cropped and fields.get("do_pad", False) else "crop" if cropped else "squash",
        mean=mean,
        std=std,
        resample=resample,
        edge=0 if edge == min(height, width) else edge,
    )


def _tiled(kind: str, size: dict[str, int], fields: Fields) -> tuple[int | tuple[int, int], Tiling] | None:
    """The size of a tile and the tiling of this kind of image processor; None for one that does not cut."""
    if kind == "LlavaNextImageProcessor":
        side = size.get("shortest_edge", size.get("height"))
        crop = fields.get("crop_size", side)
        if not side or crop not in (side, {"height": side, "width": side}) or size.get("width", side) != side:
            raise UserError(f"{fields.where}: size = {size} and crop_size = {crop} are not one square, as tiles are")
        canvases = fields.get("image_grid_pinpoints", [])
        if not canvases or any(pixels % side or pixels < side for canvas in canvases for pixels in canvas):
            raise UserError(f"{fields.where}: image_grid_pinpoints = {canvases} are not in whole tiles of {side}")
        grids = tuple((height // side, width // side) for height, width in canvases)
        return side, AnyRes(grids, fields.get("overview", True), fields.get("rounded", True))
    # InternVL's own processor cuts, whatever the file of its image processor says.
    cuts = fields.get("crop_to_patches", False) or fields.get("processor_class") == "InternVLProcessor"
    if kind == "GotOcr2ImageProcessor" and cuts:
        sides = size.get("height", 384), size.get("width", 384)
        tiling = DynamicTiles(fields.get("min_patches", 1), fields.get("max_patches", 12), fields.get("overview", True))
        return sides[0] if sides[0] == sides[1] else sides, tiling
    if kind == "OverlappingTiles":  # ours
        sides = size["height"], size["width"]
        return sides[0] if sides[0] == sides[1] else sides, OverlappingTiles(fields.need("max_patches"), fields.need("overlap"))
    if kind == "Qwen2VLImageProcessor":  # its edges are numbers of pixels
        least = fields.get("min_pixels", size.get("shortest_edge", 56 * 56))
        most = fields.get("max_pixels", size.get("longest_edge", 28 * 28 * 1280))
        return fields.get("patch_size", 14), SmartResize(least, most, fields.get("merge_size", 2))
    return None


def write_image_processor(processor: ImageProcessor, config: ModelConfig, directory: Path, strategy: str) -> None:
    """preprocessor_config.json and processor_config.json of transformers' LLaVA, LLaVA-NeXT or InternVL; `strategy` is its
    vision_feature_select_strategy. Whatever transformers' processors have no field for stands in fields of ours.
    """
    tower = config.vision
    sides = {"height": processor.height, "width": processor.width}
    cropped = processor.aspect != "squash"
    kind = {"pad": "LlavaImageProcessor", "crop": "CLIPImageProcessor", "squash": "SiglipImageProcessor"}[
        processor.aspect
    ]
    values: dict[str, Any] = {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": processor.edge or min(sides.values())} if cropped else sides,
        "resample": int(processor.resample),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
    }
    if cropped:
        values |= {"do_center_crop": True, "crop_size": sides}
    if processor.aspect == "pad":
        values["do_pad"] = True
    if processor.tiling is not None:
        values |= _written_tiling(processor, processor.tiling)
    if isinstance(tower, ViTConfig) and strategy and not isinstance(processor.tiling, DynamicTiles):
        values["processor_class"] = "LlavaNextProcessor" if processor.tiling else "LlavaProcessor"
        joined = {
            "processor_class": values["processor_class"],
            "image_token": PLACEHOLDER,
            "patch_size": tower.patch_size,
            "num_additional_image_tokens": tower.prefix,
            "vision_feature_select_strategy": strategy,
        }
        (directory / "processor_config.json").write_text(json.dumps(joined, indent=2) + "\n")
    (directory / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")


def is_writable(processor: ImageProcessor) -> bool:
    """Whether `write_image_processor` can write it."""
    tiling, square = processor.tiling, processor.height == processor.width
    return tiling is None or isinstance(tiling, (DynamicTiles, OverlappingTiles)) or isinstance(tiling, AnyRes) and square


def _written_tiling(processor: ImageProcessor, tiling: Tiling) -> dict[str, Any]:
    """The fields in which a processor that cuts differs from others'. Raises UserError where none says it."""
    height, width = processor.shape[:2]
    ours = {name: False for name in ("overview", "rounded") if not getattr(tiling, name, True)}
    if not is_writable(processor):
        raise UserError(f"an image processor with {tiling} and tiles of {height} x {width} pixels cannot be written")
    if isinstance(tiling, AnyRes):
        return {
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": height},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "image_grid_pinpoints": [[rows * height, columns * width] for rows, columns in tiling.grids],
            **ours,
        }
    if isinstance(tiling, OverlappingTiles):
        return {"image_processor_type": "OverlappingTiles", "max_patches": tiling.most, "overlap": tiling.overlap}
    assert isinstance(tiling, DynamicTiles)
    most = {"min_patches": tiling.least, "max_patches": tiling.most}
    return {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": True, **most, **ours}


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory. Nothing is downloaded and no code of the directory is run. Raises UserError."""
    from transformers import CONFIG_MAPPING, AutoTokenizer, PretrainedConfig

    config = directory / "config.json"
    try:
        kind = json.loads(config.read_text()).get("model_type") if config.is_file() else None
        # Of a kind that transformers does not know, config.json is not asked which tokenizer goes with it.
        asked = {} if kind is None or kind in CONFIG_MAPPING else {"config": PretrainedConfig()}
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False, **asked)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"{directory} has no tokenizer that can be read: {str(error).splitlines()[0]}") from error


def write_connector_tokenizer(tokenizer: PreTrainedTokenizerBase, length: int, directory: Path) -> None:
    """The tokenizer of what a Q-Former reads beside a picture, at most `length` tokens, where transformers' InstructBLIP has it."""
    before = tokenizer.model_max_length
    tokenizer.model_max_length = length
    try:
        tokenizer.save_pretrained(str(directory / CONNECTOR_TOKENIZER))
    finally:
        tokenizer.model_max_length = before


def read_connector_tokenizer(
    directory: Path, config: ModelConfig
) -> tuple[PreTrainedTokenizerBase | None, int]:
    """What `write_connector_tokenizer` wrote, and the length; (None, 0) where there is none or nothing that reads it."""
    home, connector = directory / CONNECTOR_TOKENIZER, config.connector
    if connector is None or not connector.text_vocab or not has_tokenizer(home):
        return None, 0
    found = read_tokenizer(home)
    return found, min(found.model_max_length, connector.text_positions)


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None,
    directory: Path,
    image_start: str = "",
    image_end: str = "",
) -> None:
    """The tokenizer's files; the template goes with it as its chat template."""
    before = tokenizer.chat_template
    if template is not None:
        tokenizer.chat_template = template.exported(tokenizer, image_start, image_end)
    try:
        tokenizer.save_pretrained(str(directory))
    finally:
        tokenizer.chat_template = before
