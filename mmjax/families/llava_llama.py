"""LLaVA in its authors' own layout (github.com/haotian-liu/LLaVA): `model_type` llava_llama or llava_mistral.

`input_ids` hold one -200 for an image, whose tokens are spliced in; `images` are taken in order. With pictures in tiles (LLaVA 1.6,
`image_aspect_ratio` anyres) `images` are a list of [tiles, 3, height, width], or one array of all, and `image_sizes` their own
(width, height). The vision tower is often published apart: the config names it in `mm_vision_tower`.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.data.picture_tokens import order, together
from mmjax.data.tiling import AnyRes, Tiling
from mmjax.errors import UserError
from mmjax.families import language, llava, llava_next, parts, sequential
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, prefixed, rule
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, ViTConfig
from mmjax.tree import Params

IMAGE = -200
IGNORED = language.IGNORED
LANGUAGE = {"llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
ARCHITECTURES = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_qwen": "LlavaQwenForCausalLM",
}


def text_config(config: Config) -> Config:
    """The language model's own config, whose fields stand among LLaVA's."""
    return {**config, "model_type": LANGUAGE[config["model_type"]]}


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("mm_patch_merge_type", "flat", "spatial", "spatial_unpad")
    fields.only("mm_resampler_type")
    if str(fields.get("image_aspect_ratio", "")).startswith("anyres_max"):
        raise UserError(
            f"{where}: image_aspect_ratio = {config['image_aspect_ratio']!r} is not supported (only pad, square, anyres): "
            "OneVision's shrinking of many tiles' features is not there"
        )
    text = text_config(config)
    llm = parts.language(text, where).read_config(text, where).llm
    image = vision_config(config, where)
    tower = parts.vision(image, f"{where}: vision_config").read_config(image, f"{where}: vision_config")
    assert llm is not None and isinstance(tower.vision, ViTConfig)
    select = fields.get("mm_vision_select_feature", "patch")
    if select not in ("patch", "cls_patch"):
        raise UserError(f"{where}: mm_vision_select_feature = {select!r} is not supported (only patch, cls_patch)")
    keeps = select == "cls_patch"
    kind, depth = projector(fields.get("mm_projector_type", "linear"), where)
    spec = FeatureSpec(
        (fields.get("mm_vision_select_layer", -2),), keeps, keep_registers=True, scales=scales(fields, tower.vision)
    )
    if fields.get("mm_hidden_size", spec.width(tower.vision)) != spec.width(tower.vision):
        raise UserError(
            f"{where}: mm_hidden_size is {config['mm_hidden_size']}, the vision tower's is {spec.width(tower.vision)}"
        )
    return ModelConfig(
        llm=llm,
        vision=tower.vision,
        connector=ConnectorConfig(
            kind=kind,  # type: ignore[arg-type]
            depth=depth,
            in_width=spec.width(tower.vision),
            out_width=llm.input_width,
            positions=spec.positions(tower.vision),
            merge=fields.get("mm_patch_merge_type", "flat"),
        ),
        features=spec,
        image_mean=tower.image_mean,
        image_std=tower.image_std,
        image_aspect=tower.image_aspect,
    )


def scales(fields: Fields, tower: ViTConfig) -> tuple[int, ...]:
    """The scales of `s2_scales`, which are sides in pixels. Raises UserError for those that are not multiples of the tower's size."""
    if not fields.get("s2", False):
        return (1,)
    sides = [int(side) for side in str(fields.get("s2_scales", "336,672,1008")).split(",")]
    if any(side % tower.image_size for side in sides) or min(sides) != tower.image_size:
        raise UserError(f"{fields.where}: s2_scales = {sides} are not multiples, from 1 on, of the tower's {tower.image_size} pixels")
    return tuple(side // tower.image_size for side in sorted(sides))


def written_scales(features: FeatureSpec, tower: ViTConfig) -> Config:
    """The fields that `scales` reads."""
    if features.scales == (1,):
        return {}
    return {"s2": True, "s2_scales": ",".join(str(scale * tower.image_size) for scale in features.scales)}


def projector(name: str, where: str) -> tuple[str, int]:
    """LLaVA's name of a connector -> our kind and depth: linear, identity, mlpNx_gelu."""
    found = re.fullmatch(r"mlp(\d+)x_gelu", name)
    if found:
        return "mlp", int(found[1])
    if name in ("linear", "identity"):
        return name, 1
    raise UserError(f"{where}: mm_projector_type = {name!r} is not supported (only linear, identity, mlpNx_gelu)")


def tiling(foreign: Config, config: ModelConfig, where: str = "config.json") -> AnyRes | None:
    """How the config says that pictures are cut; None where they are not. Raises UserError for canvases not in whole tiles."""
    if foreign.get("image_aspect_ratio") != "anyres":
        return None
    pinpoints, side = foreign.get("image_grid_pinpoints"), config.encoder.image_size
    if isinstance(pinpoints, str):
        try:
            pinpoints = ast.literal_eval(pinpoints)
        except (ValueError, SyntaxError):
            raise UserError(f"{where}: image_grid_pinpoints = {pinpoints!r} are no list of (width, height)") from None
    across_first = llava_next.grids(pinpoints or (), side, f"{where}: image_grid_pinpoints")
    return AnyRes(tuple((rows, columns) for columns, rows in across_first), rounded=False)


def vision_config(config: Config, where: str) -> Config:
    """The tower's config. `mmjax.published.complete` puts it where the file leaves it out."""
    if not config.get("vision_config"):
        raise UserError(
            f"{where} has no vision_config, and the tower that it names ({config.get('mm_vision_tower')}) was not found"
        )
    return {"model_type": "clip_vision_model", **config["vision_config"]}


def expressible(config: ModelConfig, cut: Tiling | None = None) -> str:
    """Why this layout cannot hold a model whose pictures are cut like this; "" if it can."""
    c = config.connector
    if cut is not None and not (isinstance(cut, AnyRes) and cut.overview):
        return f"its pictures are cut into a grid and an overview (anyres), not by {cut}"
    if config.llm is None or not isinstance(config.vision, ViTConfig) or c is None:
        return "it needs a language model, a vision transformer and a connector"
    if config.mask != "causal":
        return f"its mask is causal, not {config.mask!r}"
    if config.cross_attention is not None:
        return "its language model reads media as tokens of the text, not between its blocks"
    if (
        c.kind not in ("linear", "mlp", "identity")
        or c.hidden_width not in (0, c.out_width)
        or not c.bias
        or c.activation != "gelu"
        or c.grid
        or c.input_norm
        or c.output_norm
        or c.squeeze_width
        or c.frames
    ):
        return "its connector is linear, the identity or mlpNx_gelu, as wide as the language model and with biases"
    if config.vision.registers and not config.features.keep_registers:
        return "its connector reads the encoder's registers as well"
    if config.features.joined:
        return "its connector reads every position of one tile"
    if config.features.post_norm or len(config.features.layers) != 1:
        return "its connector reads one of the encoder's states, before the last norm"
    return ""


def _write(config: ModelConfig, base: Config) -> Config:
    why = expressible(config)
    if why:
        raise UserError(f"the model does not fit LLaVA's original layout: {why}")
    c = config.connector
    assert c is not None and isinstance(config.vision, ViTConfig)
    text = text_config(base)
    family = parts.language(text, "the model's config")
    image = vision_config(base, "the model's config")
    return {
        **family.write_config(config, text),
        "architectures": base.get("architectures") or [ARCHITECTURES[base["model_type"]]],
        "model_type": base["model_type"],
        "mm_hidden_size": c.in_width,
        **written_scales(config.features, config.vision),
        "mm_patch_merge_type": c.merge,
        "mm_projector_type": f"mlp{c.depth}x_gelu" if c.kind == "mlp" else c.kind,
        "mm_vision_select_feature": "cls_patch" if config.features.keep_class_token else "patch",
        "mm_vision_select_layer": config.features.layers[0],
        "use_mm_proj": True,
        "vision_config": parts.vision(image, "vision_config").write_config(config, image),
    }


def projector_rules(config: ConnectorConfig) -> list[Rule]:
    """`mm_projector` of the original layout: one Linear, or a Sequential whose odd places are activations; and the newline."""
    newline = [rule("model.image_newline", "connector/newline")] if config.newline else []
    if config.kind == "linear":
        return [*linear("model.mm_projector", "connector/layers_0"), *newline]
    return [*sequential.rules("model.mm_projector", config), *newline]


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.connector is not None
    text, image = text_config(foreign), vision_config(foreign, "the model's config")
    return [
        *parts.language(text, "the model's config").rules(config, text),
        *projector_rules(config.connector),
        *prefixed("model.vision_tower.vision_tower.", parts.vision(image, "vision_config").rules(config, image)),
    ]


def batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    return splice(config, foreign, inputs)[0]


def splice(config: ModelConfig, foreign: Config, inputs: Inputs) -> tuple[Batch, np.ndarray]:
    """The batch with every -200 replaced by its image's tokens, and its labels [rows, length].

    Rows are cut to `tokenizer_model_max_length` and padded on `tokenizer_padding_side`. A row without images may bring one of which
    nothing is used, as in LLaVA's code, or none, as in VILA's: the number of images tells. Raises UserError where images and
    ids do not agree.
    """
    if "input_ids" not in inputs:
        raise UserError("input_ids are missing")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", np.ones_like(ids)) != 0
    labels = inputs.get("labels", np.full_like(ids, IGNORED))
    images, places = _pictures(config, foreign, inputs)
    count, longest = len(places), foreign.get("tokenizer_model_max_length")
    wanted = [int((row[keep] == IMAGE).sum()) for row, keep in zip(ids, mask)]
    blank = wanted.count(0)  # rows without images
    if count not in (sum(wanted), sum(wanted) + blank * (images is not None)):
        each = f" (or {sum(wanted) + blank}, with one for each row that has none)" if blank else ""
        raise UserError(f"input_ids ask for {sum(wanted)} images, one for each {IMAGE}{each}, but {count} are given")
    passed_over = int(count > sum(wanted))
    rows, image = [], 0
    for row, keep, targets in zip(ids, mask, labels):
        row, targets = row[keep], targets[keep]
        marks = row == IMAGE
        shown = places[image : image + int(marks.sum())]
        repeats = np.ones(len(row), int)
        repeats[marks] = [len(place) for place in shown]
        at = np.repeat(np.arange(len(row)), repeats)
        is_media = marks[at]
        media = np.full(len(at), -1)
        media[is_media] = np.concatenate([np.zeros(0, int), *shown])
        image += len(shown) or passed_over
        spliced = np.where(is_media, 0, row[at]), np.where(is_media, IGNORED, targets[at]), media
        rows.append([field[:longest] for field in spliced])
    length = max(len(row[0]) for row in rows)
    left = foreign.get("tokenizer_padding_side", "right") == "left"

    def padded(field: int, fill: int) -> np.ndarray:
        out = np.full((len(rows), length), fill, np.int32)
        for line, row in zip(out, rows):
            n = len(row[field])
            line[length - n if left else 0 : length if left else n] = row[field]
        return out

    real = padded(2, -2) != -2
    spliced_labels = padded(1, IGNORED)
    text = language.text_batch(
        config,
        {"input_ids": padded(0, 0), "attention_mask": real.astype(np.int32)}
        | ({"labels": spliced_labels} if "labels" in inputs else {}),
    )
    text = dataclasses.replace(text, media=np.where(real, padded(2, -1), -1).astype(np.int32))
    return llava.with_images(text, images), spliced_labels


def _pictures(
    config: ModelConfig, foreign: Config, inputs: Inputs
) -> tuple[np.ndarray | None, list[np.ndarray]]:
    """The tiles of all images, [tiles, height, width, channels], and the media tokens of each image in order. Raises UserError."""
    given = [np.asarray(image, np.float32) for image in inputs.get("images", ())]
    if not given:
        return None, []
    apart = all(image.ndim == 3 for image in given)  # an image then is its one tile, as it is
    tiles = [image[None] for image in given] if apart else given
    if any(image.ndim != 4 or image.shape[1:] != tiles[0].shape[1:] for image in tiles):
        raise UserError(
            "images are [images, channels, height, width], or of each image [tiles, channels, height, width], all of one "
            f"height and width; not {[list(image.shape) for image in given]}"
        )
    pixels = np.concatenate(tiles).transpose(0, 2, 3, 1)
    config = config.for_pictures(*pixels.shape[1:3])
    assert config.connector is not None
    counts, per_tile, merge = [len(image) for image in tiles], config.tokens_per_tile, config.connector.merge
    if apart or merge == "flat":
        orders = [np.arange(count * per_tile) for count in counts]
    else:
        orders = [_order(config, foreign, inputs, number, count) for number, count in enumerate(counts)]
    places = together(orders, counts, per_tile, len(pixels))
    return pixels, np.split(places, np.cumsum([len(o) for o in orders])[:-1])


def _order(config: ModelConfig, foreign: Config, inputs: Inputs, number: int, count: int) -> np.ndarray:
    """The tokens of an image of so many tiles."""
    cut, merge, side = tiling(foreign, config), config.connector.merge, config.encoder.image_size  # type: ignore[union-attr]
    if count == 1:
        return order(None, (1, 1), config.tokens_per_tile, merge)
    if cut is None or "image_sizes" not in inputs:
        raise UserError(
            f"image {number} has {count} tiles, which mm_patch_merge_type = {merge!r} puts together by its size: image_sizes "
            f"(width, height) and image_aspect_ratio = 'anyres' are needed, not {foreign.get('image_aspect_ratio')!r}"
        )
    width, height = np.asarray(inputs["image_sizes"])[number].tolist()
    layout = cut.layout(height, width, (side, side))
    if layout.tiles != count:
        raise UserError(f"image {number} has {count} tiles, but by its size of {width} x {height} it has {layout.tiles}")
    return order(layout, (height, width), config.tokens_per_tile, merge, cut.rounded)


def outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, Any]:
    rows, labels = splice(config, foreign, inputs)
    found: dict[str, Any] = language.run_language(params, rows, config=config, run=run, states=states)
    assert isinstance(config.vision, ViTConfig)
    if "image_features" in found and config.vision.class_token and not config.features.keep_class_token:
        found["image_features"] = found["image_features"][:, 1:]
    real = np.asarray(rows.segments)
    found["inputs_embeds"] = jax.numpy.where(real[..., None] > 0, found["inputs_embeds"], 0)
    found["spliced_attention_mask"] = real
    if "labels" in inputs:
        found["spliced_labels"] = labels
    return found


FAMILY = Family(
    model_types=tuple(LANGUAGE),
    about="LLaVA in its authors' layout (arXiv 2304.08485)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=("input_ids", "attention_mask", "labels", "images", "image_sizes"),
    outputs=outputs,
    prompt=batch,
    tiling=tiling,
    spellings=(
        (r"^model\.vision_tower\.vision_tower\." + llava.TOWER, "model.vision_tower.vision_tower.vision_model."),
        (r"^(mm_projector\.|image_newline$)", r"model.\1"),
    ),
    copies=lambda config: (
        {"lm_head.weight": "model.embed_tokens.weight"} if config.llm and config.llm.tied_head else {}
    ),
    # The first files called this layout by the name that transformers took later.
    claims=lambda config: (
        config.get("model_type") == "llava" and "mm_vision_tower" in config and "text_config" not in config
    ),
    external=lambda config: {"vision": config["mm_vision_tower"]} if config.get("mm_vision_tower") else {},
    unneeded=("vision/head/**", "vision/projection/**"),
)
