"""From a recipe's `model` section to a model: published parts, fresh parts, fresh adapters, and what surrounds them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import config as recipes
from mmjax import published, qformer_weights, tree, vocabulary
from mmjax.architecture import described, model_config, source_of, with_adapters_and_mask, with_new_rows
from mmjax.config import Recipe
from mmjax.data import sources, templates
from mmjax.data import tiling as tilings
from mmjax.data.instructions import Embeddings
from mmjax.data.messages import PLACEHOLDER, BadSample
from mmjax.errors import UserError
from mmjax.families import composed
from mmjax.families.family import Config
from mmjax.loading import load, load_connector
from mmjax.model import Model
from mmjax.models import adapters, multimodal, prompts, quantised, tuning_config
from mmjax.models.config import Execution, ModelConfig
from mmjax.parallel.sharding import mesh_of, placed
from mmjax.preprocessing import has_tokenizer, image_processor, read_image_processor, read_tokenizer
from mmjax.published import Published, locate
from mmjax.tree import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Shardings = Callable[[Params], Params]


def assemble(recipe: Recipe, workdir: Path, shardings: Shardings | None = None) -> Model:
    """The model of a recipe before its first step: published weights in model.dtype, fresh ones in float32 from the
    recipe's seed.

    workdir     where a tokenizer of our own is kept (WORKDIR/tokenizer)
    shardings   from the parameters' shapes to where each leaf goes; none = the default device
    """
    if recipe.model.path:
        return _extended(recipe, shardings)
    section = recipe.model
    language = source_of(section.llm, "model.llm", weights=True)
    vision = source_of(section.vision, "model.vision", weights=True)
    tokenizer = _tokenizer(recipe, language, Path(workdir))
    config, family, foreign = described(recipe, len(tokenizer) if tokenizer is not None else None)
    _check_vocabulary(config, tokenizer, recipe)
    shapes = multimodal.shapes(with_new_rows(config, section))
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
    config = with_adapters_and_mask(base.config, section)
    fresh = _drawn(recipe.seed, config, ModelConfig(), base.params, shardings)
    drawn = _placed(adapters.settle(tree.merge(base.params, fresh), base.params, config), places)
    own = frozenset(tree.flatten(drawn)) - frozenset(tree.flatten(base.params))
    bases = {section.path: published.fingerprint(locate(section.path))}
    return _with_tokens(dataclasses.replace(base, config=config, params=drawn, own=own, bases=bases), recipe, places)


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
