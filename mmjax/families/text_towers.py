"""The text halves of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343) in transformers' layout, alone or beside a vision tower.

Inputs: `input_ids` [rows, length] and `attention_mask`. Outputs: `last_hidden_state`, `pooler_output` [rows, width] (SigLIP's is its
embedding), `text_embeds` [rows, projection] of a CLIP with its projection, and `hidden_states_i` on request.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from mmjax.errors import UserError
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, norm, rule
from mmjax.families.towers import architecture, block_rules, read_block, write_block
from mmjax.models import adapters, text_tower
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import TextTowerConfig
from mmjax.tree import Params

INPUTS = ("input_ids", "attention_mask")
PROJECTED = "CLIPTextModelWithProjection"


def read_clip(fields: Fields, projection: int) -> TextTowerConfig:
    """CLIP's text_config; `projection` is the width of its embeddings, 0 for none."""
    return TextTowerConfig(
        vocab_size=fields.get("vocab_size", 49408),
        layers=fields.get("num_hidden_layers", 12),
        block=read_block(fields, 512, 8, 2048, "quick_gelu", 1e-5),
        max_positions=fields.get("max_position_embeddings", 77),
        causal=True,
        pooling="end_of_text",
        projection=projection,
        projection_bias=False,
        end_of_text=fields.get("eos_token_id", 49407),
    )


def read_siglip(fields: Fields) -> TextTowerConfig:
    """SigLIP's text_config."""
    block = read_block(fields, 768, 12, 3072, "gelu_pytorch_tanh", 1e-6)
    return TextTowerConfig(
        vocab_size=fields.get("vocab_size", 32000),
        layers=fields.get("num_hidden_layers", 12),
        block=block,
        max_positions=fields.get("max_position_embeddings", 64),
        causal=False,
        pooling="last",
        projection=fields.get("projection_size", block.width),
        projection_bias=True,
    )


def write(text: TextTowerConfig, base: Config, model_type: str) -> Config:
    """The text_config of either."""
    clip = text.pooling == "end_of_text"
    return {
        **base,
        "model_type": model_type,
        **write_block(text.block, text.layers, base),
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_positions,
        **({"eos_token_id": text.end_of_text} if clip else {"projection_size": text.projection}),
    }


def rules(config: ModelConfig) -> list[Rule]:
    """The names of the tower and of its projection, if it has one."""
    assert config.text is not None
    table = [
        rule("text_model.embeddings.token_embedding.weight", "text/embed/embedding"),
        rule("text_model.embeddings.position_embedding.weight", "text/positions"),
        *block_rules("text_model.encoder.layers.{i}.", "text/layers/"),
        *norm("text_model.final_layer_norm", "text/final_norm"),
    ]
    if not config.text.projection:
        return table
    name = "text_projection" if config.text.pooling == "end_of_text" else "text_model.head"
    return table + linear(name, "text/projection", config.text.projection_bias)


def inputs_of(config: TextTowerConfig, inputs: Inputs) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids and mask, int32 [rows, length]. Raises UserError for ids that are missing or more than there are positions for."""
    if "input_ids" not in inputs:
        raise UserError("input_ids are missing")
    ids = inputs["input_ids"].astype(np.int32)
    if ids.ndim != 2 or ids.shape[1] > config.max_positions:
        raise UserError(f"input_ids are [rows, {config.max_positions} at most], not {list(ids.shape)}")
    return ids, inputs["attention_mask"].astype(np.int32) if "attention_mask" in inputs else None


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    text = config.text
    assert text is not None
    found = _encode(adapters.merge(params, config)[0]["text"], *inputs_of(text, inputs), config=text, run=run)
    kept = {"last_hidden_state": found["last"], "pooler_output": found["pooled"]}
    if text.projection:
        kept["text_embeds" if text.pooling == "end_of_text" else "pooler_output"] = found["embedding"]
    hidden = {f"hidden_states_{i}": state for i, state in enumerate(found["states"])} if states else {}
    return {**kept, **hidden}


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _encode(params: Params, ids: jax.Array, mask: jax.Array | None, *, config: TextTowerConfig, run: Execution) -> dict:
    return text_tower.encode(params, config, ids, run, mask)


def _read_clip(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    architecture(fields)
    projected = PROJECTED in fields.get("architectures", [])
    return ModelConfig(text=read_clip(fields, fields.get("projection_dim", 512) if projected else 0))


def _write_clip(config: ModelConfig, base: Config) -> Config:
    assert config.text is not None
    projection = config.text.projection
    written = write(config.text, base, "clip_text_model")
    if projection:
        written["projection_dim"] = projection
    return {**written, "architectures": [PROJECTED if projection else "CLIPTextModel"]}


def _read_siglip(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    architecture(fields)
    return ModelConfig(text=read_siglip(fields))


def _write_siglip(config: ModelConfig, base: Config) -> Config:
    assert config.text is not None
    kind = base.get("model_type", "siglip_text_model")
    name = "Siglip2TextModel" if kind == "siglip2_text_model" else "SiglipTextModel"
    return {**write(config.text, base, kind), "architectures": [name]}


_ALONE = ((r"^(?=(embeddings|encoder|final_layer_norm|head)\.)", "text_model."),)

CLIP = Family(
    model_types=("clip_text_model",),
    about="CLIP's text tower, with or without its projection (arXiv 2103.00020)",
    read_config=_read_clip,
    write_config=_write_clip,
    rules=lambda config, foreign: rules(config),
    inputs=INPUTS,
    outputs=_outputs,
    spellings=_ALONE,
)
SIGLIP = Family(
    model_types=("siglip_text_model", "siglip2_text_model"),
    about="SigLIP's and SigLIP 2's text towers (arXiv 2303.15343, 2502.14786)",
    read_config=_read_siglip,
    write_config=_write_siglip,
    rules=lambda config, foreign: rules(config),
    inputs=INPUTS,
    outputs=_outputs,
    spellings=_ALONE,
)
