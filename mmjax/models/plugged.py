"""The adapters that plug into layers (mmjax.models.ports): their fresh leaves, and their plugs in a stack of blocks.

What is learned beside the leaves of plugs, but is part of no layer, stands at mine/NAME (mmjax.models.mine).
"""

from __future__ import annotations

import dataclasses
from typing import Callable, Mapping

import jax
import jax.numpy as jnp

from mmjax import tree
from mmjax.models import adaption_prompt, bottleneck, mine, modality_mixture, noise_prompt, ports
from mmjax.models.adaption_prompt import Beside
from mmjax.models.block import Extra
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig
from mmjax.models.modality_mixture import Routed
from mmjax.models.tuning_config import (
    Adapter,
    AdaptionPromptConfig,
    BottleneckConfig,
    ModalityMixtureConfig,
    NoisePromptConfig,
    Part,
)
from mmjax.tree import Params

STACKS: dict[Part, str] = {"llm": "llm", "encoder": "llm/encoder", "vision": "vision"}
"""Where the leaves of a part stand."""


def init(key: jax.Array, adapter: Adapter, config: ModelConfig) -> Params | None:
    """Fresh float32 leaves, from the root of the parameters, one row for each layer that has the adapter; None for one that does not plug
    into layers. Raises ValueError for parts and layers that the model does not have."""
    if isinstance(adapter, AdaptionPromptConfig):
        return {"llm": {"plugs": {adapter.name: adaption_prompt.init(key, adapter, config.language)}}}
    if isinstance(adapter, NoisePromptConfig):
        leaves = {"llm": {"plugs": {adapter.name: noise_prompt.init(key, adapter, config.language)}}}
        if not adapter.audio:
            return leaves
        block = config.language.block
        widths = block.heads * block.head_dim, adapter.audio, adapter.channels
        return {**leaves, "mine": {adapter.name: mine.init(jax.random.fold_in(key, 1), *widths)}}
    if not isinstance(adapter, BottleneckConfig | ModalityMixtureConfig):
        return None
    fresh: Params = {}
    for number, part in enumerate(adapter.parts):
        block, layers = stack(config, part, adapter.name)
        if absent := [layer for layer in adapter.layers if not 0 <= layer < layers]:
            raise ValueError(f"adapter {adapter.name!r}: layers {absent} of {part}, which has {layers}")
        own, rows = jax.random.fold_in(key, number), len(adapter.layers) or layers
        if isinstance(adapter, BottleneckConfig):
            leaves = bottleneck.init(own, adapter, block.width, rows)
        else:
            leaves = modality_mixture.init(own, adapter, block.width, rows)
        fresh |= tree.flatten(leaves, f"{STACKS[part]}/plugs/{adapter.name}/")
    if isinstance(adapter, ModalityMixtureConfig) and "llm" in adapter.parts:
        tokens = modality_mixture.init_tokens(jax.random.fold_in(key, len(adapter.parts)), config.language.input_width)
        fresh |= tree.flatten(tokens, modality_mixture.path(adapter.name) + "/")
    return tree.unflatten(fresh)


def stack(config: ModelConfig, part: Part, name: str) -> tuple[BlockConfig, int]:
    """The blocks of a part, and how many they are. Raises ValueError where the model has no such part."""
    if part == "vision" and isinstance(config.vision, ViTConfig):
        return config.vision.block, config.vision.layers
    decoder = config.llm.encoder if part == "encoder" and config.llm is not None else config.llm if part == "llm" else None
    if decoder is None:
        raise ValueError(f"adapter {name!r}: this model has no blocks of {part!r}")
    return decoder.block, decoder.layers


def plugs(
    config: ModelConfig,
    part: Part,
    beside: Beside | None = None,
    weights: Mapping[str, jax.Array] = {},
    routed: Routed | None = None,
    groups: int = 1,
) -> tuple[ports.Plug, ...]:
    """The plugs of all adapters that have one in this part.

    beside    the media that stand beside the LLM's text
    weights   of adapters with gates, by name: a number, or one for each row (see mmjax.models.adapters)
    routed    how the LLM's text is routed; without it a mixture of modality adapters is left out
    groups    of an encoder's pictures
    """
    found = []
    for adapter in config.adapters:
        if isinstance(adapter, BottleneckConfig) and part in adapter.parts:
            found.append(bottleneck.plug(adapter, stack(config, part, adapter.name)[1]))
        elif isinstance(adapter, ModalityMixtureConfig) and part in adapter.parts:
            layers = stack(config, part, adapter.name)[1]
            if part == "vision":
                found.append(modality_mixture.in_pictures(adapter, layers, groups))
            elif routed is not None:
                found.append(modality_mixture.in_text(adapter, layers, routed))
        elif isinstance(adapter, AdaptionPromptConfig) and part == "llm":
            found.append(_weighed(adaption_prompt.plug(adapter, config.language, beside), weights))
        elif isinstance(adapter, NoisePromptConfig) and part == "llm":
            found.append(_weighed(noise_prompt.plug(adapter, config.language, beside, config.adapters), weights))
    return tuple(found)


def _weighed(plug: ports.Plug, weights: Mapping[str, jax.Array]) -> ports.Plug:
    """The plug with its gate times its weight, () or [rows], if it has one."""
    if plug.name not in weights:
        return plug
    weight = weights[plug.name]

    def call(params: Params, query: jax.Array, project: Callable) -> Extra | None:
        extra = plug.call(params, query, project)
        if extra is None or extra.gate is None:
            return extra
        return extra._replace(gate=extra.gate * (weight[:, None, None] if jnp.ndim(weight) else weight))

    return dataclasses.replace(plug, call=call)
