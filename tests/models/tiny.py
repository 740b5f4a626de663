"""Shapes and batches shared by the tests: small enough to compile in a second, with every option that matters."""

import jax
import numpy as np

from mmjax import tree
from mmjax.batch import Batch
from mmjax.models import multimodal
from mmjax.models.block_config import BlockConfig, Rope
from mmjax.models.config import DecoderConfig, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, ViTConfig
from mmjax.models.tuning_config import LoraConfig

LLAMA_BLOCK = BlockConfig(32, 4, 2, 8, 48, "silu", "rms", 1e-5, True, False, False, False, Rope())
VIT_BLOCK = BlockConfig(24, 4, 4, 6, 40, "quick_gelu", "layer", 1e-5, False, True, True, True)
LORA = LoraConfig("default", 4, 8.0, ("llm/layers/**",))


def model_config(layers=4, windows=(0,), adapters=(), connector="mlp") -> ModelConfig:
    """A two-layer CLIP-like tower, an MLP and a Llama."""
    return ModelConfig(
        llm=DecoderConfig(64, layers, LLAMA_BLOCK, 128, windows=windows),
        vision=ViTConfig(28, 14, 3, VIT_BLOCK, class_token=True, pre_norm=True),
        connector=ConnectorConfig(connector, 24, 32, 4),
        features=FeatureSpec((-2,)),
        adapters=adapters,
        image_mean=(0.5,) * 3,
        image_std=(0.25,) * 3,
    )


def random_params(config: ModelConfig, seed: int = 0):
    """Every parameter drawn at random, so that no zero or one at initialisation hides a mistake."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, leaf in tree.flatten(multimodal.shapes(config)).items():
        scale = path.endswith("scale")
        flat[path] = np.asarray(rng.normal(1.0 if scale else 0.0, 0.1 if scale else 0.2, leaf.shape), np.float32)
    return tree.unflatten(flat)


def rows(lengths: list[list[int]], length: int, vocab: int = 64, seed: int = 0, images: bool = True) -> Batch:
    """Rows that each pack samples of the given lengths; every sample begins with one image of four tokens."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), length)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    media = np.full(shape, -1, np.int32)
    tile = 0
    for row, parts in enumerate(lengths):
        start = 0
        for number, size in enumerate(parts, 1):
            here = slice(start, start + size)
            tokens[row, here] = rng.integers(3, vocab, size)
            segments[row, here] = number
            positions[row, here] = np.arange(size)
            if images:
                media[row, start : start + 4] = tile * 4 + np.arange(4)
                tile += 1
            start += size
    pixels = rng.integers(0, 256, (1, tile, 28, 28, 3), dtype=np.uint8) if images else None
    return Batch(tokens=tokens, segments=segments, positions=positions, media=media, images=pixels)


def key() -> jax.Array:
    return jax.random.key(0)
