"""Image processors and tokenizers as Hugging Face directories hold them, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmjax.data.images import ImageProcessor
from mmjax.data.templates import Template
from mmjax.errors import UserError
from mmjax.families.fields import Fields
from mmjax.models.config import ModelConfig, ViTConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "<image>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def image_processor(config: ModelConfig, *, aspect: str = "", size: int = 0) -> ImageProcessor:
    """The processor of an encoder: its own size, aspect, mean and deviation."""
    tower = config.vision
    assert tower is not None
    return ImageProcessor(size or tower.image_size, aspect or config.image_aspect, config.image_mean, config.image_std)


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
    fields = Fields(values, str(path))
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        fields.only(switch, True)
    if abs(fields.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise UserError(f"{path}: rescale_factor = {values['rescale_factor']} is not supported (only 1/255)")
    size = fields.get("size", {})
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = fields.get("crop_size", {})
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    kind = str(values.get("image_processor_type", values.get("feature_extractor_type", "")))
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
        mean=tuple(fields.get("image_mean", config.image_mean)),
        std=tuple(fields.get("image_std", config.image_std)),
        resample=fields.get("resample", 3),
        edge=0 if edge == min(height, width) else edge,
    )


def write_image_processor(processor: ImageProcessor, config: ModelConfig, directory: Path, strategy: str) -> None:
    """preprocessor_config.json and processor_config.json of transformers' LLaVA; `strategy` is its
    vision_feature_select_strategy.
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
    if isinstance(tower, ViTConfig) and strategy:
        values["processor_class"] = "LlavaProcessor"
        joined = {
            "processor_class": "LlavaProcessor",
            "image_token": PLACEHOLDER,
            "patch_size": tower.patch_size,
            "num_additional_image_tokens": tower.prefix,
            "vision_feature_select_strategy": strategy,
        }
        (directory / "processor_config.json").write_text(json.dumps(joined, indent=2) + "\n")
    (directory / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory. Nothing is downloaded and no code of the directory is run. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"{directory} has no tokenizer that can be read: {str(error).splitlines()[0]}") from error


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
