"""What the stages of published systems train at full size, counted from shapes alone; the source stands beside each number."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from mmjax import tree
from mmjax.architecture import model_config
from mmjax.config import from_config_dict
from mmjax.families import parts, vila
from mmjax.models import multimodal
from mmjax.models.block_config import BlockConfig, Rope
from mmjax.models.config import DecoderConfig, ModelConfig
from mmjax.models.tuning_config import AffineConfig, BottleneckConfig, Ia3Config, LoraConfig, NormConfig
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


def gated_block(width: int, media: int, inner: int) -> int:
    """OpenFlamingo's GatedCrossAttentionBlock (src/helpers.py of 655f693): LayerNorm, to_q, to_kv, to_out and a feed-forward of four
    widths behind a LayerNorm, all without biases; two gates."""
    return 2 * width + width * inner + media * 2 * inner + inner * width + 2 * width + 8 * width**2 + 2


def resampler(width: int, inner: int, layers: int = 6, latents: int = 64) -> int:
    """Its PerceiverResampler: two LayerNorms, to_q, to_kv, to_out, a feed-forward like that; latents, and a LayerNorm at the end."""
    return latents * width + layers * (4 * width + 4 * width * inner + 2 * width + 8 * width**2) + 2 * width


@pytest.mark.parametrize(
    "size, count, blocks, width, rows",
    [
        ("", 1_178_843_152, 8, 4096, 2),  # MPT-7B, every 4th of 32 blocks; two tied rows
        ("4b", 960_763_936, 16, 2560, 0),  # RedPajama-3B, every 2nd of 32; its new rows are frozen (arXiv 2308.01390)
        ("3b", 944_023_600, 24, 2048, 2),  # MPT-1B, every one of 24
    ],
)
def test_openflamingos_new_layers(size, count, blocks, width, rows):
    """No count of trained parameters is published in what we have, so they are counted from the code's layers: 1.12B in gated blocks and
    63M in the resampler for 9B. With MPT-7B and CLIP ViT-L/14 that makes 8.1B parameters, which the paper rounds up to 9B."""
    by_hand = blocks * gated_block(width, 1024, 512) + resampler(1024, 512) + rows * width
    assert trained("openflamingo", size)["train"] == count == by_hand


def test_otters_stages():
    """As OpenFlamingo with one more token; then also all embeddings (MPT's are tied to its head; Llama's head beside them)."""
    new = 8 * gated_block(4096, 1024, 512) + resampler(1024, 512)
    assert trained("otter", "") == {"train": new + 3 * 4096, "instruct": new + (50432 + 3) * 4096}
    assert trained("otter", "llama") == {"train": new + 3 * 4096, "instruct": new + 2 * (32000 + 3) * 4096}


@pytest.mark.parametrize(
    "size, blocks, width, inner, low, high",
    [("", 24, 2048, 2048, 1.15e9, 1.4e9), ("9b", 8, 4096, 4096, 1.4e9, 1.8e9), ("80b", 12, 8192, 8192, 8.3e9, 10e9)],
)
def test_flamingos_new_layers(size, blocks, width, inner, low, high):
    """arXiv 2204.14198 gives the gated blocks 1.2 to 1.4B, 1.6 to 1.8B and 10B parameters and the resampler 194M. From its own shapes
    (24 blocks of 2,048, 10 of 4,096, 12 of 8,192; 6 layers of 1,536) one counts 1.16B, 1.80B, 8.35B and 170M. Ours: the same for
    3B and 80B, whose gap to the 10B is not explained in the paper; 1.44B for 9B, whose language model here has 32 blocks for
    40. The resampler reads CLIP's 1,024 channels through a Linear of 1.6M."""
    gated = blocks * gated_block(width, 1536, inner)
    assert low <= gated <= high
    rows = trained("flamingo", size)["train"] - gated - resampler(1536, 1536) - 1024 * 1536
    assert rows == 2 * 2 * width  # two tokens, in an untied head as well
    assert 10 * gated_block(4096, 1536, 4096) == pytest.approx(1.8e9, rel=0.01)


@pytest.mark.parametrize("size, blocks, width, mlp", [("", 8, 4096, 11008), ("80b", 20, 8192, 22016)])
def test_idefics_stages(size, blocks, width, mlp):
    """transformers' IdeficsGatedCrossAttentionLayer (queries and outputs of the language model's width, keys and values of the tower's
    1,280; SwiGLU; four norms, of which two over a head's 128 channels; two gates) and its resampler of 16 heads of 96 with norms
    over 96. The base stage's 1.6B and 14B; with all parts 8.9B and 80.0B, the published sizes of 9B and 80B."""
    block = 2 * width**2 + 2 * 1280 * width + 3 * width * mlp + 2 * width + 2 * 128 + 2
    reading = resampler(1280, 1536) + 6 * 2 * 2 * 96
    found = trained("idefics", size)
    assert found["base"] == blocks * block + reading + 3 * 2 * width
    assert found["instruct"] == pytest.approx({"": 8.93e9, "80b": 79.97e9}[size], rel=1e-3)


def visual_projector(latents: int, width: int = 768, out: int = 4096, depth: int = 8) -> int:
    """llama_adapter_v2_multimodal7b/llama/llama_adapter.py of OpenGVLab/LLaMA-Adapter 521a09d: clip_proj and clip_proj_norm over CLIP-L's 768
    projected channels, visual_query, timm's blocks of four widths, visual_proj and visual_proj_norm."""
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 4 * width
    around = (width + 1) * width + 2 * width + (width + 1) * out + 2 * out
    return latents * width + depth * block + around


def test_llama_adapters():
    """V1: 10 prompts of 4,096 in 30 layers with a gate for each of 32 heads, the paper's 1.2M (arXiv 2303.16199); with pictures 1.8M. V2's
    two stages as its code chooses leaves (llama_adapter.py, get_trainable_params), less the gates of the layer without prompts: 61.73M,
    then biases of wq, wo, w1, w2, w3 (1.10M) and all norms (0.27M). V2's chat65b is Llama65B_bias_scale_norm_tuning: a scale of
    what each of seven Linears reads, a bias, and the layers' norms, the published 13.80M."""
    assert trained("llama_adapter", "") == {"instruct": 10 * 30 * 4096 + 30 * 32} == {"instruct": 1_229_760}
    projector = (1024 + 1) * 112 + (112 + 1) * 4096
    assert trained("llama_adapter", "v1_multimodal") == {"instruct": 1_229_760 + projector} == {"instruct": 1_807_408}
    biases, norms = 32 * (3 * 4096 + 2 * 11008), (2 * 32 + 1) * 4096
    assert (biases, norms) == (1_097_728, 266_240)
    prompts = 10 * 31 * 4096 + 31 * 32
    assert trained("llama_adapter", "v2") == {"pretrain": prompts + visual_projector(10), "finetune": biases + norms}
    assert prompts + visual_projector(10) == 61_731_552 and biases + norms == 1_363_968
    attention, mlp = 4 * (8192 + 8192), 3 * (8192 + 22016)
    assert trained("llama_adapter", "v2_chat") == {"instruct": 80 * (attention + mlp + 2 * 8192)} == {"instruct": 13_803_520}


def test_robust_ger():
    """lit_gpt/robust_ger.py of YUCHEN005/RobustGER ad4e37f, 30 layers of LLaMA-2 7B: adapter_wte, gating_factor, ef_key without and ef_value
    with a bias, two norms, two gates [20, 32, 128]; MINE over 4,096 and 1,280 channels, with a prefix of 384."""
    layer = 20 * 4096 + 32 + 2 * 384 * 4096 + 4096 + 2 * 4096 + 2 * 20 * 4096
    network = 384 * 4096 + 4096 * 1024 + 1280 * 1024 + 1024 * 256 + 256
    assert trained("robust_ger", "") == {"correct": 30 * layer + network} == {"correct": 109_454_528}
    assert trained("robust_ger", "plain") == {"correct": 30 * (20 * 4096 + 32)} == {"correct": 2_458_560}
    assert trained("robust_ger", "lora") == {"correct": 32 * 4 * 16 * 8192} == {"correct": 16_777_216}


def adapted(adapter) -> int:
    """Trained parameters of an adapter on LLaMA-7B (arXiv 2302.13971): 32 layers, 4,096 wide, MLPs of 11,008."""
    block = BlockConfig(4096, 32, 32, 128, 11008, "silu", "rms", 1e-6, True, False, False, False, Rope())
    base = ModelConfig(llm=DecoderConfig(32000, 32, block, 2048))
    shapes = tree.flatten(multimodal.shapes(dataclasses.replace(base, adapters=(adapter,))))
    return sum(math.prod(leaf.shape) for path, leaf in shapes.items() if "/adapters/" in path)


def test_adapters_of_llama_7b():
    """LoRA (arXiv 2106.09685) of rank 8 on queries and values, 8 * (in + out) each; DoRA (arXiv 2402.09353) has a magnitude for each
    output beside; IA3 (arXiv 2205.05638) a factor for each key, value and channel of the MLP; LLaMA-Adapter V2 (arXiv 2304.15010)
    multimodal7b as released: biases of wq, wo, w1, w2, w3 and the norms' scales (OpenGVLab/LLaMA-Adapter, 1.10M and 0.27M)."""
    queries_values = ("llm/layers/attention/{query,value}",)
    assert adapted(LoraConfig("a", 8, 16.0, queries_values)) == 32 * 2 * 8 * (4096 + 4096) == 4_194_304
    assert adapted(LoraConfig("a", 8, 16.0, queries_values, dora=True)) == 4_194_304 + 32 * 2 * 4096
    ia3 = Ia3Config("a", ("llm/layers/*/{key,value,down}",), ("llm/layers/mlp/down",))
    assert adapted(ia3) == 32 * (4096 + 4096 + 11008) == 614_400
    biases = AffineConfig("a", ("llm/layers/attention/{query,output}", "llm/layers/mlp/*"), "bias")
    assert adapted(biases) == 32 * (3 * 4096 + 2 * 11008) == 1_097_728
    assert adapted(NormConfig("a", ("llm/**",))) == (2 * 32 + 1) * 4096 == 266_240


def mixture(width: int, hidden: int = 8) -> int:
    """LaVIN's RepAdapter_Router (luogen1996/LaVIN dd0a1bf, lavin/mm_adapter.py): conv_A, two branches of two groups, a router of two."""
    return (width + 1) * hidden + 2 * (hidden // 2 + 1) * width + 2 * (width + 1)


@pytest.mark.parametrize("size, count, width, layers", [("7b", 3_781_296, 4096, 32), ("13b", 5_390_080, 5120, 40)])
def test_lavins_adapters(size, count, width, layers):
    """The paper says 3.8M and 5.4M: an adapter in each block of LLaMA and of CLIP-L, Linear(1024, 128) and Linear(128, d), two tokens."""
    connector = (1024 + 1) * 128 + (128 + 1) * width
    assert trained("lavin", size)["finetune"] == count == layers * mixture(width) + 24 * mixture(1024) + connector + 2 * width


@pytest.mark.parametrize("size, share", [("7b", 0.0399), ("13b", 0.0323)])
def test_bottleneck_adapters_are_3_to_4_percent(size, share):
    """Houlsby's two in each layer (arXiv 1902.00751 trains 3.6 % on GLUE), 512 channels wide, on LLaMA; Pfeiffer's one is half of it."""
    llm = from_config_dict(expand.config("lavin", size)).model.llm.config
    width, layers, mlp = llm["hidden_size"], llm["num_hidden_layers"], llm["intermediate_size"]
    config = parts.language(llm, "llm").read_config(llm, "llm")
    config = dataclasses.replace(config, adapters=(BottleneckConfig("x", width=512, places=("attention", "mlp"), reads="output"),))
    whole = sum(leaf.size for leaf in jax.tree.leaves(multimodal.shapes(config)))
    own = 2 * ((width + 1) * 512 + (512 + 1) * width) * layers
    base = 2 * 32000 * width + width + layers * (4 * width**2 + 3 * width * mlp + 2 * width)
    assert whole == base + own and round(own / base, 4) == share
