"""Any recipe at a size that runs in a minute on a laptop: what the config argument `tiny` of every recipe does."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from mmjax.config import Adapter, Evaluation, Model, Part, Recipe, Source, Stage
from mmjax.models.tuning_config import fields as fields_of

SIZES: dict[str, int] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "projection_dim": 32,
    "image_size": 84,
    "patch_size": 14,
    "num_patches": 36,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 512,
}
"""Fields of a config.json that are sizes, and their tiny values. Those a config does not have are not added. 6 x 6 patches can
be put together by 4 and by 9."""
SAMPLES = 64  # of a drawn source


class Drawing(NamedTuple):
    """What is drawn for a recipe: pictures cut into `tiles`, so of several shapes; pictures at all, or (not `seen`) words in their place."""

    tiles: bool
    seen: bool


def tiny(recipe: Recipe) -> Recipe:
    """The recipe with small fresh parts, a few steps and drawn data (handwritten digits, a tokenizer trained on the questions).

    Only sizes, steps and data change: stages, what they train, connector, ports, masks and templates stay.
    """
    text_alone = bool(recipe.model.llm.path or recipe.model.llm.config) and not (recipe.model.vision.path or recipe.model.vision.config)
    drawing = Drawing(bool(recipe.model.image.tiling), not text_alone)
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}_tiny",
        model=_model(recipe.model),
        stages={name: _stage(stage, drawing) for name, stage in recipe.stages.items()},
        evaluations={name: _evaluation(evaluation, drawing) for name, evaluation in recipe.evaluations.items()},
        checkpoint=dataclasses.replace(recipe.checkpoint, every=2),
        logging=dataclasses.replace(recipe.logging, every=1),
        generate=dataclasses.replace(recipe.generate, max_new_tokens=8),
    )


def _model(model: Model) -> Model:
    queries: dict[str, Any] = {}
    if "perceiver" in model.connector.kind or model.connector.kind in ("qformer", "visual_blocks"):
        sizes = {"depth": 2, "latents": 4, "heads": 2, "head_dim": 16}
        queries = {name: min(getattr(model.connector, name) or size, size) for name, size in sizes.items()}
    if model.connector.text_vocab:
        # the language model's tokenizer stands in for the connector's, with one word more (BLIP-2's [DEC])
        queries |= {"text_vocab": SIZES["vocab_size"] + 1, "text_positions": 64, "tokenizer": ""}
        queries["text_length"] = min(model.connector.text_length, 32)
        queries["contrast_width"] = min(model.connector.contrast_width, 16)
    connector = dataclasses.replace(
        model.connector,
        path="",
        bert="",
        hidden_width=min(model.connector.hidden_width, 64),
        squeeze_width=min(model.connector.squeeze_width, 64),
        pooled_tokens=min(model.connector.pooled_tokens, 4),
        grid=min(model.connector.grid, 3),
        **queries,
    )
    depth, layers = int(model.vision.config.get("num_hidden_layers", 0)), model.feature_layers
    if any(layer > SIZES["num_hidden_layers"] for layer in layers):  # counted from the first: as far up as they are
        layers = tuple(dict.fromkeys(-(-layer * SIZES["num_hidden_layers"] // depth) for layer in layers))
    crossed = model.cross_attention
    if crossed.every:
        every = min(crossed.every, SIZES["num_hidden_layers"])
        small: dict[str, Any] = {"every": every, "first": min(crossed.first, every - 1), "heads": 2, "head_dim": 16}
        crossed = dataclasses.replace(crossed, **small)
    adapters = {name: _adapter(adapter) for name, adapter in model.adapters.items()}
    return dataclasses.replace(
        model,
        path="",
        llm=_part(model.llm),
        vision=_part(model.vision),
        connector=connector,
        feature_layers=layers,
        cross_attention=crossed,
        image=dataclasses.replace(model.image, size=0, overlap=min(model.image.overlap, SIZES["patch_size"])),
        tokenizer=dataclasses.replace(model.tokenizer, path="", vocab_size=SIZES["vocab_size"]),
        adapters=adapters,
    )


def _adapter(adapter: Adapter) -> Adapter:
    """The fields that its kind reads made small."""
    read = fields_of(adapter.kind)
    small: dict[str, Any] = {}
    if "rank" in read:
        small |= {"rank": min(adapter.rank, 4), "alpha": adapter.alpha * min(adapter.rank, 4) / adapter.rank}
    small |= {name: min(getattr(adapter, name), most) for name, most in (("tokens", 4), ("encoder_width", 16)) if name in read}
    if "depth" in read:
        small["depth"] = min(adapter.depth, SIZES["num_hidden_layers"] - 1)
    if adapter.kind == "adaption_prompt":  # the embeddings of drawn data, which noise prompts read, are as large as real ones
        small["length"] = min(adapter.length, 4)
    return dataclasses.replace(adapter, **small)


def _part(part: Part) -> Part:
    return Part(config={field: _size(field, value, part.config) for field, value in part.config.items()})


def _size(field: str, value: Any, config: dict[str, Any]) -> Any:
    """The tiny value of a field; as many key/value heads as heads where the full model has as many."""
    if field == "num_key_value_heads" and value == config.get("num_attention_heads"):
        return SIZES["num_attention_heads"]
    return SIZES.get(field, value)


def _stage(stage: Stage, drawing: Drawing) -> Stage:
    return dataclasses.replace(
        stage,
        sources={name: _source(source, "train", drawing) for name, source in stage.sources.items()},
        validation=dataclasses.replace(
            stage.validation,
            sources={name: _source(source, "held_out", drawing) for name, source in stage.validation.sources.items()},
            every=min(stage.validation.every, 2),
            batches=min(stage.validation.batches, 2),
        ),
        steps=4,
        epochs=0.0,
        rows=8,
        length=min(stage.length, 32) if stage.objective == "contrastive" else 256 if drawing.tiles else 160,
        answer_length=min(stage.answer_length, 64),
        tiles=min(stage.tiles, 6 if drawing.tiles else 2),
        accumulate=min(stage.accumulate, 2),
    )


def _evaluation(evaluation: Evaluation, drawing: Drawing) -> Evaluation:
    source = _source(evaluation.source, "held_out", drawing)
    return dataclasses.replace(evaluation, source=source, max_new_tokens=8, batch=8, limit=16, samples=4)


def _source(source: Source, split: str, drawing: Drawing) -> Source:
    """Drawn data in place of a file's; what is drawn already stays what it is, with fewer samples."""
    if source.kind == "hypotheses":
        return Source(kind="drawn_hypotheses", weight=source.weight, options={"split": split, "size": SAMPLES})
    if source.kind in ("digits", "digit_facts", "drawn_hypotheses"):
        return dataclasses.replace(source, options={**source.options, "size": SAMPLES})
    task = "caption" if source.kind == "captions" else "questions"
    prompts: dict[str, Any] = {key: value for key, value in source.options.items() if key in ("prompts", "system", "task_id")}
    if source.kind == "alpaca" or not drawing.seen:
        return Source(kind="digit_facts", weight=source.weight, options={"split": split, "size": SAMPLES, **prompts})
    shapes: dict[str, Any] = {"canvas": "any"} if drawing.tiles else {}
    options: dict[str, Any] = {"split": split, "task": task, "size": SAMPLES, **shapes, **prompts}
    return Source(kind="digits", weight=source.weight, options=options)
