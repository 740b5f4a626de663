"""The two halves of an encoder-decoder (T5, arXiv 1910.10683): the encoder reads, the decoder writes and looks at what was read.

Both are mmjax.models.decoder; the encoder's leaves stand at `encoder` among the decoder's, and share its token embeddings.
"""

from __future__ import annotations

from typing import Any

import jax

from mmjax.models.block import memory_keys_values
from mmjax.models.config import DecoderConfig, Execution
from mmjax.models.decoder import Decoded, Memory, Params, decode
from mmjax.models.stack import run_stack
from mmjax.models.tuning_config import Adapters


def encode(
    params: Params,
    config: DecoderConfig,
    x: jax.Array,
    *,
    segments: jax.Array,
    positions: jax.Array,
    run: Execution,
    adapters: Adapters = (),
    **settings: Any,
) -> Decoded:
    """Runs the encoder over embeddings x [rows, S, input width]. `params` and `config` are the whole language model's; `settings`
    are those of mmjax.models.decoder.decode."""
    assert config.encoder is not None
    return decode(
        params["encoder"], config.encoder, x, segments=segments, positions=positions, run=run, adapters=adapters, **settings
    )


def remember(
    params: Params,
    config: DecoderConfig,
    states: jax.Array,
    segments: jax.Array,
    run: Execution,
    adapters: Adapters = (),
) -> Memory:
    """What the decoder's layers read of the encoder's last states [rows, S, width], where segments [rows, S] are not 0."""

    def body(states, layer, j, index, extra):
        return states, memory_keys_values(layer, config.block, states, adapters)

    crossed = params["layers"]["cross_attention"]
    projections = {"cross_attention": {name: crossed[name] for name in ("key", "value", "key_norm") if name in crossed}}
    _, (keys, values) = run_stack(body, states, projections, layers=config.layers, run=run)
    return Memory(keys, values, segments)
