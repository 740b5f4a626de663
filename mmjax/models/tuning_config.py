"""The ways of tuning a model beside its weights, each a frozen dataclass with a name of its own: what ModelConfig.adapters lists.

`targets` are globs over paths of Linears (which end before `/kernel`; `norm`: of norms, before `/scale`). They take layer ranges
(`llm/layers[16:32]/attention/**`): leaves are then made for those layers alone. `peft` is what else a peft directory said of an
adapter, as JSON, to be written again; recipes leave it empty.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from mmjax.models.block_config import Activation

Targets: TypeAlias = tuple[str, ...]
Part = Literal["llm", "encoder", "vision"]
"""A stack of blocks: of the language model (of an encoder-decoder its decoder's, and its encoder's), of the vision transformer."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (arXiv 2106.09685), see mmjax.models.lora.

    The change of a weight is lora_a @ lora_b * alpha / rank (alpha / sqrt(rank) with `rank_stabilised`, arXiv 2312.03732).

    rank_pattern, alpha_pattern   (glob over Linears, value) in the place of rank and alpha; the first that matches counts
    dora       the columns of the changed weight get norms of their own (arXiv 2402.09353)
    bias       which biases of the model get a copy that is trained: "lora_only", those of the Linears chosen; "all", every one
    lora_bias  lora_b has a bias of its own
    whole      globs over leaves that get a copy which is trained whole (peft's modules_to_save)
    token_ids  rows of the embedding table that get a copy which is trained (peft's trainable_token_indices)
    """

    name: str
    rank: int
    alpha: float
    targets: Targets
    dropout: float = 0.0
    rank_stabilised: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    whole: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    peft: str = ""

    @property
    def scale(self) -> float:
        return self.scale_of(self.rank, self.alpha)

    def scale_of(self, rank: int, alpha: float) -> float:
        return alpha / (rank**0.5 if self.rank_stabilised else rank)


@dataclasses.dataclass(frozen=True)
class Ia3Config:
    """Learned factors of a Linear's outputs, or, where one of `feedforward` names it, of its inputs (arXiv 2205.05638), see
    mmjax.models.elementwise. The paper scales keys, values and the inputs of the MLP's last Linear."""

    name: str
    targets: Targets
    feedforward: Targets = ()
    whole: tuple[str, ...] = ()
    peft: str = ""


@dataclasses.dataclass(frozen=True)
class AffineConfig:
    """LLaMA-Adapter V2's bias and scale of a Linear (arXiv 2304.15010), see mmjax.models.elementwise.

    order   "output": scale * (W x + bias), as in the paper; "input": W (x * scale) + bias, as its chat65b was released; "bias": W x +
            bias, as its multimodal7b was
    """

    name: str
    targets: Targets
    order: Literal["output", "input", "bias"] = "output"


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """A norm's scale and bias, tuned in copies (peft's LN_TUNING; LLaMA-Adapter V2, arXiv 2304.15010), see mmjax.models.adapters."""

    name: str
    targets: Targets
    whole: tuple[str, ...] = ()
    peft: str = ""


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Prompt tuning (arXiv 2104.08691): learned vectors before each sample's text, see mmjax.models.prompts.

    tokens   virtual tokens
    text     they begin as its embeddings, repeated or cut to `tokens` (where a recipe is assembled, which has a tokenizer); "" = drawn
    """

    name: str
    tokens: int = 20
    text: str = ""
    peft: str = ""


@dataclasses.dataclass(frozen=True)
class PTuningConfig:
    """P-tuning (arXiv 2103.10385): the vectors are what an encoder makes of learned ones, see mmjax.models.prompts.

    encoder        "mlp", with two hidden layers, or "lstm", bidirectional, with an MLP of one
    encoder_width  of its hidden layers, of an LSTM in each direction; 0 = as wide as the embeddings
    encoder_depth  layers of an LSTM
    settled        the vectors themselves are held: the encoder that made them is not there (peft's files hold none)
    """

    name: str
    tokens: int = 20
    encoder: Literal["mlp", "lstm"] = "mlp"
    encoder_width: int = 0
    encoder_depth: int = 2
    settled: bool = False
    peft: str = ""


@dataclasses.dataclass(frozen=True)
class MultitaskPromptConfig:
    """Multi-task prompt tuning (arXiv 2303.02861): a prompt shared by all tasks, times a matrix of rank `task_rank` for the sample's own
    task, 0 to tasks - 1; see mmjax.models.prompts. `tokens` and `text` as in PromptConfig."""

    name: str
    tokens: int = 20
    text: str = ""
    tasks: int = 1
    task_rank: int = 1
    peft: str = ""


@dataclasses.dataclass(frozen=True)
class PrefixConfig:
    """Prefix tuning (arXiv 2101.00190): learned keys and values in front of what each layer attends to, see mmjax.models.prefix.

    tokens         keys, and values, of each layer
    projected      a two-layer MLP makes them of vectors as wide as a key
    encoder_width  of its hidden layer; 0 = as wide as a key
    settled        the keys and values themselves are held: the MLP that made them is not there (peft's files hold none)
    """

    name: str
    tokens: int = 20
    projected: bool = False
    encoder_width: int = 0
    settled: bool = False
    peft: str = ""

    @property
    def made_by_mlp(self) -> bool:
        return self.projected and not self.settled


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """A bottleneck beside or behind sublayers (see mmjax.models.bottleneck): down to `width` channels (0 = the block's / `reduction`), an
    activation, up again, times `scale`.

    places      the sublayers it sits at
    reads       what goes down: the sublayer's "output" (arXiv 1902.00751), what the residual stream is "joined" behind it (arXiv
                2005.00247), or its "input", the stream before the norm (parallel, arXiv 2110.04366)
    norm_before, norm_after   a layer norm of what goes down, of what comes up
    parts       the stacks of blocks that have it
    layers      of each of them; () = all
    """

    name: str
    reduction: float = 16.0
    width: int = 0
    places: tuple[Literal["attention", "mlp"], ...] = ("mlp",)
    reads: Literal["output", "joined", "input"] = "joined"
    activation: Activation = "relu"
    scale: float = 1.0
    norm_before: bool = False
    norm_after: bool = False
    dropout: float = 0.0
    parts: tuple[Part, ...] = ("llm",)
    layers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class AdaptionPromptConfig:
    """Learned prompts with zero-init gated attention (LLaMA-Adapter, arXiv 2303.16199, 2304.15010), see mmjax.models.adaption_prompt.

    length      learned prompts of a layer
    depth       how many of the LLM's layers have them, the topmost ones, or with `bottom` the first; 0 = all
    media       what becomes of media tokens: "added" to the prompts, "alone" in their place, and none are learned; "" = they are read otherwise
    gate        one for each "head", or one for a "layer" (peft)
    gate_fn     of the learned number (LLaMA-Adapter V1 was trained with tanh, but its released weights are meant without)
    gate_scale  a factor of the gate that starts as 1 (V2's new_gate)
    adapted     whether keys and values of prompts, too, are what other adapters make of their Linears (V2's chat65b: bias and scale);
                else as the Linears are without (V2's multimodal7b: LoRA)
    """

    name: str
    length: int = 10
    depth: int = 0
    bottom: bool = False
    media: Literal["", "added", "alone"] = ""
    gate: Literal["head", "layer"] = "head"
    gate_fn: Literal["tanh", "identity"] = "tanh"
    gate_scale: bool = False
    adapted: bool = True

    @property
    def learned(self) -> bool:
        """Whether it has prompts of its own."""
        return self.media != "alone"


@dataclasses.dataclass(frozen=True)
class NoisePromptConfig:
    """RobustGER's prompts of the `depth` topmost layers (0 = all), moved by a language-space noise embedding of so many `channels` for each
    (arXiv 2401.10446), see mmjax.models.noise_prompt. `audio` is the width of the audio features that MINE compares the embedding with;
    0 = there is none (mmjax.models.mine)."""

    name: str
    length: int = 20
    depth: int = 0
    channels: int = 384
    audio: int = 0


@dataclasses.dataclass(frozen=True)
class ModalityMixtureConfig:
    """LaVIN's mixture-of-modality adapters (arXiv 2305.15023), see mmjax.models.modality_mixture.

    width          channels between its halves; groups: shares into which these are divided
    temperature    of the router
    places         the sublayers whose input it changes
    parts, layers  as of a bottleneck
    visual_router  what routes pictures: the batch's first one, as in the authors' code, or the picture's own class token
    """

    name: str
    width: int = 8
    groups: int = 2
    temperature: float = 10.0
    scale: float = 1.0
    dropout: float = 0.1
    places: tuple[Literal["attention", "mlp"], ...] = ("attention",)
    parts: tuple[Part, ...] = ("llm", "vision")
    layers: tuple[int, ...] = ()
    visual_router: Literal["released", "per_sample_cls"] = "released"


Adapter: TypeAlias = (
    LoraConfig
    | Ia3Config
    | AffineConfig
    | NormConfig
    | PromptConfig
    | PTuningConfig
    | MultitaskPromptConfig
    | PrefixConfig
    | BottleneckConfig
    | AdaptionPromptConfig
    | NoisePromptConfig
    | ModalityMixtureConfig
)
Adapters: TypeAlias = tuple[Adapter, ...]
KINDS: dict[str, type[Adapter]] = {
    "lora": LoraConfig,
    "ia3": Ia3Config,
    "affine": AffineConfig,
    "norm": NormConfig,
    "prompt": PromptConfig,
    "p_tuning": PTuningConfig,
    "multitask_prompt": MultitaskPromptConfig,
    "prefix": PrefixConfig,
    "bottleneck": BottleneckConfig,
    "adaption_prompt": AdaptionPromptConfig,
    "noise_prompt": NoisePromptConfig,
    "modality_mixture": ModalityMixtureConfig,
}
"""What a recipe calls each of them. The fields of the dataclass are what a recipe may say of one."""


def fields(kind: str) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(KINDS[kind]) if field.name not in ("name", "peft", "settled"))
