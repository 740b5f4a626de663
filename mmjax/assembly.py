"""From a recipe's `model` section to a model: published parts, fresh parts, fresh adapters, and what surrounds them."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import config as recipes
from mmjax import published, qformer_weights, tree, vocabulary
from mmjax.config import Part, Recipe
from mmjax.data import sources, templates
from mmjax.data import tiling as tilings
from mmjax.data.instructions import Embeddings
from mmjax.data.messages import PLACEHOLDER, BadSample
from mmjax.errors import UserError
from mmjax.families import composed, parts
from mmjax.families.family import Config, Family
from mmjax.loading import load, load_connector
from mmjax.model import Model
from mmjax.models import adapters, multimodal, new_rows, prompts, quantised, tuning_config
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, GatedCrossAttentionConfig, Stitching, ViTConfig
from mmjax.models.quantised import Quantisation
from mmjax.models.tuning_config import Adapter
from mmjax.parallel.sharding import mesh_of, placed
from mmjax.preprocessing import has_tokenizer, image_processor, read_image_processor, read_tokenizer
from mmjax.published import Published, locate, open_published
from mmjax.tree import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Shardings = Callable[[Params], Params]


def model_config(recipe: Recipe, vocab_size: int | None = None) -> ModelConfig:
    """The shapes of a recipe's model, from config.json files or the recipe's own; no weights are touched.

    vocab_size   of a fresh language model whose recipe does not give one (its tokenizer's); without it, the size its
                 tokenizer is to have
    """
    return _with_new_rows(_described(recipe, vocab_size)[0], recipe.model)


def assemble(recipe: Recipe, workdir: Path, shardings: Shardings | None = None) -> Model:
    """The model of a recipe before its first step: published weights in model.dtype, fresh ones in float32 from the
    recipe's seed.

    workdir     where a tokenizer of our own is kept (WORKDIR/tokenizer)
    shardings   from the parameters' shapes to where each leaf goes; none = the default device
    """
    if recipe.model.path:
        return _extended(recipe, shardings)
    section = recipe.model
    language = _source(section.llm, "model.llm", weights=True)
    vision = _source(section.vision, "model.vision", weights=True)
    tokenizer = _tokenizer(recipe, language, Path(workdir))
    config, family, foreign = _described(recipe, len(tokenizer) if tokenizer is not None else None)
    _check_vocabulary(config, tokenizer, recipe)
    shapes = multimodal.shapes(_with_new_rows(config, section))
    places = shardings(shapes) if shardings else None

    loaded: list[Params] = []
    bases: dict[str, str] = {}
    for part, source in (("llm", language), ("vision", vision)):
        if isinstance(source, Published):
            source = published.quantised_as(source, config.quantisation)
            reading: dict[str, Any] = {"dtype": section.dtype, "shardings": places, "heads": part == "vision" and section.projected}
            loaded.append(published.load_part(source, part, **reading))
            bases[getattr(section, part).path] = published.fingerprint(source.directory)
    if config.connector is not None and config.connector.kind == "qformer":
        if section.connector.path or section.connector.bert:
            loaded.append(qformer_weights.load(section.connector, config.connector, recipe.seed, places))
    elif section.connector.path and config.connector is not None:
        loaded.append(load_connector(section.connector.path, config.connector, shardings=places))
    params = _completed(recipe, config, tree.merge(*loaded), shardings)
    processor: Any = None
    if (embedded := next((a for a in config.adapters if isinstance(a, tuning_config.NoisePromptConfig)), None)) is not None:
        processor = Embeddings((embedded.length, embedded.channels))
    elif config.vision is not None:
        tiling = tilings.of_recipe(section.image)
        processor = image_processor(
            config,
            aspect="squash" if tiling else section.image.aspect if config.connector else "",
            size=0 if config.connector else section.image.size,
        )
        own = read_image_processor(vision.directory, config) if isinstance(vision, Published) else None
        processor = dataclasses.replace(processor, tiling=tiling, resample=own.resample if own else processor.resample)
    model = Model(
        config=config,
        params=params,
        family=family,
        foreign=foreign,
        run=Execution(dtype=section.dtype, mesh=mesh_of(params)),
        tokenizer=tokenizer,
        image_processor=processor,
        connector_tokenizer=_connector_tokenizer(section.connector, tokenizer),
        connector_text=section.connector.text_length,
        bases=bases,
        own=frozenset(tree.flatten(shapes)) - frozenset(tree.flatten(tree.merge(*loaded))) | _connector_paths(shapes),
    )
    return _with_tokens(model, recipe, places)


def _with_tokens(model: Model, recipe: Recipe, places: Params | None) -> Model:
    """The model with the recipe's new tokens, and the template and delimiters that may be made of them."""
    section = recipe.model
    if section.new_tokens:
        model = model.add_tokens(section.new_tokens, section.new_rows_start, recipe.seed)
        model = dataclasses.replace(model, params=_placed(model.params, places))
    if model.config.cross_attention is not None and model.family is composed.FAMILY and model.tokenizer is not None:
        known = model.tokenizer.get_vocab().get(PLACEHOLDER)
        model = dataclasses.replace(model, foreign={**model.foreign, "image_token_index": known})
    model = _with_texts_begun(model, places)
    return dataclasses.replace(
        model,
        template=templates.get(section.template, model.tokenizer, section.system) if model.tokenizer else None,
        image_start=section.image_start or model.image_start,
        image_end=section.image_end or model.image_end,
    )


def _with_texts_begun(model: Model, places: Params | None) -> Model:
    """The model with its prompts begun as the embeddings of their texts."""
    params = model.params
    for prompt in prompts.of(model.config):
        if text := getattr(prompt, "text", ""):
            if model.tokenizer is None:
                raise UserError(f"model.adapters.{prompt.name}.text cannot be read: the model has no tokenizer")
            ids = jnp.resize(jnp.array(model.tokenizer(text)["input_ids"], jnp.int32), (1, prompt.tokens))
            begun = multimodal.embed_tokens(params, model.config, ids, model.run)[0].astype(jnp.float32)
            params = tree.merge(params, tree.unflatten({f"{prompts.path(prompt.name)}/vectors": begun}))
    return model if params is model.params else dataclasses.replace(model, params=_placed(params, places))


def _with_new_rows(config: ModelConfig, section: recipes.Model) -> ModelConfig:
    """The shapes as they are if the tokenizer knows none of the new tokens."""
    if config.llm is None or not section.new_tokens:
        return config
    size = config.llm.vocab_size
    return new_rows.widened(config, range(size, size + len(section.new_tokens)))


def load_workdir(workdir: Path, dtype: str, *, template: str = "", shardings: Params | None = None) -> Model:
    """The model that a run has trained: what its recipe assembles, with the newest sound checkpoint over it."""
    from mmjax.checkpoints.store import check_bases, open_workdir, overlay

    recipe, checkpoint = open_workdir(workdir)
    model = assemble(recipe, workdir, (lambda shapes: shardings) if shardings is not None else None)
    params = model.params
    if checkpoint is not None:
        check_bases(checkpoint, model.bases)
        params = overlay(params, checkpoint, shardings)
    leaves = tree.take(params)
    cast = {path: leaf if quantised.is_part(path) else jnp.asarray(leaf).astype(dtype) for path in list(leaves) for leaf in [leaves.pop(path)]}
    params = tree.unflatten(cast)
    chosen = templates.get(template, model.tokenizer) if template else model.template
    return dataclasses.replace(model, params=params, run=Execution(dtype=dtype, mesh=mesh_of(params)), template=chosen)  # type: ignore[arg-type]


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


def _described(recipe: Recipe, vocab_size: int | None) -> tuple[ModelConfig, Family, Config]:
    """Shapes, family and config.json of the whole. A model without a connector is of its one part's family."""
    section = recipe.model
    if section.path:
        directory = locate(section.path)
        if (directory / "recipe.json").is_file():
            before = recipes.read_recipe(directory)
            earlier, family, foreign = _described(before, trained_vocabulary(directory))
            return _with_adapters_and_mask(_with_new_rows(earlier, before.model), section), family, foreign
        source = open_published(directory)
        return _with_adapters_and_mask(source.config, section), source.family, source.foreign
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
        return _with_adapters_and_mask(dataclasses.replace(config, features=features), section), family, foreign
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
    return _with_adapters_and_mask(config, section), composed.FAMILY, foreign


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
    source = _source(part, f"model.{name}")
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


def _source(part: Part, key: str, weights: bool = False) -> Published | Config | None:
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


def _with_adapters_and_mask(config: ModelConfig, section: recipes.Model) -> ModelConfig:
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


def _completed(recipe: Recipe, config: ModelConfig, loaded: Params, shardings: Shardings | None) -> Params:
    """The loaded leaves, and fresh ones for all that are not there. What is drawn depends on the seed and the part
    alone.
    """
    shapes = multimodal.shapes(config)
    there = {part: None for part in ("llm", "vision", "connector") if part in loaded}
    if "connector" in loaded and len(tree.flatten(loaded["connector"])) < len(tree.flatten(shapes["connector"])):
        del there["connector"]  # some of a Q-Former's leaves
    absent = dataclasses.replace(config, adapters=(), quantisation=None, **there)  # type: ignore[arg-type]
    bare = multimodal.shapes(dataclasses.replace(config, adapters=()))
    drawn = tree.merge(_drawn(recipe.seed, config, absent, bare, shardings), loaded)
    places = shardings(shapes) if shardings else None
    if config.quantisation is not None:  # what was loaded is quantised already
        drawn = quantised.converted(drawn, config.quantisation, tree.flatten(places or {}))
    params = adapters.settle(drawn, loaded, config)
    flat = tree.flatten(_placed(params, places))
    return tree.unflatten({path: flat[path] for path in tree.flatten(shapes)})


def _placed(params: Params, places: Params | None) -> Params:
    """The leaves where they belong; those that `places` does not name stay where they are."""
    where = tree.flatten(places) if places is not None else {}
    flat = tree.flatten(params)
    return tree.unflatten({path: placed(leaf, where[path]) if path in where else leaf for path, leaf in flat.items()})


def _drawn(seed: int, config: ModelConfig, absent: ModelConfig, bare: Params, shardings: Shardings | None) -> Params:
    """The fresh leaves, each made where it belongs: all of the `absent` parts, and the adapters of the whole that `bare`, the parameters
    under them or their shapes, has not yet."""
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tree.flatten(bare).items()}
    key = np.asarray(jax.random.key_data(jax.random.key(seed)))  # of numpy: data of every process
    draw = _drawing(config, absent, tuple(shapes.items()))
    if not shardings:
        return _program(draw, None)(key)
    made = jax.eval_shape(draw, key)
    known = tree.flatten(shardings(made))
    return _program(draw, tuple((path, known.get(path)) for path in tree.flatten(made)))(key)


@functools.lru_cache(maxsize=8)
def _drawing(
    config: ModelConfig, absent: ModelConfig, bare: tuple[tuple[str, jax.ShapeDtypeStruct], ...]
) -> Callable[[jax.Array], Params]:
    """From the data of a key to the fresh leaves."""

    def draw(data: jax.Array) -> Params:
        key, shapes = jax.random.wrap_key_data(data), dict(bare)
        whole = tree.flatten(adapters.draw(jax.random.fold_in(key, 1), tree.unflatten(shapes), config))
        adapted = {path: leaf for path, leaf in whole.items() if path not in shapes}
        return tree.merge(multimodal.init(key, absent), tree.unflatten(adapted))

    return draw


@functools.lru_cache(maxsize=8)
def _program(draw: Callable[[jax.Array], Params], places: tuple[tuple[str, Any], ...] | None) -> Callable[[np.ndarray], Params]:
    # It runs once: on a CPU, optimising the program takes longer than running it.
    cheap: dict[str, str | bool] = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False}
    options = cheap if jax.default_backend() == "cpu" else {}
    return jax.jit(draw, compiler_options=options, out_shardings=None if places is None else tree.unflatten(dict(places)))


def _connector_paths(shapes: Params) -> frozenset[str]:
    return frozenset(path for path in tree.flatten(shapes) if path.startswith("connector/"))


def _extended(recipe: Recipe, shardings: Shardings | None) -> Model:
    """A whole model that exists already, with the recipe's template, tokens and adapters; it is the base as a whole."""
    section = recipe.model
    places = shardings(multimodal.shapes(model_config(recipe))) if shardings else None
    spec = model_config(recipe).quantisation
    base = load(section.path, section.dtype, shardings=places, quantise=spec or "")
    config = _with_adapters_and_mask(base.config, section)
    fresh = _drawn(recipe.seed, config, ModelConfig(), base.params, shardings)
    drawn = _placed(adapters.settle(tree.merge(base.params, fresh), base.params, config), places)
    own = frozenset(tree.flatten(drawn)) - frozenset(tree.flatten(base.params))
    bases = {section.path: published.fingerprint(locate(section.path))}
    return _with_tokens(dataclasses.replace(base, config=config, params=drawn, own=own, bases=bases), recipe, places)


def trained_vocabulary(workdir: Path) -> int | None:
    """Tokens of the tokenizer that a run trained for itself, if it did."""
    directory = workdir / "tokenizer"
    return len(read_tokenizer(directory)) if has_tokenizer(directory) else None


def _tokenizer(recipe: Recipe, language: Published | Config | None, workdir: Path) -> PreTrainedTokenizerBase | None:
    """The recipe's tokenizer: the one it names, the language model's own, or one trained on the recipe's texts."""
    section = recipe.model.tokenizer
    if language is None:
        return None
    if section.path:
        return read_tokenizer(locate(section.path))
    if isinstance(language, Published):
        if not has_tokenizer(language.directory):
            raise UserError(f"model.llm.path: {language.directory} has no tokenizer; name one in model.tokenizer.path")
        return read_tokenizer(language.directory)
    return vocabulary.train_once(
        workdir / "tokenizer",
        _texts(recipe),
        kind=section.kind,
        vocab_size=section.vocab_size,
        min_frequency=section.min_frequency,
        markers=templates.markers(recipe.model.template),
    )


def _connector_tokenizer(
    section: recipes.Connector, of_language: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """What a connector that has words reads them with."""
    if not section.text_vocab:
        return None
    found = read_tokenizer(locate(section.tokenizer)) if section.tokenizer else of_language
    if found is not None and len(found) > section.text_vocab:
        raise UserError(
            f"the connector's tokenizer has {len(found)} tokens, more than model.connector.text_vocab = {section.text_vocab}"
        )
    return found


def _texts(recipe: Recipe) -> Iterator[str]:
    """Every conversation of the stages' sources, as its template writes it."""
    seen = set()
    for name in recipe.run:
        stage = recipe.stages[name]
        template = templates.get(stage.template or recipe.model.template, None, recipe.model.system)
        for source in stage.sources.values():
            if stage.objective != "classify" and (key := (repr(source), template.name)) not in seen:
                seen.add(key)
                dataset = sources.open(source)
                for i in range(len(dataset)):
                    try:
                        messages = dataset[i].messages
                    except BadSample:
                        continue
                    yield "".join(segment.text for segment in template.segments(messages))


def _check_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe) -> None:
    if config.llm is None or tokenizer is None or len(tokenizer) <= config.llm.vocab_size:
        return
    beyond = [tokenizer.convert_ids_to_tokens(id) for id in range(config.llm.vocab_size, len(tokenizer))]
    if not set(beyond) <= set(recipe.model.new_tokens):
        remedy = "" if recipe.model.llm.path else ", or leave out vocab_size in model.llm.config"
        if len(beyond) <= 16:
            remedy += f", or give the others rows of their own (model.new_tokens): {', '.join(map(repr, beyond))}"
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the language model only {config.llm.vocab_size} embeddings: "
            f"choose another model.tokenizer.path{remedy}"
        )
