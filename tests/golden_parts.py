"""Goldens of parts of systems: the package's functions behind its key tables. All that is done here is to map names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from mmjax.checkpoints import weights
from mmjax.errors import UserError
from mmjax.families import anymal, flamingo, keys, vila
from mmjax.models import connectors, gated_cross_attention, multimodal, perceiver
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, GatedCrossAttentionConfig

Arrays = dict[str, Any]
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "sqrelu": "squared_relu"}


def vila_projector(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    features = inputs["image_features"]
    widths = config["mm_hidden_size"], config["hidden_size"]
    order: Any = "columns" if config["token_order"].startswith("transposed") else "rows"
    shape = vila.projector(config["mm_projector_type"], *widths, features.shape[1], order)
    params = _connector(directory, shape, vila.projector_rules(shape))
    return {
        "downsampled": connectors.group(shape, features),
        "connector_output": connectors.connect(params, shape, features),
    }


def anymal_linear(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    if config["pool_type"]:
        raise UserError(f"pool_type {config['pool_type']} is not supported")
    features = inputs["image_features"]
    shape = anymal.projector(config["num_layers"], config["input_dim"], config["output_dim"], features.shape[1])
    params = _connector(directory, shape, anymal.projector_rules(shape))
    return {"connector_output": connectors.connect(params, shape, features)}


def anymal_perceiver(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    features = inputs["image_features"]
    shape = ConnectorConfig(
        "cross_self_perceiver",
        config["input_dim"],
        config["output_dim"],
        features.shape[1],
        depth=config["num_layers"],
        latents=config["num_latents"],
        heads=config["num_heads"],
    )
    params = _connector(directory, shape, anymal.resampler_rules(shape))
    return {"connector_output": connectors.connect(params, shape, features)}


def flamingo_perceiver(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    features, layout = inputs["image_features"], config["implementation"]
    shape = ConnectorConfig(
        "perceiver",
        config["dim"],
        config["dim"],
        features.shape[-2],
        depth=config["depth"],
        activation=ACTIVATIONS[config["act"]],  # type: ignore[arg-type]
        bias=False,
        latents=config["num_latents"],
        heads=config["heads"],
        head_dim=config["dim_head"],
        frames=config.get("num_time_embeds") or config.get("max_num_frames") or 0,
        media=config.get("max_num_media") or 0,
    )
    params = _connector(directory, shape, flamingo.resampler_rules(shape, layout))
    if layout == "flamingo_mini":  # one medium a row: [rows, frames, positions, width]
        return {"connector_output": perceiver.resample(params, shape, features[:, None])[:, 0]}
    return {"connector_output": perceiver.resample(params, shape, features)}


def gated_cross_attention_block(directory: Path, config: Arrays, inputs: Arrays, wanted: set[str]) -> Arrays:
    shape = GatedCrossAttentionConfig(
        BlockConfig(
            width=config["dim"],
            heads=config["heads"],
            kv_heads=config["heads"],
            head_dim=config["dim_head"],
            mlp_width=config["dim"] * config["ff_mult"],
            activation=ACTIVATIONS[config["act"]],  # type: ignore[arg-type]
            norm="layer",
            norm_eps=1e-5,
            gated_mlp=False,
            qkv_bias=False,
            output_bias=False,
            mlp_bias=False,
            memory_width=config["dim_visual"],
        ),
        last_media_only=config["only_attend_immediate_media"],
    )
    shapes = {"block": jax.eval_shape(lambda: gated_cross_attention.init(jax.random.key(0), shape))}
    rules = flamingo.gated_cross_attention_rules(config["implementation"], path="block/")
    params = keys.load(weights.read(directory), rules, shapes, dtype="float32", where=directory)["block"]
    x, media, locations = inputs["text_features"], inputs["visual_features"], inputs["media_locations"]
    held = gated_cross_attention.keys_values(params, shape, media)

    def memory(begun: jax.Array) -> gated_cross_attention.Memory:
        return (*held, gated_cross_attention.media_mask(shape, begun, media.shape[1], media.shape[2]))

    begun = gated_cross_attention.media_begun(locations)
    following = gated_cross_attention.media_begun(locations, following=True)
    found = {
        "output": gated_cross_attention.cross(params, shape, x, memory(begun)),
        "output_attend_previous_false": gated_cross_attention.cross(params, shape, x, memory(following)),
        "attn_output_before_gate": gated_cross_attention.read(params, shape, x, memory(begun)),
        "cached_last_token_output": gated_cross_attention.cross(params, shape, x[:, -1:], memory(begun[:, -1:])),
        "keys": held[0].swapaxes(1, 2),
        "values": held[1].swapaxes(1, 2),
    }
    return {name: found[name] for name in wanted if name in found}


def _connector(directory: Path, config: ConnectorConfig, rules: list[keys.Rule]) -> Arrays:
    shapes = multimodal.shapes(ModelConfig(connector=config))
    return keys.load(weights.read(directory), rules, shapes, dtype="float32", where=directory)["connector"]


PARTS = {
    "anymal_linear": anymal_linear,
    "anymal_perceiver": anymal_perceiver,
    "flamingo_gated_xattn": gated_cross_attention_block,
    "flamingo_perceiver": flamingo_perceiver,
    "otter_gated_xattn": gated_cross_attention_block,
    "otter_perceiver": flamingo_perceiver,
    "vila_projector": vila_projector,
}
