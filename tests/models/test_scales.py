"""Multi-scale features against a small implementation in torch of what LLaVA's `s2` does."""

import dataclasses

import jax
import numpy as np
import pytest

from mmjax.models import multimodal
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import FeatureSpec, ViTConfig
from mmjax.models.scales import features

torch = pytest.importorskip("torch")


def reference(encode, pictures, scales, side):
    """Resize to each scale, encode its tiles, put the maps together, average them to the smallest map, join on channels."""
    found, size = [], None
    for scale in scales:
        resized = torch.nn.functional.interpolate(pictures, size=(scale * side, scale * side), mode="bicubic")
        rows = []
        for i in range(scale):
            tiles = [resized[:, :, i * side : (i + 1) * side, j * side : (j + 1) * side] for j in range(scale)]
            maps = [encode(tile) for tile in tiles]
            rows.append(torch.cat(maps, -1))
        whole = torch.cat(rows, -2)
        size = size or whole.shape[-1]
        found.append(torch.nn.functional.interpolate(whole, size=(size, size), mode="area"))
    return torch.cat(found, 1).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("scales", [(1, 2), (1, 2, 3), (1, 3)])
def test_features_equal_the_reference(scales):
    side, kernel = 12, np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32)
    largest = side * max(scales)
    pictures = np.random.default_rng(1).standard_normal((2, 3, largest, largest)).astype(np.float32)

    def theirs(tile):
        return torch.nn.functional.conv2d(tile, torch.tensor(kernel), stride=4)

    def ours(tiles):
        out = theirs(torch.tensor(np.asarray(tiles).transpose(0, 3, 1, 2)))
        return jax.numpy.asarray(out.flatten(2).transpose(1, 2).numpy())

    expected = reference(theirs, torch.tensor(pictures), scales, side).numpy()
    found = features(ours, jax.numpy.asarray(pictures.transpose(0, 2, 3, 1)), scales)
    assert found.shape == (2, 9, 5 * len(scales))
    np.testing.assert_allclose(found, expected, atol=2e-5)


BLOCK = BlockConfig(8, 2, 2, 4, 16, "gelu", "layer", 1e-5, False, True, True, True)
CONFIG = ModelConfig(vision=ViTConfig(8, 4, 1, BLOCK, class_token=True), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


def test_an_encoder_at_two_scales():
    params = multimodal.init(jax.random.key(0), CONFIG)
    config = dataclasses.replace(CONFIG, features=FeatureSpec(scales=(1, 2)))
    assert config.picture_size == 16 and config.features.width(config.vision) == 16
    picture = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    found = multimodal.vision_features(params, config, picture, Execution())
    assert found.shape == (1, 4, 16)
    tiles = picture[0].reshape(2, 8, 2, 8, 3).transpose(0, 2, 1, 3, 4).reshape(4, 8, 8, 3)
    each = multimodal.vision_features(params, CONFIG, tiles, Execution())
    np.testing.assert_allclose(found[0, :, 8:], each.mean(1), atol=1e-5)  # of 2 x 2 patches each
    with pytest.raises(ValueError, match="16 x 16 pixels are not 3 times"):
        multimodal.vision_features(params, dataclasses.replace(CONFIG, features=FeatureSpec(scales=(1, 3))), picture, Execution())


def test_a_class_token_is_refused():
    config = dataclasses.replace(CONFIG, features=FeatureSpec(keep_class_token=True, scales=(1, 2)))
    params = multimodal.init(jax.random.key(0), CONFIG)
    with pytest.raises(ValueError, match="5 positions are no square map"):
        multimodal.vision_features(params, config, np.zeros((1, 16, 16, 3), np.uint8), Execution())
