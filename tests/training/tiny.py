"""A tiny vision-language model and batches for it, shared by the tests of training."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mmjax import tree
from mmjax.batch import Batch
from mmjax.models import multimodal
from mmjax.models.block_config import BlockConfig, Rope
from mmjax.models.config import DecoderConfig, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, ViTConfig
from mmjax.models.tuning_config import LoraConfig

_BLOCK = BlockConfig(
    width=16,
    heads=2,
    kv_heads=2,
    head_dim=8,
    mlp_width=32,
    activation="gelu",
    norm="layer",
    norm_eps=1e-5,
    gated_mlp=False,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
)
VISION = ViTConfig(image_size=8, patch_size=4, layers=2, block=_BLOCK, class_token=True, pooling="class_token", classes=5)
LLM = DecoderConfig(
    vocab_size=64,
    layers=2,
    block=dataclasses.replace(
        _BLOCK,
        width=32,
        head_dim=16,
        mlp_width=64,
        activation="silu",
        norm="rms",
        gated_mlp=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        rope=Rope(),
    ),
    max_positions=64,
)
CONFIG = ModelConfig(
    llm=LLM,
    vision=VISION,
    connector=ConnectorConfig("mlp", in_width=16, out_width=32, positions=4),
    adapters=(LoraConfig("tune", rank=4, alpha=8.0, targets=("llm/layers/attention/query", "llm/layers/mlp/up")),),
)


def params(config: ModelConfig = CONFIG, seed: int = 0) -> dict:
    """Random parameters, made without compiling the model's own initialisation; LoRA's zeros are small numbers here, so that
    every leaf gets a gradient."""
    random = np.random.default_rng(seed)
    flat = {}
    for path, leaf in tree.flatten(multimodal.shapes(config)).items():
        values = random.normal(size=leaf.shape) * (leaf.shape[-2] if len(leaf.shape) > 1 else 25) ** -0.5
        flat[path] = jnp.asarray(1 + values if path.endswith("scale") else values, jnp.float32)
    return tree.unflatten(flat)


def batch(rows: int = 8, length: int = 16, groups: int = 8, seed: int = 0, classes: bool = False) -> Batch:
    """Rows with one image each in their first positions, unequal numbers of supervised tokens, padding at the end."""
    random = np.random.default_rng(seed)
    tiles, tokens = rows // groups, 4
    used = random.integers(length // 2, length + 1, rows)
    real = np.arange(length) < used[:, None]
    media = np.full((rows, length), -1, np.int32)
    media[:, 1 : 1 + tokens] = np.arange(tokens) + tokens * (np.arange(rows) % tiles)[:, None]
    weights = real & (np.arange(length) >= used[:, None] - random.integers(1, 6, rows)[:, None])
    return Batch(
        tokens=np.where(real, random.integers(0, 64, (rows, length)), 0).astype(np.int32),
        segments=real.astype(np.int32),
        positions=(np.arange(length) * real).astype(np.int32),
        media=media,
        targets=np.where(real, random.integers(0, 64, (rows, length)), 0).astype(np.int32),
        weights=weights.astype(np.float32),
        images=random.integers(0, 256, (groups, tiles, 8, 8, 3), dtype=np.uint8),
        tiles=np.ones((groups, tiles), bool),
        classes=random.integers(0, 5, (groups, tiles)).astype(np.int32) if classes else None,
    )


def paths(params: dict) -> list[str]:
    return list(tree.flatten(params))
