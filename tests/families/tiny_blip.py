"""Tiny random BLIP-2 and InstructBLIP models of transformers, every parameter drawn, and inputs for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

PLACEHOLDER, VOCABULARY, QUERIES, WORDS, SIDE = 97, 98, 3, 40, 28
LANGUAGE: dict[str, Any] = {
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=56, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    ),
    "t5": lambda: T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=12, d_ff=56, num_layers=2, num_heads=4,
        feed_forward_proj="relu", relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0,
    ),
    "flan_t5": lambda: T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=56, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0,
    ),
}  # fmt: skip


def model(language: str, instructed: bool, layers: int = 5, every: int = 2) -> Any:
    width = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    config, built = (
        (InstructBlipConfig, InstructBlipForConditionalGeneration)
        if instructed
        else (Blip2Config, Blip2ForConditionalGeneration)
    )
    whole = config(
        vision_config={**width, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": 14},
        qformer_config={
            "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": layers,
            "cross_attention_frequency": every, "vocab_size": WORDS, "max_position_embeddings": 16,
        },
        text_config=LANGUAGE[language]().to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=PLACEHOLDER,
    )  # fmt: skip
    torch.manual_seed(0)
    made = built(whole).eval()
    for name, parameter in made.named_parameters():
        mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean, 0.1 if mean else 0.2)
    return made


def inputs(
    instructed: bool, encoder_decoder: bool, images_per_row: tuple[int, ...] = (1, 1, 2), left: bool = True, seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows of images, then text; padded between the two (`left`) or at their end."""
    rng = np.random.default_rng(seed)
    heads = [[PLACEHOLDER] * QUERIES * count for count in images_per_row]
    texts = [list(rng.integers(3, 90, 4 + 2 * row)) for row in range(len(images_per_row))]
    length = max(len(head) + len(text) for head, text in zip(heads, texts))
    ids, mask = [], []
    for head, text in zip(heads, texts):
        pads = [1] * (length - len(head) - len(text))
        ids.append(head + (pads + text if left else text + pads))
        real = [1] * len(text)
        mask.append([1] * len(head) + ([0] * len(pads) + real if left else real + [0] * len(pads)))
    given = {"input_ids": np.array(ids), "attention_mask": np.array(mask)}
    images = sum(images_per_row)
    given["pixel_values"] = rng.standard_normal((images, 3, SIDE, SIDE)).astype(np.float32)
    labels = np.where((given["attention_mask"] == 1) & (given["input_ids"] != PLACEHOLDER), given["input_ids"], -100)
    if encoder_decoder:
        labels = rng.integers(3, 90, (len(ids), 4))
        labels[0, 2:] = -100
    given["labels"] = labels
    if instructed:
        given["qformer_input_ids"] = rng.integers(3, WORDS, (images, 5))
        given["qformer_attention_mask"] = (np.arange(5) < rng.integers(2, 6, (images, 1))).astype(int)
    return given


def tensors(given: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in given.items()}


def run(made: Any, given: dict[str, np.ndarray]) -> Any:
    with torch.no_grad():
        return made(**tensors(given))


def greedy(made: Any, given: dict[str, np.ndarray], new: int) -> np.ndarray:
    """transformers' next ids, never ending early, without the prompt or the start token."""
    prompt = tensors({name: value for name, value in given.items() if name != "labels"})
    with torch.no_grad():
        ids = made.generate(**prompt, max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return ids[:, -new:].numpy()
