"""The one typed batch: what data hands to the model, in training, evaluation and generation alike.

Rows hold one sample or several packed ones. Media stand beside the rows in `groups` (one for each shard of the data
axes, so that a row's media live on its own devices): row r of R belongs to group r // (R // groups), and `media[r, t]` is
an index into that group's media tokens, tile after tile. Behind those of all tiles stands the connector's newline, if it has one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Arrays of numpy or jax. Fields that a use does not need are None.

    tokens      int32 [rows, length]   token ids; 0 at media positions and at padding
    segments    int32 [rows, length]   0 = padding; 1, 2, ... = the packed samples of the row
    positions   int32 [rows, length]   position within the sample; [rows, length, axes] where a position has several (M-RoPE)
    spans       int32 [rows, length]   positions of one sample with equal numbers above 0 see each other, whatever is causal; None = no two
    media       int32 [rows, length]   index of the media token spliced here, -1 at text
    virtual     int32 [rows, length]   which of the virtual tokens of prompts stands here (mmjax.models.prompts), -1 at all else; None = there are none
    task        int32 [rows, length]   of multi-task prompts: the task of the position's sample
    begun       int32 [rows, length]   where blocks read media by cross-attention: which of `row_media` the position belongs to,
                                       counted from 1; 0 = none. The text holds one ordinary token for a medium; `media` is -1 there
    row_media   int32 [rows, media]    tile of the group that is the row's 1st, 2nd, ... medium, -1 = none
    media_segments   int32 [rows, media]   the packed sample that it belongs to
    media_seen  bool [rows, length, media]   in the place of `begun`: which media each position sees
    targets     int32 [rows, length]   the id to be predicted *from* this position (already shifted)
    weights     float32 [rows, length] weight of that prediction in the loss, 0 = not supervised
    decoder_tokens, decoder_segments   int32 [rows, T]   of an encoder-decoder, whose encoder reads `tokens`: what its decoder
                                       reads; `targets` and `weights` are then [rows, T]. None = the start token alone
    images      uint8 [groups, tiles, height, width, channels]   pixels; the model normalises. [groups, tiles, frames, ...] where a
                                                                 perceiver reads several frames as one medium
    features    float [groups, tiles, positions, width]          cached encoder features in place of `images`
    audio       float [groups, tiles, 2, width]   where `features` are noise embeddings of N-best lists: means of noisy and clean audio features
    tiles       bool [groups, tiles]   which tiles are real; the others are dummies that no row points at
    frames      int32 [groups, tiles]  which frame of its video each tile is, from 0; -1 = a picture; None = there is no video
    grids       int32 [groups, pictures, 3]   of pictures whose tiles are stitched: the overview's tile in the group, rows and columns of
                the tiles behind it; 0 rows = the overview alone. `media` then counts picture after picture
    classes     int32 [groups, tiles]  class of each tile (classification objective), -1 = none
    connector_tokens, connector_segments   int32 [groups, tiles, L]   text that a Q-Former reads beside a tile, in its own vocabulary, and
                                       1 where there is some, 0 at padding
    """

    tokens: Any = None
    segments: Any = None
    positions: Any = None
    spans: Any = None
    media: Any = None
    virtual: Any = None
    task: Any = None
    begun: Any = None
    row_media: Any = None
    media_segments: Any = None
    media_seen: Any = None
    targets: Any = None
    weights: Any = None
    decoder_tokens: Any = None
    decoder_segments: Any = None
    images: Any = None
    features: Any = None
    audio: Any = None
    tiles: Any = None
    frames: Any = None
    grids: Any = None
    classes: Any = None
    connector_tokens: Any = None
    connector_segments: Any = None
