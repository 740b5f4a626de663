"""FLOPs against figures worked out by hand for LLaVA-1.5-7B, and the rules of the convention."""

from __future__ import annotations

import dataclasses

import pytest

from mmjax import flops
from mmjax.models import multimodal
from mmjax.models.block_config import BlockConfig, Rope
from mmjax.models.config import DecoderConfig, ModelConfig, RelativeBias
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, MobileNetV2Config, ViTConfig
from mmjax.models.tuning_config import LoraConfig, PrefixConfig, PTuningConfig
from mmjax.training.trainable import select

VICUNA = DecoderConfig(
    vocab_size=32000,
    layers=32,
    block=BlockConfig(4096, 32, 32, 128, 11008, "silu", "rms", 1e-5, True, False, False, False, Rope()),
    max_positions=4096,
)
CLIP = ViTConfig(
    image_size=336,
    patch_size=14,
    layers=24,
    block=BlockConfig(1024, 16, 16, 64, 4096, "quick_gelu", "layer", 1e-5, False, True, True, True),
    class_token=True,
    patch_bias=False,
    pre_norm=True,
    pooling="class_token",
)
LLAVA = ModelConfig(llm=VICUNA, vision=CLIP, connector=ConnectorConfig("mlp", 1024, 4096, 576), features=FeatureSpec((-2,)))
LORA = dataclasses.replace(LLAVA, adapters=(LoraConfig("default", 128, 256.0, ("llm/layers/**",)),))


def cost(config: ModelConfig, *globs: str, objective="language") -> flops.Flops:
    return flops.training_flops(config, select(multimodal.shapes(config), globs, "trainable"), objective)


@pytest.mark.parametrize(
    "config, trainable, length, teraflops",
    [
        (LLAVA, ("connector/**",), 600, 16.6),
        (LLAVA, ("llm/**", "connector/**"), 850, 34.7),
        (LORA, ("llm/**/lora_*", "connector/**"), 850, 25.1),
    ],
    ids=["pretrain", "finetune", "finetune_lora"],
)
def test_llava_15(config, trainable, length, teraflops):
    counted = cost(config, *trainable)
    assert sum(counted.count([length], length, 1).values()) == pytest.approx(teraflops * 1e12, rel=0.02)
    # the head at supervised positions only
    text_only = sum(counted.count([length], length - 576, 1).values())
    assert text_only == pytest.approx(teraflops * 1e12, rel=0.02) and text_only < teraflops * 1e12


def test_a_trained_weight_costs_three_times_its_forward_pass_and_a_frozen_one_two():
    kernels = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    full, connector = cost(LLAVA, "llm/**"), cost(LLAVA, "connector/**")
    assert full.per_token["llm"] == 6 * kernels
    assert connector.per_token["llm"] == 4 * kernels
    assert connector.per_tile["connector"] == 6 * 576 * (1024 * 4096 + 4096 * 4096)
    assert full.per_tile["connector"] == connector.per_tile["connector"] / 3  # frozen in front of all that is trained
    assert full.per_supervised["llm head"] == 6 * 4096 * 32000


def test_layers_in_front_of_the_first_trained_one_only_run_forwards():
    kernels = 4 * 4096**2 + 3 * 4096 * 11008
    assert cost(LLAVA, "llm/layers[30:32]/**").per_token["llm"] == 30 * 2 * kernels + 2 * 6 * kernels
    assert cost(LLAVA, "llm/head/**").per_token["llm"] == 32 * 2 * kernels
    top, whole = cost(LLAVA, "vision/layers[20:24]/**"), cost(LLAVA, "vision/**")
    assert top.per_tile["vision"] < whole.per_tile["vision"] < 3.01 * cost(LLAVA, "connector/**").per_tile["vision"]


def test_a_space_to_depth_connector():
    """Four positions of VILA-1.5's 27 x 27 become one of 14 x 14 tokens."""
    tower = dataclasses.replace(CLIP, image_size=27 * 14, class_token=False, pooling="none")
    connector = ConnectorConfig("space_to_depth", 1024, 4096, 729, group=2, input_norm=True)
    counted = cost(dataclasses.replace(LLAVA, vision=tower, connector=connector), "connector/**")
    assert connector.tokens == 196
    assert counted.per_tile["connector"] == 6 * 196 * (4 * 1024 * 4096 + 4096 * 4096)


def test_resamplers():
    """Six layers of 64 latents over 576 positions. Flamingo's latents read themselves with the media, AnyMAL's in a sublayer."""
    square, latents = 4096 * 4096, 64
    for kind, squares in (
        ("perceiver", latents * 10 + 2 * (576 + latents)),
        ("cross_self_perceiver", latents * 10 + 2 * 576 + 4 * latents),
    ):
        connector = ConnectorConfig(kind, 1024, 4096, 576, depth=6, heads=32)  # type: ignore[arg-type]
        counted = cost(dataclasses.replace(LLAVA, connector=connector), "connector/**")
        products = 576 * 1024 * 4096 + 6 * square * squares
        pairs = 6 * 4 * 4096 * latents * (576 + latents)
        assert counted.per_tile["connector"] == 6 * products + 3 * pairs


def test_the_last_block_does_not_run_where_the_connector_reads_the_one_before():
    last = dataclasses.replace(LLAVA, features=FeatureSpec((-1,)))
    share = cost(LLAVA, "connector/**").per_tile["vision"] / cost(last, "connector/**").per_tile["vision"]
    assert share == pytest.approx(23 / 24, rel=1e-3)


def test_attention_is_causal_and_a_window_makes_a_band():
    counted = cost(LLAVA, "connector/**")
    assert counted.count([600], 0, 0)["llm attention"] == 3 * 32 * 4 * 4096 * 600**2 / 2
    assert counted.count([300, 300], 0, 0)["llm attention"] == 3 * 32 * 4 * 4096 * 300**2  # packed samples do not see each other
    windowed = dataclasses.replace(LLAVA, llm=dataclasses.replace(VICUNA, windows=(0, 100)))
    band = 100 * 600 - 100**2 / 2
    expected = 3 * 16 * 4 * 4096 * (600**2 / 2 + band)
    assert cost(windowed, "connector/**").count([600], 0, 0)["llm attention"] == expected


def test_cached_features_leave_the_encoder_out():
    counted = cost(LLAVA, "connector/**")
    assert "vision" not in counted.count([600], 24, 1, encoded=False)
    assert counted.count([600], 24, 1, encoded=False)["connector"] == counted.count([600], 24, 1)["connector"]


def test_a_tied_head_costs_what_an_untied_one_does():
    tied = dataclasses.replace(LLAVA, llm=dataclasses.replace(VICUNA, tied_head=True))
    assert cost(tied, "connector/**").per_supervised == cost(LLAVA, "connector/**").per_supervised


def test_classifying():
    small = dataclasses.replace(CLIP, classes=10)
    counted = cost(ModelConfig(vision=small), "vision/**", objective="classify")
    forward = 24 * (4 * 1024**2 + 2 * 1024 * 4096) * 577 + 588 * 1024 * 576 + 10 * 1024
    assert counted.per_tile["vision"] == pytest.approx(3 * (2 * forward + 24 * 4 * 1024 * 577**2))


def test_mobilenet_v2():
    """0.3 billion multiply-adds at 224 pixels (arXiv 1801.04381, table 4)."""
    config = ModelConfig(vision=MobileNetV2Config(classes=1001))
    counted = cost(config, "vision/head/**", objective="classify")
    assert counted.per_tile["vision"] == pytest.approx(2 * 0.3e9, rel=0.02)


def test_utilisation():
    assert flops.peak("NVIDIA H200") == 989e12 and flops.peak("NVIDIA H100 PCIe") == 756e12
    assert flops.peak("TPU v5 lite") == 197e12 and flops.peak("TPU v5p") == 459e12
    assert flops.peak("cpu") is None and flops.mfu(1e12, 1.0, 1, "cpu") is None
    assert flops.mfu(989e12, 2.0, 2, "NVIDIA H200") == 0.25


def test_an_encoder_decoder():
    """T5-small (arXiv 1910.10683): 6 + 6 blocks of width 512, 8 heads of 64, MLPs of 2048."""
    block = BlockConfig(512, 8, 8, 64, 2048, "relu", "rms", 1e-6, False, False, False, False, scale=1.0)
    encoder = DecoderConfig(32128, 6, block, 512, causal=False, has_head=False, relative_bias=RelativeBias(32, 128))
    crossed = dataclasses.replace(block, memory_width=512)
    t5 = dataclasses.replace(encoder, block=crossed, causal=True, has_head=True, tied_head=True, encoder=encoder)
    counted = cost(ModelConfig(llm=t5), "llm/**")
    square, mlp, pair = 512 * 512, 2 * 512 * 2048, 3 * 4 * 512
    assert counted.per_source == {"llm encoder": 6 * 6 * (4 * square + mlp), "llm": 6 * 6 * 2 * square}
    assert counted.per_token == {"llm": 6 * 6 * (6 * square + mlp)}
    assert counted.per_supervised == {"llm head": 6 * 512 * 32128}
    parts = counted.count([40], 40, 0, sources=[100])
    assert parts["llm attention"] == 6 * pair * (100**2 + 40**2 / 2 + 100 * 40)
    # nothing is trained in front of the decoder's last block, so that the encoder and the blocks below only run forwards
    top = cost(ModelConfig(llm=t5), "llm/layers[5:6]/mlp/**")
    assert top.per_source["llm encoder"] == counted.per_source["llm encoder"] / 3
    assert top.per_source_pair == counted.per_source_pair / 3


def test_prompts_and_prefixes():
    """Gradients pass through all of the language model, which stays frozen; a prefix is read by every position in every layer."""
    prompted = dataclasses.replace(LLAVA, adapters=(PTuningConfig("x", 20, encoder="lstm", encoder_width=8),))
    prefixed = dataclasses.replace(LLAVA, adapters=(PrefixConfig("x", 20),))
    projected = dataclasses.replace(LLAVA, adapters=(PrefixConfig("x", 20, projected=True, encoder_width=8),))
    kernels = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    for config, trained in ((prompted, "llm/prompts/x/**"), (prefixed, "llm/plugs/x/**"), (projected, "llm/prompts/x/**")):
        counted = cost(config, trained)
        assert counted.per_token["llm"] == 4 * kernels
        assert counted.per_pair[0] == 3 * 32 * 4 * 4096
        assert counted.per_token.get("llm attention", 0) == (0 if config is prompted else 20 * 3 * 32 * 4 * 4096)
        assert counted.per_tile["connector"] == 2 * 576 * (1024 * 4096 + 4096**2)
