"""What the stages of published systems train at full size, counted from shapes alone; the source stands beside each number."""

from __future__ import annotations

import jax
import pytest

from mmjax.assembly import model_config
from mmjax.config import from_config_dict
from mmjax.families import vila
from mmjax.models import multimodal
from mmjax.models.config import ModelConfig
from tests.configs import expand, table


def trained(name: str, argument: str) -> dict[str, int]:
    recipe = from_config_dict(expand.config(name, argument))
    return table.trained(recipe, model_config(recipe))


def vila_projector(width: int, out: int) -> int:
    """VILA-1.5's mlp_downsample as its code builds it (llava/model/multimodal_projector/base_projector.py): LayerNorm(4 c),
    Linear(4 c, d), GELU, Linear(d, d), for an encoder of c channels and a language model of d."""
    return 2 * 4 * width + (4 * width + 1) * out + (out + 1) * out


@pytest.mark.parametrize(
    "size, count, by_hand",
    [
        ("7b", 4_198_400, (1024 + 1) * 4096),  # the paper's linear layer (arXiv 2312.07533) over CLIP-L
        ("13b", 5_248_000, (1024 + 1) * 5120),
        ("3b", 18_364_416, vila_projector(1152, 2560)),  # SigLIP-so400m, Sheared-LLaMA-2.7B (scripts/v1_5/release/3b)
        ("8b", 35_668_992, vila_projector(1152, 4096)),  # Llama-3-8B
        ("40b", 143_170_560, vila_projector(3200, 7168)),  # InternViT-6B, Yi-34B
    ],
)
def test_vilas_projector(size, count, by_hand):
    assert trained("vila", size)["align"] == count == by_hand


def test_vilas_projector_over_vicuna_13b():
    """VILA-1.5-13B's: SigLIP-so400m and a language model of 5,120."""
    assert vila_projector(1152, 5120) == 49_826_816
    connector = vila.projector("mlp_downsample", 1152, 5120, 729, "columns")
    assert sum(leaf.size for leaf in jax.tree.leaves(multimodal.shapes(ModelConfig(connector=connector)))) == 49_826_816
    assert connector.tokens == 196


def test_vilas_projector_over_two_scales():
    """VILA-1.5-3B-S2 (scripts/v1_5/release/3b-s2): the maps of 384 and 768 pixels are joined on channels."""
    assert trained("vila", "3b,s2")["align"] == vila_projector(2 * 1152, 2560) == 30_170_112


def test_vilas_stages():
    """Scripts v1_5/release of NVlabs/VILA 143c773: the projector; then the LLM with it; then the tower as well. The LLM's own count is
    Llama-2-7B's 6,738,415,616 (its checkpoint); frozen in pretraining, the projector is left."""
    assert trained("vila", "") == {"align": 4_198_400, "pretrain": 6_742_614_016, "sft": 7_046_121_472}
    assert trained("vila", "frozen")["pretrain"] == 4_198_400


def anymal_resampler(width: int, media: int = 1024, layers: int = 6, latents: int = 64) -> int:
    """babakd/anymal's PerceiverResampler at the language model's width: input_proj, latents, and in each layer two
    nn.MultiheadAttention, an MLP of four widths and four LayerNorms; a LayerNorm at the end. The paper's own is not published."""
    attention, mlp, norm = 4 * (width + 1) * width, (width + 1) * 4 * width + (4 * width + 1) * width, 2 * width
    return (media + 1) * width + latents * width + layers * (2 * attention + mlp + 4 * norm) + norm


@pytest.mark.parametrize(
    "size, count, width", [("7b", 1_615_597_568, 4096), ("13b", 2_522_813_440, 5120), ("70b", 6_452_420_608, 8192)]
)
def test_anymals_resampler(size, count, width):
    assert trained("anymal", size)["align"] == count == anymal_resampler(width)


def test_anymals_adapters():
    """LoRA of rank 64 (arXiv 2309.16058) on the seven Linears of Llama-2-7B's 32 layers: 64 * (in + out) each."""
    linears = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    found = trained("anymal", "")
    assert found["instruct"] - found["align"] == 32 * 64 * linears == 159_907_840


def qformer(text: bool, heads: bool) -> int:
    """BERT-base with cross-attention to 1,408 channels in every second layer and a second feed-forward for text
    (LAVIS, lavis/models/blip2_models/Qformer.py), 32 queries, and the heads of BLIP-2's first stage (blip2_qformer.py)."""
    width, mlp, channels, words, norm = 768, 3072, 1408, 30523, 2 * 768
    square = width * width + width
    feed_forward = width * mlp + mlp + mlp * width + width + norm
    crossing = 2 * square + 2 * (channels * width + width) + norm
    found = 12 * (4 * square + norm + feed_forward * (1 + text)) + 6 * crossing + norm + 32 * width
    found += text * (words + 512) * width
    return found + heads * (2 * (width * 256 + 256) + 1 + 2 * width + 2 + square + norm + words)


def test_q_formers():
    """The paper says 188M of the Q-Former (arXiv 2301.12597, section 3.1): that is all of it, with every head and the Linear in front
    of OPT-2.7B; the first stage trains all but that Linear, and the norm behind the encoder."""
    behind, linear = 2 * 1408, (768 + 1) * 2560
    found = trained("blip2", "")
    assert found["represent"] == qformer(True, True) + behind == 186_705_470
    assert qformer(True, True) + linear == 188_671_294
    assert found["generate"] == qformer(False, False) + linear + behind == 107_133_696
    assert trained("instructblip", "")["instruct"] == qformer(True, False) + (768 + 1) * 4096


@pytest.mark.parametrize("llm, count", [("", (768 + 1) * 4096), ("vicuna_13b", (768 + 1) * 5120), ("llama2_7b", (4 * 1408 + 1) * 4096)])
def test_minigpt4s_linear(llm, count):
    """llama_proj alone (Vision-CAIR/MiniGPT-4 d94738a, minigpt4/models/minigpt4.py); over four joined states for Llama 2."""
    assert trained("minigpt4", llm) == {"pretrain": count, "align": count}


def test_doubutsus_and_moondreams_connectors():
    """doubutsu: Linear(1152, 1536), GELU, Linear(1536, 1536) (qrsch/doubutsu 5192502); its LoRA has rank 128 (its README).
    moondream 1: mlp1 1152 -> 8192 -> 2048, a norm, mlp2 2048 -> 8192 -> 2048 (vikhyat/moondream d5fa2f9)."""
    found = trained("doubutsu", "")
    assert found["pretrain"] == (1152 + 1) * 1536 + (1536 + 1) * 1536 == 4_131_840
    linears = (1536 + 1536) * 2 + (1536 + 256) * 2 + 3 * (1536 + 8960)
    assert found["adapt"] == 28 * 128 * linears == 147_718_144
    first = (1152 + 1) * 8192 + (8192 + 1) * 2048
    second = (2048 + 1) * 8192 + (8192 + 1) * 2048
    assert trained("moondream", "")["pretrain"] == first + 2 * 2048 + second == 59_793_408
    # moondream 2: Linear(2304, 8192), GELU, Linear(8192, 2048) over overview and tiles (vikhyat/moondream 44146f1, config.py's defaults)
    assert trained("moondream", "v2")["pretrain"] == (2304 + 1) * 8192 + (8192 + 1) * 2048 == 35_661_824
