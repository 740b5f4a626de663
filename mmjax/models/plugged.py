"""The adapters that plug into layers (mmjax.models.ports): their fresh leaves, and their plugs in a stack of blocks."""

from __future__ import annotations

import jax

from mmjax import tree
from mmjax.models import bottleneck, ports
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig
from mmjax.models.tuning_config import Adapter, BottleneckConfig, Part
from mmjax.tree import Params

STACKS: dict[Part, str] = {"llm": "llm", "encoder": "llm/encoder", "vision": "vision"}
"""Where the leaves of a part stand."""


def init(key: jax.Array, adapter: Adapter, config: ModelConfig) -> Params | None:
    """Fresh float32 leaves, from the root of the parameters, one row for each layer that has the adapter; None for one that does not plug
    into layers. Raises ValueError for parts and layers that the model does not have."""
    if not isinstance(adapter, BottleneckConfig):
        return None
    fresh: Params = {}
    for number, part in enumerate(adapter.parts):
        block, layers = stack(config, part, adapter.name)
        if absent := [layer for layer in adapter.layers if not 0 <= layer < layers]:
            raise ValueError(f"adapter {adapter.name!r}: layers {absent} of {part}, which has {layers}")
        leaves = bottleneck.init(jax.random.fold_in(key, number), adapter, block.width, len(adapter.layers) or layers)
        fresh |= tree.flatten(leaves, f"{STACKS[part]}/plugs/{adapter.name}/")
    return tree.unflatten(fresh)


def stack(config: ModelConfig, part: Part, name: str) -> tuple[BlockConfig, int]:
    """The blocks of a part, and how many they are. Raises ValueError where the model has no such part."""
    if part == "vision" and isinstance(config.vision, ViTConfig):
        return config.vision.block, config.vision.layers
    decoder = config.llm.encoder if part == "encoder" and config.llm is not None else config.llm if part == "llm" else None
    if decoder is None:
        raise ValueError(f"adapter {name!r}: this model has no blocks of {part!r}")
    return decoder.block, decoder.layers


def plugs(config: ModelConfig, part: Part) -> tuple[ports.Plug, ...]:
    """The plugs of all adapters that have one in this part."""
    found = []
    for adapter in config.adapters:
        if isinstance(adapter, BottleneckConfig) and part in adapter.parts:
            found.append(bottleneck.plug(adapter, stack(config, part, adapter.name)[1]))
    return tuple(found)
