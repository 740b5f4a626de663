"""BLIP-2 (arXiv 2301.12597) and InstructBLIP (arXiv 2305.06500) in transformers' layout: a ViT, a Q-Former and a Linear in front of a
language model, decoder-only (OPT, Llama) or encoder-decoder (T5).

Inputs: `pixel_values` [images, 3, height, width]; `input_ids`, in which `image_token_index` stands once for each token of an image,
in front of the text; the language model's other inputs; of InstructBLIP the instruction in the Q-Former's own vocabulary,
`qformer_input_ids` and `qformer_attention_mask` [images, L]. Outputs: those of the language model, `image_features` [images, positions,
width], `qformer_output` [images, queries (and L), width] and `connector_output` [images, queries, LLM width].
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, Mapping

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.checkpoints.safetensors import Stored
from mmjax.errors import UserError
from mmjax.families import blip_2_vision, language, llava, parts, t5
from mmjax.families import qformer as names
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, prefixed
from mmjax.models import adapters, multimodal, qformer
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import FeatureSpec, ViTConfig
from mmjax.tree import Params

FEATURES = FeatureSpec(layers=(-1,), keep_class_token=True, post_norm=True)
INSTRUCTED = "instructblip"
# model_type of the vision tower and of the Q-Former, and the class
KINDS = {
    "blip-2": ("blip_2_vision_model", "blip_2_qformer", "Blip2ForConditionalGeneration"),
    INSTRUCTED: ("instructblip_vision_model", "instructblip_qformer", "InstructBlipForConditionalGeneration"),
}
LANGUAGE = "language_model."


def _kind(config: Config) -> str:
    return config.get("hf_model_type") or config["model_type"]


def _text(config: Config) -> Config:
    return Fields(config).part("text_config", "opt")


def _read(config: Config, where: str) -> ModelConfig:
    fields, kind = Fields(config, where), _kind(config)
    fields.only("quantization_config")
    named = (fields.get("architectures") or [KINDS[kind][2]])[0]
    if named != KINDS[kind][2]:
        raise UserError(f"{where}: the architecture {named} is not supported (only {KINDS[kind][2]})")
    text = fields.part("text_config", "opt")
    llm = parts.language(text, f"{where}: text_config").read_config(text, f"{where}: text_config").llm
    tower = blip_2_vision.read_tower(Fields(fields.part("vision_config", KINDS[kind][0]), f"{where}: vision_config"))
    assert llm is not None
    own = Fields(fields.part("qformer_config", KINDS[kind][1]), f"{where}: qformer_config")
    own.only("use_qformer_text_input", False)
    connector = names.read(
        own,
        latents=fields.get("num_query_tokens", 32),
        in_width=tower.feature_width,
        out_width=llm.input_width,
        positions=FEATURES.positions(tower),
        text=kind == INSTRUCTED,
    )
    return ModelConfig(
        llm=llm,
        vision=tower,
        connector=connector,
        features=FEATURES,
        image_mean=blip_2_vision.MEAN,
        image_std=blip_2_vision.STD,
    )


def _complete(config: Config, stored: Mapping[str, Stored]) -> Config:
    """What only the tensors tell of the language model."""
    text = _text(config)
    family = parts.language(text, "text_config")
    if family.complete is None:
        return config
    own = {name.removeprefix(LANGUAGE): tensor for name, tensor in stored.items() if name.startswith(LANGUAGE)}
    return {**config, "text_config": family.complete(text, own)}


def expressible(config: ModelConfig, kind: str) -> str:
    """Why the layout of this model_type cannot hold a model; "" if it can."""
    c = config.connector
    if config.llm is None or not isinstance(config.vision, ViTConfig) or c is None:
        return "it needs a language model, a vision transformer and a connector"
    if why := names.expressible(c):
        return why
    if bool(c.text_vocab) != (kind == INSTRUCTED) or c.contrast_width:
        return "InstructBLIP's Q-Former reads text, BLIP-2's does not, and neither has the heads of the first stage"
    if config.features != FEATURES:
        return "its Q-Former reads the encoder's last states with the class token, after the last norm"
    if why := blip_2_vision.expressible(config.vision):
        return why
    return ""


def _write(config: ModelConfig, base: Config) -> Config:
    kind = _kind(base) if base else "blip-2"
    if why := expressible(config, kind):
        raise UserError(f"the model does not fit the Hugging Face {kind} layout: {why}")
    assert config.llm is not None and config.connector is not None and isinstance(config.vision, ViTConfig)
    text, image, own = _text(base), base.get("vision_config") or {}, base.get("qformer_config") or {}
    return {
        **base,
        "architectures": [KINDS[kind][2]],
        "model_type": kind,
        "text_config": parts.language(text, "text_config").write_config(config, text),
        "vision_config": blip_2_vision.write(config.vision, {**image, "model_type": KINDS[kind][0]}),
        "qformer_config": {**names.write(config.connector, own), "model_type": KINDS[kind][1]},
        "num_query_tokens": config.connector.latents,
        "is_encoder_decoder": config.llm.encoder is not None,
        "use_decoder_only_language_model": config.llm.encoder is None,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.connector is not None and isinstance(config.vision, ViTConfig)
    text, c = _text(foreign), config.connector
    own = ("qformer.embeddings.", "layernorm") if c.text_vocab else ("qformer.", "layernorm")
    return [
        *prefixed(LANGUAGE, parts.language(text, "text_config").rules(config, text)),
        *prefixed("vision_model.", blip_2_vision.tower_rules(config.vision)),
        names.QUERIES,
        *names.embedding_rules(own[0], c, own[1]),
        *names.layer_rules("qformer.encoder.layer.", c, "attention"),
        *linear("language_projection", "connector/project_out"),
    ]


def _copies(config: ModelConfig, foreign: Config) -> dict[str, str]:
    """Those of the language model."""
    found = parts.language(_text(foreign), "text_config").copies(config)
    return {LANGUAGE + copy: LANGUAGE + original for copy, original in found.items()}


def batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    """The batch of foreign inputs. Padding between pictures and text keeps its tokens: the first label behind it is predicted from it."""
    if config.language.encoder is not None:
        rows = t5.teaching(config, _text(foreign), inputs, _placeholder(foreign))
    else:
        rows = _padded(config, foreign, inputs)
    return instructed(config, llava.spliced(config, rows, inputs), inputs)


def _padded(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    """Rows of a decoder-only model. Without positions they are slots, or what is real is counted (OPT) and padding stands before it."""
    ids = inputs.get("input_ids", np.zeros((0, 0), int))
    counted = parts.language(_text(foreign), "text_config").outputs is language.counted_outputs
    slots = {} if counted else {"position_ids": np.broadcast_to(np.arange(ids.shape[-1]), ids.shape)}
    rows = language.text_batch(config, {**slots, **inputs}, _placeholder(foreign))
    tokens = np.where(rows.media >= 0, 0, np.clip(ids, 0, config.language.vocab_size - 1))
    positions = np.where((rows.segments == 0) & ("position_ids" not in inputs) & counted, -1, rows.positions)
    return dataclasses.replace(rows, tokens=tokens.astype(np.int32), positions=positions.astype(np.int32))


def prompt(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    """The prompts; without `input_ids` each picture is described from the start token on, as in transformers."""
    placeholder = _placeholder(foreign)
    if "input_ids" not in inputs and "pixel_values" in inputs and (start := _text(foreign).get("bos_token_id")) is not None:
        row = [placeholder] * config.tokens_per_tile + [start]
        inputs = {**inputs, "input_ids": np.tile(row, (len(inputs["pixel_values"]), 1))}
        inputs.pop("attention_mask", None)
    if config.language.encoder is not None:
        text = {**_text(foreign), **{n: foreign[n] for n in ("decoder_start_token_id",) if foreign.get(n) is not None}}
        rows = t5.prompt(config, text, inputs, placeholder)
    else:
        rows = language.text_batch(config, inputs, placeholder)
    return instructed(config, llava.spliced(config, rows, inputs), inputs)


def _placeholder(foreign: Config) -> int:
    for name in ("image_token_index", "image_token_id"):
        if foreign.get(name) is not None:
            return int(foreign[name])
    raise UserError(
        "config.json has no image_token_index: this checkpoint is older than the token that stands for pictures. Give the field an id "
        "that the tokenizer does not use"
    )


def instructed(config: ModelConfig, rows: Batch, inputs: Inputs) -> Batch:
    """The batch with the text that the Q-Former reads beside each picture, if it reads any."""
    assert config.connector is not None
    if not config.connector.text_vocab or rows.images is None:
        return rows
    if "qformer_input_ids" not in inputs:
        raise UserError("qformer_input_ids are missing: the Q-Former reads the instruction as well")
    ids, images = inputs["qformer_input_ids"], len(rows.images[0])
    mask = inputs.get("qformer_attention_mask", np.ones_like(ids))
    if ids.ndim != 2 or len(ids) != images or mask.shape != ids.shape:
        raise UserError(
            f"qformer_input_ids and qformer_attention_mask are [{images}, length], a row for each picture; "
            f"not {list(ids.shape)} and {list(mask.shape)}"
        )
    c, read = config.connector, ids[mask != 0]
    if read.size and not 0 <= read.min() <= read.max() < c.text_vocab or ids.shape[1] > c.text_positions:
        raise UserError(f"qformer_input_ids are below {c.text_vocab}, and at most {c.text_positions} in a row")
    tokens = np.where(mask != 0, ids, np.clip(ids, 0, c.text_vocab - 1))
    text = {"connector_tokens": tokens, "connector_segments": mask != 0}
    return dataclasses.replace(rows, **{name: value.astype(np.int32)[None] for name, value in text.items()})


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    return _run(params, batch(config, foreign, inputs), config=config, run=run, states=states)


@functools.partial(jax.jit, static_argnames=("config", "run", "states"))
def _run(params: Params, rows: Batch, *, config: ModelConfig, run: Execution, states: bool) -> dict[str, jax.Array]:
    found: dict[str, jax.Array] = {}
    if rows.images is not None:
        config = config.for_pictures(*rows.images.shape[-3:-1])
        assert config.connector is not None
        (found["image_features"], *_), features = language.media_features(params, config, rows, run)
        text = multimodal.connector_text(rows)
        beside = text and qformer.Text(text.tokens[0], text.segments[0])
        own: tuple[Any, Any] = adapters.bound(params, config, "connector"), config.connector
        found["qformer_output"] = qformer.read(*own, features, beside, config.adapters, run).states
        found["connector_output"] = qformer.project(*own, found["qformer_output"], config.adapters)
        media = found["connector_output"][None]
        return {**found, **language.decoded_outputs(params, config, rows, run, states, media, padding_sees=True)}
    return language.decoded_outputs(params, config, rows, run, states, padding_sees=True)


def _family(kind: str, about: str, inputs: tuple[str, ...]) -> Family:
    return Family(
        model_types=(kind,),
        about=about,
        read_config=_read,
        write_config=_write,
        rules=_rules,
        inputs=(*t5.FAMILY.inputs, "position_ids", "pixel_values", "interpolate_pos_encoding", *inputs),
        outputs=_outputs,
        prompt=prompt,
        complete=_complete,
        copies_in=_copies,
        unused=(
            r"\.position_ids$",
            r"rotary_emb\.inv_freq$",
            *(pattern.replace("^", "^" + re.escape(LANGUAGE), 1) for pattern in t5.FAMILY.unused),
        ),
    )


BLIP_2 = _family("blip-2", "BLIP-2 around OPT, FlanT5 and others (arXiv 2301.12597)", ())
INSTRUCTBLIP = _family(
    INSTRUCTED,
    "InstructBLIP around Vicuna, FlanT5 and others (arXiv 2305.06500)",
    ("qformer_input_ids", "qformer_attention_mask"),
)
