"""Qwen2-VL (arXiv 2409.12191) in transformers' layout: a vision transformer for pictures of any shape, whose patches turn by their rows
and columns; a merger that makes one token of 2 x 2 patches; a Qwen2 whose positions have three axes (time, row, column).

Inputs beside a language model's: `pixel_values` [patches, channels x frames x patch_size ** 2], the patches of all pictures one after
another, block by block of what is merged; `image_grid_thw` [pictures, 3], their patches in time (1), rows and columns;
`mm_token_type_ids` [rows, length], 1 at image tokens. Image tokens take the time where they begin and their rows and columns from there
on; the text goes on behind the largest. `position_ids` may be given, [3, rows, length]. Videos are not supported.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families import clip_vision, language, llama, qwen2
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Form, Rule, linear, norm, rule, transposed
from mmjax.families.rope import read_rope, write_rope
from mmjax.families.towers import tower
from mmjax.families.windows import write_windows
from mmjax.models import vit
from mmjax.models.block_config import BlockConfig, Rope
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, ViTConfig
from mmjax.spans import runs
from mmjax.tree import Params

TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
}
THETA, SECTIONS = 1e6, (16, 24, 24)  # where a config says nothing
ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")
MERGED = 2  # rows and columns of patches that become one token
FEATURES = FeatureSpec((-1,))
PICTURE = 448  # pixels of a side, where a size must be named: the family has none of its own
IMAGE_TOKEN = 151655
INPUTS = (*language.INPUTS, "pixel_values", "image_grid_thw", "mm_token_type_ids")


def _text(config: Config) -> Config:
    """The text's fields: text_config, or in published files those of the whole."""
    return config.get("text_config") or {name: value for name, value in config.items() if name != "vision_config"}


def _tied(config: Config) -> bool:
    """Either place may say that the head is tied."""
    return bool(config.get("tie_word_embeddings") or _text(config).get("tie_word_embeddings"))


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("quantization_config")
    llm = _read_text(Fields(_text(config), where), _tied(config))
    image = Fields(fields.need("vision_config"), f"{where}: vision_config")
    encoder = _read_tower(image)
    width = image.get("hidden_size", 3584)
    if width != llm.input_width:
        raise UserError(f"{image.where}: hidden_size = {width}, but the language model's embeddings have {llm.input_width} channels")
    return ModelConfig(
        llm=llm,
        vision=encoder,
        connector=_merger(encoder, width),
        features=FEATURES,
        image_mean=clip_vision.MEAN,
        image_std=clip_vision.STD,
    )


def _read_text(fields: Fields, tied: bool) -> DecoderConfig:
    rope = _rope(fields)
    kept = {name: value for name, value in fields.values.items() if name not in ROPE_FIELDS}
    defaults = {**TEXT_DEFAULTS, "num_key_value_heads": llama.kv_heads(fields, 8)}
    plain = Fields({**TEXT_DEFAULTS, **kept, "tie_word_embeddings": tied, "rope_parameters": write_rope(rope)}, fields.where)
    decoder = llama.read_decoder(plain, qkv_bias=True, output_bias=False, windows=qwen2.windows(plain), **defaults)
    if sum(rope.sections) != decoder.block.head_dim // 2:
        raise UserError(f"{fields.where}: mrope_section = {list(rope.sections)} does not add up to the {decoder.block.head_dim // 2} angles of a head")
    return dataclasses.replace(decoder, block=dataclasses.replace(decoder.block, rope=rope))


def _rope(fields: Fields) -> Rope:
    given = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    sections = tuple(given.pop("mrope_section", SECTIONS))
    if given.get("rope_type", given.pop("type", None)) in ("mrope", None):
        given["rope_type"] = "default"
    given.setdefault("rope_theta", fields.get("rope_theta", THETA))
    kept = {name: value for name, value in fields.values.items() if name not in ROPE_FIELDS}
    return dataclasses.replace(read_rope(Fields({**kept, "rope_parameters": given}, fields.where)), sections=sections)


def _read_tower(fields: Fields) -> ViTConfig:
    width, heads = fields.get("embed_dim", 1280), fields.get("num_heads", 16)
    rope = fields.get("rope_parameters", {})
    Fields(rope, fields.where).only("rope_type", "axial")
    fields.only("spatial_merge_size", MERGED)
    if width % (4 * heads):
        raise UserError(f"{fields.where}: embed_dim = {width} with {heads} heads: a head's channels must be a multiple of 4")
    return ViTConfig(
        image_size=PICTURE,
        patch_size=fields.square("patch_size", 14),
        patch_frames=fields.square("temporal_patch_size", 2),
        channels=fields.get("in_channels", 3),
        layers=fields.get("depth", 32),
        block=BlockConfig(
            width=width,
            heads=heads,
            kv_heads=heads,
            head_dim=width // heads,
            mlp_width=int(width * fields.get("mlp_ratio", 4)),
            activation=fields.activation("hidden_act", "quick_gelu"),
            norm="layer",
            norm_eps=1e-6,
            gated_mlp=False,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            rope=Rope(float(rope.get("rope_theta", 1e4)), kind="axial", sections=(width // heads // 4,) * 2),
        ),
        naflex=True,
        learned_positions=False,
        patch_bias=False,
        post_norm="",
    )


def _merger(encoder: ViTConfig, width: int) -> ConnectorConfig:
    return ConnectorConfig(
        "concat",
        encoder.feature_width,
        width,
        encoder.positions,
        hidden_width=encoder.feature_width * MERGED**2,
        group=MERGED**2,
        input_norm=True,
        norm_each=True,
        norm_eps=1e-6,
    )


def _write(config: ModelConfig, base: Config) -> Config:
    llm, encoder = config.language, tower(config)
    block, image = llm.block, base.get("vision_config", {})
    fits = llama.plain(block) and block.norm == "rms" and block.qkv_bias and not block.output_bias and not block.qk_norm
    fits = fits and block.rope is not None and bool(block.rope.sections) and config.connector == _merger(encoder, llm.input_width)
    llama.require(fits and (config.features, config.mask) == (FEATURES, "causal"), "Qwen2-VL", "its blocks, connector or mask are others")
    text = _text(base)
    bare = {name: value for name, value in text.items() if name not in ROPE_FIELDS}
    written = {**llama.write_decoder(llm, bare, "qwen2_vl_text", "Qwen2VLForConditionalGeneration"), **_rope_fields(block.rope, text)}
    del written["head_dim"], written["architectures"]  # always width / heads
    written.update(use_sliding_window=any(llm.windows), **write_windows(llm.windows, llm.layers))
    nested = "text_config" in base or not base
    return {
        **base,
        **({"text_config": written} if nested else written),
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "tie_word_embeddings": llm.tied_head,
        "vision_config": {
            **image,
            "model_type": "qwen2_vl_vision",
            "depth": encoder.layers,
            "embed_dim": encoder.block.width,
            "hidden_size": llm.input_width,
            "num_heads": encoder.block.heads,
            "mlp_ratio": encoder.block.mlp_width // encoder.block.width,
            "hidden_act": activation_name(encoder.block.activation, image.get("hidden_act")),
            "in_channels": encoder.channels,
            "patch_size": encoder.patch_size,
            "temporal_patch_size": encoder.patch_frames,
            "spatial_merge_size": MERGED,
            "rope_parameters": {"rope_type": "axial", "rope_theta": encoder.block.rope.theta if encoder.block.rope else 1e4},
        },
    }


def _rope_fields(rope: Rope | None, text: Config) -> Config:
    """The fields of the rotary embedding: those of `text` where it has this already."""
    assert rope is not None
    if text and _rope(Fields(text)) == rope:
        return {name: text[name] for name in ROPE_FIELDS if name in text}
    return {"rope_parameters": {**write_rope(rope), "mrope_section": list(rope.sections)}}


def _volumes(channels: int, frames: int) -> Form:
    """A Conv3d over patches: [out, channels, frames, p, p]; ours [(channel, frame, row, column), out]."""

    def side(rows: int) -> int:
        return round((rows // channels // frames) ** 0.5)

    return Form(
        lambda s: (s[1], channels, frames, side(s[0]), side(s[0])),
        lambda a: a.reshape(len(a), -1).T,
        lambda a: a.T.reshape(-1, channels, frames, side(len(a)), side(len(a))),
    )


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    encoder, theirs, ours = tower(config), "visual.blocks.{i}.", "vision/layers/"
    joined = [f"{ours}attention/{name}" for name in ("query", "key", "value")]
    return [
        *llama.rules(config, foreign),
        rule("visual.patch_embed.proj.weight", "vision/patch/kernel", form=_volumes(encoder.channels, encoder.patch_frames)),
        *norm(theirs + "norm1", ours + "attention_norm"),
        *norm(theirs + "norm2", ours + "mlp_norm"),
        rule(theirs + "attn.qkv.weight", *(f"{path}/kernel" for path in joined), form=transposed),
        rule(theirs + "attn.qkv.bias", *(f"{path}/bias" for path in joined)),
        *linear(theirs + "attn.proj", ours + "attention/output"),
        *linear(theirs + "mlp.fc1", ours + "mlp/up"),
        *linear(theirs + "mlp.fc2", ours + "mlp/down"),
        *norm("visual.merger.ln_q", "connector/input_norm"),
        *linear("visual.merger.mlp.0", "connector/layers_0"),
        *linear("visual.merger.mlp.2", "connector/layers_1"),
    ]


def _batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    placeholder = foreign.get("image_token_id") or IMAGE_TOKEN
    given = {name: inputs[name] for name in language.INPUTS if name in inputs and name != "position_ids"}
    found = language.text_batch(config, given, placeholder)
    is_media, segments = np.asarray(found.media) >= 0, np.asarray(found.segments)
    kinds = inputs.get("mm_token_type_ids")
    if kinds is not None and not np.array_equal((kinds == 1) & (segments > 0), is_media & (segments > 0)):
        raise UserError(f"mm_token_type_ids are 1 where input_ids are {placeholder}, and nowhere else")
    grids = _grids(config, inputs)
    if is_media.sum() != grids.prod(1).sum() // MERGED**2:
        raise UserError(f"input_ids hold {is_media.sum()} image tokens, but pictures of {grids.prod(1) // MERGED**2} tokens are given")
    if "position_ids" in inputs:
        wanted = inputs["position_ids"]
        if wanted.shape not in (segments.shape, (3, *segments.shape)):
            raise UserError(f"position_ids are [3, rows, length] or [rows, length], not {list(wanted.shape)}")
        positions = wanted if wanted.ndim == 2 else wanted.transpose(1, 2, 0)
    else:
        positions = _positions(segments, runs(is_media & (segments > 0), segments), grids // MERGED)
    found = dataclasses.replace(found, positions=positions.astype(np.int32))
    if not len(grids):
        return found
    patches = _patches(config, inputs["pixel_values"], grids)
    room = patches.pixels.shape[2] // MERGED**2  # of a picture's tokens, padding included
    table = np.concatenate([i * room + np.arange(count) for i, count in enumerate(grids.prod(1) // MERGED**2)])
    media = np.where(is_media, table[np.maximum(found.media, 0)], -1).astype(np.int32)
    return dataclasses.replace(found, media=media, images=patches, tiles=np.ones((1, len(grids)), bool))


def _grids(config: ModelConfig, inputs: Inputs) -> np.ndarray:
    """Rows and columns of each picture's patches, int [pictures, 2]."""
    if "pixel_values" not in inputs:
        return np.zeros((0, 2), int)
    if "image_grid_thw" not in inputs:
        raise UserError("image_grid_thw are missing")
    grids, pixels, encoder = inputs["image_grid_thw"], inputs["pixel_values"], tower(config)
    size = encoder.patch_size**2 * encoder.channels * encoder.patch_frames
    if grids.ndim != 2 or grids.shape[1] != 3 or (grids[:, 0] != 1).any() or (grids[:, 1:] % MERGED).any() or (grids < 1).any():
        raise UserError(f"image_grid_thw are [pictures, 3]: 1, and even numbers of rows and columns; not {grids.tolist()}")
    if pixels.shape != (grids.prod(1).sum(), size):
        raise UserError(f"pixel_values are [{grids.prod(1).sum()}, {size}] for these image_grid_thw, not {list(pixels.shape)}")
    return grids[:, 1:]


def _patches(config: ModelConfig, pixels: np.ndarray, grids: np.ndarray) -> vit.Patches:
    """The pictures padded to one length, as one group."""
    counts = grids.prod(1)
    shape = 1, len(grids), int(counts.max())
    values, seen = np.zeros((*shape, pixels.shape[1]), np.float32), np.zeros(shape, np.int32)
    places = np.zeros((*shape, 2), np.int32)
    for i, (rows, columns) in enumerate(grids):
        first, count = int(counts[:i].sum()), int(counts[i])
        values[0, i, :count], seen[0, i, :count] = pixels[first : first + count], 1
        cells = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)
        blocks = cells.reshape(rows // MERGED, MERGED, columns // MERGED, MERGED, 2).swapaxes(1, 2)
        places[0, i, :count] = blocks.reshape(-1, 2)
    return vit.Patches(values, grids[None].astype(np.int32), seen, places)  # type: ignore[arg-type]


def _positions(segments: np.ndarray, pictures: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """int [rows, length, 3]; pictures: int [rows, length], 0 = text, else the number of the run of image tokens in its row; cells: the rows
    and columns of tokens of each picture of the batch, in order."""
    positions, number = np.zeros((*segments.shape, 3), int), 0
    for row in range(len(segments)):
        following = 0
        at = np.flatnonzero(segments[row])
        for kind in np.split(at, np.flatnonzero(np.diff(pictures[row, at])) + 1) if len(at) else []:
            if not pictures[row, kind[0]]:
                positions[row, kind] = following + np.arange(len(kind))[:, None]
                following += len(kind)
                continue
            if number == len(cells) or len(kind) != cells[number].prod():
                raise UserError(f"row {row} has {len(kind)} image tokens on end, which is not one picture of image_grid_thw")
            rows, columns = cells[number]
            grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
            positions[row, kind] = following + np.concatenate([np.zeros((len(kind), 1), int), grid], 1)
            following, number = following + int(max(rows, columns)), number + 1
    return positions


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    batch = _batch(config, foreign, inputs)
    found = language.run_language(params, batch, config=config, run=run, states=states)
    if batch.images is not None:  # the pictures' own, one after another, without padding
        seen = np.asarray(batch.images.seen[0]) > 0
        for name, real in (("image_features", seen), ("connector_output", seen[:, :: MERGED**2])):
            found[name] = jnp.asarray(found[name])[real]
    return found


FAMILY = Family(
    model_types=("qwen2_vl",),
    about="Qwen2-VL, pictures without videos (arXiv 2409.12191)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=INPUTS,
    outputs=_outputs,
    prompt=_batch,
    spellings=((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),
    copies=llama.copies,
    modules=((r"^visual\.", "model.visual."), (r"^model\.(?!visual\.)", "model.language_model.")),
)
