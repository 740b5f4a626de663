"""From a recipe's `model` section to the shapes of a model: what its config.json files and the recipe say, without any weights."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from mmjax import config as recipes
from mmjax import vocabulary
from mmjax.config import Part, Recipe
from mmjax.errors import UserError
from mmjax.families import composed, parts
from mmjax.families.family import Config, Family
from mmjax.models import new_rows, quantised, tuning_config
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import DecoderConfig, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, GatedCrossAttentionConfig, Stitching, ViTConfig
from mmjax.models.quantised import Quantisation
from mmjax.models.tuning_config import Adapter
from mmjax.preprocessing import read_image_processor
from mmjax.published import Published, locate, open_published


def model_config(recipe: Recipe, vocab_size: int | None = None) -> ModelConfig:
    """The shapes of a recipe's model, from config.json files or the recipe's own; no weights are touched.

    vocab_size   of a fresh language model whose recipe does not give one (its tokenizer's); without it, the size its
                 tokenizer is to have
    """
    return with_new_rows(described(recipe, vocab_size)[0], recipe.model)


def with_new_rows(config: ModelConfig, section: recipes.Model) -> ModelConfig:
    """The shapes as they are if the tokenizer knows none of the new tokens."""
    if config.llm is None or not section.new_tokens:
        return config
    size = config.llm.vocab_size
    return new_rows.widened(config, range(size, size + len(section.new_tokens)))


def connector_config(
    section: recipes.Connector, vision: ModelConfig, features: FeatureSpec, width: int
) -> ConnectorConfig:
    """The connector between an encoder and a language model of this width; `kind` may be LLaVA's mlpNx_gelu."""
    tower = vision.vision
    assert tower is not None
    kind, depth = section.kind, {"perceiver": 6, "cross_self_perceiver": 6, "qformer": 12, "visual_blocks": 8}.get(section.kind, 2)
    if named := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        kind, depth = "mlp", int(named[1])
    config = ConnectorConfig(
        kind=kind,  # type: ignore[arg-type]
        in_width=features.width(tower),
        out_width=width,
        positions=features.positions(tower),
        depth=section.depth or depth,
        hidden_width=section.hidden_width,
        bias=section.bias,
        group=section.group,
        pooled_tokens=section.pooled_tokens,
        grid=section.grid,
        input_norm=section.input_norm,
        output_norm=section.output_norm,
        norm=section.norm,
        norm_eps=section.norm_eps,
        squeeze_width=section.squeeze_width,
        token_order=section.token_order,
        latents=section.latents,
        heads=section.heads,
        head_dim=section.head_dim,
        activation=section.activation,
        qk_norm=section.qk_norm,
        cross_every=section.cross_every,
        mlp_width=section.mlp_width,
        text_vocab=section.text_vocab,
        text_positions=section.text_positions,
        contrast_width=section.contrast_width,
        merge=section.merge,
    )
    side = math.isqrt(config.positions)
    if config.grid and (kind == "pooled_mlp" or side**2 != config.positions or config.grid > side):
        raise UserError(
            f"model.connector.grid = {config.grid}: the connector {section.kind!r} over {config.positions} positions "
            f"has no square map of at least {config.grid} x {config.grid} cells to average"
        )
    if kind == "space_to_depth" and math.isqrt(config.pooled) ** 2 != config.pooled:
        raise UserError(
            f"model.connector.kind = 'space_to_depth' cuts up a square map of positions, and {config.pooled} are none: "
            f"does the connector read a class token?"
        )
    if kind == "identity" and config.in_width != width:
        raise UserError(
            f"model.connector.kind = 'identity' needs an encoder as wide as what reads it, the language model, "
            f"not {config.in_width} against {width}"
        )
    if kind == "residual_mlp" and not section.hidden_width:
        return dataclasses.replace(config, hidden_width=4 * width)
    return config


def cross_attention_config(
    section: recipes.CrossAttention, llm: DecoderConfig, media_width: int
) -> GatedCrossAttentionConfig:
    """The cross-attention of a language model to media tokens of this width."""
    if llm.encoder is not None:
        raise UserError("model.cross_attention: an encoder-decoder reads media as tokens of what its encoder reads")
    layers = tuple(range(section.first, llm.layers, section.every))
    if not layers:
        raise UserError(f"model.cross_attention.first is {section.first}, and the language model has {llm.layers} blocks")
    own = BlockConfig(
        width=llm.block.width,
        heads=section.heads,
        kv_heads=section.heads,
        head_dim=section.head_dim,
        mlp_width=4 * llm.block.width,
        activation=section.activation,
        norm="layer",
        norm_eps=1e-5,
        gated_mlp=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
    )
    like = dataclasses.replace(
        own,
        **{name: getattr(llm.block, name) for name in ("heads", "kv_heads", "head_dim", "mlp_width", "activation")},
        **{name: getattr(llm.block, name) for name in ("norm", "norm_eps", "norm_bias", "gated_mlp", "qkv_bias", "mlp_bias")},
    )
    block = like if section.block == "llm" else own
    block = dataclasses.replace(block, memory_width=media_width, qk_norm=block.norm if section.qk_norm else "")
    return GatedCrossAttentionConfig(block, layers, section.last_media_only, section.vector_gates)


def described(recipe: Recipe, vocab_size: int | None) -> tuple[ModelConfig, Family, Config]:
    """Shapes, family and config.json of the whole. A model without a connector is of its one part's family."""
    section = recipe.model
    if section.path:
        directory = locate(section.path)
        if (directory / "recipe.json").is_file():
            before = recipes.read_recipe(directory)
            earlier, family, foreign = described(before, vocabulary.trained(directory))
            return with_adapters_and_mask(with_new_rows(earlier, before.model), section), family, foreign
        source = open_published(directory)
        return with_adapters_and_mask(source.config, section), source.family, source.foreign
    found: dict[str, tuple[ModelConfig, Family, Config]] = {}
    for name in ("llm", "vision"):
        part: Part = getattr(section, name)
        if part.path or part.config:
            found[name] = _part(part, name, vocab_size or section.tokenizer.vocab_size, section.projected)
    features = FeatureSpec(
        tuple(section.feature_layers),
        section.keep_class_token,
        section.post_norm,
        pooled=section.pooled,
        projected=section.projected,
        scales=tuple(section.scales),
        class_tokens=section.class_tokens,
    )
    if len(found) == 1:
        config, family, foreign = next(iter(found.values()))
        return with_adapters_and_mask(dataclasses.replace(config, features=features), section), family, foreign
    if not found:
        raise UserError("model: neither llm nor vision is given")
    language, tower = found["llm"][0], found["vision"][0]
    if features.pooled and (not isinstance(tower.vision, ViTConfig) or tower.vision.pooling == "none"):
        raise UserError("model.pooled: this encoder makes no one vector of its states")
    if features.projected and (not isinstance(tower.vision, ViTConfig) or not tower.vision.projection):
        raise UserError("model.projected: this encoder has no projection; its config.json names CLIPVisionModelWithProjection, or is CLIP's")
    if features.class_tokens and not (isinstance(tower.vision, ViTConfig) and tower.vision.class_token):
        raise UserError("model.class_tokens: this encoder has no class token")
    tower = tower.at_size(section.image.size) if section.image.size else tower
    if section.stitching:
        features = dataclasses.replace(features, stitching=_stitching(section, tower))
    assert language.llm is not None
    assert tower.vision is not None
    mean, std = section.image.mean or tower.image_mean, section.image.std or tower.image_std
    crossed, width = section.cross_attention.every > 0, language.llm.input_width
    if crossed:
        width = section.connector.hidden_width or tower.vision.feature_width * len(features.layers)
    connector = connector_config(section.connector, tower, features, width)
    config = dataclasses.replace(
        tower,
        llm=language.llm,
        quantisation=language.quantisation,
        text=None,
        logit_bias=False,
        connector=connector,
        cross_attention=cross_attention_config(section.cross_attention, language.llm, width) if crossed else None,
        features=features,
        image_mean=tuple(mean),
        image_std=tuple(std),
    )
    foreign = {"model_type": "mmjax", "text_config": found["llm"][2], "vision_config": found["vision"][2]}
    return with_adapters_and_mask(config, section), composed.FAMILY, foreign


def _stitching(section: recipes.Model, tower: ModelConfig) -> Stitching:
    """The overlap of tiles in positions. Raises UserError where it is no whole number of them, or leaves a tile no part of its own."""
    if not isinstance(tower.vision, ViTConfig):
        raise UserError("model.stitching needs a vision transformer")
    patch, overlap = tower.vision.patch_size, section.image.overlap
    if overlap % patch or 2 * overlap >= tower.vision.image_size:
        raise UserError(
            f"model.image.overlap = {overlap} must be a multiple of the patch size, {patch}, and less than half of a tile, "
            f"{tower.vision.image_size}"
        )
    return Stitching(section.stitching, overlap // patch)  # type: ignore[arg-type]


def _part(part: Part, name: str, vocab_size: int, projected: bool = False) -> tuple[ModelConfig, Family, Config]:
    """A part's shapes, family and config; from its directory, or from the recipe where that is not at hand (or not
    meant). `projected`: of an encoder the projection is kept.
    """
    source = source_of(part, f"model.{name}")
    if isinstance(source, Published):
        own = read_image_processor(source.directory, source.config) if name == "vision" else None
        kept = ModelConfig(
            llm=source.config.llm if name == "llm" else None,
            vision=_headless(source.config.vision, projected) if name == "vision" else None,
            image_mean=own.mean if own else source.config.image_mean,
            image_std=own.std if own else source.config.image_std,
            image_aspect=source.config.image_aspect,
            quantisation=source.config.quantisation if name == "llm" else None,
        )
        foreign = source.family.sections(source.foreign)[name] or source.foreign
        family = (parts.language if name == "llm" else parts.vision)(
            _typed(foreign, source.foreign, name), f"model.{name}"
        )
        return kept, family, _typed(foreign, source.foreign, name)
    foreign = dict(part.config)
    classes = foreign.pop("classes", 0)  # a fresh encoder's own head, for the classification objective
    if name == "llm":
        foreign.setdefault("vocab_size", vocab_size)
        family = parts.language(foreign, f"model.{name}.config")
    else:
        family = parts.vision(foreign, f"model.{name}.config")
    config = family.read_config(foreign, f"model.{name}.config")
    if classes:
        assert config.vision is not None
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, classes=classes))
    return config, family, foreign


def _typed(part: Config, whole: Config, name: str) -> Config:
    """A part's config with its model_type, which two-tower files may leave out."""
    known = {name: f"{name}_vision_model" for name in ("clip", "siglip", "siglip2")}
    default = known.get(whole["model_type"], whole["model_type"]) if name == "vision" else "llama"
    return {"model_type": default, **part}


def _headless(vision: Any, projected: bool = False) -> Any:
    """An encoder without its classifier and, unless it is read, its projection: a connector reads neither, and neither is loaded."""
    gone = {name: 0 for name in ("classes", *(() if projected else ("projection",))) if hasattr(vision, name)}
    return dataclasses.replace(vision, **gone)


def source_of(part: Part, key: str, weights: bool = False) -> Published | Config | None:
    """The directory of a part, or its config where it begins from nothing; None for no part.

    Where the directory is not here, the recipe's config stands in for its shapes, never for its `weights`."""
    if not part.path:
        return part.config or None
    try:
        return open_published(locate(part.path))
    except UserError as error:
        if part.config and not weights:
            return part.config
        raise UserError(f"{key}.path: {error}") from error


def with_adapters_and_mask(config: ModelConfig, section: recipes.Model) -> ModelConfig:
    added = tuple(_adapter(name, adapter) for name, adapter in section.adapters.items())
    for adapter in added:
        if isinstance(adapter, tuning_config.AdaptionPromptConfig) and adapter.media:
            tokens = config.connector.tokens if config.connector is not None else 0
            if not tokens or (adapter.media == "added" and tokens not in (1, adapter.length)):
                raise UserError(
                    f"model.adapters.{adapter.name}: media are {adapter.media!r} to {adapter.length} prompts, and the connector makes {tokens} "
                    "tokens of a picture; it must make one, or as many as there are prompts"
                )
    quantisation = _quantisation(section.quantise, config)
    return dataclasses.replace(config, adapters=config.adapters + added, mask=section.mask or config.mask, quantisation=quantisation)


def _quantisation(section: recipes.Quantise, config: ModelConfig) -> Quantisation | None:
    """How the recipe, or else its base, holds frozen kernels."""
    if not section.format:
        return config.quantisation
    spec = Quantisation(section.format, tuple(section.targets), section.double, section.block or quantised.NAMED[section.format].block)
    if config.quantisation not in (None, spec):
        raise UserError(f"model.quantise.format: the base is held in {config.quantisation.format} already; leave it out")  # type: ignore[union-attr]
    return spec


def _adapter(name: str, section: recipes.Adapter) -> Adapter:
    values: dict[str, Any] = {field: getattr(section, field) for field in tuning_config.fields(section.kind)}
    frozen: dict[str, Any] = {field: _frozen(value) for field, value in values.items()}
    return tuning_config.KINDS[section.kind](name, **frozen)


def _frozen(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
