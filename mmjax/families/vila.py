"""VILA (arXiv 2312.07533), in two layouts: `model_type` vila with all tensors in one place, and the published one, a folder each
for `llm`, `vision_tower` and `mm_projector` below a config.json whose `model_type` is llava_llama and which has `llm_cfg`.

Inputs, outputs and the rule of splicing are those of mmjax.families.llava_llama.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

from mmjax.errors import UserError
from mmjax.families import llava, llava_llama, parts, sequential
from mmjax.families.family import Config, Family, Folder
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, prefixed
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, ViTConfig

FOLDERS = {
    part: Folder(name, f"{name}.", f"{name}_cfg")
    for part, name in (("llm", "llm"), ("vision", "vision_tower"), ("connector", "mm_projector"))
}


class Names(NamedTuple):
    """The names of the parts' configs in a config.json."""

    text: str
    image: str
    projector: str  # "" = its fields stand among the others


def names_of(config: Config) -> Names:
    if "llm_cfg" in config:
        return Names("llm_cfg", "vision_tower_cfg", "mm_projector_cfg")
    return Names("llm_config", "vision_config", "")


def _parts(config: Config, where: str) -> tuple[Config, Config]:
    """The configs of language model and vision tower."""
    fields, names = Fields(config, where), names_of(config)
    image = fields.part(names.image, "siglip_vision_model")
    return fields.part(names.text, "llama"), {k: v for k, v in image.items() if k != "architectures"}


def _read(config: Config, where: str) -> ModelConfig:
    fields, names = Fields(config, where), names_of(config)
    fields.only("mm_patch_merge_type", "flat")
    text, image = _parts(config, where)
    llm = parts.language(text, f"{where}: {names.text}").read_config(text, f"{where}: {names.text}").llm
    tower = parts.vision(image, f"{where}: {names.image}").read_config(image, f"{where}: {names.image}")
    assert llm is not None and isinstance(tower.vision, ViTConfig)
    select = fields.get("mm_vision_select_feature", "patch")
    if select not in ("patch", "cls_patch"):
        raise UserError(f"{where}: mm_vision_select_feature = {select!r} is not supported (only patch, cls_patch)")
    if select == "patch" and not tower.vision.class_token:
        raise UserError(
            f"{where}: mm_vision_select_feature = 'patch' drops the first position, but this vision tower has no class token: "
            "a patch would be lost. Set it to 'cls_patch'."
        )
    spec = FeatureSpec(
        (fields.get("mm_vision_select_layer", -2),),
        keep_class_token=select == "cls_patch",
        keep_registers=True,
        scales=llava_llama.scales(fields, tower.vision),
    )
    projector_fields = Fields(config[names.projector], f"{where}: {names.projector}") if names.projector else fields
    connector = projector(
        projector_fields.need("mm_projector_type"),
        spec.width(tower.vision),
        llm.input_width,
        spec.positions(tower.vision),
        token_order(fields),
    )
    for name, width in (("mm_hidden_size", connector.in_width), ("hidden_size", connector.out_width)):
        if fields.get(name, width) != width:
            raise UserError(f"{where}: {name} is {config[name]}, the parts are for {width}")
    return ModelConfig(
        llm=llm,
        vision=tower.vision,
        connector=connector,
        features=spec,
        image_mean=tower.image_mean,
        image_std=tower.image_std,
        image_aspect=tower.image_aspect,
    )


def token_order(fields: Fields) -> Literal["rows", "columns"]:
    """In which order mlp_downsample hands out its tokens: `projector_source` says whose code made the checkpoint. A published
    config.json does not; those are VILA-1.5's."""
    fields.only("projector_source", "vila15", "nvila")
    return "rows" if fields.get("projector_source", "vila15") == "nvila" else "columns"


def projector(
    name: str, in_width: int, out_width: int, positions: int, token_order: Literal["rows", "columns"]
) -> ConnectorConfig:
    """The connector that `mm_projector_type` names.

    token_order   of mlp_downsample, a name that stands for two functions: the code of VILA-1.5 hands out its tokens
                  column by column, that since December 2024 row by row. The *_fix names are always row by row.
    """
    shape: dict[str, Any] = {"in_width": in_width, "out_width": out_width, "positions": positions}
    if name == "linear":
        return ConnectorConfig("linear", **shape)
    if found := re.fullmatch(r"mlp(\d+)x_gelu", name):
        return ConnectorConfig("mlp", **shape, depth=int(found[1]))
    if name == "mlp_downsample":
        return ConnectorConfig("space_to_depth", **shape, group=2, input_norm=True, token_order=token_order)
    if name == "mlp_downsample_2x2_fix":
        return ConnectorConfig("space_to_depth", **shape, group=2, input_norm=True)
    if name == "mlp_downsample_3x3_fix":
        return ConnectorConfig("space_to_depth", **shape, group=3, input_norm=True, squeeze_width=3 * in_width)
    raise UserError(
        f"mm_projector_type = {name!r} is not supported (only linear, mlpNx_gelu, mlp_downsample[_2x2_fix|_3x3_fix])"
    )


def projector_name(config: ConnectorConfig, order: Literal["rows", "columns"], before: str = "") -> str:
    """The mm_projector_type of a connector, if possible the one it had `before`; `order` as in `projector`. Raises UserError for a
    connector that VILA does not have."""
    names = ["linear", f"mlp{config.depth}x_gelu", "mlp_downsample", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix"]
    names.sort(key=lambda name: name != before)
    for name in names:
        if projector(name, config.in_width, config.out_width, config.positions, order) == config:
            return name
    raise UserError(f"the model does not fit VILA's layout: it has no connector such as {config}")


def projector_rules(config: ConnectorConfig) -> list[Rule]:
    """Place 0 of a down-sampling projector is the regrouping, which has no tensors."""
    if config.kind == "linear":
        return linear("layers", "connector/layers_0")
    return sequential.rules("layers", config, place=int(config.kind == "space_to_depth"))


def _write(config: ModelConfig, base: Config) -> Config:
    text, image = _parts(base, "the model's config")
    names, features = names_of(base), config.features
    assert config.connector is not None and isinstance(config.vision, ViTConfig)
    other = features.post_norm or features.joined or len(features.layers) != 1
    if other or (config.vision.registers and not features.keep_registers):
        raise UserError(
            "the model does not fit VILA's layout: its connector reads one of the encoder's states before the last norm"
        )
    if config.mask != "causal":
        raise UserError("the model does not fit VILA's layout: its mask is causal")
    held = base.get(names.projector, {}) if names.projector else base
    order, before = token_order(Fields(base)), held.get("mm_projector_type", "")
    kind = {"mm_projector_type": projector_name(config.connector, order, before)}
    return {
        **{name: value for name, value in base.items() if name not in ("s2", "s2_scales")},
        **llava_llama.written_scales(features, config.vision),
        names.text: parts.language(text, names.text).write_config(config, text),
        names.image: parts.vision(image, names.image).write_config(config, image),
        **({names.projector: {"model_type": "v2l_projector", **held, **kind}} if names.projector else kind),
        "hidden_size": config.connector.out_width,
        "mm_hidden_size": config.connector.in_width,
        "mm_vision_select_feature": "patch"
        if config.vision.class_token and not features.keep_class_token
        else "cls_patch",
        "mm_vision_select_layer": features.layers[0],
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.connector is not None
    text, image = _parts(foreign, "the model's config")
    return [
        *prefixed("llm.", parts.language(text, "llm_config").rules(config, text)),
        *prefixed("vision_tower.", parts.vision(image, "vision_config").rules(config, image)),
        *prefixed("mm_projector.", projector_rules(config.connector)),
    ]


FAMILY = Family(
    model_types=("vila",),
    about="VILA 1.0 and 1.5 (arXiv 2312.07533), also as published",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=("input_ids", "attention_mask", "labels", "images"),
    outputs=llava_llama.outputs,
    prompt=llava_llama.batch,
    spellings=((r"^vision_tower\." + llava.TOWER, "vision_tower.vision_model."),),
    copies=lambda config: (
        {"llm.lm_head.weight": "llm.model.embed_tokens.weight"} if config.llm and config.llm.tied_head else {}
    ),
    claims=lambda config: "llm_cfg" in config,
    sections=lambda config: dict(zip(("llm", "vision"), _parts(config, "config.json"))),
    folders=lambda config: FOLDERS if "llm_cfg" in config else {},
    unneeded=("vision/head/**", "vision/projection/**"),
)
