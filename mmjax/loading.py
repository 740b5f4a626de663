"""Reading a model from any directory that holds one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mmjax import hub, published, tree
from mmjax.checkpoints import adapterhub, peft, weights
from mmjax.data import templates
from mmjax.data.instructions import Embeddings
from mmjax.data.templates import Template
from mmjax.errors import UserError
from mmjax.families import keys, llava_llama, minigpt4, reading
from mmjax.model import Model
from mmjax.models import connectors, multimodal, quantised
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig
from mmjax.models.quantised import Quantisation
from mmjax.models.tuning_config import Adapter, NoisePromptConfig
from mmjax.parallel.sharding import mesh_of
from mmjax.preprocessing import (
    has_tokenizer,
    image_processor,
    read_connector_tokenizer,
    read_image_processor,
    read_tokenizer,
)
from mmjax.published import Published, locate, open_published, read_json
from mmjax.tree import Params

PROJECTORS = ("mm_projector.bin", "mm_projector.safetensors", "non_lora_trainables.bin")
# What training scripts leave before the names of a projector's tensors.
_WRAPPED = (r"^base_model\.(model\.)?(?=model\.)", "")


def load(
    path: str | Path,
    dtype: str = "float32",
    *,
    template: str = "",
    shardings: Params | None = None,
    check_finite: bool = True,
    quantise: str | Quantisation = "",
) -> Model:
    """The model in a directory: a Hugging Face one, one in an original layout, an adapter of PEFT's or AdapterHub's over its base, or an mmjax workdir;
    or a repository, OWNER/NAME or OWNER/NAME@REVISION, that is in the local Hugging Face cache. What it is, its config.json says.

    dtype         of weights and activations
    template      a chat template's name; "" = the tokenizer's own, else LLaVA-1.5's where it fits
    shardings     where each leaf goes (a tree like the parameters); none = the default device
    quantise      in what the Linears of the LLM's blocks are held, quantised while they are read: "int8", "nf4", "int4", or what a
                  Quantisation says; "" = as the directory has them
    check_finite  refuse published weights with NaN or infinity (it takes a few per cent of the time of reading them)
    Raises UserError listing every weight that is missing, unexpected or of another shape; nothing is ever left
    random.
    """
    directory = locate(str(path))
    spec = quantised.named(quantise) if isinstance(quantise, str) else quantise
    if (directory / "recipe.json").is_file():
        from mmjax.assembly import load_workdir

        model = load_workdir(directory, dtype, template=template, shardings=shardings)
        return model.quantised(spec) if spec is not None else model
    reading: dict[str, Any] = {"dtype": dtype, "shardings": shardings, "check_finite": check_finite}
    asked: dict[str, Any] = {**reading, "quantise": quantise, "template": template}
    has_config = (directory / "config.json").is_file()
    adapter_config = directory / "adapter_config.json"
    if has_config and "adapter_dir" in (index := read_json(directory / "config.json")):
        beside = directory / index["adapter_dir"]
        if adapterhub.is_one(read_json(beside / "adapter_config.json")):
            return with_bottleneck(load(directory / index["base_dir"], **asked), beside)
        return load(beside, **asked)
    if adapter_config.is_file() and adapterhub.is_one(fields := read_json(adapter_config)):
        return with_bottleneck(load(locate(adapterhub.base_name(fields), directory), **asked), directory)
    if adapter_config.is_file():
        adapter = peft.read(directory)
        if not has_config:
            return with_adapter(load(locate(adapter.base, directory), **asked), adapter)
        # LLaVA's LoRA directories: the whole model's config, the projector beside the adapter, the rest elsewhere.
        source = published.quantised_as(open_published(directory), spec)
        model = from_published(source, _from_parts(source, adapter.base, reading), dtype, template)
        return with_adapter(model, adapter)
    if not has_config:
        raise UserError(
            f"{directory} has no config.json (nor adapter_config.json, nor an mmjax run's recipe.json). {hub.remedy(directory)}"
        )
    source = published.quantised_as(open_published(directory), spec)
    if spec is not None:
        quantised.require(published.dense_shapes(source.config), spec)
    if source.family is llava_llama.FAMILY and not weights.files(directory):
        base_name = source.foreign.get("_name_or_path", "")
        return from_published(source, _from_parts(source, base_name, reading), dtype, template)
    return from_published(source, published.load_leaves(source, **reading), dtype, template)


def from_published(source: Published, params: Params, dtype: str, template: str) -> Model:
    """The model of a directory whose leaves are read."""
    directory, foreign = source.directory, source.foreign
    generation = [place / "generation_config.json" for place in source.places]
    generation = [path for path in generation if path.is_file()]
    tokenizer = next((read_tokenizer(place) for place in source.places if has_tokenizer(place)), None)
    processor: Any = None
    if source.config.vision is not None:
        processor = read_image_processor(directory, source.config)
        if processor is None and source.config.connector is not None:
            named = {"pad": "pad", "square": "crop", "resize": "squash"}
            aspect = named.get(str(foreign.get("image_aspect_ratio")), "")
            processor = published.own_image_processor(source.places, source.config)  # the encoder's own
            if processor is None:
                processor = image_processor(source.config, aspect=aspect)
            elif aspect:
                processor = dataclasses.replace(processor, aspect=aspect)
        if processor is not None and processor.tiling is None and (cut := source.family.tiling(foreign, source.config)):
            processor = dataclasses.replace(processor, tiling=cut, aspect="squash")
    if (noise := next((a for a in source.config.adapters if isinstance(a, NoisePromptConfig)), None)) is not None:
        processor = Embeddings((noise.length, noise.channels))
    beside, beside_length = read_connector_tokenizer(directory, source.config)
    delimited = bool(foreign.get("mm_use_im_start_end", False))
    return Model(
        config=source.config,
        params=params,
        family=source.family,
        foreign=foreign,
        run=Execution(dtype=dtype, mesh=mesh_of(params)),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        template=chosen_template(tokenizer, directory, template) if tokenizer is not None else None,
        image_processor=processor,
        image_start="<im_start>" if delimited else "",
        image_end="<im_end>" if delimited else "",
        connector_tokenizer=beside,
        connector_text=beside_length,
        generation=read_json(generation[0]) if generation else {},
        bases=published.bases(source),
    )


def chosen_template(tokenizer: Any, directory: Path, name: str = "") -> Template | None:
    """The template called `name`; without one the tokenizer's own (or the processor's), else v1 where it fits, else
    None.
    """
    if tokenizer.chat_template is None:
        for file in ("chat_template.json", "processor_config.json"):
            if (directory / file).is_file() and (found := read_json(directory / file).get("chat_template")):
                tokenizer.chat_template = found
                break
    if name:
        return templates.get(name, tokenizer)
    if tokenizer.chat_template is not None:
        return templates.get("tokenizer", tokenizer)
    try:
        return templates.get("v1", tokenizer)
    except UserError:
        return None


def with_adapter(model: Model, directory: peft.Directory) -> Model:
    """The model with a PEFT adapter beside its weights."""
    return _with_leaves(model, *peft.leaves(directory, _under(model)))


def with_bottleneck(model: Model, directory: Path) -> Model:
    """The model with an adapter of AdapterHub's in its blocks."""
    return _with_leaves(model, *adapterhub.read(directory, _under(model)))


def _under(model: Model) -> peft.Base:
    """The model as an adapter's files know it: with the shapes of dense kernels."""
    plain = dataclasses.replace(model.config, quantisation=None)
    return peft.Base(plain, model.family, model.foreign, quantised.dense_shapes(model.params))


def _with_leaves(model: Model, adapter: Adapter, leaves: Params) -> Model:
    config = dataclasses.replace(model.config, adapters=(*model.config.adapters, adapter))
    return dataclasses.replace(
        model,
        config=config,
        params=tree.merge(model.params, leaves),
        own=model.own | set(tree.flatten(leaves)),
    )


def load_connector(
    path: str | Path, config: ConnectorConfig, *, dtype: Any = "float32", check_finite: bool = True, shardings: Params | None = None
) -> Params:
    """A connector's leaves from a projector-only file (`mm_projector.bin` and the like, or MiniGPT-4's with its one Linear), a
    directory with one, or a whole model's directory.

    Raises UserError with what is missing or does not fit.
    """
    place = Path(path)
    if not place.is_file():
        place = locate(str(path))
        named = [place / name for name in PROJECTORS if (place / name).is_file()]
        if not named and (place / "config.json").is_file():
            source = open_published(place)
            if source.config.connector != config:
                raise UserError(f"{place}: its connector is {source.config.connector}, the recipe's is {config}")
            return published.load_part(source, "connector", dtype=dtype, shardings=shardings, check_finite=check_finite)
        if not named:
            raise UserError(
                f"{place} has no connector: neither {', '.join(PROJECTORS)} nor a whole model's config.json"
            )
        place = named[0]
    shapes = multimodal.shapes(ModelConfig(connector=config))
    stored = keys.renamed(weights.read(place), (_WRAPPED, *llava_llama.FAMILY.spellings))
    # mm_projector files of training runs with extra tokens also hold embeddings: those would be lost here.
    rules = llava_llama.projector_rules(config)
    if len(connectors.widths(config)) == 1 and f"{minigpt4.PROJECTION}.weight" in stored:
        rules = keys.linear(minigpt4.PROJECTION, "connector/layers_0", config.bias)
    return reading.load(stored, rules, shapes, dtype=dtype, shardings=shardings, where=place, check_finite=check_finite)


def _from_parts(source: Published, base: str, reading: dict[str, Any]) -> Params:
    """The leaves of LLaVA's partial directories: language model, vision tower and projector each from where it is
    published.
    """
    where = source.directory
    if not base:
        raise UserError(
            f"{where} has no language model and does not say which one it belongs to; "
            "load it through a recipe's model.llm.path"
        )
    towers = source.family.external(source.foreign)
    if "vision" not in towers:
        raise UserError(f"{where}/config.json does not name its vision tower (mm_vision_tower)")
    places = locate(base, where), locate(towers["vision"], where)
    llm, vision = (published.quantised_as(open_published(place), source.config.quantisation) for place in places)
    if llm.config.llm != source.config.llm:
        raise UserError(f"{where}: its language model is {source.config.llm}, that of {base} is {llm.config.llm}")
    assert source.config.connector is not None
    return tree.merge(
        published.load_part(vision, "vision", **reading),
        load_connector(where, source.config.connector, **reading),
        published.load_part(llm, "llm", **reading),
    )
