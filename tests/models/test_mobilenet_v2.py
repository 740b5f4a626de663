"""The network on its own; equality with transformers is in tests/families/test_mobilenet_v2.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import tree
from mmjax.batch import Batch
from mmjax.models import mobilenet_v2, multimodal
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, MobileNetV2Config
from mmjax.models.tuning_config import LoraConfig

TINY = MobileNetV2Config(image_size=40, depth_multiplier=0.1, classes=3)


@pytest.mark.parametrize("tensorflow", [True, False])
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2), (1, 4)])
def test_shifted_products_equal_a_grouped_convolution(stride, dilation, tensorflow):
    c = mobilenet_v2.Convolution("x", 3, 5, 5, stride=stride, dilation=dilation, depthwise=True)
    x = jax.random.normal(jax.random.key(0), (2, 9, 12, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 5))
    padding = [mobilenet_v2._padding(c, side, tensorflow) for side in x.shape[1:3]]
    shifted = mobilenet_v2.shifted(x, kernel, padding, c)
    np.testing.assert_allclose(shifted, mobilenet_v2.grouped(x, kernel, padding, c), atol=1e-5)
    assert shifted.shape[1:3] == (-(-9 // stride), 12 // stride)


def test_features_have_the_shape_that_the_config_says():
    params = jax.eval_shape(lambda k: mobilenet_v2.init(k, TINY), jax.random.key(0))
    for config in (TINY, MobileNetV2Config(image_size=70, output_stride=16, depth_multiplier=1.4)):
        params = jax.eval_shape(lambda k: mobilenet_v2.init(k, config), jax.random.key(0))
        pixels = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, 3), jnp.float32)
        found = jax.eval_shape(
            lambda p, x: mobilenet_v2.features(p, config, FeatureSpec(), x, Execution(dtype="bfloat16")), params, pixels
        )
        assert found.shape == (2, config.positions, config.feature_width) and found.dtype == jnp.bfloat16


@pytest.mark.parametrize("spec", [FeatureSpec((-2,)), FeatureSpec((-1, 3)), FeatureSpec(keep_class_token=True)])
def test_other_feature_specs_are_refused(spec):
    with pytest.raises(ValueError, match="one map of features"):
        mobilenet_v2.features({}, TINY, spec, jnp.zeros((1, 40, 40, 3)), Execution())


def test_the_published_network_has_its_published_size():
    config = MobileNetV2Config(classes=1001)
    leaves = tree.flatten(jax.eval_shape(lambda k: mobilenet_v2.init(k, config), jax.random.key(0)))
    statistics = sum(leaf.size for path, leaf in leaves.items() if path.endswith(("/mean", "/variance")))
    assert sum(leaf.size for leaf in leaves.values()) - statistics == 3_506_153  # 3.5 M with 1,001 classes
    assert (config.positions, config.feature_width) == (49, 1280)


def test_a_connector_reads_it_like_any_encoder():
    config = ModelConfig(vision=TINY, connector=ConnectorConfig("linear", 1280, 8, TINY.positions))
    images = jax.ShapeDtypeStruct((1, 2, 40, 40, 3), jnp.uint8)
    found = jax.eval_shape(
        lambda p, x: multimodal.vision_features(p, config, x, Execution()), multimodal.shapes(config), images
    )
    assert found.shape == (1, 2, TINY.positions, 1280)
    classes = jax.eval_shape(
        lambda p, x: multimodal.classify(p, config, Batch(images=x), Execution()), multimodal.shapes(config), images
    )
    assert classes.shape == (1, 2, 3)


def test_adapters_stay_off_convolutions():
    """They read none, and neither does the head behind them: an adapter there would be trained and never used."""
    adapter = LoraConfig("default", 2, 4.0, ("vision/**",))
    with pytest.raises(ValueError, match="matches no linear layer"):
        multimodal.shapes(ModelConfig(vision=TINY, adapters=(adapter,)))
