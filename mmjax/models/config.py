"""The shapes of a model: its language model and the union of its parts, as frozen dataclasses. Blocks are described in
mmjax.models.block_config, encoders and connectors in mmjax.models.encoder_config, adapters in mmjax.models.tuning_config.

Everything there and here is static (hashable) and free of arrays, so that any of it can be a static argument of `jax.jit`.
Foreign configuration files are translated to these by `mmjax.families`; recipes never build them by hand.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Sequence

from jax.sharding import Mesh

from mmjax.models.block_config import BlockConfig, Rope
from mmjax.models.encoder_config import (
    ConnectorConfig,
    EncoderConfig,
    FeatureSpec,
    GatedCrossAttentionConfig,
    Merge,
    TextTowerConfig,
    ViTConfig,
)
from mmjax.models.quantised import Quantisation
from mmjax.models.tuning_config import Adapters, AdaptionPromptConfig, NoisePromptConfig

MaskKind = Literal["causal", "prefix", "media", "opening"]
"""What a model's texts see: what stands before; also the whole prompt each other (prefix-LM: PaliGemma, arXiv 2407.07726); also the
tokens of an image each other (Gemma 3, arXiv 2503.19786; GIT, arXiv 2205.14100); also a text's first image and what stands in front
of it each other (moondream 2). See mmjax.spans."""


@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """T5's learned bias of attention by bucketed distance (arXiv 1910.10683), one table for all layers."""

    buckets: int
    max_distance: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A language model: a stack of blocks between embeddings and a head. Causal, or (`causal=False`) an encoder such as BERT's.

    `windows` and `ropes` are the layer pattern: layer i attends within `windows[i % len(windows)]` positions, itself included
    (0 = no limit), and turns by `ropes[i % len(windows)]` (no `ropes`: by block.rope in all layers). Layers are stacked on axis 0
    and scanned in groups of one period.

    embed_width        of token embeddings and of the head's input, joined to the blocks by a Linear each (OPT-350m); 0 = block.width
    embed_scale        what looked-up embeddings are multiplied by (Gemma); media tokens are not
    learned_positions  rows of a table of learned positions; 0 = none. Position p takes row p + position_offset (2 in OPT)
    token_types        rows of a table of segment kinds (BERT); 0 = none
    media_as_they_are  media tokens enter the first block as they are: learned positions (which count the text alone), token types and
                       embed_norm are for the text's (GIT)
    embed_norm, final_norm   a norm before the first block and after the last
    alibi              largest exponent of the slopes of ALiBi (arXiv 2108.12409); 0 = none
    has_head           whether it predicts tokens at all
    logit_scale, logit_softcap   logits * scale, then softcap * tanh(logits / softcap)
    head_transform     a Linear, the blocks' activation and a norm in front of the head (BERT)
    pooler             a Linear and tanh over the first position (BERT)
    classes            width of a Linear over the pooled state (BERT's next sentence); 0 = none
    encoder            of an encoder-decoder (T5): its blocks, whose states `block.memory_width` reads; it shares the token embeddings
    start_token        what an encoder-decoder's decoder begins with
    cache_restarts     whether a cache is computed anew when a text grows past `rope.original_length` (Phi-3's longrope)
    new_rows           ids of the vocabulary whose rows are leaves of their own, ascending (mmjax.models.new_rows)
    beyond             how many of them, the last ones, have no row in the tables
    """

    vocab_size: int
    layers: int
    block: BlockConfig
    max_positions: int
    windows: tuple[int, ...] = (0,)
    ropes: tuple[Rope, ...] = ()
    tied_head: bool = False
    head_bias: bool = False
    causal: bool = True
    embed_width: int = 0
    embed_scale: float = 1.0
    learned_positions: int = 0
    position_offset: int = 0
    token_types: int = 0
    embed_norm: bool = False
    media_as_they_are: bool = False
    final_norm: bool = True
    alibi: float = 0.0
    relative_bias: RelativeBias | None = None
    has_head: bool = True
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    head_transform: bool = False
    pooler: bool = False
    classes: int = 0
    encoder: DecoderConfig | None = None
    start_token: int = 0
    cache_restarts: bool = False
    new_rows: tuple[int, ...] = ()
    beyond: int = 0

    @property
    def table_size(self) -> int:
        """Rows of the embedding table, and outputs of the head, without those that are leaves of their own."""
        return self.vocab_size - self.beyond

    @property
    def input_width(self) -> int:
        """Width of token embeddings, and of the media tokens spliced among them."""
        return self.embed_width or self.block.width


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The union: any of the parts may be absent (a text LLM has no vision; a vision tower has no LLM)."""

    llm: DecoderConfig | None = None
    vision: EncoderConfig | None = None
    text: TextTowerConfig | None = None  # the text half of a two-tower model
    connector: ConnectorConfig | None = None
    cross_attention: GatedCrossAttentionConfig | None = None  # media are read between the LLM's blocks, not spliced
    features: FeatureSpec = FeatureSpec()
    adapters: Adapters = ()
    quantisation: Quantisation | None = None  # of frozen kernels
    logit_bias: bool = False  # SigLIP's two-tower logits carry a bias beside the scale
    image_mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # of pixels scaled to [0, 1]
    image_std: tuple[float, ...] = (1.0, 1.0, 1.0)
    mask: MaskKind = "causal"
    image_aspect: Literal["crop", "squash"] = "squash"  # how the encoder's publisher makes a picture square

    @property
    def language(self) -> DecoderConfig:
        """The LLM. Raises ValueError where there is none."""
        if self.llm is None:
            raise ValueError("this model has no language model")
        return self.llm

    @property
    def encoder(self) -> EncoderConfig:
        """The vision encoder. Raises ValueError where there is none."""
        if self.vision is None:
            raise ValueError("this model has no vision encoder")
        return self.vision

    @property
    def media_beside(self) -> bool:
        """Whether media stand beside the text, read by adapters, and nowhere in it."""
        return any(
            isinstance(a, NoisePromptConfig) or (isinstance(a, AdaptionPromptConfig) and bool(a.media)) for a in self.adapters
        )

    @property
    def tokens_per_tile(self) -> int:
        """Positions of the text that one tile takes: those of its tokens, or of the one that stands for it."""
        if self.cross_attention is not None:
            return 1
        if self.media_beside:
            return 0
        return self.connector.tokens if self.connector else 0

    @property
    def merge(self) -> Merge | Literal["stitched"]:
        """How a picture's tiles become its tokens (see mmjax.data.picture_tokens)."""
        assert self.connector is not None
        return "stitched" if self.features.stitching else self.connector.merge

    def without(self, adapters: Sequence[str]) -> ModelConfig:
        """The same without the adapters of these names."""
        return dataclasses.replace(self, adapters=tuple(a for a in self.adapters if a.name not in adapters)) if adapters else self

    def at_size(self, size: int) -> ModelConfig:
        """The same for pictures of another size."""
        resized = self.for_pictures(size, size)
        own = size // max(self.features.scales)
        return dataclasses.replace(resized, vision=resized.vision.at_size(own)) if resized.vision else resized

    @property
    def picture_size(self) -> int:
        """Side in pixels of the pictures, or their tiles, that the encoder reads at all its scales."""
        return self.encoder.image_size * max(self.features.scales)

    def for_patches(self, count: int) -> ModelConfig:
        """The same with a connector for pictures of so many patches, padding included."""
        assert self.connector is not None
        return dataclasses.replace(self, connector=dataclasses.replace(self.connector, positions=count))

    def for_pictures(self, height: int, width: int) -> ModelConfig:
        """The same with a connector for what the encoder makes of pictures of this height and width."""
        if self.connector is None or not isinstance(self.vision, ViTConfig) or self.features.pooled or self.features.class_tokens:
            return self
        largest = max(self.features.scales)
        patches = (height // largest // self.vision.patch_size) * (width // largest // self.vision.patch_size)
        positions = self.features.positions(self.vision) - self.vision.positions + patches
        if positions == self.connector.positions:
            return self
        return dataclasses.replace(self, connector=dataclasses.replace(self.connector, positions=positions))


@dataclasses.dataclass(frozen=True)
class Execution:
    """How to run, never what to compute: results agree across these settings to rounding."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "reference", "xla", "cudnn", "splash"] = "auto"
    unroll: int = 1  # layers of the scan unrolled into one loop body
    mesh: Mesh | None = None  # where the parameters live; needed by what is divided by hand
