"""moondream 2 (github.com/vikhyat/moondream, the code of 2025): overlapping tiles stitched into one map, an MLP, a decoder like Phi's.

A row is [start token, picture, text]; start token and picture see each other both ways. Inputs: `input_ids` [rows, length], and either
`crops` [rows, channels, side, side], one normalised picture a row that is its own only tile, or `images`, a list of uint8
[height, width, 3] that are cut into tiles here: one for each row, or all with the one row. Outputs of the latter bear the number
of their picture.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mmjax.batch import Batch
from mmjax.data.images import ImageProcessor
from mmjax.data.tiling import OverlappingTiles
from mmjax.errors import UserError
from mmjax.families import language, prefixed, siglip_vision, vision
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, flat_patches, leading, linear, norm, rule, transposed
from mmjax.models import stitching
from mmjax.models.block_config import Activation, BlockConfig, Rope
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, Stitching, ViTConfig
from mmjax.spans import spans_of
from mmjax.tree import Params

EPS = 1e-5


def _read(config: Config, where: str) -> ModelConfig:
    text = Fields(config.get("text", {}), f"{where}: text")
    image = Fields(config.get("vision", {}), f"{where}: vision")
    fields = Fields(config, where)
    text.only("group_size")  # int4
    text.only("moe")
    fields.only("vision_gelu", "tanh")
    tower = read_tower(image, "gelu_tanh")
    llm = _read_text(text, Fields(config.get("rotary", {}), f"{where}: rotary"))
    side = image.get("crop_size", 378) // tower.patch_size
    if text.get("prefix_attn", 1 + side**2) != 1 + side**2:
        raise UserError(
            f"{where}: prefix_attn = {text.get('prefix_attn')} is not supported (only 1 + the {side**2} tokens of a picture)"
        )
    if image.get("proj_out_dim", llm.block.width) != llm.block.width:
        raise UserError(
            f"{where}: proj_out_dim is {image.get('proj_out_dim')}, the language model's dim {llm.block.width}"
        )
    spec = FeatureSpec((-1,), post_norm=True, stitching=Stitching("area", image.get("overlap_margin", 4)))
    return ModelConfig(
        llm=llm,
        vision=tower,
        connector=ConnectorConfig(
            "mlp",
            spec.width(tower),
            llm.block.width,
            tower.positions,
            hidden_width=image.get("proj_inner_dim", 8192),
            activation="gelu_tanh",
        ),
        features=spec,
        image_mean=siglip_vision.MEAN,
        image_std=siglip_vision.STD,
        mask="opening",
    )


def read_tower(fields: Fields, activation: Activation) -> ViTConfig:
    """SigLIP as moondream writes it, by the fields of its `vision`."""
    width, heads = fields.get("enc_dim", 1152), fields.get("enc_n_heads", 16)
    return ViTConfig(
        image_size=fields.get("crop_size", 378),
        patch_size=fields.get("enc_patch_size", 14),
        channels=fields.get("in_channels", 3),
        layers=fields.get("enc_n_layers", 27),
        block=plain_block(width, heads, heads, fields.get("enc_ff_dim", 4304), activation),
    )


def plain_block(
    width: int, heads: int, kv_heads: int, mlp_width: int, activation: Activation, **more: Any
) -> BlockConfig:
    """Layer norms, and biases everywhere."""
    return BlockConfig(
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_width=mlp_width,
        activation=activation,
        norm="layer",
        norm_eps=EPS,
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        **more,
    )


def _read_text(fields: Fields, rotary: Fields) -> DecoderConfig:
    width, heads = fields.get("dim", 2048), fields.get("n_heads", 32)
    turned = rotary.get("rot_dim", width // heads // 2)
    rope = Rope(rotary.get("theta", 10000.0), fraction=turned / (width // heads))
    kv_heads, mlp_width = fields.get("n_kv_heads", heads), fields.get("ff_dim", 8192)
    return DecoderConfig(
        vocab_size=fields.get("vocab_size", 51200),
        layers=fields.get("n_layers", 24),
        block=plain_block(width, heads, kv_heads, mlp_width, "gelu_tanh", rope=rope, parallel_norms=1),
        max_positions=fields.get("max_context", 2048),
        head_bias=True,
    )


def _write(config: ModelConfig, base: Config) -> Config:
    tower, connector, llm, features = config.vision, config.connector, config.llm, config.features
    assert isinstance(tower, ViTConfig) and connector is not None and llm is not None and llm.block.rope is not None
    block, rope = llm.block, llm.block.rope
    assert features.stitching is not None
    written = {
        **base,
        "model_type": "moondream",
        "text": {
            **base.get("text", {}),
            "dim": block.width,
            "ff_dim": block.mlp_width,
            "n_layers": llm.layers,
            "n_heads": block.heads,
            "n_kv_heads": block.kv_heads,
            "vocab_size": llm.vocab_size,
            "max_context": llm.max_positions,
            "prefix_attn": 1 + tower.positions,
        },
        "vision": {
            **base.get("vision", {}),
            "enc_dim": tower.block.width,
            "enc_ff_dim": tower.block.mlp_width,
            "enc_n_layers": tower.layers,
            "enc_n_heads": tower.block.heads,
            "enc_patch_size": tower.patch_size,
            "crop_size": tower.image_size,
            "in_channels": tower.channels,
            "overlap_margin": features.stitching.overlap,
            "proj_inner_dim": connector.inner_width,
            "proj_out_dim": connector.out_width,
        },
        "rotary": {"rot_dim": round(rope.fraction * block.head_dim), "theta": rope.theta},
    }
    if _read(written, "the model's config") != dataclasses.replace(config, adapters=()):
        raise UserError("the model does not fit moondream's layout: its blocks, connector, features or mask are others")
    return written


def tower_rules(theirs: str, names: dict[str, str]) -> list[Rule]:
    """The vision tower below `theirs`; `names` are those of patch embedding, positions, a block's norms and the last norm."""
    block, ours = f"{theirs}blocks.{{i}}.", "vision/layers/"
    return [
        rule(f"{theirs}{names['patch']}.weight", "vision/patch/kernel", form=flat_patches(3)),
        rule(f"{theirs}{names['patch']}.bias", "vision/patch/bias"),
        rule(f"{theirs}{names['positions']}", "vision/positions", form=leading(1)),
        *norm(f"{block}{names['attention_norm']}", f"{ours}attention_norm"),
        *norm(f"{block}{names['mlp_norm']}", f"{ours}mlp_norm"),
        *attention_rules(f"{block}attn.qkv", f"{block}attn.proj", f"{ours}attention"),
        *linear(f"{block}mlp.fc1", f"{ours}mlp/up"),
        *linear(f"{block}mlp.fc2", f"{ours}mlp/down"),
        *norm(f"{theirs}{names['last_norm']}", "vision/post_norm"),
    ]


NAMES = {
    "patch": "patch_emb",
    "positions": "pos_emb",
    "attention_norm": "ln1",
    "mlp_norm": "ln2",
    "last_norm": "post_ln",
}


def attention_rules(packed: str, output: str, path: str) -> list[Rule]:
    """Queries, keys and values are one tensor, one after another."""
    parts = ("query", "key", "value")
    return [
        rule(f"{packed}.weight", *(f"{path}/{part}/kernel" for part in parts), form=transposed),
        rule(f"{packed}.bias", *(f"{path}/{part}/bias" for part in parts)),
        *linear(output, f"{path}/output"),
    ]


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    block, ours = "text.blocks.{i}.", "llm/layers/"
    return [
        *tower_rules("vision.", NAMES),
        *linear("vision.proj_mlp.fc1", "connector/layers_0"),
        *linear("vision.proj_mlp.fc2", "connector/layers_1"),
        rule("text.wte", "llm/embed/embedding"),
        *norm(f"{block}ln", f"{ours}attention_norm"),
        *attention_rules(f"{block}attn.qkv", f"{block}attn.proj", f"{ours}attention"),
        *linear(f"{block}mlp.fc1", f"{ours}mlp/up"),
        *linear(f"{block}mlp.fc2", f"{ours}mlp/down"),
        *norm("text.post_ln", "llm/final_norm"),
        *linear("text.lm_head", "llm/head"),
    ]


def tiling(foreign: Config, config: ModelConfig) -> OverlappingTiles:
    assert isinstance(config.vision, ViTConfig) and config.features.stitching is not None
    most = foreign.get("vision", {}).get("max_crops", 12)
    return OverlappingTiles(most, config.features.stitching.overlap * config.vision.patch_size)


def batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    return _put_together(config, foreign, inputs)[0]


def _put_together(config: ModelConfig, foreign: Config, inputs: Inputs) -> tuple[Batch, list[np.ndarray]]:
    """The batch, and the tiles of each of its `images` as they were cut."""
    assert isinstance(config.vision, ViTConfig)
    if ("images" in inputs) == ("crops" in inputs):
        raise UserError("a moondream takes either crops or images")
    cut: list[np.ndarray] = []
    if "images" in inputs:
        own = tiling(foreign, config)
        processor = ImageProcessor(config.vision.image_size, "squash", config.image_mean, config.image_std, tiling=own)
        cut = [processor.tiles(image) for image in inputs["images"]]
        layouts = [own.layout(image.shape[0], image.shape[1], processor.shape[:2]) for image in inputs["images"]]
        firsts = np.cumsum([0] + [len(tiles) for tiles in cut])
        grids = [(first, layout.rows, layout.columns) for first, layout in zip(firsts, layouts)]
        images = np.concatenate(cut)
        if len(inputs.get("input_ids", ())) == 1:
            inputs = {name: np.repeat(value, len(cut), 0) for name, value in inputs.items() if name != "images"}
    else:
        images = vision.pixels(inputs, "crops")
        grids = [(k, 0, 0) for k in range(len(images))]
    text, _ = prefixed.rows(config, inputs, config.tokens_per_tile, (foreign.get("bos_id", 0),))
    if len(text.tokens) != len(grids):
        raise UserError(f"input_ids have {len(text.tokens)} rows for {len(grids)} pictures")
    whole = dataclasses.replace(
        text,
        images=images[None],
        tiles=np.ones((1, len(images)), bool),
        grids=np.array([grids], np.int32),
        spans=spans_of("opening", text.segments, text.media >= 0, np.zeros(text.segments.shape, bool)),
    )
    return whole, cut


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, Any]:
    """Of `images`, also `crops_uint8_k` [tiles, side, side, 3], `tiling_k` (rows and columns), `global_features_k` (the overview's),
    `reconstructed_k` (the map of the whole grid before it is brought to the size of one tile's)."""
    whole, cut = _put_together(config, foreign, inputs)
    found: dict[str, Any] = language.run_language(params, whole, config=config, run=run, states=states)
    if not cut:
        return found
    assert config.features.stitching is not None
    features = found.pop("image_features")
    named: dict[str, Any] = {}
    for k, (tiles, (first, rows, columns)) in enumerate(zip(cut, whole.grids[0])):
        grid = features[first + 1 : first + 1 + rows * columns].reshape(rows, columns, *features.shape[1:])
        named[f"crops_uint8_{k}"], named[f"tiling_{k}"] = tiles, np.array([rows, columns])
        named[f"global_features_{k}"] = features[first]
        named[f"reconstructed_{k}"] = stitching.joined(config.features.stitching, grid)
        for name in ("connector_output", "logits", "inputs_embeds", "last_hidden_state"):
            named[f"{name}_{k}"] = found[name][k : k + 1]
    return {**named, **({"loss": found["loss"]} if "loss" in found else {})}


FAMILY = Family(
    model_types=("moondream",),
    about="moondream 2 (vikhyat, 2025; github.com/vikhyat/moondream)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=("input_ids", "attention_mask", "labels", "crops", "images"),
    outputs=_outputs,
    prompt=batch,
    tiling=tiling,
    spellings=((r"^model\.(?=(vision|text|region)\.)", ""),),
    unused=(r"^(model\.)?region\.",),  # boxes and points, which no language model reads
)
