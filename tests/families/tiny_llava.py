"""Tiny random LLaVA models of transformers, every parameter drawn, and inputs for them."""

from __future__ import annotations

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

PLACEHOLDER = 97
SIDE = 28
CLIP, SIGLIP = "clip", "siglip"


def model(
    tower: str, kv_heads: int, *, layer: int | list[int] = -2, strategy: str = "full", **text
) -> LlavaForConditionalGeneration:
    common = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 14,
    }
    vision = CLIPVisionConfig(**common, projection_dim=16) if tower == CLIP else SiglipVisionConfig(**common)
    language = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        **text,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=PLACEHOLDER,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    torch.manual_seed(0)
    built = LlavaForConditionalGeneration(config).eval()
    for name, parameter in built.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean, 0.1 if mean else 0.2)
    return built


def inputs(
    tokens_per_image: int, images_per_row: tuple[int, ...] = (1, 0, 3, 2), seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows with so many images among text of different lengths, padded on the left."""
    rng = np.random.default_rng(seed)
    rows = []
    for row, count in enumerate(images_per_row):
        ids = list(rng.integers(3, 90, 3 + row))
        for _ in range(count):
            ids += [PLACEHOLDER] * tokens_per_image + list(rng.integers(3, 90, 2))
        rows.append(ids)
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + row for row in rows])
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    labels = np.where((ids != PLACEHOLDER) & (mask == 1), ids, -100)
    pixels = rng.standard_normal((sum(images_per_row), 3, SIDE, SIDE)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def run(built: LlavaForConditionalGeneration, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers' logits and loss."""
    with torch.no_grad():
        out = built(**{name: torch.tensor(value) for name, value in given.items()})
    return {"logits": out.logits.numpy(), "loss": out.loss.numpy()}


def greedy(built: LlavaForConditionalGeneration, given: dict[str, np.ndarray], new: int) -> np.ndarray:
    """transformers' next ids, never ending early."""
    prompt = {name: torch.tensor(value) for name, value in given.items() if name != "labels"}
    with torch.no_grad():
        ids = built.generate(**prompt, max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return ids[:, given["input_ids"].shape[1] :].numpy()
