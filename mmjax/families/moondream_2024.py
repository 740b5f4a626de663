"""The vision halves of moondream's releases of 2024: moondream 1's residual projection (January), and the encoder with stitched tiles
(from May on). Tensors are named as below `vision_encoder.`."""

from __future__ import annotations

from mmjax.families import moondream, siglip_vision
from mmjax.families.keys import Rule, linear, norm
from mmjax.models.block_config import Activation
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, Stitching, ViTConfig

INNER = 4  # width of the MLP's inside, in widths of the language model


def residual_projection(
    in_width: int, out_width: int, positions: int, activation: Activation = "gelu"
) -> ConnectorConfig:
    """moondream 1's connector: an MLP, a layer norm, and x + MLP(x)."""
    return ConnectorConfig(
        "residual_mlp", in_width, out_width, positions, hidden_width=INNER * out_width, activation=activation
    )


def residual_rules() -> list[Rule]:
    table = norm("ln", "connector/norm")
    for theirs, ours in (("mlp1", "first"), ("mlp2", "second")):
        table += linear(f"{theirs}.fc1", f"connector/{ours}/up") + linear(f"{theirs}.fc2", f"connector/{ours}/down")
    return table


def vision(
    width: int,
    heads: int,
    mlp_width: int,
    layers: int,
    grid: int,
    patch_size: int,
    out_width: int,
    activation: Activation = "gelu_tanh",
) -> ModelConfig:
    """Encoder and connector since May 2024: the map of all tiles is brought to `grid` x `grid` positions and joined to the overview's."""
    tower = ViTConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        layers=layers,
        block=moondream.plain_block(width, heads, heads, mlp_width, activation),
    )
    features = FeatureSpec((-1,), post_norm=True, stitching=Stitching("bilinear"))
    return ModelConfig(
        vision=tower,
        connector=ConnectorConfig(
            "mlp",
            features.width(tower),
            out_width,
            tower.positions,
            hidden_width=INNER * out_width,
            activation=activation,
        ),
        features=features,
        image_mean=siglip_vision.MEAN,
        image_std=siglip_vision.STD,
    )


def vision_rules() -> list[Rule]:
    names = {
        "patch": "patch_embed.linear",
        "positions": "pos_embed",
        "attention_norm": "norm1",
        "mlp_norm": "norm2",
        "last_norm": "norm",
    }
    return [
        *moondream.tower_rules("encoder.model.visual.", names),
        *linear("projection.mlp.fc1", "connector/layers_0"),
        *linear("projection.mlp.fc2", "connector/layers_1"),
    ]
