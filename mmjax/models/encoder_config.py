"""What encoders are, and the connectors between them and a language model, as frozen dataclasses. See mmjax.models.config."""

from __future__ import annotations

import dataclasses
import math
import sys
from types import ModuleType
from typing import Literal, Union

from mmjax.models.block_config import Activation, BlockConfig, NormKind


@dataclasses.dataclass(frozen=True)
class Stitching:
    """The tiles of a picture's grid put together into one map, at the size of one tile's (see mmjax.models.stitching).

    resize    of that map: "area" (the mean of equal parts, overlapping where they do not fit, as torch's adaptive average pooling),
              or "bilinear" (between the two nearest positions, without smoothing)
    overlap   how many positions a tile reaches beyond its own part of the picture, on each side
    """

    resize: Literal["area", "bilinear"] = "area"
    overlap: int = 0


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """Which of an encoder's states a connector reads (one for each published system; a wrong one is silent).

    `layer` counts as transformers' hidden_states do: 0 is the embedding output, -1 the output of the last block,
    -2 the input of the last block. Several layers are concatenated on channels.
    `pooled`: what the encoder itself makes of all its states, one vector, in place of them. `stitching`: a picture is an overview
    and a grid of tiles, whose maps are joined on channels. `scales` of the picture, as multiples of the encoder's own size (see
    mmjax.models.scales); concatenated on channels as well. `projected`: each position goes through the tower's own projection
    (LLaMA-Adapter V2 reads CLIP so). `class_tokens`: of each layer the class token alone, a position for each (LaVIN).
    """

    layers: tuple[int, ...] = (-1,)
    keep_class_token: bool = False
    post_norm: bool = False
    keep_registers: bool = False
    pooled: bool = False
    stitching: Stitching | None = None
    scales: tuple[int, ...] = (1,)
    projected: bool = False
    class_tokens: bool = False

    def positions(self, encoder: EncoderConfig) -> int:
        """Number of positions that the connector reads."""
        if self.pooled or self.class_tokens:
            return len(self.layers) if self.class_tokens else 1
        kept = 0
        if isinstance(encoder, ViTConfig):
            kept = (self.keep_class_token and encoder.class_token) + self.keep_registers * encoder.registers
        return encoder.positions + kept

    @property
    def joined(self) -> bool:
        """Whether a connector reads something other than the positions of a tile."""
        return self.pooled or self.class_tokens or self.stitching is not None

    def tile_width(self, encoder: EncoderConfig) -> int:
        """Channels of a tile's features."""
        width = encoder.projection if self.projected and isinstance(encoder, ViTConfig) else encoder.feature_width
        return width * (1 if self.class_tokens else len(self.layers)) * len(self.scales)

    def width(self, encoder: EncoderConfig) -> int:
        """Channels that the connector reads."""
        return self.tile_width(encoder) * (2 if self.stitching else 1)


Interpolation = Literal["bicubic", "bicubic_antialias", "bilinear_antialias"]


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A vision transformer: all of them, from CLIP to InternVL, are settings of it.

    image_size      side in pixels of the pictures that it is run on
    native_size     side of the pictures whose positions are stored; 0 = image_size. Others have them interpolated
    naflex          its publisher's model takes pictures of any shape, cut into patches (arXiv 2502.14786)
    patch_frames    pictures of a video that one patch spans; a single picture stands there as often (Qwen2-VL)
    registers       tokens without a position between the class token and the patches (arXiv 2309.16588)
    mask_token      an unused vector is kept, which only pretraining needed
    learned_positions   whether there are any
    pre_norm        a layer norm in front of the first block
    post_norm       what the layer norm behind the last block acts on: "states" (all of them, before pooling), "pooled" (CLIP:
                    the pooled state alone), "both" (BLIP-2: all states, and the pooled one once more), "" = there is none
    post_norm_eps   its epsilon; 0 = the blocks' (LAVIS's BLIP-2 has another)
    pooling         how states become one; "class_and_mean" joins the class token and the mean of the patches on channels
    pooler          width of a Linear with `pooler_activation` over the pooled state, which no head reads (ViT); 0 = none
    projection      width of the bias-free projection of the pooled state; 0 = none
    classes         width of the classification head over the pooled state; 0 = none
    """

    image_size: int
    patch_size: int
    layers: int
    block: BlockConfig
    channels: int = 3
    native_size: int = 0
    interpolation: Interpolation = "bicubic"
    naflex: bool = False
    patch_frames: int = 1
    class_token: bool = False
    registers: int = 0
    mask_token: bool = False
    learned_positions: bool = True
    patch_bias: bool = True
    pre_norm: bool = False
    post_norm: Literal["", "states", "pooled", "both"] = "states"
    post_norm_eps: float = 0.0
    pooling: Literal["none", "class_token", "attention", "mean", "class_and_mean"] = "none"
    pooler: int = 0
    pooler_activation: Activation | Literal["tanh"] = "tanh"
    projection: int = 0
    classes: int = 0

    @property
    def positions(self) -> int:
        """Number of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches."""
        return self.class_token + self.registers

    @property
    def native_side(self) -> int:
        """Side of the square map of stored positions."""
        return (self.native_size or self.image_size) // self.patch_size

    @property
    def feature_width(self) -> int:
        return self.block.width

    def at_size(self, size: int) -> ViTConfig:
        """The same for pictures of another size; stored positions stay."""
        native = self.native_size or self.image_size
        return dataclasses.replace(self, image_size=size, native_size=0 if size == native else native)


@dataclasses.dataclass(frozen=True)
class MobileNetV2Config:
    """MobileNetV2 (arXiv 1801.04381) as transformers lays it out; batch norms are folded into the convolutions."""

    image_size: int = 224
    depth_multiplier: float = 1.0
    depth_divisible_by: int = 8
    min_depth: int = 8
    expand_ratio: float = 6.0
    output_stride: int = 32
    first_layer_is_expansion: bool = True
    finegrained_output: bool = True
    tf_padding: bool = True
    activation: str = "relu6"
    norm_eps: float = 0.001
    channels: int = 3
    classes: int = 0

    def scaled(self, channels: int) -> int:
        """Channels of a layer under the depth multiplier."""
        return divisible(round(channels * self.depth_multiplier), self.depth_divisible_by, self.min_depth)

    @property
    def positions(self) -> int:
        return (-(-self.image_size // self.output_stride)) ** 2

    @property
    def feature_width(self) -> int:
        return 1280 if self.finegrained_output and self.depth_multiplier < 1 else self.scaled(1280)

    def at_size(self, size: int) -> MobileNetV2Config:
        """The same for pictures of another size."""
        return dataclasses.replace(self, image_size=size)


def divisible(value: int, divisor: int, minimum: int) -> int:
    """Channels rounded to a multiple of `divisor`, never more than 10 % down (the rule of the MobileNet papers)."""
    rounded = max(minimum, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
    """The text half of a two-tower (CLIP, SigLIP) model."""

    vocab_size: int
    layers: int
    block: BlockConfig
    max_positions: int
    causal: bool
    pooling: Literal["last", "end_of_text"]
    projection: int
    projection_bias: bool
    end_of_text: int = -1


EncoderConfig = Union[ViTConfig, MobileNetV2Config]
Merge = Literal["flat", "spatial", "spatial_unpad"]


PERCEIVERS = ("perceiver", "cross_self_perceiver")
CONNECTORS = ("linear", "mlp", "pooled_mlp", "concat", "space_to_depth", "residual_mlp", *PERCEIVERS, "qformer", "visual_blocks", "identity")


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """From encoder features [items, positions, in_width] to LLM tokens [items, tokens, out_width].

    kind:
      linear      one Linear on each position ("per-patch linear")
      mlp         `depth` Linears with the activation between them (LLaVA-1.5's mlp2x_gelu is depth 2)
      pooled_mlp  mean over positions, then an MLP whose last Linear makes `tokens` LLM tokens at once (doubutsu's first)
      concat      `group` neighbouring positions concatenated on channels, then an MLP of `depth` (MiniGPT-4, doubutsu's second)
      space_to_depth  the square map cut into blocks of `group` x `group` positions, concatenated on channels row by row, then an MLP
                  of `depth` (VILA, arXiv 2312.07533); a map that `group` does not divide gets zeros at right and bottom
      residual_mlp  MLP, layer norm, then x + MLP(x), both through `hidden_width` (moondream 1)
      perceiver, cross_self_perceiver  `latents` learned queries read the positions in `depth` layers of `hidden_width`
                  (Flamingo, AnyMAL; see mmjax.models.perceiver)
      qformer     `latents` learned queries run through `depth` layers of a BERT, and read the positions in every `cross_every`-th of
                  them (BLIP-2; see mmjax.models.qformer); then a Linear
      visual_blocks   `latents` learned queries before the positions, through `depth` blocks of `hidden_width`, between two Linears with
                  norms (LLaMA-Adapter V2; see mmjax.models.visual_blocks)
      identity    nothing
      a module's name, with a dot or without   a connector of one's own (see mmjax.models.connectors)

    input_norm     a norm in front of the parameters (VILA, AnyMAL, Gemma 3); a perceiver has its own
    norm_each      ... of each position, before positions are put together (Qwen2-VL)
    output_norm    a norm behind them (GIT)
    norm, norm_eps   of these two; norm_eps also of a Q-Former's
    squeeze_width  one more Linear, activation and layer norm in front of an MLP's `depth` (VILA's 3x3); 0 = none
    token_order    in which order space_to_depth hands out its blocks: row by row, or column by column (VILA-1.5)
    heads, head_dim   of a perceiver or Q-Former; head_dim 0 = hidden_width / heads
    widening       how much wider a perceiver's MLPs are than its latents
    frames         embeddings of a video's frames: a perceiver's own, else added to the features of each frame (GIT); 0 = none
    media          a perceiver's embeddings of a text's media; 0 = none
    merge          how the tokens of a picture's tiles become those of the picture (see mmjax.data.picture_tokens)
    qk_norm        a layer norm over each head's queries and keys in a perceiver (IDEFICS)
    mlp_width      of a Q-Former's feed-forward layers; 0 = 4 * hidden_width
    text_vocab, text_positions   rows of a Q-Former's tables of words and of their positions; 0 = it reads no text
    contrast_width   width in which a Q-Former compares pictures with texts; with it the heads of BLIP-2's first stage are there
                  (mmjax.models.image_text). 0 = none
    With a `grid` the square map of positions is first averaged to grid x grid cells (overlapping where grid does not divide
    the side, as torch's adaptive average pooling), of whatever kind the connector is.
    """

    kind: str
    in_width: int
    out_width: int
    positions: int
    depth: int = 2
    hidden_width: int = 0  # 0 = out_width
    activation: Activation = "gelu"
    bias: bool = True
    group: int = 1
    pooled_tokens: int = 1
    grid: int = 0
    input_norm: bool = False
    norm_each: bool = False
    output_norm: bool = False
    norm: NormKind = "layer"
    norm_eps: float = 1e-5
    squeeze_width: int = 0
    token_order: Literal["rows", "columns"] = "rows"
    latents: int = 64
    widening: int = 4
    heads: int = 8
    head_dim: int = 0
    frames: int = 0
    media: int = 0
    merge: Merge = "flat"
    qk_norm: bool = False
    cross_every: int = 2
    mlp_width: int = 0
    text_vocab: int = 0
    text_positions: int = 512
    contrast_width: int = 0

    def __post_init__(self) -> None:
        # Only what a recipe names is imported (mmjax.config_checks): a directory's config.json cannot make any code run.
        if self.kind not in CONNECTORS and self.kind not in sys.modules:
            raise ValueError(
                f"{self.kind!r} is no kind of connector ({', '.join(CONNECTORS)}); if it is a module of your own, import it first"
            )

    @property
    def own(self) -> ModuleType | None:
        """The module of a connector that is none of ours."""
        return None if self.kind in CONNECTORS else sys.modules[self.kind]

    @property
    def newline(self) -> bool:
        """Whether there is a learned vector that stands behind every row of a picture's tokens."""
        return self.merge == "spatial_unpad"

    @property
    def inner_width(self) -> int:
        return self.hidden_width or self.out_width

    @property
    def resamples(self) -> bool:
        return self.kind in PERCEIVERS

    @property
    def pooled(self) -> int:
        """Positions that its parameters see: those left by the averaging at its beginning, if it has any."""
        return 1 if self.kind == "pooled_mlp" else self.grid**2 or self.positions

    @property
    def tokens(self) -> int:
        """LLM tokens for one image tile."""
        if self.own is not None:
            return self.own.tokens(self)
        if self.kind == "pooled_mlp":
            return self.pooled_tokens
        if self.kind == "concat":
            return self.pooled // self.group
        if self.resamples or self.kind in ("qformer", "visual_blocks"):
            return self.latents
        if self.kind == "space_to_depth":
            return (-(-math.isqrt(self.pooled) // self.group)) ** 2
        return self.pooled


@dataclasses.dataclass(frozen=True)
class GatedCrossAttentionConfig:
    """Gated cross-attention between a language model's blocks (arXiv 2204.14198); see mmjax.models.gated_cross_attention.

    block             its shapes; `memory_width` is that of the media tokens. No output bias: what sees nothing gets nothing
    layers            the decoder layers before which it sits, ascending
    last_media_only   a text position sees the latest medium begun, not all of them
    vector_gates      a gate for each channel instead of one for all (IDEFICS)
    """

    block: BlockConfig
    layers: tuple[int, ...] = ()
    last_media_only: bool = True
    vector_gates: bool = False
