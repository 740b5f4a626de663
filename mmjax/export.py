"""Writing a model: to the published layouts, and its adapters alone to peft's."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any, Sequence

import jax
import jax.numpy as jnp

from mmjax import tree
from mmjax.checkpoints import adapterhub, peft, safetensors
from mmjax.data.images import ImageProcessor
from mmjax.data.tiling import AnyRes, DynamicTiles
from mmjax.errors import UserError
from mmjax.families import (
    composed,
    idefics,
    internvl,
    keys,
    lavin,
    llama_adapter,
    llava,
    llava_llama,
    llava_next,
    open_flamingo,
    robust_ger,
    writing,
)
from mmjax.families.family import Config, Family
from mmjax.inference.sampling import asked
from mmjax.model import Model
from mmjax.models import adapters, new_rows, prompts, quantised, vit
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig
from mmjax.models.tuning_config import (
    AdaptionPromptConfig,
    BottleneckConfig,
    ModalityMixtureConfig,
    NoisePromptConfig,
    NormConfig,
    PrefixConfig,
)
from mmjax.parallel import placement
from mmjax.preprocessing import (
    PLACEHOLDER,
    is_writable,
    write_connector_tokenizer,
    write_image_processor,
    write_tokenizer,
)

log = logging.getLogger(__name__)

LAYOUTS = ("hf", "original", "mmjax")
# transformers' layouts, and how pictures are cut in each.
_HF = {llava: type(None), llava_next: AnyRes, internvl: DynamicTiles}
ROWS = 64  # a vocabulary that must grow grows to a multiple of this
# Fields of LLaVA's original config that are not the language model's.
_NOT_TEXT = (
    "mm_",
    "tune_mm",
    "freeze_mm",
    "unfreeze_mm",
    "use_mm",
    "image_",
    "tokenizer_",
    "vision_config",
    "architectures",
)


def save(model: Model, path: Path, *, layout: str = "", dtype: str = "", merge_adapters: bool = True) -> None:
    """See Model.save_pretrained. Raises UserError where the layout cannot hold the model.

    Where the parameters are spread over several processes, all of them must call: the first one writes, and no tensor is whole anywhere
    but the one that is being written."""
    if plugged := [adapter.name for adapter in model.config.adapters if isinstance(adapter, BottleneckConfig)]:
        raise UserError(
            f"bottleneck adapters cannot be merged into weights ({', '.join(plugged)}); write them by themselves: "
            "--config.export.format=peft, or mmjax.export.save_adapters"
        )
    if model.config.adapters and not merge_adapters:
        raise UserError(
            f"the adapters {', '.join(_names(model))} cannot stay apart in a whole model's directory; "
            "write them by themselves in peft's layout"
        )
    if unmerged := [a.name for a in model.config.adapters if isinstance(a, prompts.Prompt | PrefixConfig)]:
        raise UserError(
            f"{', '.join(unmerged)}: prompts and prefixes stand in front of the text, and no weights can hold them. Write them by "
            "themselves, in peft's layout: --config.export.format=peft, or mmjax.export.save_adapters"
        )
    int4 = model.config.quantisation is not None and model.config.quantisation.format == "int4"
    if model.config.quantisation is not None and (not int4 or model.config.adapters):
        raise UserError(
            f"this model's kernels are held in {model.config.quantisation.format}, which no layout written here holds"
            + (f", and its adapters ({', '.join(_names(model))}) cannot be merged into them" if _names(model) else "")
            + ". Dequantise first (model.dequantised(), export.dequantise in a recipe)"
            + (", or write the adapters alone (export.format 'peft')" if _names(model) else "")
        )
    family, foreign = _target(model, layout)
    if not (family.keeps_rows and _only_beyond(model.config)):
        model = merged(model)
    if family is not composed.FAMILY and foreign.get("vision_config", {}).get("model_type") not in llava.ANY_SIZE:
        model = _with_own_positions(model)
    named = any(foreign.get(name) is not None for name in ("image_token_index", "image_token_id"))
    if family in [layout.FAMILY for layout in _HF] and not named:
        model, foreign = _with_placeholder(model, foreign)
    kept = tuple(a for a in model.config.adapters if isinstance(a, family.keeps_adapters))
    apart = adapters.leaves_of(model.params, [a.name for a in kept])
    bare = without_adapters(model, [a.name for a in kept])
    params, config, change = adapters.merge_by_layer(bare.params, bare.config)
    params, config = tree.merge(params, apart), dataclasses.replace(config, adapters=kept)
    config = _without_heads(config, family)
    foreign = family.write_config(config, foreign)
    flat = {
        p: leaf
        for p, leaf in tree.flatten(params).items()
        if not any(tree.matches(p, glob) for glob in family.unneeded)
    }
    rules = family.rules(config, foreign)
    named_paths = {p for rule in rules for p in rule.paths}
    if int4:
        foreign = {**foreign, "quantization_config": _awq(model.config.quantisation, rules, flat)}
    flat = {p: leaf for p, leaf in flat.items() if quantised.kernel_of(p) in named_paths or not p.startswith("mine/")}  # of training alone
    if homeless := sorted({quantised.kernel_of(p) for p in flat} - named_paths):
        raise UserError(f"this layout has no place for {', '.join(homeless)}: adapters, merged into the weights, have made them")
    tensors = writing.tensors(tree.unflatten(flat), rules, dtype or None, change)
    held = dtype or _sizes(tensors).most_common(1)[0][0]
    folders = family.folders(foreign)
    together = placement.crosses(model.params)
    if jax.process_index() == 0 or not together:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(_with_dtype(foreign, held), indent=2) + "\n")
        for folder in folders.values():
            (path / folder.name).mkdir(exist_ok=True)
            section = _with_dtype(foreign[folder.section], held)
            (path / folder.name / "config.json").write_text(json.dumps(section, indent=2) + "\n")
        _write_rest(model, family, foreign, path)

    if not folders:
        writing.write(tensors, path, together=together)
    for folder in folders.values():
        own = [
            dataclasses.replace(tensor, name=tensor.name.removeprefix(folder.prefix))
            for tensor in tensors
            if tensor.name.startswith(folder.prefix)
        ]
        writing.write(own, path / folder.name, together=together)


def _awq(spec: quantised.Quantisation | None, rules: list[keys.Rule], flat: dict[str, Any]) -> Config:
    """The `quantization_config` of kernels in int4, as transformers reads it; what is left dense is named by what its modules share."""
    assert spec is not None
    dense = {r.name.split(".{i}")[0].removesuffix(".weight") for r in rules if f"{r.paths[0]}/codes" not in flat and r.form is keys.transposed}
    packed = {r.name.split(".{i}")[0] for r in rules if f"{r.paths[0]}/codes" in flat}
    fields = {"quant_method": "awq", "bits": 4, "group_size": spec.block, "zero_point": True, "version": "gemm"}
    return {**fields, "modules_to_not_convert": sorted(dense - packed) or None}


def save_adapters(model: Model, path: Path, *, name: str = "", base: str = "", dtype: str = "") -> None:
    """One adapter in peft's layout, or, where that has no such method, AdapterHub's. `name` may be left out where there is only one.

    base   the directory or repository over which it is written. New rows of the vocabulary are no part of an adapter: where the
           model has any, a base that holds them must be given.
    """
    names = _names(model)
    if not names or (not name and len(names) > 1) or (name and name not in names):
        raise UserError(f"which adapter? This model has {', '.join(names) or 'none'}")
    if model.config.llm is not None and model.config.llm.new_rows and not base:
        raise UserError(
            f"the {len(model.config.llm.new_rows)} new rows of the vocabulary are no part of an adapter: give a `base` that holds "
            "them, such as the directory that mmjax.export.without_adapters(model).save_pretrained(...) writes"
        )
    adapter = next(a for a in model.config.adapters if a.name == (name or names[0]))
    family, foreign = _target(without_adapters(model), "")
    plain = dataclasses.replace(model.config, quantisation=None)
    under = peft.Base(plain, family, foreign, quantised.dense_shapes(model.params))
    if isinstance(adapter, BottleneckConfig):
        adapterhub.write(model.params, adapter, under, path, base_name=base or next(iter(model.bases), ""), dtype=dtype or None)
        return
    peft.write(model.params, adapter, under, path, base_name=base or next(iter(model.bases), ""), dtype=dtype or None)


def without_adapters(model: Model, names: Sequence[str] | None = None) -> Model:
    """The model as it is under its adapters, all of them or those of these names."""
    gone = _names(model) if names is None else names
    theirs = tree.flatten(adapters.leaves_of(model.params, gone))
    flat = {path: leaf for path, leaf in tree.flatten(model.params).items() if path not in theirs}
    left = tuple(adapter for adapter in model.config.adapters if adapter.name not in gone)
    config = dataclasses.replace(model.config, adapters=left)
    return dataclasses.replace(model, config=config, params=tree.unflatten(flat))


def merged(model: Model) -> Model:
    """The model with the new rows of its vocabulary in its tables."""
    if model.config.llm is None:
        return model
    params, config = new_rows.merge(model.params, model.config)
    return dataclasses.replace(model, params=params, config=config)


def _only_beyond(config: ModelConfig) -> bool:
    """Whether all vocabulary rows that are leaves of their own lie beyond the tables."""
    return config.llm is not None and len(config.llm.new_rows) == config.llm.beyond


def _names(model: Model) -> list[str]:
    return [adapter.name for adapter in model.config.adapters]


def _target(model: Model, layout: str) -> tuple[Family, Config]:
    """The family to write, and the config.json from which its own is made."""
    if layout not in ("", *LAYOUTS):
        raise UserError(f"unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")
    if any(isinstance(adapter, ModalityMixtureConfig) for adapter in model.config.adapters):
        return _with_mixture(model, layout)
    whole = model.config.connector is not None
    if any(isinstance(adapter, AdaptionPromptConfig | NoisePromptConfig) for adapter in model.config.adapters):
        return _with_prompts(model, layout)
    if model.family.keeps_adapters and layout in ("", "original"):
        return model.family, model.foreign
    if model.config.cross_attention is not None:
        return _between_blocks(model, layout)
    if not whole or (not layout and model.family is not composed.FAMILY):
        if layout in ("original", "mmjax"):
            raise UserError(f"layout {layout!r} is for models with a connector")
        return model.family, model.foreign
    text, image = _part_configs(model)
    hf = _hf(model, text, image)
    if not layout:
        layout = "hf" if isinstance(hf, Family) else "mmjax"
        if not isinstance(hf, Family):
            log.info("it is written in mmjax's own layout, since those of transformers cannot hold it: %s", hf)
    if layout == "hf" and not isinstance(hf, Family):
        raise UserError(f"the model does not fit the Hugging Face layouts: {hf}")
    family = {"hf": hf, "original": llava_llama.FAMILY, "mmjax": composed.FAMILY}[layout]
    assert isinstance(family, Family)
    if family is model.family:
        return family, model.foreign
    tiling = model.image_processor.tiling if model.image_processor else None
    canvases: Config = {}
    if isinstance(tiling, AnyRes) and family is not composed.FAMILY:
        side = model.config.encoder.image_size
        across_first = family is llava_llama.FAMILY
        pixels = [[rows * side, columns * side] for rows, columns in tiling.grids]
        canvases = {"image_grid_pinpoints": [canvas[::-1] if across_first else canvas for canvas in pixels]}
    if family is llava_llama.FAMILY:
        why, kind = llava_llama.expressible(model.config, tiling), f"llava_{text['model_type']}"
        if why or kind not in llava_llama.LANGUAGE:
            raise UserError(f"the model does not fit LLaVA's original layout: {why or f'it knows no {kind}'}")
        aspect = model.image_processor.aspect if model.image_processor else "pad"
        return family, {
            **{key: value for key, value in text.items() if key != "architectures"},
            "model_type": kind,
            "vision_config": image,
            "mm_vision_tower": "",
            "image_aspect_ratio": "anyres" if tiling else "pad" if aspect == "pad" else "square",
            **canvases,
            "mm_use_im_start_end": bool(model.image_start),
            "mm_use_im_patch_token": False,
        }
    before = {name: model.foreign[name] for name in ("image_token_index",) if model.foreign.get(name) is not None}
    return family, {"model_type": family.model_types[0], "text_config": text, "vision_config": image, **before, **canvases}


def _with_prompts(model: Model, layout: str) -> tuple[Family, Config]:
    """The same for a model whose adapters plug into layers, which only the layouts of their authors hold."""
    if model.family.keeps_adapters and layout in ("", "original"):
        return model.family, model.foreign
    reasons = []
    for family, expressible in (
        (llama_adapter.V1, llama_adapter.not_v1),
        (llama_adapter.V2, llama_adapter.expressible),
        (robust_ger.FAMILY, robust_ger.expressible),
    ):
        kept = tuple(a for a in model.config.adapters if not isinstance(a, NormConfig))  # merged into the norms
        why = expressible(dataclasses.replace(model.config, adapters=kept))
        if not why and layout in ("", "original"):
            text = model.foreign.get("text_config", model.foreign)
            ids = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if text.get(name) is not None}
            return family, {"model_type": family.model_types[0], **ids}
        reasons.append(f"{family.model_types[0]}: {why or 'it is the layout original'}")
    raise UserError(
        f"the prompts of {', '.join(_names(model))} do not fit {f'the layout {layout!r}' if layout else 'any layout'} ({'; '.join(reasons)}); "
        "a workdir keeps them, and so may peft's layout (mmjax.export.save_adapters)"
    )


def _with_mixture(model: Model, layout: str) -> tuple[Family, Config]:
    """The same for a model with a mixture of modality adapters, which LaVIN's layout alone holds."""
    kept = tuple(a for a in model.config.adapters if isinstance(a, ModalityMixtureConfig))  # others are merged
    why = lavin.expressible(dataclasses.replace(model.config, adapters=kept))
    if why or layout not in ("", "original"):
        raise UserError(
            f"a mixture of modality adapters is held by LaVIN's layout alone (--config.export.format=original): {why or f'not by {layout!r}'}; "
            "a workdir keeps it as it is"
        )
    return lavin.FAMILY, model.foreign if model.family is lavin.FAMILY else {"model_type": "lavin"}


def _between_blocks(model: Model, layout: str) -> tuple[Family, Config]:
    """The same for a model that reads media between its blocks: transformers' layout is IDEFICS', the original one OpenFlamingo's."""
    if model.family is not composed.FAMILY:
        own = "hf" if model.family is idefics.FAMILY else "original"
        if layout not in ("", own):
            raise UserError(f"a {model.family.model_types[0]} is written in its own layout ({own!r}), not in {layout!r}")
        return model.family, model.foreign
    text, image = _part_configs(model)
    config, id = model.config, model.foreign.get("image_token_index")
    if not _only_beyond(config):
        config = dataclasses.replace(config, llm=dataclasses.replace(config.language, new_rows=(), beyond=0))
    why = idefics.expressible(config, text, image)
    if layout == "hf" and why:
        raise UserError(f"the model does not fit transformers' IDEFICS: {why}")
    if layout == "hf" or (not layout and not why):
        return idefics.FAMILY, idefics.joined(text, image)
    if layout == "original":
        return open_flamingo.FAMILY, {
            "model_type": "openflamingo",
            "text_config": text,
            "vision_config": image,
            **({"media_token_id": id} if id is not None else {}),
        }
    if not layout:
        log.info("it is written in mmjax's own layout, since IDEFICS' cannot hold it: %s", why)
    ids = {"image_token_index": id} if id is not None else {}
    return composed.FAMILY, {"model_type": "mmjax", "text_config": text, "vision_config": image, **ids}


def _hf(model: Model, text: Config, image: Config) -> Family | str:
    """Which of transformers' layouts holds the model, or why none does."""
    tiling = model.image_processor.tiling if model.image_processor else None
    reasons = []
    for layout, kind in _HF.items():
        why = layout.expressible(model.config, text, image)
        if not why and model.image_processor is not None and not isinstance(tiling, kind):
            why = f"its pictures are cut otherwise than by {tiling}"
        if not why and isinstance(tiling, (AnyRes, DynamicTiles)) and not tiling.overview:
            why = "its tiles come with an overview"
        if not why:
            return layout.FAMILY
        reasons.append(f"{layout.FAMILY.model_types[0]}: {why}")
    return "; ".join(reasons)


def _part_configs(model: Model) -> tuple[Config, Config]:
    """text_config and vision_config, whichever layout the model was read in."""
    if model.family is llava_llama.FAMILY:
        text = {k: v for k, v in llava_llama.text_config(model.foreign).items() if not k.startswith(_NOT_TEXT)}
        return text, llava_llama.vision_config(model.foreign, "config.json")
    return model.foreign["text_config"], model.foreign["vision_config"]


def _with_own_positions(model: Model) -> Model:
    """The model with positions for the size that it is run at, for layouts whose code would not interpolate them."""
    vision = model.config.vision
    if not isinstance(vision, ViTConfig) or not vision.native_size or not vision.learned_positions:
        return model
    flat, side = dict(tree.flatten(model.params)), vision.image_size // vision.patch_size
    table = jnp.asarray(flat["vision/positions"])
    flat["vision/positions"] = vit.positions(table, vision, side, side).astype(table.dtype)
    config = dataclasses.replace(model.config, vision=dataclasses.replace(vision, native_size=0))
    return dataclasses.replace(model, config=config, params=tree.unflatten(flat))


def _without_heads(config: ModelConfig, family: Family) -> ModelConfig:
    """Without the encoder's projection and classes, where the family has no place for them."""
    if family.unneeded and config.vision is not None:
        gone: dict[str, Any] = {name: 0 for name in ("projection", "classes") if hasattr(config.vision, name)}
        return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **gone))
    return config


def _with_placeholder(model: Model, foreign: Config) -> tuple[Model, Config]:
    """The model with an id for image tokens, as transformers wants it: the tokenizer's <image>, else a new one, for
    which the vocabulary grows (by rows that are the mean of the others) only where it has no spare row.
    """
    assert model.config.llm is not None
    vocab, tokenizer = model.config.llm.vocab_size, model.tokenizer
    placeholder: Any
    if tokenizer is None:
        placeholder = vocab
    elif PLACEHOLDER in tokenizer.get_vocab():
        placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    else:
        placeholder, tokenizer = len(tokenizer), copy.deepcopy(tokenizer)
        tokenizer.add_tokens([PLACEHOLDER], special_tokens=True)
    model = dataclasses.replace(model, tokenizer=tokenizer)
    if placeholder >= vocab:
        model = model.resize_vocabulary(-(-(placeholder + 1) // ROWS) * ROWS)
    return model, {**foreign, "image_token_index": placeholder}


def _sizes(tensors: list[safetensors.Tensor]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[str(tensor.dtype)] += tensor.bytes
    return sizes


def _with_dtype(foreign: Config, dtype: str) -> Config:
    """The config with its `dtype` said, in its parts as well."""
    written = {key: value for key, value in foreign.items() if key != "torch_dtype"}
    for part in ("text_config", "vision_config"):
        if isinstance(written.get(part), dict):
            written[part] = _with_dtype(written[part], dtype)
    return {**written, "dtype": dtype}


def _write_rest(model: Model, family: Family, foreign: Config, path: Path) -> None:
    """Tokenizer, chat template, image processor, generation_config, each where the layout has its part."""
    homes = {part: path / folder.name for part, folder in family.folders(foreign).items()}
    home = homes.get("llm", path)
    if model.tokenizer is not None:
        write_tokenizer(model.tokenizer, model.template, home, model.image_start, model.image_end)
    if model.connector_tokenizer is not None and model.connector_text:
        write_connector_tokenizer(model.connector_tokenizer, model.connector_text, path)
    processor = model.image_processor if isinstance(model.image_processor, ImageProcessor) else None
    # What has no file in transformers' layout is not written where the family's code or config.json says it.
    if processor is not None and (is_writable(processor) or processor.tiling != family.tiling(foreign, model.config)):
        strategy = str(foreign.get("vision_feature_select_strategy", ""))
        write_image_processor(processor, model.config, homes.get("vision", path), strategy)
    if model.config.llm is not None:
        text = family.sections(foreign)["llm"] or foreign
        ids = {
            name: model.generation.get(name, text.get(name))
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        }
        if model.tokenizer is not None:
            own = {name: getattr(model.tokenizer, name, None) for name in ids}
            ids = {name: own[name] if value is None else value for name, value in ids.items()}
        # Once there is this file nobody asks the config.json, where old ones have such settings.
        old = {} if model.generation else asked({**text, **foreign})
        kept = {**old, **model.generation, **{name: value for name, value in ids.items() if value is not None}}
        (home / "generation_config.json").write_text(json.dumps(kept, indent=2) + "\n")
