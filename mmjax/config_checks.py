"""What is wrong with a recipe whose every field is of the right type: values out of range, names that name nothing,
files that are not there. Cheap, so that it is said before anything is loaded or compiled."""

from __future__ import annotations

import dataclasses
import glob
import importlib
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from mmjax.config_parsing import nearest
from mmjax.hub import REPOSITORY
from mmjax.models.encoder_config import CONNECTORS, PERCEIVERS
from mmjax.models.tuning_config import fields as fields_of

if TYPE_CHECKING:
    from mmjax.config import Adapter, Connector, FewShot, Model, Part, Recipe, Source, Stage

MLPS = ("mlp", "pooled_mlp", "concat", "space_to_depth")

# Field name -> smallest and largest value. Fields that are not named here may be any value of their type.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("least_tiles", "most_tiles"), (1, math.inf)),
    **dict.fromkeys(("rows", "length", "accumulate", "unroll", "group", "pooled_tokens", "rank", "join"), (1, math.inf)),
    **dict.fromkeys(("batch", "num_beams", "max_new_tokens", "prefetch", "threads", "min_frequency", "local_every"), (1, math.inf)),
    **dict.fromkeys(("steps", "epochs", "tiles", "limit", "weight", "loss_weight", "warmup_steps"), (0, math.inf)),
    **dict.fromkeys(("answer_length", "depth", "hidden_width", "squeeze_width", "head_dim"), (0, math.inf)),
    **dict.fromkeys(("latents", "heads", "cross_every", "text_positions"), (1, math.inf)),
    **dict.fromkeys(("mlp_width", "text_vocab", "text_length", "contrast_width"), (0, math.inf)),
    **dict.fromkeys(("tokens", "tasks", "task_rank", "encoder_depth", "channels"), (1, math.inf)),
    **dict.fromkeys(("encoder_width", "task", "first", "audio", "noise_distillation", "width"), (0, math.inf)),
    **dict.fromkeys(("clip_norm", "weight_decay", "temperature", "top_k", "patience", "every"), (0, math.inf)),
    **dict.fromkeys(("keep", "keep_best", "workers", "samples", "shots", "text_only", "size", "grid", "profile_step"), (0, math.inf)),
    **dict.fromkeys(("dropout", "warmup_ratio", "end_factor", "b1", "b2", "label_smoothing"), (0, 1)),
    **dict.fromkeys(("max_broken", "top_p"), (0, 1)),
    "learning_rate": (1e-12, math.inf),
    "eps": (0, 1),
}


def problems(recipe: Recipe) -> list[str]:
    """Everything about the recipe that cannot be meant, each line naming its key."""
    untiled = [name for name, stage in recipe.stages.items() if recipe.model.stitching and not stage.tiled]
    return [
        *_out_of_range(recipe, ""),
        *_model(recipe.model),
        *(f"stages.{name}.tiled is off, but model.stitching reads the tiles of a picture." for name in untiled),
        *_run(recipe),
        *(line for name, stage in recipe.stages.items() for line in _stage(f"stages.{name}", stage)),
        *(
            line
            for name, evaluation in recipe.evaluations.items()
            for line in [
                *_source(f"evaluations.{name}.source", evaluation.source),
                *_few_shot(f"evaluations.{name}.few_shot", evaluation.few_shot),
            ]
        ),
        *_mesh(recipe),
        *_exported(recipe),
    ]


def missing_files(recipe: Recipe, job: str) -> list[str]:
    """The files `job` will read that are not there, each line naming its key. --job=plan reads none."""
    wanted: dict[str, str] = {}
    if job in ("train", "evaluate", "generate", "chat", "export"):
        model = recipe.model
        wanted = {"model.path": model.path}
        for name in ("llm", "vision", "connector", "tokenizer"):
            wanted[f"model.{name}.path"] = getattr(model, name).path
        wanted["model.connector.tokenizer"] = model.connector.tokenizer
        wanted["model.connector.bert"] = model.connector.bert
    if job == "train":
        for name in recipe.run:
            stage = recipe.stages[name]
            wanted |= _files(f"stages.{name}.sources", stage.sources)
            wanted |= _files(f"stages.{name}.validation.sources", stage.validation.sources)
    if job in ("train", "evaluate"):
        for name, evaluation in recipe.evaluations.items():
            wanted |= _files(f"evaluations.{name}", {"source": evaluation.source})
            wanted |= _files(f"evaluations.{name}.few_shot", {"source": evaluation.few_shot.source})
    if job in ("generate", "chat"):
        wanted |= {"generate.input": recipe.generate.input, "generate.image": recipe.generate.image}
    return [
        f"{key} is {value!r}, which does not exist. Give it on the command line: --config.{key}=PATH"
        for key, value in wanted.items()
        if value and not _exists(value)
    ]


def _files(prefix: str, sources: dict[str, Source]) -> dict[str, str]:
    return {
        f"{prefix}.{name}.{field}": getattr(source, field)
        for name, source in sources.items()
        for field in ("path", "images")
    }


def _exists(path: str) -> bool:
    # OWNER/NAME may be a repository in the local cache: whoever loads it says whether it is
    return Path(path).exists() or bool(glob.glob(path)) or re.fullmatch(REPOSITORY, path) is not None


def _out_of_range(value: Any, path: str) -> Iterator[str]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            below = getattr(value, field.name)
            key = f"{path}.{field.name}" if path else field.name
            if field.name in _RANGES and isinstance(below, (int, float)):
                low, high = _RANGES[field.name]
                if not low <= below <= high:
                    bound = f"between {low:g} and {high:g}" if high < math.inf else f"at least {low:g}"
                    yield f"{key} is {below}; it must be {bound}."
            yield from _out_of_range(below, key)
    elif isinstance(value, dict):
        for name, below in value.items():
            if dataclasses.is_dataclass(below):
                yield from _out_of_range(below, f"{path}.{name}")


def _model(model: Model) -> Iterator[str]:
    parts = {"llm": model.llm, "vision": model.vision}
    if model.path:
        for name, part in parts.items():
            if part.path or part.config:
                yield (
                    f"model.{name} is given beside model.path={model.path!r}, which brings its own parts; "
                    f"leave out one of the two."
                )
    elif not any(part.path or part.config for part in parts.values()):
        yield "model names no parts: give model.path, or model.llm and model.vision (a path, or a config of shapes)."
    for name, part in parts.items():
        yield from _part(f"model.{name}", part)
    yield from _connector(model.connector)
    if model.path and model.cross_attention.every:
        yield f"model.cross_attention is given beside model.path={model.path!r}, which brings its own or has none; leave out one of the two."
    yield from _tiling(model)
    yield from _template("model.template", model.template)
    if not model.feature_layers:
        yield "model.feature_layers is empty: which of the encoder's hidden states does the connector read? (-2: the last but one)"
    for name in model.new_tokens:
        if not name or model.new_tokens.count(name) > 1:
            yield f"model.new_tokens: {name!r} is empty or stands there twice."
    if model.new_tokens and not (model.path or model.llm.path or model.llm.config):
        yield "model.new_tokens are given, but the model has no language model that could learn them."
    beside = [name for name, adapter in model.adapters.items() if adapter.media or adapter.kind == "noise_prompt"]
    if beside and model.cross_attention.every:
        yield f"model.adapters.{beside[0]} reads media beside the text, and model.cross_attention between the blocks; choose one of the two."
    if beside and model.image.tiling:
        yield f"model.adapters.{beside[0]} reads media beside the text, where a picture is one tile; model.image.tiling cuts it."
    for name, adapter in model.adapters.items():
        if not re.fullmatch(r"\w+", name):
            yield f"model.adapters: {name!r} cannot name an adapter; use letters, digits and _."
        read = fields_of(adapter.kind)
        if "targets" in read and not adapter.targets:
            yield f"model.adapters.{name}.targets is empty: it lists globs over Linears, such as llm/layers/**."
        yield from _in_front(f"model.adapters.{name}", name, adapter)
        yield from _plugged(f"model.adapters.{name}", name, adapter)
        for field in dataclasses.fields(adapter):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if field.name not in ("kind", *read) and getattr(adapter, field.name) != default:
                yield f"model.adapters.{name}.{field.name} is not read by an adapter of kind {adapter.kind!r}, which reads {', '.join(read)}."


def _in_front(key: str, name: str, adapter: Adapter) -> Iterator[str]:
    """Prompts and prefixes."""
    if adapter.kind == "p_tuning" and adapter.encoder == "mlp" and adapter.encoder_depth != 2:
        yield f"{key}.encoder_depth is {adapter.encoder_depth}, and encoder='mlp' has two hidden layers; it counts those of an LSTM."
    if adapter.kind == "prefix" and adapter.encoder_width and not adapter.projected:
        yield f"{key}.encoder_width is of the MLP that makes a prefix with projected=True."
    if name == "cross_attention":
        yield f"{key}: it cannot be called so, since the leaves of cross-attention between blocks are."


def _plugged(key: str, name: str, adapter: Adapter) -> Iterator[str]:
    """What sits in blocks."""
    for field in ("places", "parts"):
        if not getattr(adapter, field) or len(set(getattr(adapter, field))) < len(getattr(adapter, field)):
            yield f"{key}.{field} is empty, or says something twice: {getattr(adapter, field)}."
    if list(adapter.layers) != sorted(set(adapter.layers)) or any(layer < 0 for layer in adapter.layers):
        yield f"{key}.layers are {adapter.layers}; they count from 0, ascending."
    if adapter.kind == "modality_mixture":
        if "encoder" in adapter.parts:
            yield f"{key}.parts: an encoder-decoder's encoder has no modality tokens; there are 'llm' and 'vision'."
        if adapter.width < 1 or adapter.groups < 1 or adapter.width % adapter.groups:
            yield f"{key}.width is {adapter.width}, which {adapter.groups} groups do not divide."
        if not adapter.temperature:
            yield f"{key}.temperature is 0; the router's logits are divided by it."
    if adapter.reduction <= 0:
        yield f"{key}.reduction is {adapter.reduction}; it must be more than 0."


def _tiling(model: Model) -> Iterator[str]:
    image, merge = model.image, model.connector.merge
    for grid in image.grids:
        if not re.fullmatch(r"[1-9]\d?x[1-9]\d?", grid):
            yield f"model.image.grids: {grid!r} is no grid; write rows and columns, such as 2x3."
    if image.grids and image.tiling != "anyres":
        yield f"model.image.grids are those of tiling='anyres'; it is {image.tiling!r}."
    if image.overlap and image.tiling != "overlapping":
        yield f"model.image.overlap is that of tiling='overlapping'; it is {image.tiling!r}."
    if model.stitching and image.tiling != "overlapping":
        yield "model.stitching puts together the tiles of model.image.tiling='overlapping'."
    if image.tiling == "overlapping" and (not model.stitching or not image.overview):
        yield "model.image.tiling='overlapping' needs model.stitching, and an overview: tiles that overlap are only read as one map."
    if image.least_tiles > image.most_tiles:
        yield f"model.image.least_tiles is {image.least_tiles}, more than most_tiles, {image.most_tiles}."
    if merge == "spatial_unpad" and image.tiling != "anyres":
        yield "model.connector.merge is 'spatial_unpad', which cuts off the black borders of tiling='anyres'; others have none."
    elif merge == "spatial" and not image.tiling:
        yield "model.connector.merge is 'spatial', but pictures are not cut into tiles (model.image.tiling)."
    if model.scales[:1] != (1,) or list(model.scales) != sorted(set(model.scales)):
        yield f"model.scales are {model.scales}; they are multiples of the encoder's size, from 1 up, such as (1, 2, 3)."


def _connector(connector: Connector) -> Iterator[str]:
    kind = connector.kind
    named = re.fullmatch(r"mlp[1-9]\d*x_gelu", kind)
    if kind not in CONNECTORS and not named:
        yield from _own_connector(kind)
    if named and connector.depth:
        yield f"model.connector.depth is {connector.depth}, and kind={kind!r} says how deep it is; leave out one of the two."
    if connector.input_norm and kind in PERCEIVERS:
        yield f"model.connector.input_norm: kind={kind!r} has a norm of what it reads in each of its layers."
    if connector.output_norm and kind in (*PERCEIVERS, "residual_mlp", "qformer", "visual_blocks"):
        yield f"model.connector.output_norm: kind={kind!r} has norms of its own."
    if connector.input_norm and kind == "visual_blocks":
        yield "model.connector.input_norm: kind='visual_blocks' has norms of its own."
    if connector.input_norm and kind == "qformer":
        yield "model.connector.input_norm: a Q-Former reads the encoder as it is; model.post_norm norms it."
    if connector.text_vocab and kind != "qformer":
        yield f"model.connector.text_vocab: only a Q-Former reads text, not kind={kind!r}."
    if connector.contrast_width and not connector.text_vocab:
        yield "model.connector.contrast_width compares pictures with texts; model.connector.text_vocab says how many words those have."
    if connector.text_length and not connector.text_vocab:
        yield "model.connector.text_length is what a Q-Former reads; model.connector.text_vocab says how many words that has."
    if connector.text_length > connector.text_positions:
        yield f"model.connector.text_length is {connector.text_length}, more than text_positions={connector.text_positions}."
    if connector.squeeze_width and kind not in MLPS and not named:
        yield f"model.connector.squeeze_width is a layer of an MLP ({', '.join(MLPS)}), which kind={kind!r} has not."


def _own_connector(kind: str) -> Iterator[str]:
    """A connector that is none of ours is a module, which is imported here."""
    try:
        module = importlib.import_module(kind) if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", kind) else None
    except ImportError:
        module = None
    if module is None:
        known = f"{', '.join(CONNECTORS)}, mlpNx_gelu"
        near = f" Did you mean {nearest(kind, list(CONNECTORS))!r}?"
        yield f"model.connector.kind is {kind!r}; it must be one of {known}, or the name of a module of your own.{near}"
    elif missing := [name for name in ("tokens", "init", "connect") if not callable(getattr(module, name, None))]:
        yield f"model.connector.kind: the module {kind!r} has no function {missing[0]}; a connector has tokens, init and connect."


def _template(key: str, name: str) -> Iterator[str]:
    from mmjax.data.templates import NAMES  # here: it brings in transformers

    if name not in (*NAMES, "tokenizer"):
        near = nearest(name, [*NAMES, "tokenizer"])
        yield f"{key} is {name!r}; it must be one of {', '.join(NAMES)}, tokenizer. Did you mean {near!r}?"


def _part(key: str, part: Part) -> Iterator[str]:
    if part.config and "model_type" not in part.config:
        yield f"{key}.config has no model_type, which says the family (llama, clip_vision_model, ...)."


def _run(recipe: Recipe) -> Iterator[str]:
    for name in recipe.run:
        if name not in recipe.stages:
            stages = ", ".join(recipe.stages) or "none"
            near = f" Did you mean {nearest(name, recipe.stages)!r}?" if recipe.stages else ""
            yield f"run names a stage {name!r} that does not exist (stages: {stages}).{near}"
    for name in {name for name in recipe.run if recipe.run.count(name) > 1}:
        yield f"run names stage {name!r} twice; a stage's checkpoints bear its name, so give the second run its own stage."


def _stage(key: str, stage: Stage) -> Iterator[str]:
    if (stage.steps > 0) == (stage.epochs > 0):
        yield f"{key}: give either steps or epochs (steps={stage.steps}, epochs={stage.epochs:g})."
    if stage.template:
        yield from _template(f"{key}.template", stage.template)
    if not stage.trainable:
        yield f"{key}.trainable is empty: nothing would be trained."
    if not stage.sources:
        yield f"{key}.sources is empty: the stage has no data."
    if stage.accumulate > 0 and stage.rows % stage.accumulate:
        yield f"{key}.rows is {stage.rows}, which {key}.accumulate={stage.accumulate} micro-batches do not divide."
    if stage.validation.every and not stage.validation.sources:
        yield f"{key}.validation.every is {stage.validation.every} but {key}.validation.sources is empty."
    if stage.validation.patience and not stage.validation.every:
        yield f"{key}.validation.patience is {stage.validation.patience} but {key}.validation.every is 0: nothing is validated."
    for name, source in stage.sources.items():
        yield from _source(f"{key}.sources.{name}", source)
        if stage.objective != "language" and (source.join > 1 or source.loss_weight != 1):
            yield f"{key}.sources.{name}: join and loss_weight are of text; with objective={stage.objective!r} leave them at 1."
    if stage.sources and not any(source.loss_weight for source in stage.sources.values()):
        yield f"{key}.sources: every loss_weight is 0, so nothing would be learned."
    for name, source in stage.validation.sources.items():
        yield from _source(f"{key}.validation.sources.{name}", source)


def _source(key: str, source: Source) -> Iterator[str]:
    if source.kind not in ("digits", "digit_facts", "drawn_hypotheses") and not source.path:
        yield f"{key}.path is empty: a source of kind {source.kind!r} is read from a file."


def _few_shot(key: str, settings: FewShot) -> Iterator[str]:
    if settings.shots or settings.text_only:
        yield from _source(f"{key}.source", settings.source)
    if settings.choose == "similar" and not settings.shots:
        yield f"{key}.choose is 'similar', but {key}.shots is 0: there is no picture to choose."


def _exported(recipe: Recipe) -> Iterator[str]:
    """What an export after training would only say at its end."""
    kinds = ("prompt", "p_tuning", "multitask_prompt", "prefix")
    unmerged = [name for name, adapter in recipe.model.adapters.items() if adapter.kind in kinds]
    if unmerged and recipe.export.after_training and recipe.export.format != "peft":
        yield (
            f"export.format is {recipe.export.format!r}, but no weights can hold the adapter {unmerged[0]!r}, which stands in front of the "
            "text: 'peft' writes it by itself."
        )


def _mesh(recipe: Recipe) -> Iterator[str]:
    sizes = dataclasses.asdict(recipe.mesh)
    if list(sizes.values()).count(-1) > 1:
        yield "mesh: only one axis may be -1 (whatever is left of the devices)."
    for axis, size in sizes.items():
        if size < 1 and size != -1 and (axis, size) != ("data", 0):
            yield f"mesh.{axis} is {size}; it must be at least 1, or -1 for whatever is left of the devices."
