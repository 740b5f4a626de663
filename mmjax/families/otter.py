"""Otter (arXiv 2305.03726, 2306.05425) in its authors' layout (OtterForConditionalGeneration of github.com/Luodian/Otter): OpenFlamingo's
resampler and gated blocks around a CLIP tower of transformers, read without its last norm and its class token.

Inputs are OpenFlamingo's. The frames of a video are read together, with embeddings where `max_num_frames` says so.
`use_media_placement_augmentation` is a setting of training: half of the time text then belongs to the next picture. A model that
is used goes by the last one.
"""

from __future__ import annotations

import dataclasses

from mmjax.errors import UserError
from mmjax.families import flamingo, open_flamingo, parts
from mmjax.families.family import Config
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, prefixed
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import FeatureSpec, ViTConfig

NO_SIZES = Fields({})


def _text(config: Config) -> Config:
    """text_config with the type that its class says: files of MosaicML's own code bear other names."""
    text = dict(config["text_config"])
    named = str((text.get("architectures") or [""])[0]).lower()
    if named.startswith("mpt"):
        text["model_type"] = "mpt"
    return {"model_type": "llama", **text}


def _vision(config: Config) -> Config:
    image = {"model_type": "clip_vision_model", **config["vision_config"]}
    return {name: value for name, value in image.items() if name != "architectures"}


def _read(config: Config, where: str) -> ModelConfig:
    for part in ("text_config", "vision_config"):
        Fields(config, where).need(part)
    text, image = _text(config), _vision(config)
    fields = Fields({**config, "text_config": text}, where)
    llm = open_flamingo.read_language(fields)
    tower = parts.vision(image, f"{where}: vision_config").read_config(image, f"{where}: vision_config")
    spec = FeatureSpec((-1,))
    assert isinstance(tower.vision, ViTConfig)
    sizes = Fields({"max_num_frames": fields.get("max_num_frames")}, where)
    connector = open_flamingo.resampler(sizes, tower.vision.feature_width, spec.positions(tower.vision))
    last = bool(fields.get("only_attend_previous", True))
    crossed = open_flamingo.cross_attention(
        Fields({"cross_attn_every_n_layers": fields.get("cross_attn_every_n_layers", 4)}), NO_SIZES, llm, connector.out_width, last
    )
    return dataclasses.replace(tower, llm=llm, connector=connector, cross_attention=crossed, features=spec)


def _write(config: ModelConfig, base: Config) -> Config:
    text, image = _text(base), _vision(base)
    crossed, connector = config.cross_attention, config.connector
    if crossed is None or connector is None or not isinstance(config.vision, ViTConfig):
        raise UserError("the model does not fit Otter's layout: it has no gated cross-attention, or no vision transformer")
    every = crossed.layers[0] + 1
    frames = Fields({"max_num_frames": connector.frames or None})
    same = open_flamingo.cross_attention(
        Fields({"cross_attn_every_n_layers": every}), NO_SIZES, config.language, connector.out_width, crossed.last_media_only
    )
    if crossed != same or connector != open_flamingo.resampler(frames, connector.in_width, connector.positions):
        raise UserError("the model does not fit Otter's layout: its gated blocks or its resampler are others")
    return {
        **base,
        "architectures": base.get("architectures") or ["OtterForConditionalGeneration"],
        "model_type": "otter",
        "cross_attn_every_n_layers": every,
        "only_attend_previous": crossed.last_media_only,
        "max_num_frames": connector.frames or None,
        "text_config": parts.language(text, "text_config").write_config(config, text),
        "vision_config": parts.vision(image, "vision_config").write_config(config, image),
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.connector is not None
    image = _vision(foreign)
    return [
        *open_flamingo.language_rules(config, _text(foreign), "otter"),
        *prefixed("perceiver.", flamingo.resampler_rules(config.connector, "otter")),
        *prefixed(open_flamingo.TOWER, parts.vision(image, "vision_config").rules(config, image)),
    ]


FAMILY = dataclasses.replace(
    open_flamingo.FAMILY,
    model_types=("otter",),
    about="Otter (arXiv 2305.03726)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    complete=None,
    copies_in=lambda config, foreign: open_flamingo.copies_in(config, {"text_config": _text(foreign)}),
    external=lambda config: {},
    partial=(),
)
