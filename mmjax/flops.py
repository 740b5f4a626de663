"""Floating-point operations of training, counted from shapes.

The convention, said wherever a figure is printed (`CONVENTION`): a multiply-add is 2. For every token a weight of N elements costs
2N forwards, 2N for the gradient of its input where something in front of it is trained, and 2N for its own gradient where it is
trained itself: 6N trained, 4N frozen, 2N frozen with nothing trained in front. A causal attention costs half of a full one; the
head is counted at supervised positions only; what rematerialisation computes twice is not counted. Norms, activations and
lookups are left out, and what makes prompts and prefixes once a step for all rows. In a cross-attention between blocks a position of the text is counted as seeing one medium.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from typing import Literal, Sequence

from mmjax import tree
from mmjax.models import (
    adapter_places,
    gated_cross_attention,
    mobilenet_v2,
    multimodal,
    noise_prompt,
    perceiver,
    plugged,
    prefix,
    qformer,
    visual_blocks,
)
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, MobileNetV2Config, ViTConfig
from mmjax.models.tuning_config import AdaptionPromptConfig, NoisePromptConfig
from mmjax.training.trainable import Selection

CONVENTION = "2 per multiply-add; trained weights 6N, frozen 4N (2N with nothing trained in front); causal attention half; no remat"

# Dense bfloat16 peak in FLOP/s by the start of jax's device_kind, from NVIDIA's data sheets and Google Cloud's TPU pages.
PEAK = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}

Site = tuple[int, float]  # where a leaf stands in the data flow: (part, layer)


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one training step by what they grow with; each maps a part's name to its share.

    per_tile        of an image tile (encoder and connector)
    per_token       of an LLM position, media and text alike; of an encoder-decoder, a position of its decoder
    per_supervised  of a supervised position
    per_pair        of a pair of positions of which one attends to the other, by the layers' window (0 = none)
    per_source      of a position that an encoder-decoder's encoder reads
    per_source_pair, per_cross_pair   of a pair of such positions, and of one of them and one of the decoder's
    """

    per_tile: dict[str, float]
    per_token: dict[str, float]
    per_supervised: dict[str, float]
    per_pair: dict[int, float]
    per_source: dict[str, float] = dataclasses.field(default_factory=dict)
    per_source_pair: float = 0.0
    per_cross_pair: float = 0.0

    def count(
        self,
        lengths: Sequence[float],
        supervised: float,
        tiles: float,
        encoded: bool = True,
        sources: Sequence[float] = (),
    ) -> dict[str, float]:
        """Part -> FLOPs for samples of these lengths. `encoded`: the media encoder ran (it does not where its features are cached);
        `sources`: the lengths that an encoder-decoder's encoder reads, in the same order."""
        parts: dict[str, float] = collections.defaultdict(float)
        for part, share in self.per_tile.items():
            parts[part] += share * tiles * (encoded or not part.startswith("vision"))
        for part, share in self.per_token.items():
            parts[part] += share * sum(lengths)
        for part, share in self.per_supervised.items():
            parts[part] += share * supervised
        for window, share in self.per_pair.items():
            parts["llm attention"] += share * sum(_pairs(length, window) for length in lengths)
        for part, share in self.per_source.items():
            parts[part] += share * sum(sources)
        parts["llm attention"] += self.per_source_pair * sum(source**2 for source in sources)
        parts["llm attention"] += self.per_cross_pair * sum(s * length for s, length in zip(sources, lengths))
        return {part: value for part, value in parts.items() if value}


def training_flops(
    config: ModelConfig,
    selection: Selection,
    objective: Literal["language", "classify", "contrastive"] = "language",
    beside: int = 0,
) -> Flops:
    """What a training step of `config` costs when the leaves of `selection` are trained; `beside`: tokens of text that a Q-Former reads
    beside a tile."""
    dense = dataclasses.replace(config, quantisation=None)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(multimodal.shapes(dense)).items()}
    trained = _trained(shapes, selection)
    first = min((_place(path, layer, config) for path, layer in trained), default=(math.inf, 0.0))
    in_text = _first_in_text(trained, config)
    used = _layers_used(config, objective)
    replaced = {f"{place.path}/{name}" for place in _adapter_places(config).values() for name in place.copies if not place.rows}

    def times(path: str, layer: int) -> int:
        if _reads_media(path):  # what hands on a gradient to media tokens is trained in front of the text
            reached = first < (2, 0.0)
        else:
            reached = _place(path, layer, config) >= (in_text if path.startswith("llm/") else first)
        return 3 if (path, layer) in trained else 2 if reached else 1

    per_tile: dict[str, float] = collections.defaultdict(float)
    per_token: dict[str, float] = collections.defaultdict(float)
    per_supervised: dict[str, float] = collections.defaultdict(float)
    per_source: dict[str, float] = collections.defaultdict(float)
    for path, shape in shapes.items():
        if not _is_matmul(path, config) or path in replaced:
            continue
        rows, table = _rows(path, config, objective, beside), per_tile
        if path.startswith("llm/"):
            rows, table = _share_of_experts(path, config), per_supervised if _is_head(path, config) else per_token
            table = per_source if _reads_source(path) else table
        if _reads_media(path):
            rows, table = config.connector.tokens if config.connector else _prompts(config), per_tile
        stacked = _is_stacked(path)
        for layer in range(shape[0] if stacked else 1):
            if stacked and _layer(path, layer, config) >= used.get(path.split("/")[0], math.inf):
                continue
            forward = 2 * math.prod(shape[1:] if stacked else shape) * rows
            table[_part(path, config)] += forward * times(path, layer)

    per_pair: dict[int, float] = collections.defaultdict(float)
    per_source_pair = per_cross_pair = 0.0
    if config.llm is not None and objective == "language":
        for layer in range(config.llm.layers):
            window = config.llm.windows[layer % len(config.llm.windows)]
            # a frozen layer's softmax still hands on a gradient to queries, keys and values alike: 1 or 3, never 2
            passes = 3 if _site("llm/layers/", layer) >= in_text else 1
            per_pair[window] += _attention(config.llm.block) * passes
            if prefix.of(config):
                per_token["llm attention"] += _attention(config.llm.block) * prefix.count(config) * passes
            per_cross_pair += _attention(config.llm.block) * passes if config.llm.encoder else 0.0
        for layer in range(config.llm.encoder.layers if config.llm.encoder else 0):
            assert config.llm.encoder is not None
            passes = 3 if _site("llm/encoder/layers/", layer) >= first else 1
            per_source_pair += _attention(config.llm.encoder.block) * passes
    if (crossed := config.cross_attention) is not None and config.connector is not None and objective == "language":
        for layer in crossed.layers:
            passes = 3 if (3, layer - 0.5) >= in_text else 1
            per_token["llm attention"] += _attention(crossed.block) * config.connector.tokens * passes
    if config.llm is not None and objective == "language":
        for adapter in config.adapters:
            if isinstance(adapter, AdaptionPromptConfig | NoisePromptConfig):
                for layer in _sits(config)[adapter.name]:
                    passes = 3 if _site("llm/layers/", layer) >= in_text else 1
                    per_token["llm attention"] += _attention(config.llm.block) * adapter.length * passes
    if isinstance(config.vision, ViTConfig):
        pairs = (config.vision.positions + config.vision.prefix) ** 2 * _views(config)
        for layer in range(used["vision"]):
            passes = 3 if _site("vision/layers/", layer) >= first else 1
            per_tile["vision"] += _attention(config.vision.block) * pairs * passes
    if config.connector is not None and config.connector.resamples and objective == "language":
        c = config.connector
        passes = 3 if _site("connector/layers/", 0) >= first else 1
        # latents read the positions and, there or in a sublayer of its own, each other
        per_tile["connector"] += _attention(perceiver.block_config(c)) * c.latents * (c.pooled + c.latents) * c.depth * passes
    if config.connector is not None and config.connector.kind == "visual_blocks" and objective == "language":
        c = config.connector
        passes = 3 if _site("connector/layers/", 0) >= first else 1
        per_tile["connector"] += _attention(visual_blocks.block_config(c)) * (c.pooled + c.latents) ** 2 * c.depth * passes
    if config.features.stitching is not None:
        per_tile["connector"] /= 2  # there is room for one picture for every two tiles
    if config.connector is not None and config.connector.kind == "qformer" and objective != "classify":
        c = config.connector
        passes = 3 if _site("connector/layers/", 0) >= first else 1
        per_tile["connector"] += _attention(qformer.block_config(c)) * passes * _qformer_pairs(c, objective, beside)
    return Flops(
        dict(per_tile), dict(per_token), dict(per_supervised), dict(per_pair), dict(per_source), per_source_pair, per_cross_pair
    )


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, None where it is not known (CPUs)."""
    return next((value for name, value in PEAK.items() if device_kind.startswith(name)), None)


def mfu(flops: float, seconds: float, devices: int, device_kind: str) -> float | None:
    """Model FLOPs over what the devices could have done in that time, 0 to 1; None where their peak is not known."""
    known = peak(device_kind)
    return None if known is None else flops / (seconds * devices * known)


def _pairs(length: float, window: int) -> float:
    """Pairs of a causal attention: half of the square, or of the band of a sliding window."""
    return length**2 / 2 if not window or length <= window else window * length - window**2 / 2


def _attention(block: BlockConfig) -> float:
    """FLOPs of a pair: the scores, and the mixing of values."""
    return 4 * block.heads * block.head_dim


def _site(path: str, layer: float) -> Site:
    """The order in which gradients must pass: what stands behind a trained site carries them, what stands in front does not."""
    top, second, *rest = path.split("/")
    if top == "mine":
        return (5, 0.0)  # no gradient passes through it
    if top == "llm" and second == "encoder":
        return (2, {"layers": 1 + layer, "relative_bias": 1.0}.get(rest[0], math.inf))
    if top == "llm":
        return {"embed": (2, 0.0), "layers": (3, float(layer)), "relative_bias": (3, 0.0)}.get(second, (4, 0.0))
    if top == "connector":
        return (1, 0.0)
    if second == "layers":
        return (0, float(layer))
    return (0, math.inf if second in ("post_norm", "pool", "pooler", "projection", "head") else -1.0)


def _place(path: str, layer: int, config: ModelConfig) -> Site:
    """The site of a leaf's layer; a plug's stand before the blocks that it sits on, or in them."""
    if path.startswith("llm/prompts/"):
        return (2, 0.0)
    if path.startswith("llm/plugs/"):
        name = path.split("/")[2]
        if name == gated_cross_attention.NAME and config.cross_attention is not None:
            return (3, config.cross_attention.layers[layer] - 0.5)
        if name in (sits := _sits(config)):
            return (3, float(sits[name][layer]))
    if "/plugs/" in path:
        adapter = next(adapter for adapter in config.adapters if adapter.name == tree.adapter_of(path))
        layers = getattr(adapter, "layers", ())
        return _site(f"{path.split('/plugs/')[0]}/layers/", layers[layer] if layers else layer)
    return _site(path, _layer(path, layer, config))


def _layer(path: str, row: int, config: ModelConfig) -> int:
    """The layer of a leaf's row: of adapters that sit on some layers not the same."""
    if "/adapters/" not in path:
        return row
    known = _adapter_places(config)
    place = known.get(path) or known.get(path.rpartition("/")[0])
    return place.layers[row] if place is not None and place.layers else row


@functools.lru_cache(maxsize=4)
def _adapter_places(config: ModelConfig) -> dict[str, adapter_places.Place]:
    """Where adapters stand beside weights, by the paths of copies, and of others by the path below which they are."""
    if not config.adapters:
        return {}
    shapes = multimodal.shapes(config)
    found = [place for adapter in config.adapters for place in adapter_places.places(shapes, config, adapter)]
    return {key: place for place in found for key in [f"{place.at}/{name}" for name in place.copies] or [place.at]}


def _prompts(config: ModelConfig) -> int:
    """The prompts that a noise embedding moves."""
    return sum(adapter.length for adapter in config.adapters if isinstance(adapter, NoisePromptConfig))


def _sits(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The layers of the LLM on which the plugs of adapters sit, by name."""
    return {plug.name: plug.layers for plug in plugged.plugs(config, "llm")} if config.llm is not None else {}


def _first_in_text(trained: set[tuple[str, int]], config: ModelConfig) -> Site:
    """The first site that hands a gradient to the blocks of the LLM: where media are read between them, nothing in front of the
    first that reads does it for the media's sake."""
    sites: list[Site] = [_place(path, layer, config) for path, layer in trained]
    if config.cross_attention is not None:
        reads: Site = (3, config.cross_attention.layers[0] - 0.5)
        sites = [max(site, reads) if site < (2, 0.0) else site for site in sites]
    if config.media_beside and (sits := _sits(config)):
        begin: Site = (3, float(min(layers[0] for layers in sits.values())))
        sites = [max(site, begin) if site < (2, 0.0) else site for site in sites]
    return min(sites, default=(5, 0.0))  # behind everything


def _trained(shapes: dict[str, tuple[int, ...]], selection: Selection) -> set[tuple[str, int]]:
    """(path, layer) of everything trained; layer 0 for what is not stacked."""
    found = set()
    for path, chosen in selection.leaves.items():
        start, stop = chosen or (0, shapes[path][0] if _is_stacked(path) else 1)
        found |= {(path, layer) for layer in range(start, stop)}
    return found


def _layers_used(config: ModelConfig, objective: str) -> dict[str, int]:
    """Layers of the encoder that run: those above the highest state a connector reads do not."""
    if not isinstance(config.vision, ViTConfig):
        return {}
    layers = config.vision.layers
    return {"vision": layers if objective == "classify" else max(layer % (layers + 1) for layer in config.features.layers)}


def _share_of_experts(path: str, config: ModelConfig) -> float:
    """How much of a weight a token of the LLM meets: of a mixture's experts only those that it chose."""
    experts = config.llm.block.experts if config.llm else None
    return experts.chosen / experts.count if experts and "/experts_" in path else 1.0


def _rows(path: str, config: ModelConfig, objective: str, beside: int) -> float:
    """How many positions of a tile a weight outside the LLM is applied to; 0 where it is not used."""
    if path.startswith("connector/"):
        if config.connector and config.connector.kind == "visual_blocks":
            c = config.connector
            whole = 0 if objective != "language" else c.pooled if path.startswith("connector/project_in/") else c.pooled + c.latents
            return c.latents if whole and path.startswith("connector/project_out/") else whole
        if config.connector and config.connector.kind == "qformer" and objective != "classify":
            return _qformer_rows(path, config.connector, objective, beside)
        return _connector_rows(path, config.connector) if config.connector and objective == "language" else 0
    if not path.startswith("vision/") or config.vision is None:
        return 0
    if isinstance(config.vision, MobileNetV2Config):
        head = float(objective == "classify")
        found = head if path.startswith("vision/head") else _pixels(config.vision)[path.removesuffix("/kernel")]
        return found * _views(config)
    vision, views = config.vision, _views(config)
    if path.startswith("vision/patch"):
        return vision.positions * views
    if path.startswith(("vision/layers", "vision/plugs")) or (path.startswith("vision/projection") and config.features.projected):
        return (vision.positions + vision.prefix) * views
    if objective != "classify" or path.startswith(("vision/projection", "vision/pooler")):
        return 0
    return vision.positions if "/attention/key" in path or "/attention/value" in path else 1


def _views(config: ModelConfig) -> int:
    """How often the encoder is run for a tile: once for each part of it at each scale."""
    return sum(scale**2 for scale in config.features.scales)


def _connector_rows(path: str, config: ConnectorConfig) -> int:
    if config.own is not None:  # as if every weight met every position
        return max(config.pooled, config.tokens)
    if config.resamples:
        if path.startswith("connector/project_in/"):
            return config.pooled
        read = config.pooled + (config.latents if config.kind == "perceiver" else 0)
        return read if "/cross_attention/key/" in path or "/cross_attention/value/" in path else config.latents
    return config.tokens if config.kind in ("concat", "space_to_depth") else config.pooled


def _qformer_rows(path: str, config: ConnectorConfig, objective: str, text: int) -> float:
    """The same of a Q-Former. Its first stage reads every picture alone and in three pairs, every text alone, in three pairs and where
    it is written."""
    contrastive, queries = objective == "contrastive", config.latents
    pictures, texts = (4, 5) if contrastive else (1, 1)
    if path.startswith("connector/heads/"):
        heads = {"image": queries, "text": 1, "match": 3 * queries, "language": text}
        return heads[path.split("/")[2]] if contrastive else 0
    if path.startswith("connector/embed/"):
        return text if contrastive else 0  # the head's table is that of the words
    if path.startswith("connector/project_out/"):
        return 0 if contrastive else queries
    if "/cross_attention/key/" in path or "/cross_attention/value/" in path:
        return pictures * config.pooled
    if "/cross_attention/" in path or "/layers/mlp/" in path:
        return pictures * queries
    return texts * text if "/text_mlp/" in path else pictures * queries + texts * text


def _qformer_pairs(config: ConnectorConfig, objective: str, text: int) -> float:
    """Pairs of positions of a tile of which one attends to the other, over all layers of a Q-Former."""
    queries, crossing = config.latents, -(-config.depth // config.cross_every)
    if objective != "contrastive":
        return config.depth * (queries + text) ** 2 + crossing * queries * config.pooled
    own = queries**2 + text**2 + 3 * (queries + text) ** 2 + text * queries + text**2 / 2
    return config.depth * own + crossing * 4 * queries * config.pooled


def _pixels(config: MobileNetV2Config) -> dict[str, int]:
    """Path of each convolution -> pixels of its output."""
    side, pixels = config.image_size, {}
    for block in mobilenet_v2.network(config):
        for convolution in block.convolutions:
            side = -(-side // convolution.stride)
            pixels[f"vision/{convolution.path}"] = side**2
    return pixels


def _is_stacked(path: str) -> bool:
    return tree.is_stacked(path)


def _reads_source(path: str) -> bool:
    """Whether a weight of the LLM is applied to what an encoder-decoder's encoder reads: its own, and those that project its states."""
    memory = path.startswith(("llm/layers/cross_attention/key/", "llm/layers/cross_attention/value/"))
    return memory or path.startswith("llm/encoder/")


def _reads_media(path: str) -> bool:
    """Whether a weight of the LLM is applied to media tokens: those that project them for a cross-attention between blocks, or a noise
    embedding for prompts."""
    start = "llm/plugs/cross_attention/cross_attention/"
    named = path.startswith("llm/plugs/") and path.split("/")[3] in noise_prompt.NAMES
    return path.startswith((f"{start}key/", f"{start}value/")) or named


def _is_head(path: str, config: ModelConfig) -> bool:
    tied = config.llm is not None and config.llm.tied_head
    return path.startswith("llm/head/") or (tied and path in ("llm/embed/embedding", "llm/embed/new_rows"))


def _is_matmul(path: str, config: ModelConfig) -> bool:
    if path.startswith(("llm/pooler/", "llm/classifier/", "llm/prompts/")):
        return False  # not used in training on language, or not for every position
    if path.startswith("llm/embed/adapters/"):
        return path.endswith("/lora_b")  # lora_a is looked up
    if path == "connector/embed/embedding":
        return bool(config.connector and config.connector.contrast_width)
    if "/plugs/" in path and path.endswith(("/down", "/up")):
        return True
    return path.endswith(("/kernel", "/lora_a", "/lora_b")) or (path.endswith(("/embedding", "/new_rows")) and _is_head(path, config))


def _part(path: str, config: ModelConfig) -> str:
    if tree.adapter_of(path):
        return f"{path.split('/')[0]} adapters"
    if path.startswith("llm/encoder/"):
        return "llm encoder"
    return "llm head" if _is_head(path, config) else path.split("/")[0]
