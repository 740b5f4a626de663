"""The shapes of the parts: what a decoder, an encoder, a connector and their union are, as frozen dataclasses.

Everything here is static (hashable) and free of arrays, so that any of it can be a static argument of `jax.jit`.
Foreign configuration files are translated to these by `mmjax.families`; recipes never build them by hand.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, Union

from jax.sharding import Mesh

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "squared_relu"]


NormKind = Literal["rms", "rms_plus_one", "layer"]
"""RMS norm (arXiv 1910.07467); the same with 1 added to its scale (Gemma); layer norm (arXiv 1607.06450)."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864) and its published context extensions; see mmjax.models.rope.

    `fraction` of each head's channels is rotated, the rest passes through (phi, GPT-NeoX).

    factor, original_length   of every extension
    low/high_frequency_factor     llama3
    max_length                    dynamic: positions up to here are not scaled
    beta_fast, beta_slow, truncate    yarn: where the passage between scaled and unscaled wavelengths lies
    short_factors, long_factors   longrope: divisors of each angle, for inputs up to `original_length` and beyond it
    attention_factor              yarn, longrope: what cosines and sines are multiplied by
    """

    theta: float = 10000.0
    fraction: float = 1.0
    kind: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 0
    max_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in the MLP's place (arXiv 2401.04088): each token goes to the `chosen` experts that its router rates
    highest, and their outputs are added by the softmax of those ratings. No token is ever dropped."""

    count: int
    chosen: int


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One transformer block: attention and MLP, each with a norm and a residual.

    norm_place      "before": x + f(norm(x)); "after": norm(x + f(x)) (BERT); "both": x + norm'(f(norm(x))) (Gemma 2)
    norm_bias       of layer norms
    parallel_norms  0: attention, then the MLP. Else both read the same x, x + attention(norm(x)) + mlp(norm'(x)), through
                    1 norm (phi) or 2 (GPT-NeoX)
    qk_norm         a norm on queries and keys, over each head's channels or over all of them; qk_norm_eps 0 = norm_eps
    scale           of the scores; 0 = 1 / sqrt(head_dim)
    softcap         scores become softcap * tanh(scores / softcap); 0 = none
    clip_qkv        queries, keys and values are clipped to +- this; 0 = not
    layer_scale     a learned factor for each channel of what attention and MLP add (arXiv 2103.17239)
    wide_residual   the residual stream and the MLP's output are float32 whatever the activations are (T5's outgrow float16)
    memory_width    width of the states that a cross-attention between attention and MLP reads; 0 = no cross-attention
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    activation: Activation
    norm: NormKind
    norm_eps: float
    gated_mlp: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    rope: Rope | None = None
    norm_place: Literal["before", "after", "both"] = "before"
    norm_bias: bool = True
    parallel_norms: Literal[0, 1, 2] = 0
    qk_norm: NormKind | Literal[""] = ""
    qk_norm_over: Literal["head", "width"] = "head"
    qk_norm_eps: float = 0.0
    scale: float = 0.0
    softcap: float = 0.0
    clip_qkv: float = 0.0
    layer_scale: bool = False
    wide_residual: bool = False
    experts: Experts | None = None
    memory_width: int = 0


@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """T5's learned bias of attention by bucketed distance (arXiv 1910.10683), one table for all layers."""

    buckets: int
    max_distance: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A language model: a stack of blocks between embeddings and a head. Causal, or (`causal=False`) an encoder such as BERT's.

    `windows` is the layer pattern: layer i attends within `windows[i % len(windows)]` positions, itself included
    (0 = no limit). Layers are stacked on axis 0 and scanned in groups of one period.

    embed_width        of token embeddings and of the head's input, joined to the blocks by a Linear each (OPT-350m); 0 = block.width
    embed_scale        what looked-up embeddings are multiplied by (Gemma); media tokens are not
    learned_positions  rows of a table of learned positions; 0 = none. Position p takes row p + position_offset (2 in OPT)
    token_types        rows of a table of segment kinds (BERT); 0 = none
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
    tied_head: bool = False
    head_bias: bool = False
    causal: bool = True
    embed_width: int = 0
    embed_scale: float = 1.0
    learned_positions: int = 0
    position_offset: int = 0
    token_types: int = 0
    embed_norm: bool = False
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
class FeatureSpec:
    """Which of an encoder's states a connector reads (one for each published system; a wrong one is silent).

    `layer` counts as transformers' hidden_states do: 0 is the embedding output, -1 the output of the last block,
    -2 the input of the last block. Several layers are concatenated on channels.
    """

    layers: tuple[int, ...] = (-1,)
    keep_class_token: bool = False
    post_norm: bool = False
    keep_registers: bool = False

    def positions(self, encoder: EncoderConfig) -> int:
        """Number of positions that the connector reads."""
        kept = 0
        if isinstance(encoder, ViTConfig):
            kept = (self.keep_class_token and encoder.class_token) + self.keep_registers * encoder.registers
        return encoder.positions + kept


Interpolation = Literal["bicubic", "bicubic_antialias", "bilinear_antialias"]


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A vision transformer: all of them, from CLIP to InternVL, are settings of it.

    image_size      side in pixels of the pictures that it is run on
    native_size     side of the pictures whose positions are stored; 0 = image_size. Others have them interpolated
    naflex          its publisher's model takes pictures of any shape, cut into patches (arXiv 2502.14786)
    registers       tokens without a position between the class token and the patches (arXiv 2309.16588)
    mask_token      an unused vector is kept, which only pretraining needed
    learned_positions   whether there are any
    pre_norm        a layer norm in front of the first block
    post_norm       what the layer norm behind the last block acts on: "states" (all of them, before pooling), "pooled" (CLIP:
                    the pooled state alone), "both" (BLIP-2: all states, and the pooled one once more), "" = there is none
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
    class_token: bool = False
    registers: int = 0
    mask_token: bool = False
    learned_positions: bool = True
    patch_bias: bool = True
    pre_norm: bool = False
    post_norm: Literal["", "states", "pooled", "both"] = "states"
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
      identity    nothing

    input_norm     a layer norm in front of the parameters (VILA, AnyMAL); a perceiver has its own
    squeeze_width  one more Linear, activation and layer norm in front of an MLP's `depth` (VILA's 3x3); 0 = none
    token_order    in which order space_to_depth hands out its blocks: row by row, or column by column (VILA-1.5)
    heads, head_dim   of a perceiver; head_dim 0 = hidden_width / heads
    frames, media  rows of a perceiver's embeddings of a video's frames, and of a text's media; 0 = none
    With a `grid` the square map of positions is first averaged to grid x grid cells (overlapping where grid does not divide
    the side, as torch's adaptive average pooling), of whatever kind the connector is.
    """

    kind: Literal["linear", "mlp", "pooled_mlp", "concat", "space_to_depth", "residual_mlp", "perceiver", "cross_self_perceiver", "identity"]
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
    squeeze_width: int = 0
    token_order: Literal["rows", "columns"] = "rows"
    latents: int = 64
    heads: int = 8
    head_dim: int = 0
    frames: int = 0
    media: int = 0

    @property
    def inner_width(self) -> int:
        return self.hidden_width or self.out_width

    @property
    def resamples(self) -> bool:
        return self.kind in ("perceiver", "cross_self_perceiver")

    @property
    def pooled(self) -> int:
        """Positions that its parameters see: those left by the averaging at its beginning, if it has any."""
        return 1 if self.kind == "pooled_mlp" else self.grid**2 or self.positions

    @property
    def tokens(self) -> int:
        """LLM tokens for one image tile."""
        if self.kind == "pooled_mlp":
            return self.pooled_tokens
        if self.kind == "concat":
            return self.pooled // self.group
        if self.resamples:
            return self.latents
        if self.kind == "space_to_depth":
            return (-(-math.isqrt(self.pooled) // self.group)) ** 2
        return self.pooled


@dataclasses.dataclass(frozen=True)
class GatedCrossAttentionConfig:
    """Gated cross-attention between a language model's blocks (arXiv 2204.14198); see mmjax.models.gated_cross_attention.

    block             its shapes; `memory_width` is that of the media tokens. No output bias: what sees nothing gets nothing
    last_media_only   a text position sees the latest medium begun, not all of them
    vector_gates      a gate for each channel instead of one for all (IDEFICS)
    """

    block: BlockConfig
    last_media_only: bool = True
    vector_gates: bool = False


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """One named low-rank adapter (arXiv 2106.09685) on every Linear whose path matches one of `targets`.

    The change of a weight is lora_a @ lora_b * alpha / rank (alpha / sqrt(rank) with `rank_stabilised`, arXiv 2312.03732).
    """

    name: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The union: any of the parts may be absent (a text LLM has no vision; a vision tower has no LLM)."""

    llm: DecoderConfig | None = None
    vision: EncoderConfig | None = None
    text: TextTowerConfig | None = None  # the text half of a two-tower model
    connector: ConnectorConfig | None = None
    features: FeatureSpec = FeatureSpec()
    adapters: tuple[LoraConfig, ...] = ()
    logit_bias: bool = False  # SigLIP's two-tower logits carry a bias beside the scale
    image_mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # of pixels scaled to [0, 1]
    image_std: tuple[float, ...] = (1.0, 1.0, 1.0)
    image_aspect: Literal["crop", "squash"] = "squash"  # how the encoder's publisher makes a picture square

    @property
    def language(self) -> DecoderConfig:
        """The LLM. Raises ValueError where there is none."""
        if self.llm is None:
            raise ValueError("this model has no language model")
        return self.llm

    @property
    def tokens_per_tile(self) -> int:
        return self.connector.tokens if self.connector else 0

    def at_size(self, size: int) -> ModelConfig:
        """The same for pictures of another size."""
        resized = self.for_pictures(size, size)
        return dataclasses.replace(resized, vision=resized.vision.at_size(size)) if resized.vision else resized

    def for_pictures(self, height: int, width: int) -> ModelConfig:
        """The same with a connector for what the encoder makes of pictures of this height and width."""
        if self.connector is None or not isinstance(self.vision, ViTConfig):
            return self
        patches = (height // self.vision.patch_size) * (width // self.vision.patch_size)
        positions = self.features.positions(self.vision) - self.vision.positions + patches
        if positions == self.connector.positions:
            return self
        return dataclasses.replace(self, connector=dataclasses.replace(self.connector, positions=positions))


@dataclasses.dataclass(frozen=True)
class Execution:
    """How to run, never what to compute: results agree across these settings to rounding."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "reference", "xla", "cudnn"] = "auto"
    unroll: int = 1  # layers of the scan unrolled into one loop body
    mesh: Mesh | None = None  # where the parameters live; needed by what is divided by hand (experts)
