"""What a recipe may say: typed, with a default for everything that has one.

A file in configs/ builds a `Recipe` from these dataclasses and hands it out with `to_config_dict`; the command line
overrides single fields (`--config.stages.finetune.optimizer.learning_rate=1e-4`); `from_config_dict` turns the result back
into a validated `Recipe`. Nothing downstream reads a ConfigDict.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, Mapping

from ml_collections import ConfigDict, config_dict

from mmjax import config_checks
from mmjax.config_parsing import parse, to_dict
from mmjax.config_parsing import parse_arguments as parse_arguments  # for the files in configs/
from mmjax.errors import UserError
from mmjax.models.block_config import Activation

DType = Literal["float32", "bfloat16", "float16"]


def to_config_dict(recipe: Recipe) -> ConfigDict:
    """Every field of the recipe, by dotted key, for the command line to override."""
    return _config_dict(to_dict(recipe))


def from_config_dict(values: Mapping[str, Any]) -> Recipe:
    """The validated recipe. Raises UserError with every problem found, one a line, each naming its key."""
    nested = values.to_dict() if isinstance(values, ConfigDict) else values
    recipe, problems = parse(Recipe, nested)
    if not problems:  # what the values mean is only asked once they are of the right kind
        problems = config_checks.problems(recipe)
    if problems:
        raise UserError("The recipe cannot be run:\n" + "\n".join(f"  {problem}" for problem in problems))
    return recipe


def write_recipe(recipe: Recipe, workdir: str | Path) -> None:
    """WORKDIR/recipe.json: the fully expanded recipe, one field a line."""
    (Path(workdir) / "recipe.json").write_text(json.dumps(to_dict(recipe), indent=1) + "\n")


def read_recipe(workdir: str | Path) -> Recipe:
    """What `write_recipe` left. Raises UserError where the file is absent or holds no recipe."""
    path = Path(workdir) / "recipe.json"
    try:
        return from_config_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; has a training run been made in this workdir?") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None


def _config_dict(values: Any) -> Any:
    """In the order given; None becomes a placeholder, so that a string may take its place."""
    if isinstance(values, dict):
        return ConfigDict({key: _config_dict(value) for key, value in values.items()}, sort_keys=False)
    return config_dict.placeholder(str) if values is None else values


@dataclasses.dataclass
class Part:
    """An encoder or an LLM: a directory with published weights, or a shape to initialise afresh.

    path      a Hugging Face directory or a repository id in the local cache; "" = fresh weights from `config`
    config    fields of the family's config.json (with `model_type`); needed when `path` is "", and enough for --job=plan where
              `path` is not on this machine (where it is, its own config.json counts)
    """

    path: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Connector:
    """See mmjax.models.encoder_config.ConnectorConfig; `kind` also takes LLaVA's spelling mlpNx_gelu. `depth` 0 = the kind's own.
    It puts out tokens as wide as the LLM's, or, for a cross-attention between blocks, `hidden_width` wide (0 = as the encoder's).
    `path` reads published connector weights (a projector-only file or directory); "" = fresh.

    text_vocab   rows of a Q-Former's table of words; 0 = it has none
    text_length  tokens of what the user says that a Q-Former reads beside the picture (InstructBLIP); 0 = none
    tokenizer    of what a Q-Former reads; "" = the language model's own
    bert         directory of a BERT as which a Q-Former begins, under what `path` has; "" = fresh
    projection   whether the Linear in front of the language model is taken from a Q-Former's `path`, too: not where that was made
                 for another language model
    """

    kind: str = "mlp2x_gelu"
    depth: int = 0
    hidden_width: int = 0
    group: int = 1
    pooled_tokens: int = 1
    grid: int = 0
    bias: bool = True
    input_norm: bool = False
    output_norm: bool = False
    norm: Literal["layer", "rms", "rms_plus_one"] = "layer"
    norm_eps: float = 1e-5
    squeeze_width: int = 0
    token_order: Literal["rows", "columns"] = "rows"
    latents: int = 64
    heads: int = 8
    head_dim: int = 0
    activation: Activation = "gelu"
    qk_norm: bool = False
    cross_every: int = 2
    mlp_width: int = 0
    text_vocab: int = 0
    text_positions: int = 512
    text_length: int = 0
    contrast_width: int = 0
    merge: Literal["flat", "spatial", "spatial_unpad"] = "flat"
    tokenizer: str = ""
    bert: str = ""
    path: str = ""
    projection: bool = True


@dataclasses.dataclass
class CrossAttention:
    """Gated cross-attention between the LLM's blocks, in the place of media tokens in the text (mmjax.models.gated_cross_attention).
    In the text one token `<image>` stands for a picture, which the tokenizer has or gets (model.new_tokens).

    every    it sits before every so many-th of the LLM's blocks; 0 = there is none. first: the first of these, from 0 (Flamingo and
             IDEFICS begin with the first block, OpenFlamingo and Otter with the `every`-th: every - 1)
    block    "own": layer norms, an MLP four times as wide as the LLM, no biases, and `heads`, `head_dim`, `activation`;
             "llm": heads, norms and MLP as the LLM's own blocks have them (IDEFICS)
    qk_norm  a norm of its kind over each head's queries and keys
    vector_gates      a gate for each channel
    last_media_only   text sees the last picture before it; else all before it
    """

    every: int = 0
    first: int = 0
    block: Literal["own", "llm"] = "own"
    heads: int = 8
    head_dim: int = 64
    activation: Activation = "gelu"
    qk_norm: bool = False
    vector_gates: bool = False
    last_media_only: bool = True


@dataclasses.dataclass
class Image:
    """How a picture becomes pixels for the encoder.

    aspect   "pad" (square with the mean colour, LLaVA-1.5), "crop" (shortest edge, then centre crop), "squash" (ignore aspect)
    size     side in pixels, to which a vision transformer's positions are interpolated; 0 = the encoder's own
    mean, std   empty = the encoder family's own
    tiling   how a picture is cut into tiles of that size, beside an overview, the whole picture squashed into one tile: "" (not at all),
             "anyres" (LLaVA-NeXT: the one of `grids` that shows most of it), "dynamic" (InternVL: the one of `least_tiles` to
             `most_tiles` tiles that is nearest in aspect), "overlapping" (moondream 2: about the picture's own size, at most
             `most_tiles` tiles, each of which reaches `overlap` pixels beyond its own part). A stage may do without (Stage.tiled)
    grids    of anyres, "ROWSxCOLUMNS" each; empty = LLaVA-NeXT's own
    overview    whether there is one
    """

    aspect: Literal["pad", "crop", "squash"] = "pad"
    size: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    tiling: Literal["", "anyres", "dynamic", "overlapping"] = ""
    grids: tuple[str, ...] = ()
    least_tiles: int = 1
    most_tiles: int = 12
    overlap: int = 0
    overview: bool = True


@dataclasses.dataclass
class Adapter:
    """A named way of tuning beside the weights. Each kind reads some of the fields (mmjax.models.tuning_config.KINDS); the others stay as
    they are here.

    kind      "lora"; "ia3"; "affine" (LLaMA-Adapter V2's bias and scale of Linears); "norm" (norms tuned in copies); in front of the text "prompt",
              "p_tuning", "multitask_prompt" (mmjax.models.prompts), "prefix" (mmjax.models.prefix); in blocks "bottleneck" (mmjax.models.bottleneck),
              "adaption_prompt" (LLaMA-Adapter, mmjax.models.adaption_prompt), "noise_prompt" (RobustGER, mmjax.models.noise_prompt),
              "modality_mixture" (LaVIN, mmjax.models.modality_mixture)
    targets   globs over paths of Linears (which end before `/kernel`) or norms (before `/scale`); llm/layers[16:32]/** chooses layers.
              `**` reaches those in blocks, plugs and connectors; heads and the table of tokens are named: llm/head, llm/embed
    rank_pattern, alpha_pattern   of lora: glob over Linears -> value, the first that matches counts
    dora      of lora: DoRA, norms of their own for the columns of changed weights (arXiv 2402.09353)
    bias      of lora: which biases get a copy that is trained, "all" or those of the Linears chosen; lora_bias: lora_b has a bias
    whole     globs over leaves that get a copy which is trained whole
    token_ids   of lora: rows of the table of tokens that get copies which are trained
    feedforward   of ia3: globs over those targets whose inputs are scaled, not their outputs
    order     of affine: see mmjax.models.tuning_config.AffineConfig
    tokens    virtual tokens before each sample, or keys and values of each layer
    text      a prompt begins as its embeddings, repeated or cut to `tokens`; "" = drawn
    encoder   what makes the vectors of P-tuning: "mlp" or "lstm", with hidden layers `encoder_width` wide (0 = as the embeddings, or a
              prefix' keys) and, of an LSTM, `encoder_depth` layers
    tasks     that multi-task prompts know (a source's or a row's `task_id` says which it is of), each with a matrix of rank `task_rank`
    projected   an MLP makes a prefix' keys and values
    reduction, width   of a bottleneck: its channels are `width`, or, with 0, those of the block / `reduction`; a mixture has a width
    places    of what is in blocks: the sublayers it sits at; parts: in the blocks of "llm", of an encoder-decoder's "encoder", of
              "vision"; layers: of these; empty = all
    reads     of a bottleneck: "output" of the sublayer (with both places: Houlsby), the stream "joined" behind it (with "mlp": Pfeiffer),
              or its "input" (parallel)
    activation, scale, norm_before, norm_after   of a bottleneck: between its halves, of what it adds, layer norms around it
    length, depth, bottom, media, gate, gate_fn, gate_scale, adapted   of adaption_prompt: see mmjax.models.tuning_config.AdaptionPromptConfig
    channels, audio   of noise_prompt (with length and depth): see mmjax.models.tuning_config.NoisePromptConfig
    groups, temperature, visual_router   of a mixture, which has a `scale`, too: see mmjax.models.tuning_config.ModalityMixtureConfig
    """

    kind: Literal[
        "lora",
        "ia3",
        "affine",
        "norm",
        "prompt",
        "p_tuning",
        "multitask_prompt",
        "prefix",
        "bottleneck",
        "adaption_prompt",
        "noise_prompt",
        "modality_mixture",
    ] = "lora"
    targets: tuple[str, ...] = ("llm/layers/**",)
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    whole: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    feedforward: tuple[str, ...] = ()
    order: Literal["output", "input", "bias"] = "output"
    tokens: int = 20
    text: str = ""
    encoder: Literal["mlp", "lstm"] = "mlp"
    encoder_width: int = 0
    encoder_depth: int = 2
    tasks: int = 1
    task_rank: int = 1
    projected: bool = False
    reduction: float = 16.0
    width: int = 0
    places: tuple[Literal["attention", "mlp"], ...] = ("mlp",)
    reads: Literal["output", "joined", "input"] = "joined"
    activation: Activation = "relu"
    scale: float = 1.0
    norm_before: bool = False
    norm_after: bool = False
    parts: tuple[Literal["llm", "encoder", "vision"], ...] = ("llm",)
    layers: tuple[int, ...] = ()
    length: int = 10
    depth: int = 0
    bottom: bool = False
    media: Literal["", "added", "alone"] = ""
    gate: Literal["head", "layer"] = "head"
    gate_fn: Literal["tanh", "identity"] = "tanh"
    gate_scale: bool = False
    adapted: bool = True
    channels: int = 384
    audio: int = 0
    groups: int = 2
    temperature: float = 10.0
    visual_router: Literal["released", "per_sample_cls"] = "released"


@dataclasses.dataclass
class Quantise:
    """How frozen kernels are held: quantised while they are read, made dense layer by layer when they are used. What is trained stays in
    Stage.param_dtype.

    format    "nf4" (QLoRA), "int4" (groups with a scale and a zero), "int8" (a scale for each output); "" = dense, or as a base that
              is published quantised (AWQ) has them
    targets   globs over Linear paths (a path ends before `/kernel`) of stacked blocks, plugs and llm/head
    double    of nf4: double quantisation, of the maxima of blocks
    block     inputs that share a maximum (nf4), or a scale and a zero (int4); 0 = the format's own, 64 and 128
    """

    format: Literal["", "int8", "nf4", "int4"] = ""
    targets: tuple[str, ...] = ("llm/layers/**",)
    double: bool = True
    block: int = 0


@dataclasses.dataclass
class Tokenizer:
    """path   a directory with tokenizer files; "" = the LLM's own directory, or, where the LLM is fresh, one trained on
              the text of the recipe's own sources and kept in the workdir
    kind      of a trained tokenizer: "word" (lower-cased words) or "bpe" (byte-level)
    """

    path: str = ""
    kind: Literal["word", "bpe"] = "bpe"
    vocab_size: int = 4096
    min_frequency: int = 1


@dataclasses.dataclass
class Model:
    """The parts and how they join.

    path            a whole multimodal checkpoint (HF llava layout, LLaVA's original layout, or an mmjax workdir); the parts below are
                    then read from it and must be left at their defaults
    mask            who sees whom: "causal"; "prefix" (a prompt's tokens see each other both ways: PaliGemma); "media" (an image's do:
                    Gemma 3, GIT); "opening" (the first image's and what stands in front of it do: moondream 2); "" = as `path` has it,
                    causal where the parts are joined here
    class_tokens    the connector reads the class token alone of each of `feature_layers`, a position for each (LaVIN)
    pooled          the connector reads one vector, what the encoder itself makes of all its states, in place of them
    projected       ... each position as the encoder's own projection makes it (CLIP's; LLaMA-Adapter V2)
    stitching       the tiles of a picture become one map, of the size of a tile's, whose features are joined to the overview's on
                    channels (moondream 2): resized by "area" or "bilinear"; "" = they do not
    template        a chat template's name (see mmjax.data.templates), or "tokenizer" for the tokenizer's own Jinja template
    image_start/end text around each image's tokens, e.g. "<im_start>"; "" = none. It is ordinary text unless new_tokens has it
    scales          of a picture, as multiples of the encoder's size, that the encoder reads (S2); their features are joined on channels
    new_tokens      tokens that the tokenizer is to have (delimiters, states, speech units). Each gets rows of its own in the
                    vocabulary, which a stage trains as `llm/**/new_rows` (of a head with a bias also `llm/head/new_bias`); one
                    that the tokenizer has already keeps its id, and its row begins as it is. The vocabulary grows where it must
    new_rows_start  what the rows of tokens that are new begin as: the "mean" of the old rows (LLaVA), or "normal", drawn with
                    the mean and the standard deviation of each channel; embeddings and head each by their own table
    dtype           of frozen weights; trained weights are kept in float32 (see Stage.param_dtype)
    """

    path: str = ""
    llm: Part = dataclasses.field(default_factory=Part)
    vision: Part = dataclasses.field(default_factory=Part)
    connector: Connector = dataclasses.field(default_factory=Connector)
    cross_attention: CrossAttention = dataclasses.field(default_factory=CrossAttention)
    feature_layers: tuple[int, ...] = (-2,)
    scales: tuple[int, ...] = (1,)
    keep_class_token: bool = False
    post_norm: bool = False
    class_tokens: bool = False
    pooled: bool = False
    projected: bool = False
    stitching: Literal["", "area", "bilinear"] = ""
    image: Image = dataclasses.field(default_factory=Image)
    tokenizer: Tokenizer = dataclasses.field(default_factory=Tokenizer)
    mask: Literal["", "causal", "prefix", "media", "opening"] = ""
    template: str = "v1"
    system: str | None = None
    image_start: str = ""
    image_end: str = ""
    new_tokens: tuple[str, ...] = ()
    new_rows_start: Literal["mean", "normal"] = "mean"
    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    quantise: Quantise = dataclasses.field(default_factory=Quantise)
    dtype: DType = "float32"


@dataclasses.dataclass
class Source:
    """One data set.

    kind     "llava" (LLaVA conversations, .json/.jsonl, also .gz), "messages" (JSONL of messages), "captions" (JSONL, `image` and a list of
             captions), "pairs" and "mimic_it" (see mmjax.data.pairs), "science_qa" (see mmjax.data.science_qa), "mmc4" and "obelics"
             (documents, see mmjax.data.interleaved),
             "alpaca" and "hypotheses" (instructions, N-best lists of speech recognition, see mmjax.data.instructions), "drawn_hypotheses",
             "digits" (handwriting scenes drawn from scikit-learn's digits), "digit_facts" (their text-only twin)
    path     the file, for some kinds a glob of .tar or .parquet files; images: a folder, a .tar, a glob of .tar files, or a .json of base64
    weight   share in the mixture relative to the other sources (0 < weight); 0 = proportional to size
    loss_weight  of each supervised token of this source in the loss, which is the weighted mean over the step's tokens
    options  of the kind, e.g. {"split": "train", "task": "caption"}; for every kind `prompts`, a list of texts of which one, drawn by the
             sample's id, takes the place of what the user says ("Question: {} Short answer:": {} is what was said), and `system`, a
             text in place of the template's system text ("" = none), and `task_id`, the number of its task for multi-task prompts
    limit    first samples only; 0 = all
    samples  how many there are, as published: for --job=plan, which opens no data; 0 = not said
    join     samples that are shown as one, one after the other: in-context rows of several pictures
    """

    kind: Literal[
        "llava",
        "messages",
        "captions",
        "pairs",
        "mimic_it",
        "science_qa",
        "mmc4",
        "obelics",
        "alpaca",
        "hypotheses",
        "drawn_hypotheses",
        "digits",
        "digit_facts",
    ] = "llava"
    path: str = ""
    images: str = ""
    weight: float = 0.0
    loss_weight: float = 1.0
    limit: int = 0
    samples: int = 0
    join: int = 1
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Optimizer:
    """`decay` globs choose what weight decay touches (leaves of rank < 2 never are)."""

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int = 0  # > 0 takes the place of warmup_ratio
    end_factor: float = 0.0  # final learning rate / peak
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: tuple[str, ...] = ("**",)
    clip_norm: float = 0.0  # 0 = no clipping; the gradient norm over all trainable leaves
    moment_dtype: DType = "float32"
    multipliers: dict[str, float] = dataclasses.field(default_factory=dict)  # glob -> learning-rate factor; first match wins


@dataclasses.dataclass
class Validation:
    """During training: the loss on held-out sources every `every` steps; keep the best, stop after `patience` without a gain."""

    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    every: int = 0
    batches: int = 8
    patience: int = 0  # 0 = never stop early


@dataclasses.dataclass
class Stage:
    """One stage of training.

    objective     "language" (next token at supervised positions), "classify" (the vision encoder's own head) or "contrastive" (a
                  Q-Former's first stage on pictures and their captions, whose tokens `length` limits; see mmjax.models.image_text)
    trainable     globs over parameter paths; each must match something. Everything else is frozen.
    idle          names of adapters that do not act in this stage: those that do not begin as the model without them (prompts, prefixes)
                  are in the way of what is trained before them
    steps/epochs  one of them > 0
    rows          rows of a step over all devices and micro-batches; length: tokens of a row
    answer_length   of an encoder-decoder, whose encoder reads a row: tokens of its decoder's row; 0 = as many as `length`
    packing       several samples in a row, apart by segments; off = one sample a row
    tiles         image tiles a row may hold
    tiled         whether pictures are cut into tiles as the model's `image` says; off = one tile each, by its `aspect`
    accumulate    micro-batches of one step
    dropout       of what each block of the LLM adds to its residual; adapters have their own
    router_loss   weight of the load-balancing loss of a mixture of experts (0.02 in Mixtral's own training)
    noise_distillation   weight of RobustGER's audio noise distillation (mmjax.training.distillation), of sources that have audio features
    cache_features   run the frozen encoder once over every picture and keep its features on disk
    attention     the backend (see mmjax.models.attention): "auto" is the fused kernel "splash" on TPUs where that can do what the mask
                  asks, which the log says, else "xla"; one asked for by name that cannot is an error
    """

    objective: Literal["language", "classify", "contrastive"] = "language"
    trainable: tuple[str, ...] = ("connector/**",)
    idle: tuple[str, ...] = ()
    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    steps: int = 0
    epochs: float = 0.0
    rows: int = 8
    length: int = 256
    answer_length: int = 0
    packing: bool = True
    tiles: int = 1
    tiled: bool = True
    accumulate: int = 1
    template: str = ""  # "" = the model's
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    validation: Validation = dataclasses.field(default_factory=Validation)
    cache_features: bool = False
    augment: tuple[str, ...] = ()
    label_smoothing: float = 0.0
    dropout: float = 0.0
    router_loss: float = 0.0
    noise_distillation: float = 0.0
    dtype: DType = "float32"  # of activations
    param_dtype: DType = "float32"  # of trained weights
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "reference", "xla", "cudnn", "splash"] = "auto"
    unroll: int = 1


@dataclasses.dataclass
class FewShot:
    """Examples before each question, see mmjax.evaluation.few_shot. None by default.

    shots      how many, each with its pictures
    text_only  without any shots: so many examples without their pictures (Flamingo's zero-shot has 2)
    source     where they come from; a picture of the question's own is never among them
    choose     "random", or "similar": by the likeness of the pictures (RICES)
    """

    shots: int = 0
    text_only: int = 0
    source: Source = dataclasses.field(default_factory=Source)
    choose: Literal["random", "similar"] = "random"
    seed: int = 0


@dataclasses.dataclass
class Evaluation:
    """Held-out questions answered by generation and scored.

    metrics   "accuracy" (exact match after normalisation), "letter" (accuracy of the option that an answer names), "bleu", "cider", "wer"
              (word errors); blind: also score with images shuffled and withheld
    """

    source: Source = dataclasses.field(default_factory=Source)
    few_shot: FewShot = dataclasses.field(default_factory=FewShot)
    metrics: tuple[Literal["accuracy", "letter", "bleu", "cider", "wer"], ...] = ("accuracy",)
    blind: bool = False
    max_new_tokens: int = 32
    num_beams: int = 1
    length_penalty: float = 1.0
    batch: int = 64
    limit: int = 0
    samples: int = 8  # answers drawn into the picture
    report_apart: tuple[str, ...] = ()  # kinds of question left out of the total and reported on their own


@dataclasses.dataclass
class Mesh:
    """Sizes of the mesh axes; one may be -1 (whatever is left of the devices). `--config.mesh=` takes all of them at once: a name such as
    auto or v5e:16x16 (mmjax.parallel.presets), or sizes such as fsdp=64,tensor=4.

    data          rows of a batch; 0 = one part for each slice of TPUs (1 elsewhere)
    fsdp          rows of a batch, and weights, which are gathered layer by layer
    tensor        heads, hidden channels of MLPs, the vocabulary
    sequence      positions of a text
    expert        rows of a batch, experts of a mixture and, with fsdp, all other weights
    cpu_devices   on a machine without accelerators, into how many devices its processor is divided: small operations do not
                  fill several cores, several devices do
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    cpu_devices: int = 1


@dataclasses.dataclass
class Checkpoint:
    """Where a run goes on from. `local`: a folder on each machine's own disk or in its memory (/dev/shm/mmjax), to which the machines of
    several slices write as well, every `local_every` steps (see mmjax.checkpoints.emergency); "" = none."""

    every: int = 500  # steps; a stage's last step is always saved
    keep: int = 3
    keep_best: int = 1
    asynchronous: bool = True
    local: str = ""
    local_every: int = 50


@dataclasses.dataclass
class Loader:
    workers: int = 0  # decoding processes; 0 = threads of this process
    threads: int = 2
    prefetch: int = 4  # batches
    max_broken: float = 0.05  # share of samples that may be unreadable before the run stops


@dataclasses.dataclass
class Logging:
    every: int = 10
    tensorboard: bool = True
    profile_step: int = 0  # > 0: trace `profile_steps` steps from this one
    profile_steps: int = 3


@dataclasses.dataclass
class Generate:
    """For --job=generate and chat: `input` is a JSONL of messages, `output` where the answers go; or one `prompt` with `image`. `task`:
    the task, for multi-task prompts, of what is asked here and in chat (rows of `input` have their own `task_id`)."""

    input: str = ""
    output: str = ""
    prompt: str = ""
    image: str = ""
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()  # strings before which an answer ends
    batch: int = 8
    task: int = 0


@dataclasses.dataclass
class Plan:
    """For --job=plan.

    topology   what to plan for: v5e:16x16, v5p:4x4x8, v6e:16x16, v4:4x4x4 (slices, compiled by libtpu where that is installed), h100:8, cpu:8
               (devices, compiled for where they are); "" = shapes alone
    stage      the stage to plan; "" = all
    search     try meshes, rematerialisation and micro-batches, and recommend some
    decode     also the decoding of a token, for generate.batch rows of the last stage's length
    """

    topology: str = ""
    stage: str = ""
    search: bool = False
    decode: bool = False


@dataclasses.dataclass
class Export:
    """For --job=export: path "" = WORKDIR/export. format "hf" (llava layout), "original" (LLaVA's), "peft" (adapters alone). `dequantise`: a
    quantised base is made dense first, so that adapters can be merged into it."""

    path: str = ""
    format: Literal["hf", "original", "peft"] = "hf"
    merge_adapters: bool = True
    dequantise: bool = False
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""  # "" = as held
    after_training: bool = False


@dataclasses.dataclass
class Recipe:
    """A recipe names the parts, how they join, and the stages in which they are trained."""

    name: str = ""
    seed: int = 0
    model: Model = dataclasses.field(default_factory=Model)
    stages: dict[str, Stage] = dataclasses.field(default_factory=dict)
    run: tuple[str, ...] = ()  # the stages to run, in order
    evaluations: dict[str, Evaluation] = dataclasses.field(default_factory=dict)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    loader: Loader = dataclasses.field(default_factory=Loader)
    logging: Logging = dataclasses.field(default_factory=Logging)
    generate: Generate = dataclasses.field(default_factory=Generate)
    export: Export = dataclasses.field(default_factory=Export)
    plan: Plan = dataclasses.field(default_factory=Plan)
