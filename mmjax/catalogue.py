"""Published parts that recipes are made of: language models, encoders, and the data that several systems share.

A recipe names a part instead of writing out its config.json: `Model(llm=VICUNA_V15["7b"], vision=CLIP_L_336)`. A part's `path` is
where its weights are (a repository of the Hugging Face hub, which must be in the local cache, or a directory that the command
line names: --config.model.llm.path=DIR); its `config` serves where they are not at hand. One that no two recipes
share may as well stand in its recipe.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mmjax.config import Part, Source

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}


def _llama(path: str, **fields: Any) -> Part:
    return Part(path, {**_LLAMA, **fields})


# Llama 1 and 2 and what was tuned from them: the same shapes but for the length and the norms' epsilon.
_FIRST: dict[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
LLAMA1 = {
    "7b": _llama("huggyllama/llama-7b", **_FIRST),
    "13b": _llama("huggyllama/llama-13b", **_FIRST, **_LLAMA_13B),
    "65b": _llama(
        "huggyllama/llama-65b",
        max_position_embeddings=2048,
        hidden_size=8192,
        intermediate_size=22016,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=64,
    ),
}
VICUNA_V13 = {
    "7b": _llama("lmsys/vicuna-7b-v1.3", **_FIRST),
    "13b": _llama("lmsys/vicuna-13b-v1.3", **_FIRST, **_LLAMA_13B),
}
VICUNA_V11 = {
    "7b": _llama("lmsys/vicuna-7b-v1.1", **_FIRST),
    "13b": _llama("lmsys/vicuna-13b-v1.1", **_FIRST, **_LLAMA_13B),
}
VICUNA_V15 = {
    "7b": _llama("lmsys/vicuna-7b-v1.5"),
    "13b": _llama("lmsys/vicuna-13b-v1.5", **_LLAMA_13B),
}
_LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
LLAMA2 = {
    "7b": _llama("meta-llama/Llama-2-7b-hf"),
    "13b": _llama("meta-llama/Llama-2-13b-hf", **_LLAMA_13B),
    "70b": _llama("meta-llama/Llama-2-70b-hf", **_LLAMA_70B),
}
LLAMA2_CHAT = {
    size: dataclasses.replace(part, path=part.path.replace("-hf", "-chat-hf")) for size, part in LLAMA2.items()
}
SHEARED_LLAMA_2_7B = _llama(
    "princeton-nlp/Sheared-LLaMA-2.7B",
    hidden_size=2560,
    intermediate_size=6912,
    num_attention_heads=20,
    num_key_value_heads=20,
)
LLAMA3_8B_INSTRUCT = _llama(
    "meta-llama/Meta-Llama-3-8B-Instruct",
    vocab_size=128256,
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_theta=500000.0,
    bos_token_id=128000,
    eos_token_id=128009,
)
HERMES_2_YI_34B = _llama(
    "NousResearch/Nous-Hermes-2-Yi-34B",
    vocab_size=64000,
    hidden_size=7168,
    intermediate_size=20480,
    num_hidden_layers=60,
    num_attention_heads=56,
    num_key_value_heads=8,
    rope_theta=5000000.0,
    eos_token_id=7,
)
PHI_1_5 = Part(
    "microsoft/phi-1_5",
    {
        "model_type": "phi",
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
)
QWEN2_1_5B_INSTRUCT = Part(
    "Qwen/Qwen2-1.5B-Instruct",
    {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
)

def _opt(path: str, width: int) -> Part:
    return Part(
        path,
        {
            "model_type": "opt",
            "vocab_size": 50272,
            "hidden_size": width,
            "ffn_dim": 4 * width,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "word_embed_proj_dim": width,
            "do_layer_norm_before": True,
            "activation_function": "relu",
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
    )


OPT = {"2.7b": _opt("facebook/opt-2.7b", 2560), "6.7b": _opt("facebook/opt-6.7b", 4096)}


def _flan_t5(path: str, width: int, mlp_width: int, heads: int) -> Part:
    return Part(
        path,
        {
            "model_type": "t5",
            "vocab_size": 32128,
            "d_model": width,
            "d_kv": 64,
            "d_ff": mlp_width,
            "num_layers": 24,
            "num_heads": heads,
            "feed_forward_proj": "gated-gelu",
            "layer_norm_epsilon": 1e-6,
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
    )


FLAN_T5 = {
    "xl": _flan_t5("google/flan-t5-xl", 2048, 5120, 32),
    "xxl": _flan_t5("google/flan-t5-xxl", 4096, 10240, 64),
}

# EVA-CLIP's ViT-g without its last block, as BLIP-2 has it: with the norm behind it that its Q-Former was trained with.
EVA_G = Part(
    "Salesforce/blip2-opt-2.7b",
    {
        "model_type": "blip_2_vision_model",
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_hidden_layers": 39,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    },
)


MPT_7B = Part(
    "mosaicml/mpt-7b",
    {
        "model_type": "mpt",
        "vocab_size": 50432,
        "d_model": 4096,
        "n_heads": 32,
        "n_layers": 32,
        "max_seq_len": 2048,
        "attn_config": {"alibi": True},
    },
)


def _clip_l(path: str, image_size: int) -> Part:
    return Part(
        path,
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": image_size,
            "patch_size": 14,
            "projection_dim": 768,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
    )


CLIP_B_16 = Part(
    "openai/clip-vit-base-patch16",
    {
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "projection_dim": 512,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
)
CLIP_L_224 = _clip_l("openai/clip-vit-large-patch14", 224)
CLIP_L_224_PROJECTED = dataclasses.replace(
    CLIP_L_224, config={**CLIP_L_224.config, "architectures": ["CLIPVisionModelWithProjection"]}
)
CLIP_H_224 = Part(
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    {
        "model_type": "clip_vision_model",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    },
)
CLIP_L_336 = _clip_l("openai/clip-vit-large-patch14-336", 336)
SIGLIP_SO400M_384 = Part(
    "google/siglip-so400m-patch14-384",
    {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
)
INTERNVIT_6B_448 = Part(
    "OpenGVLab/InternViT-6B-448px-V1-2",
    {
        "model_type": "internvl_vision",
        "hidden_size": 3200,
        "intermediate_size": 12800,
        "num_hidden_layers": 45,
        "num_attention_heads": 25,
        "image_size": 448,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "norm_type": "rms_norm",
        "attention_bias": False,
        "use_qk_norm": True,
    },
)

# The data of LLaVA, on which many others were trained as well.
ALPACA_52K = Source(kind="alpaca", path="data/alpaca_data.json", samples=52_002)
CC3M_595K = Source(path="data/LLaVA-CC3M-Pretrain-595K/chat.json", images="data/LLaVA-CC3M-Pretrain-595K/images", samples=595_375)
LCS_558K = Source(path="data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", images="data/LLaVA-Pretrain/images", samples=558_128)
INSTRUCT_158K = Source(path="data/llava_instruct_158k.json", images="data/coco/train2014", samples=157_712)
MIX_665K = Source(path="data/llava_v1_5_mix665k.json", images="data/llava_v1_5_images", samples=665_298)
