"""The project's own layout, for what no published one can hold: `model_type` mmjax.

The parts keep their published configs and tensor names, below `text_config` / `language_model.` and `vision_config` /
`vision_tower.`; the connector is ours, and so are blocks of cross-attention. Inputs and outputs are those of transformers' llava;
of an encoder-decoder also its decoder's, and of a Q-Former that reads text those of InstructBLIP.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, get_args

import jax
import numpy as np

from mmjax import tree
from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families import blip_2, interleaved, language, llava, parts, t5, vision
from mmjax.families.family import Config, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, norm, numbered, prefixed, rule, same, transposed
from mmjax.models import connectors, gated_cross_attention, multimodal
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import Execution, MaskKind, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, GatedCrossAttentionConfig, Stitching
from mmjax.tree import Params


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    text, image = fields.part("text_config", ""), fields.part("vision_config", "")
    connector, features = fields.part("connector", ""), fields.part("features", "")
    del connector["model_type"], features["model_type"]
    try:
        stitching = Stitching(**features["stitching"]) if features.get("stitching") else None
        tuples: dict[str, Any] = {name: tuple(features[name]) for name in ("layers", "scales") if name in features}
        spec = FeatureSpec(**{**features, **tuples, "stitching": stitching})
        shape = ConnectorConfig(**connector)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{where}: the connector or its features are not described as they must be: {error}") from error
    tower = parts.vision(image, f"{where}: vision_config").read_config(image, f"{where}: vision_config")
    if size := fields.get("image_size", 0):
        tower = tower.at_size(size)
    read = parts.language(text, f"{where}: text_config").read_config(text, f"{where}: text_config")
    return dataclasses.replace(
        tower,
        llm=read.llm,
        connector=shape,
        features=spec,
        image_mean=tuple(fields.need("image_mean")),
        image_std=tuple(fields.need("image_std")),
        mask=_mask(fields),
        cross_attention=_cross_attention(fields),
    )


def _cross_attention(fields: Fields) -> GatedCrossAttentionConfig | None:
    if not (written := fields.get("cross_attention")):
        return None
    try:
        block = BlockConfig(**written["block"])
        return GatedCrossAttentionConfig(**{**written, "block": block, "layers": tuple(written["layers"])})
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{fields.where}: cross_attention is not described as it must be: {error}") from error


def _mask(fields: Fields) -> MaskKind:
    found = fields.get("mask", "causal")
    if found not in get_args(MaskKind):
        raise UserError(f"{fields.where}: mask = {found!r} is not supported (only {', '.join(get_args(MaskKind))})")
    return found


def _write(config: ModelConfig, base: Config) -> Config:
    text, image = base["text_config"], base["vision_config"]
    assert config.connector is not None and config.vision is not None
    return {
        **base,
        "model_type": "mmjax",
        "image_size": config.vision.image_size,
        "text_config": parts.language(text, "text_config").write_config(config, text),
        "vision_config": parts.vision(image, "vision_config").write_config(config, image),
        "connector": dataclasses.asdict(config.connector),
        "features": dataclasses.asdict(config.features),
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "mask": config.mask,
        **({"cross_attention": dataclasses.asdict(config.cross_attention)} if config.cross_attention is not None else {}),
        "image_token_index": llava.placeholder(base),
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.connector is not None
    text, image = foreign["text_config"], foreign["vision_config"]
    return [
        *prefixed("language_model.", parts.language(text, "text_config").rules(config, text)),
        *prefixed("vision_tower.", parts.vision(image, "vision_config").rules(config, image)),
        *connector_rules(config.connector),
        *_cross_attention_rules(config),
    ]


def connector_rules(config: ConnectorConfig) -> list[Rule]:
    """Every kind of connector under `connector.`, named as our leaves are."""
    if config.resamples or config.kind in ("qformer", "visual_blocks") or config.own is not None:
        return _layered_rules(config)
    centred = config.norm == "layer"
    table = norm("connector.input_norm", "connector/input_norm", centred) if config.input_norm else []
    if config.output_norm:
        table += norm("connector.output_norm", "connector/output_norm", centred)
    if config.frames:
        table.append(rule("connector.frame_embeddings", "connector/frame_embeddings"))
    if config.newline:
        table.append(rule("connector.newline", "connector/newline"))
    if config.kind == "residual_mlp":
        halves = [f"{half}/{name}" for half in ("first", "second") for name in ("up", "down")]
        table += [
            r
            for path in halves
            for r in linear(f"connector.{path.replace('/', '.')}", f"connector/{path}", config.bias)
        ]
        return table + norm("connector.norm", "connector/norm")
    if config.squeeze_width:
        table += norm("connector.squeeze_norm", "connector/squeeze_norm")
    names = [f"layers_{i}" for i in range(len(connectors.widths(config)))]
    return table + [r for name in names for r in linear(f"connector.{name}", f"connector/{name}", config.bias)]


def _layered_rules(config: ConnectorConfig) -> list[Rule]:
    """`connector.layers.N.` for a layer, and the rest under its own names."""
    paths = tree.flatten(multimodal.shapes(ModelConfig(connector=config)))
    return [_as_ours(path.replace("/layers/", "/layers/{i}/"), path) for path in paths]


def _cross_attention_rules(config: ModelConfig) -> list[Rule]:
    """`cross_attention.N.` for what sits before layer N of the language model."""
    if config.cross_attention is None:
        return []
    start = f"llm/plugs/{gated_cross_attention.NAME}/"
    paths = [path for path in tree.flatten(multimodal.shapes(config)) if path.startswith(start) and "/adapters/" not in path]
    return numbered(config.cross_attention.layers, [_as_ours(path.replace(start, "cross_attention/{i}/"), path) for path in paths])


def _as_ours(name: str, path: str) -> Rule:
    """A leaf under its own name, dots for slashes, and torch's name and form of weights."""
    *parents, last = name.split("/")
    kinds = {"kernel": ("weight", transposed), "scale": ("weight", same)}
    last, form = kinds.get(last, (last, same))
    return rule(".".join([*parents, last]), path, form=form)


def _batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    """The batch of foreign inputs; where media are read between the blocks, one token of the text stands for each picture."""
    if config.cross_attention is None:
        return _with_media(config, foreign, inputs, t5.teaching)
    rows = language.text_batch(config, inputs)
    images = vision.pixels(inputs) if "pixel_values" in inputs else None
    located = (inputs["input_ids"] == llava.placeholder(foreign)) & (np.asarray(rows.segments) > 0)
    return interleaved.with_list(rows, images, located)


def _prompt(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    """The prompts to be continued."""
    if config.cross_attention is None:
        return _with_media(config, foreign, inputs, t5.prompt)
    return _batch(config, foreign, inputs)


def _with_media(config: ModelConfig, foreign: Config, inputs: Inputs, of_encoder_decoder: Callable[..., Batch]) -> Batch:
    """Rows with pictures in the place of their tokens, and what a Q-Former reads beside them where that is given."""
    if config.language.encoder is not None:
        rows = of_encoder_decoder(config, foreign["text_config"], inputs, llava.placeholder(foreign))
    else:
        rows = language.text_batch(config, inputs, llava.placeholder(foreign))
    rows = llava.spliced(config, rows, inputs)
    return blip_2.instructed(config, rows, inputs) if "qformer_input_ids" in inputs else rows


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    rows = _batch(config, foreign, inputs)
    return llava.in_rows(language.run_language(params, rows, config=config, run=run, states=states))


FAMILY = dataclasses.replace(
    llava.FAMILY,
    model_types=("mmjax",),
    about="any encoder, connector and language model of these, where no published layout holds them",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=(*llava.FAMILY.inputs, *(name for name in blip_2.INSTRUCTBLIP.inputs if name.startswith(("decoder_", "qformer_")))),
    outputs=_outputs,
    prompt=_prompt,
    spellings=(),
    modules=(),
)
