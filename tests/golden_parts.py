"""Goldens of parts of systems: each is run by the package's function through the package's key table. Here names are mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmjax.checkpoints import weights
from mmjax.errors import UserError
from mmjax.families import anymal, flamingo, keys, vila
from mmjax.models import connectors, multimodal, perceiver
from mmjax.models.config import ConnectorConfig, ModelConfig

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


def _connector(directory: Path, config: ConnectorConfig, rules: list[keys.Rule]) -> Arrays:
    shapes = multimodal.shapes(ModelConfig(connector=config))
    return keys.load(weights.read(directory), rules, shapes, dtype="float32", where=directory)["connector"]


PARTS = {
    "anymal_linear": anymal_linear,
    "anymal_perceiver": anymal_perceiver,
    "flamingo_perceiver": flamingo_perceiver,
    "otter_perceiver": flamingo_perceiver,
    "vila_projector": vila_projector,
}
