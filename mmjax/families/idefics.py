"""IDEFICS (arXiv 2306.16527) in transformers' layout: a Llama with gated cross-attention before every n-th block, beginning with the
first; a CLIP tower read with its class token and without its last norm, through a resampler or as it is.

`pixel_values` are [rows, media, channels, height, width], and `image_attention_mask` [rows, length, media] says which media each
position sees. Tokens beyond `vocab_size` have embeddings and outputs of their own.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families import clip_vision, interleaved, language, llama
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, leading, linear, norm, prefixed, rule
from mmjax.models import gated_cross_attention
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, GatedCrossAttentionConfig, ViTConfig
from mmjax.tree import Params

SPEC = FeatureSpec((-1,), keep_class_token=True)


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    llm = _decoder(fields)
    image = fields.get("vision_config", {})
    tower = clip_vision.read_tower(
        Fields(
            {
                "num_hidden_layers": 32,
                "num_attention_heads": 16,
                "intermediate_size": 5120,
                "patch_size": 14,
                "hidden_act": "gelu",
                **image,
                "hidden_size": image.get("embed_dim", image.get("hidden_size", 768)),
            },
            f"{where}: vision_config",
        )
    )
    return ModelConfig(
        llm=llm,
        vision=tower,
        connector=_connector(fields, tower),
        cross_attention=_cross_attention(fields, llm, tower.feature_width),
        features=SPEC,
        image_mean=clip_vision.MEAN,
        image_std=clip_vision.STD,
    )


def _decoder(fields: Fields) -> DecoderConfig:
    llm = llama.read_decoder(
        Fields({**fields.values, "num_key_value_heads": None}, fields.where),
        qkv_bias=False,
        output_bias=False,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
    )
    more = fields.get("additional_vocab_size", 0)
    rows = tuple(range(llm.vocab_size, llm.vocab_size + more))
    return dataclasses.replace(llm, vocab_size=llm.vocab_size + more, new_rows=rows, beyond=more)


def _connector(fields: Fields, tower: ViTConfig) -> ConnectorConfig:
    width, positions = tower.feature_width, SPEC.positions(tower)
    if not fields.get("use_resampler", False):
        return ConnectorConfig("identity", width, width, positions)
    sizes = Fields(fields.get("perceiver_config", {}), f"{fields.where}: perceiver_config")
    return ConnectorConfig(
        kind="perceiver",
        in_width=width,
        out_width=width,
        positions=positions,
        depth=sizes.get("resampler_depth", 6),
        activation="relu",
        bias=False,
        latents=sizes.get("resampler_n_latents", 64),
        heads=sizes.get("resampler_n_heads", 16),
        head_dim=sizes.get("resampler_head_dim", 96),
        qk_norm=bool(sizes.get("qk_layer_norms_perceiver", False)),
    )


def _cross_attention(fields: Fields, llm: DecoderConfig, media_width: int) -> GatedCrossAttentionConfig:
    """Blocks like the language model's, that turn no positions."""
    every = fields.get("cross_layer_interval", 1)
    if llm.layers % every:
        raise UserError(f"{fields.where}: cross_layer_interval = {every} must divide num_hidden_layers = {llm.layers}")
    kind = fields.get("alpha_type", "float")
    if kind not in ("float", "vector"):
        raise UserError(f"{fields.where}: alpha_type = {kind!r} is not supported (only float, vector)")
    normed = bool(fields.get("qk_layer_norms", False))
    block = dataclasses.replace(llm.block, rope=None, memory_width=media_width, qk_norm="rms" if normed else "")
    return GatedCrossAttentionConfig(block, tuple(range(0, llm.layers, every)), vector_gates=kind == "vector")


def _write(config: ModelConfig, base: Config) -> Config:
    llm, tower, c, crossed = config.language, config.vision, config.connector, config.cross_attention
    fits = isinstance(tower, ViTConfig) and c is not None and crossed is not None and config.features == SPEC
    if not fits:
        raise UserError("the model does not fit IDEFICS' layout: it has other parts, or other states of the tower are read")
    assert isinstance(tower, ViTConfig) and c is not None and crossed is not None
    every = crossed.layers[1] - crossed.layers[0] if len(crossed.layers) > 1 else llm.layers
    perceiver = c.kind == "perceiver"
    written = {
        **{name: value for name, value in base.items() if name not in ("num_key_value_heads", "head_dim")},
        **_text_fields(llm, base),
        "architectures": ["IdeficsForVisionText2Text"],
        "model_type": "idefics",
        "cross_layer_interval": every,
        "alpha_type": "vector" if crossed.vector_gates else "float",
        "qk_layer_norms": bool(crossed.block.qk_norm),
        "use_resampler": perceiver,
        "vision_config": _vision_fields(tower, base.get("vision_config", {})),
        "perceiver_config": {
            **base.get("perceiver_config", {}),
            "use_resampler": perceiver,
            "qk_layer_norms_perceiver": c.qk_norm,
        },
    }
    if perceiver:
        sizes = {"resampler_depth": c.depth, "resampler_n_latents": c.latents, "resampler_n_heads": c.heads}
        written["perceiver_config"] |= {**sizes, "resampler_head_dim": c.head_dim or c.inner_width // c.heads}
    same = _read(written, "the written config.json")
    if (same.llm, same.connector, same.cross_attention) != (llm, c, dataclasses.replace(crossed, last_media_only=True)):
        raise UserError("the model does not fit IDEFICS' layout: its resampler or its blocks are others")
    return written


def expressible(config: ModelConfig, text: Config, image: Config) -> str:
    """Why this layout cannot hold a model with this text_config and vision_config; "" if it can."""
    if text["model_type"] != "llama" or image["model_type"] != "clip_vision_model":
        return f"it is a LLaMA and a CLIP tower, not {text['model_type']} and {image['model_type']}"
    if config.cross_attention is None or not config.cross_attention.last_media_only:
        return "its text sees the last picture before it"
    try:
        _write(config, joined(text, image))
    except UserError as error:
        return str(error)
    return ""


def joined(text: Config, image: Config) -> Config:
    """A language model's and a CLIP tower's config in one: the config.json from which `write_config` makes its own."""
    kept = {name: value for name, value in text.items() if name not in ("architectures", "model_type")}
    tower = {name: value for name, value in image.items() if name not in ("architectures", "model_type", "projection_dim")}
    return {**kept, "model_type": "idefics", "vision_config": tower}


def _text_fields(llm: DecoderConfig, base: Config) -> Config:
    written = llama.write_decoder(llm, base, "idefics", "IdeficsForVisionText2Text")
    del written["num_key_value_heads"], written["head_dim"]
    return {**written, "vocab_size": llm.table_size, "additional_vocab_size": llm.beyond}


def _vision_fields(tower: ViTConfig, base: Config) -> Config:
    return {
        **{name: value for name, value in base.items() if name != "hidden_size"},
        "model_type": "idefics_vision",
        "embed_dim": tower.block.width,
        "intermediate_size": tower.block.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.block.heads,
        "hidden_act": activation_name(tower.block.activation, base.get("hidden_act")),
        "layer_norm_eps": tower.block.norm_eps,
        "image_size": tower.native_size or tower.image_size,
        "patch_size": tower.patch_size,
        "num_channels": tower.channels,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert isinstance(config.vision, ViTConfig) and config.connector is not None and config.cross_attention is not None
    table = [
        *llama.rules(config, foreign),
        *_gated_rules(config.cross_attention),
        *prefixed("model.", clip_vision.tower_rules(config.vision)),
    ]
    if config.connector.kind == "perceiver":
        table += _resampler_rules(config.connector)
    if config.language.new_rows:
        table.append(rule("model.embed_tokens.additional_embedding.weight", "llm/embed/new_rows"))
        if not config.language.tied_head:
            table.append(rule("lm_head.additional_fc.weight", "llm/head/new_rows"))
    return table


def _gated_rules(config: GatedCrossAttentionConfig) -> list[Rule]:
    """The gated blocks, numbered among themselves."""
    name, path = "model.gated_cross_attn_layers.{i}.", f"llm/plugs/{gated_cross_attention.NAME}/"
    gate = leading(2 if config.vector_gates else 1)
    table = [
        rule(name + "alpha_cross_attn", path + "cross_attention_gate", form=gate),
        rule(name + "alpha_dense", path + "mlp_gate", form=gate),
        *norm(name + "input_layernorm", path + "cross_attention_norm", bias=False),
        *norm(name + "post_attention_layernorm", path + "mlp_norm", bias=False),
    ]
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
        table += linear(f"{name}cross_attn.{theirs}_proj", f"{path}cross_attention/{ours}", bias=False)
    for part in ("gate", "up", "down"):
        table += linear(f"{name}mlp.{part}_proj", f"{path}mlp/{part}", bias=False)
    if config.block.qk_norm:
        table += norm(name + "cross_attn.q_layer_norm", path + "cross_attention/query_norm", bias=False)
        table += norm(name + "cross_attn.k_layer_norm", path + "cross_attention/key_norm", bias=False)
    return table


def _resampler_rules(config: ConnectorConfig) -> list[Rule]:
    name, path = "model.perceiver_resampler.", "connector/layers/"
    attention, mlp = name + "blocks.{i}.0.", name + "blocks.{i}.1."
    table = [
        rule(name + "latents", "connector/latents"),
        *norm(attention + "context_layer_norm", path + "media_norm"),
        *norm(attention + "latents_layer_norm", path + "cross_attention_norm"),
        *norm(mlp + "ln", path + "mlp_norm"),
        *linear(mlp + "fc", path + "mlp/up", bias=False),
        *linear(mlp + "c_proj", path + "mlp/down", bias=False),
        *norm(name + "layer_norm", "connector/norm"),
    ]
    for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("output_proj", "output")):
        table += linear(attention + theirs, f"{path}cross_attention/{ours}", bias=False)
    if config.qk_norm:
        table += norm(attention + "q_layer_norm", path + "cross_attention/query_norm")
        table += norm(attention + "k_layer_norm", path + "cross_attention/key_norm")
    return table


def _batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    rows = language.text_batch(config, inputs)
    images = interleaved.grid(inputs, "pixel_values", "rows, media, channels, height, width")
    ids, seen = inputs["input_ids"], inputs.get("image_attention_mask")
    if images is not None and seen is None:
        raise UserError("pixel_values are given without image_attention_mask, which says who sees them")
    if images is not None and seen is not None and seen.shape != (*ids.shape, images.shape[1]):
        raise UserError(f"image_attention_mask is [{ids.shape[0]}, {ids.shape[1]}, {images.shape[1]}], not {list(seen.shape)}")
    if images is not None and config.vision is not None and images.shape[2:4] != (config.vision.image_size,) * 2:
        raise UserError(f"pixel_values are {images.shape[2]} x {images.shape[3]} pixels, the tower's are {config.vision.image_size}")
    if images is None and seen is not None and seen.any():
        raise UserError("image_attention_mask shows media, but no pixel_values are given")
    begun = np.zeros(ids.shape, np.int32)
    return interleaved.with_grid(rows, images, begun, None if images is None else seen)


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    found = interleaved.outputs(params, config, _batch(config, foreign, inputs), run, states)
    if config.connector is not None and config.connector.kind == "identity":
        found.pop("connector_output", None)
    return found


def _copies(config: ModelConfig) -> dict[str, str]:
    if config.llm is None or not config.llm.tied_head:
        return {}
    more = {"lm_head.additional_fc.weight": "model.embed_tokens.additional_embedding.weight"} if config.llm.new_rows else {}
    return llama.copies(config) | more


FAMILY = Family(
    model_types=("idefics",),
    about="IDEFICS 9B, 80B (arXiv 2306.16527)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=(*language.INPUTS, "pixel_values", "image_attention_mask"),
    outputs=_outputs,
    prompt=_batch,
    copies=_copies,
    keeps_rows=True,
    unneeded=("vision/head/**", "vision/projection/**"),
)
