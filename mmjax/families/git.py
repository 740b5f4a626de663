"""GIT (arXiv 2205.14100) in transformers' layout: a CLIP tower, Linear and layer norm, and a text decoder with BERT's blocks.

Image tokens stand in front of the text without placeholders: `logits` cover them first. They see each other and no text; text is
causal and sees all of them. Words and positions are added and normed, image tokens are not. `pixel_values` are [images, channels,
height, width], or [images, frames, channels, height, width] for videos, whose frames are told apart by learned embeddings where the
config has them; fewer images than rows are handed out in turns. Also `num_image_positions`. `loss` is of the text alone.

The decoder by itself is a language model for recipes: `model_type` git_text, with the fields of GIT's own config.json.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families import clip_vision, language, llama, vision
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, leading, linear, norm, prefixed, rule
from mmjax.families.towers import tower, write_tower
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, ViTConfig
from mmjax.tree import Params

FEATURES = FeatureSpec((-1,), keep_class_token=True, post_norm=True)
PATCH = 16  # where a config names none
INPUTS = (*language.INPUTS, *vision.INPUTS)
# Published video models spell it so.
SPELLINGS = ((r"img_temperal_embedding\.", "img_temporal_embedding."),)


def _read_text(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("quantization_config")
    fields.only("position_embedding_type", "absolute")
    width, heads = fields.get("hidden_size", 768), fields.get("num_attention_heads", 12)
    if width % heads:
        raise UserError(f"{where}: hidden_size = {width} is not a multiple of num_attention_heads = {heads}")
    length = fields.get("max_position_embeddings", 1024)
    decoder = DecoderConfig(
        vocab_size=fields.get("vocab_size", 30522),
        layers=fields.get("num_hidden_layers", 6),
        block=BlockConfig(
            width=width,
            heads=heads,
            kv_heads=heads,
            head_dim=width // heads,
            mlp_width=fields.get("intermediate_size", 3072),
            activation=fields.activation("hidden_act", "gelu"),
            norm="layer",
            norm_eps=fields.get("layer_norm_eps", 1e-12),
            norm_place="after",
            gated_mlp=False,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
        ),
        max_positions=length,
        tied_head=fields.get("tie_word_embeddings", False),
        head_bias=True,
        learned_positions=length,
        embed_norm=True,
        final_norm=False,
        media_as_they_are=True,
    )
    return ModelConfig(llm=decoder)


def _write_text(config: ModelConfig, base: Config) -> Config:
    ours, block = config.language, config.language.block
    fits = block.norm == "layer" and block.norm_place == "after" and not block.gated_mlp and block.mlp_bias
    fits = fits and ours.embed_norm and not ours.final_norm and ours.media_as_they_are and ours.head_bias
    llama.require(fits and ours.learned_positions == ours.max_positions and block.rope is None, "GIT", "its norms, MLP or positions are others")
    return {
        **base,
        "model_type": "git_text",
        "vocab_size": ours.vocab_size,
        "hidden_size": block.width,
        "intermediate_size": block.mlp_width,
        "num_hidden_layers": ours.layers,
        "num_attention_heads": block.heads,
        "hidden_act": activation_name(block.activation, base.get("hidden_act")),
        "layer_norm_eps": block.norm_eps,
        "max_position_embeddings": ours.max_positions,
        "tie_word_embeddings": ours.tied_head,
    }


def _text_rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    start, layer, ours = "git.embeddings.", "git.encoder.layer.{i}.", "llm/layers/"
    table = [
        rule(start + "word_embeddings.weight", "llm/embed/embedding"),
        rule(start + "position_embeddings.weight", "llm/embed/positions"),
        *norm(start + "LayerNorm", "llm/embed/norm"),
        *linear(layer + "attention.output.dense", ours + "attention/output"),
        *norm(layer + "attention.output.LayerNorm", ours + "attention_norm"),
        *linear(layer + "intermediate.dense", ours + "mlp/up"),
        *linear(layer + "output.dense", ours + "mlp/down"),
        *norm(layer + "output.LayerNorm", ours + "mlp_norm"),
    ]
    for name in ("query", "key", "value"):
        table += linear(f"{layer}attention.self.{name}", f"{ours}attention/{name}")
    return table + ([rule("output.bias", "llm/head/bias")] if config.language.tied_head else linear("output", "llm/head"))


def _copies(config: ModelConfig) -> dict[str, str]:
    tied = config.llm is not None and config.llm.tied_head
    return {"output.weight": "git.embeddings.word_embeddings.weight"} if tied else {}


def _parts(config: Config, where: str) -> tuple[Config, Config]:
    """The text's fields and vision_config."""
    text = {name: value for name, value in config.items() if name != "vision_config"}
    image = Fields(config, where).get("vision_config", {})
    return text, {"patch_size": PATCH, **image, "model_type": "git_vision_model"}


def _read(config: Config, where: str) -> ModelConfig:
    text, image = _parts(config, where)
    llm = _read_text(text, where).language
    fields = Fields(image, f"{where}: vision_config")
    encoder = dataclasses.replace(clip_vision.read_tower(fields), post_norm="states", pooling="none")
    return ModelConfig(
        llm=llm,
        vision=encoder,
        connector=ConnectorConfig(
            "linear",
            encoder.feature_width,
            llm.input_width,
            FEATURES.positions(encoder),
            output_norm=True,
            norm_eps=encoder.block.norm_eps,
            frames=Fields(config, where).get("num_image_with_embedding", 0),
        ),
        features=FEATURES,
        mask="media",
        image_mean=clip_vision.MEAN,
        image_std=clip_vision.STD,
        image_aspect="crop",
    )


def _write(config: ModelConfig, base: Config) -> Config:
    c, text, image = config.connector, *_parts(base, "the model's config")
    fits = isinstance(config.vision, ViTConfig) and c is not None and c.kind == "linear" and c.bias and c.output_norm and not c.input_norm
    fits = fits and (config.features, config.mask) == (FEATURES, "media") and c.norm_eps == config.vision.block.norm_eps  # type: ignore[union-attr]
    llama.require(fits, "GIT", "its connector, what that reads, or its mask is another")
    assert c is not None
    return {
        **_write_text(config, text),
        "architectures": ["GitForCausalLM"],
        "model_type": "git",
        "vision_config": write_tower(tower(config), image, "git_vision_model"),
        "num_image_with_embedding": c.frames or None,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.connector is not None
    projection = "git.visual_projection.visual_projection."
    table = [
        *_text_rules(config, foreign),
        *prefixed("git.image_encoder.", clip_vision.tower_rules(tower(config))),
        *linear(projection + "0", "connector/layers_0"),
        *norm(projection + "1", "connector/output_norm"),
    ]
    frames = [rule("git.img_temporal_embedding.{i}", "connector/frame_embeddings", form=leading(2))]
    return table + frames if config.connector.frames else table


def _batch(config: ModelConfig, inputs: Inputs) -> Batch:
    """Rows of text behind the tokens of their image or video."""
    given = {name: value for name, value in inputs.items() if name not in vision.INPUTS}
    text = language.text_batch(config, given)
    if "pixel_values" not in inputs:
        return text
    pixels = inputs["pixel_values"]
    if pixels.ndim not in (4, 5):
        raise UserError(f"pixel_values are [images, channels, height, width] or [images, frames, ...], not {list(pixels.shape)}")
    count, frames = len(pixels), pixels.shape[1] if pixels.ndim == 5 else 1
    flat = vision.pictures(tower(config), {**inputs, "pixel_values": pixels.reshape(-1, *pixels.shape[-3:])})
    assert isinstance(flat, np.ndarray) and config.connector is not None and text.tokens is not None
    if pixels.ndim == 5 and config.connector.frames < frames:
        raise UserError(f"{frames} frames, but the model has embeddings of {config.connector.frames} (num_image_with_embedding)")
    rows = len(text.tokens)
    if not count or rows % count:
        raise UserError(f"{count} images cannot be handed out to {rows} rows of input_ids")
    tokens = frames * config.for_pictures(*flat.shape[1:3]).tokens_per_tile
    here = np.arange(tokens) + (np.arange(rows) % count * tokens)[:, None]
    labels = inputs.get("labels")
    if labels is not None:  # the first word is not predicted from the image alone
        unasked = np.full((rows, tokens + 1), language.IGNORED, labels.dtype)
        labels = np.concatenate([unasked, labels[:, 1:]], 1)

    def behind(values: np.ndarray, front: np.ndarray | int) -> np.ndarray:
        return np.concatenate([np.broadcast_to(front, here.shape), values], 1).astype(np.int32)

    return Batch(
        tokens=behind(text.tokens, 0),
        segments=behind(text.segments, 1),
        positions=behind(text.positions, 0),
        spans=behind(np.zeros_like(text.segments), 1),
        media=behind(text.media, here),
        images=flat[None],
        tiles=np.ones((1, len(flat)), bool),
        frames=np.tile(np.arange(frames), count)[None].astype(np.int32) if pixels.ndim == 5 else None,
        **language.targets(labels),
    )


def _prompt(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    return _batch(config, inputs)


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    """Without `position_ids` a text's position is its slot."""
    ids = inputs.get("input_ids", np.zeros((0, 0), int))
    slots = np.broadcast_to(np.arange(ids.shape[-1]), ids.shape)
    batch = _batch(config, {"position_ids": slots, **inputs})
    found = language.run_language(params, batch, config=config, run=run, states=states)
    found["num_image_positions"] = np.int64(batch.tokens.shape[1] - ids.shape[1])  # type: ignore[assignment]
    pixels = inputs.get("pixel_values")
    if pixels is not None and pixels.ndim == 5:
        apart, joined = found["image_features"], found["connector_output"]
        found["image_features"] = apart.reshape(*pixels.shape[:2], *apart.shape[1:])
        found["connector_output"] = joined.reshape(len(pixels), -1, joined.shape[-1])
    return found


TEXT = Family(
    model_types=("git_text",),
    about="GIT's text decoder (arXiv 2205.14100)",
    read_config=_read_text,
    write_config=_write_text,
    rules=_text_rules,
    inputs=language.INPUTS,
    outputs=language.outputs,
    prompt=language.prompt,
    copies=_copies,
)
FAMILY = Family(
    model_types=("git",),
    about="GIT (arXiv 2205.14100)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=INPUTS,
    outputs=_outputs,
    prompt=_prompt,
    spellings=SPELLINGS,
    copies=_copies,
)
