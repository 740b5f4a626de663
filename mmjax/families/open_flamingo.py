"""OpenFlamingo (arXiv 2308.01390) in its authors' layout (github.com/mlfoundations/open_flamingo): a CLIP tower, a perceiver
resampler, and gated cross-attention before every n-th block of a language model, the n-th being the first.

`lang_x` are token ids among which `media_token_id` stands for a picture, `vision_x` [rows, media, frames, channels, height, width].
Every block of the language model stands below `.decoder_layer.`, beside its `.gated_cross_attn_layer.`

A published checkpoint.pt holds what was trained, and the embeddings; a config.json beside it says where the rest is:

    {"model_type": "openflamingo", "lang_encoder_path": DIR, "clip_vision_encoder_path": DIR, "cross_attn_every_n_layers": 4}
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Mapping

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.checkpoints.safetensors import Stored
from mmjax.errors import UserError
from mmjax.families import clip_vision, flamingo, interleaved, language, parts
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, norm, patches, prefixed, rule, same, transposed
from mmjax.models import gated_cross_attention
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, GatedCrossAttentionConfig, ViTConfig
from mmjax.tree import Params

LANGUAGE, TOWER = "lang_encoder.", "vision_encoder."
EPS = 1e-5  # torch's own, of the resampler's and the gated blocks' norms


def read_language(fields: Fields) -> DecoderConfig:
    """The language model, with the vocabulary that the weights have."""
    text, where = fields.part("text_config", "llama"), f"{fields.where}: text_config"
    if fields.get("vocab_size"):
        text = {**text, "vocab_size": fields.get("vocab_size")}
    llm = parts.language(text, where).read_config(text, where).llm
    assert llm is not None
    if llm.encoder is not None:
        raise UserError(f"{where}: an encoder-decoder has no gated cross-attention")
    return llm


def cross_attention(fields: Fields, sizes: Fields, llm: DecoderConfig, media_width: int, last: bool) -> GatedCrossAttentionConfig:
    """The gated blocks, before every n-th block of the language model."""
    every, heads = fields.get("cross_attn_every_n_layers", 1), sizes.get("heads", 8)
    width = llm.block.width
    block = BlockConfig(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=sizes.get("dim_head", 64),
        mlp_width=sizes.get("ff_mult", 4) * width,
        activation="gelu",
        norm="layer",
        norm_eps=EPS,
        gated_mlp=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        memory_width=media_width,
    )
    return GatedCrossAttentionConfig(block, tuple(range(every - 1, llm.layers, every)), last)


def resampler(sizes: Fields, width: int, positions: int) -> ConnectorConfig:
    sizes.only("max_num_media", 0)
    if sizes.get("dim", width) != width:
        raise UserError(f"{sizes.where}: dim = {sizes.get('dim')} differs from the tower's width {width}")
    return ConnectorConfig(
        kind="perceiver",
        in_width=width,
        out_width=width,
        positions=positions,
        depth=sizes.get("depth", 6),
        activation="gelu",
        bias=False,
        latents=sizes.get("num_latents", 64),
        widening=sizes.get("ff_mult", 4),
        heads=sizes.get("heads", 8),
        head_dim=sizes.get("dim_head", 64),
        frames=sizes.get("max_num_frames", 0),
    )


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    llm = read_language(fields)
    tower, spec = _read_tower(fields)
    vision = tower.vision
    assert isinstance(vision, ViTConfig)
    gated = Fields(fields.get("gated_cross_attn", {}), f"{where}: gated_cross_attn")
    last = bool(gated.get("only_attend_immediate_media", True))
    connector = resampler(Fields(fields.get("perceiver", {}), f"{where}: perceiver"), vision.feature_width, spec.positions(vision))
    return dataclasses.replace(
        tower,
        llm=llm,
        connector=connector,
        cross_attention=cross_attention(fields, gated, llm, connector.out_width, last),
        features=spec,
    )


def _read_tower(fields: Fields) -> tuple[ModelConfig, FeatureSpec]:
    """The tower, described as open_clip does it or as transformers does, and which of its states are read."""
    image = Fields(fields.part("vision_config", ""), f"{fields.where}: vision_config")
    if not _is_open_clip(image.values):
        family = parts.vision(image.values, image.where)
        return family.read_config(_without_head(image.values), image.where), FeatureSpec((-1,))
    read = str(image.get("features", "before ln_post"))
    if not re.search(r"\b(before|after) ln_post", read):
        raise UserError(f"{image.where}: features = {read!r} does not say whether they are read before or after ln_post")
    width, heads = image.need("width"), image.need("heads")
    clip = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": int(width * image.get("mlp_ratio", 4.0)),
        "num_hidden_layers": image.need("layers"),
        "hidden_act": "quick_gelu" if image.get("quick_gelu", False) else "gelu",
        "layer_norm_eps": image.get("norm_eps", 1e-5),
        **{name: image.need(name) for name in ("image_size", "patch_size")},
    }
    tower = clip_vision.read_tower(Fields(clip, image.where), image.need("output_dim"))
    model = ModelConfig(vision=tower, image_mean=clip_vision.MEAN, image_std=clip_vision.STD, image_aspect="crop")
    return model, FeatureSpec((-1,), post_norm="after ln_post" in read)


def _is_open_clip(image: Config) -> bool:
    return "width" in image


def _without_head(image: Config) -> Config:
    return {name: value for name, value in image.items() if name != "architectures"}


def _write(config: ModelConfig, base: Config) -> Config:
    text, image = base["text_config"], base["vision_config"]
    crossed, connector, tower, llm = config.cross_attention, config.connector, config.vision, config.language
    if crossed is None or connector is None or not isinstance(tower, ViTConfig):
        raise UserError("the model does not fit OpenFlamingo's layout: it has no gated cross-attention, or no vision transformer")
    every = crossed.layers[0] + 1
    expected = cross_attention(
        Fields({"cross_attn_every_n_layers": every}),
        Fields({"heads": crossed.block.heads, "dim_head": crossed.block.head_dim, "ff_mult": crossed.block.mlp_width // llm.block.width}),
        llm,
        connector.out_width,
        crossed.last_media_only,
    )
    if crossed != expected or connector.kind != "perceiver" or connector.out_width != connector.in_width or connector.qk_norm:
        raise UserError("the model does not fit OpenFlamingo's layout: its gated blocks or its resampler are others")
    written = {name: value for name, value in base.items() if name != "vocab_size"}
    return {
        **written,
        "model_type": "openflamingo",
        "cross_attn_every_n_layers": every,
        "text_config": parts.language(text, "text_config").write_config(config, text),
        "vision_config": image if _is_open_clip(image) else parts.vision(image, "vision_config").write_config(config, image),
        "perceiver": {
            "dim": connector.in_width,
            "depth": connector.depth,
            "heads": connector.heads,
            "dim_head": connector.head_dim,
            "ff_mult": connector.widening,
            "num_latents": connector.latents,
            "max_num_frames": connector.frames or None,
            "max_num_media": None,
        },
        "gated_cross_attn": {
            "heads": crossed.block.heads,
            "dim_head": crossed.block.head_dim,
            "ff_mult": crossed.block.mlp_width // llm.block.width,
            "only_attend_immediate_media": crossed.last_media_only,
        },
    }


def language_rules(config: ModelConfig, text: Config, layout: flamingo.Layout, head: str = "") -> list[Rule]:
    """The language model below `lang_encoder.`, with the gated blocks inside of its own. `head`: the name of its head there."""
    table = parts.language(text, "text_config").rules(config, text)
    blocks = next(r.name.split("{i}")[0] for r in table if "{i}" in r.name)
    inside = [dataclasses.replace(r, name=r.name.replace("{i}.", "{i}.decoder_layer.")) for r in table]
    if head:
        inside = [dataclasses.replace(r, name=re.sub(r"^(lm_head|embed_out)\.", f"{head}.", r.name)) for r in inside]
    assert config.cross_attention is not None
    name, path = f"{blocks}{{i}}.gated_cross_attn_layer.", f"llm/plugs/{gated_cross_attention.NAME}/"
    gated = flamingo.gated_cross_attention_rules(layout, name, path)
    gated = [dataclasses.replace(r, numbers=config.cross_attention.layers) for r in gated]
    return prefixed(LANGUAGE, [*inside, *gated])


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.connector is not None and isinstance(config.vision, ViTConfig)
    image = foreign["vision_config"]
    tower = tower_rules(config.vision) if _is_open_clip(image) else parts.vision(image, "vision_config").rules(config, image)
    return [
        *language_rules(config, foreign["text_config"], "open_flamingo", foreign.get("lang_encoder_head", "")),
        *prefixed("perceiver.", flamingo.resampler_rules(config.connector, "open_flamingo")),
        *prefixed(TOWER, tower),
    ]


def tower_rules(encoder: ViTConfig) -> list[Rule]:
    """open_clip's names of a CLIP tower."""
    theirs, ours = "transformer.resblocks.{i}.", "vision/layers/"
    fused = [f"{ours}attention/{name}" for name in ("query", "key", "value")]
    table = [
        rule("class_embedding", "vision/class_embedding"),
        rule("conv1.weight", "vision/patch/kernel", form=patches(encoder.channels)),
        rule("positional_embedding", "vision/positions"),
        *norm("ln_pre", "vision/pre_norm"),
        *norm(theirs + "ln_1", ours + "attention_norm"),
        *norm(theirs + "ln_2", ours + "mlp_norm"),
        rule(theirs + "attn.in_proj_weight", *(f"{path}/kernel" for path in fused), form=transposed),
        rule(theirs + "attn.in_proj_bias", *(f"{path}/bias" for path in fused)),
        *linear(theirs + "attn.out_proj", ours + "attention/output"),
        *linear(theirs + "mlp.c_fc", ours + "mlp/up"),
        *linear(theirs + "mlp.c_proj", ours + "mlp/down"),
        *norm("ln_post", "vision/post_norm"),
    ]
    return table + [rule("proj", "vision/projection/kernel", form=same)] if encoder.projection else table


def _complete(config: Config, stored: Mapping[str, Stored]) -> Config:
    """The size of the vocabulary, which grew by the tokens of media and ends of chunks, and how the head is called."""
    tables = [t for name, t in stored.items() if re.search(r"^lang_encoder\..*\b(embed_tokens|wte|embed_in)\.weight$", name)]
    heads = [head for head in ("lm_head", "embed_out") if f"{LANGUAGE}{head}.weight" in stored]
    found: Config = {"vocab_size": tables[0].shape[0]} if tables else {}
    return {**config, **found, **({"lang_encoder_head": heads[0]} if heads else {})}


def placeholder(foreign: Config) -> int:
    """The id of the token that stands for a picture. Raises UserError where the files do not say."""
    if foreign.get("media_token_id") is None:
        raise UserError("config.json has no media_token_id, the id of <image>, and there is no tokenizer to ask for it")
    return int(foreign["media_token_id"])


def batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    given = {("input_ids" if name == "lang_x" else name): value for name, value in inputs.items() if name != "vision_x"}
    if "input_ids" not in given:
        raise UserError("lang_x are missing")
    rows = language.text_batch(config, given)
    images = interleaved.grid(inputs, "vision_x", "rows, media, frames, channels, height, width")
    if images is not None and images.shape[2] == 1 and not (config.connector and config.connector.frames):
        images = images[:, :, 0]
    locations = (given["input_ids"] == placeholder(foreign)) & (np.asarray(rows.segments) > 0)
    return interleaved.with_grid(rows, images, np.asarray(gated_cross_attention.media_begun(locations)))


def outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    found = interleaved.outputs(params, config, batch(config, foreign, inputs), run, states)
    if "vision_x" in inputs and found["image_features"].ndim == 4:
        found["image_features"] = found["image_features"][:, :, None]
    return found


def external(config: Config) -> dict[str, str]:
    named: dict[str, Any] = {"llm": config.get("lang_encoder_path"), "vision": config.get("clip_vision_encoder_path")}
    return {part: name for part, name in named.items() if name}


def copies_in(config: ModelConfig, foreign: Config) -> dict[str, str]:
    """What the language model stores twice."""
    tied = parts.language(foreign["text_config"], "text_config").copies(config)
    heads = {LANGUAGE + copy: LANGUAGE + original for copy, original in tied.items()}
    return heads | {re.sub(r"\.embed_out\.", ".lm_head.", copy): original for copy, original in heads.items()}


FAMILY = Family(
    model_types=("openflamingo",),
    about="OpenFlamingo 3B, 4B, 9B (arXiv 2308.01390)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=("lang_x", "attention_mask", "labels", "vision_x"),
    outputs=outputs,
    prompt=batch,
    # What wrappers of training leave in the names.
    spellings=((r"^module\.", ""), (r"_(fsdp|checkpoint)_wrapped_module\.", "")),
    complete=_complete,
    # The same tensors under the names that the language model has them by while it runs; buffers.
    unused=(
        r"^lang_encoder\.(old_decoder_blocks|gated_cross_attn_layers)\.",
        r"rotary_emb\.inv_freq$",
        r"\.position_ids$",
        r"\.attention\.(masked_)?bias$",
    ),
    copies_in=copies_in,
    external=external,
    partial=("llm",),
    tokens=(("media_token_id", "<image>"), ("eoc_token_id", "<|endofchunk|>")),
)
