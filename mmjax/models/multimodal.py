"""The whole model: encoders, connector and LLM joined at the embeddings port. Every system is a setting of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.models import (
    adapters,
    connectors,
    decoder,
    encoder_decoder,
    gated_cross_attention,
    mobilenet_v2,
    modality_mixture,
    plugged,
    ports,
    prefix,
    prompts,
    qformer,
    quantised,
    scales,
    text_tower,
    vit,
)
from mmjax.models.adaption_prompt import Beside, number_of_own
from mmjax.models.attention import Mask
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import MobileNetV2Config, ViTConfig
from mmjax.models.stitching import stitch
from mmjax.parallel.constraints import POSITIONS, ROWS, constrain
from mmjax.parallel.mesh import data_shards, of_rows_alone

Params = dict[str, Any]


@functools.partial(jax.jit, static_argnames="config")
def init(key: jax.Array, config: ModelConfig) -> Params:
    """Fresh float32 parameters of all parts, adapters included; kernels quantised as `config.quantisation` says."""
    keys = jax.random.split(key, 5)
    params: Params = {}
    if config.vision is not None:
        params["vision"] = _encoder(config).init(keys[0], config.vision)
    if config.text is not None:
        params["text"] = text_tower.init(keys[1], config.text)
    if config.text is not None and config.vision is not None:
        params["logit_scale"] = jnp.zeros(())
        if config.logit_bias:
            params["logit_bias"] = jnp.zeros(())
    if config.connector is not None:
        params["connector"] = connectors.init(keys[2], config.connector)
    if config.llm is not None:
        params["llm"] = decoder.init(keys[3], config.llm)
    if (crossed := config.cross_attention) is not None:
        leaves = gated_cross_attention.init_layers(jax.random.fold_in(key, 5), crossed, len(crossed.layers))
        params["llm"] = {**params.get("llm", {}), "plugs": {gated_cross_attention.NAME: leaves}}
    params = adapters.add(keys[4], params, config)
    return quantised.quantise_all(params, config.quantisation) if config.quantisation else params


def shapes(config: ModelConfig) -> Params:
    """The shapes of `init`'s parameters, without making any array. Raises UserError where `config.quantisation` names none of them."""
    found = jax.eval_shape(functools.partial(init, config=dataclasses.replace(config, quantisation=None)), jax.random.key(0))
    return quantised.shapes(found, config.quantisation) if config.quantisation else found


def normalise(config: ModelConfig, images: jax.Array) -> jax.Array:
    """uint8 pixels [..., channels] -> (pixel / 255 - mean) / std in float32; floating-point pixels are taken as normalised."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    mean, std = jnp.asarray(config.image_mean, jnp.float32), jnp.asarray(config.image_std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


def vision_features(
    params: Params, config: ModelConfig, images: jax.Array, run: Execution, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Pixels [..., height, width, channels], or vit.Patches [..., patches, pixels] -> what the connector reads [..., positions, width].
    With a `dropout_key` what is plugged into the encoder drops what it drops in training."""
    if run.mesh is not None and not isinstance(images, vit.Patches) and (parts := parts_of_tiles(config, images.shape, run.mesh)) > 1:
        dummies = [(0, 0), (0, -images.shape[1] % parts), (0, 0), (0, 0), (0, 0)]
        divided = constrain(jnp.pad(images, dummies), run.mesh, ROWS, ("tensor", "sequence"))
        run = dataclasses.replace(run, mesh=of_rows_alone(run.mesh))
        return vision_features(params, config, divided, run, dropout_key)[:, : images.shape[1]]
    leaves = adapters.bound(params, config, "vision")
    if isinstance(images, vit.Patches):
        assert isinstance(config.vision, ViTConfig)
        before = images.pixels.shape[:-2]
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(before) :]), images)
        plugs = plugged.plugs(config, "vision", groups=before[0] if len(before) > 1 else 1)
        out = vit.features(leaves, config.vision, config.features, flat, run, config.adapters, plugs, dropout_key)
        return out.reshape(*before, *out.shape[1:])
    pixels = normalise(config, images)
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    spec = dataclasses.replace(config.features, scales=(1,))

    def encode(tiles: jax.Array) -> jax.Array:
        more: dict[str, Any] = {}
        if isinstance(config.vision, ViTConfig):
            groups = pixels.shape[0] if pixels.ndim > 4 else 1
            more = {"plugs": plugged.plugs(config, "vision", groups=groups), "dropout_key": dropout_key}
        return _encoder(config).features(leaves, config.vision, spec, tiles, run, config.adapters, **more)

    out = encode(flat) if config.features == spec else scales.features(encode, flat, config.features.scales)
    return out.reshape(*pixels.shape[:-3], *out.shape[1:])


def parts_of_tiles(config: ModelConfig, shape: tuple[int, ...], mesh: Mesh) -> int:
    """Into how many parts the tiles of each group [groups, tiles, height, width, channels] are divided, as groups are over the data axes. All devices along
    `tensor` and `sequence` would compute the same where heads are not divided by `tensor`, and pictures have no `sequence`."""
    if len(shape) < 5 or shape[1] == 1 or shape[0] % data_shards(mesh):
        return 1
    divides_heads = isinstance(config.vision, ViTConfig) and config.vision.block.heads % mesh.shape["tensor"] == 0
    return 1 if divides_heads and mesh.shape["sequence"] == 1 else mesh.shape["tensor"] * mesh.shape["sequence"]


def fitted(config: ModelConfig, images: vit.Pictures) -> ModelConfig:
    """The shapes with a connector for these pictures."""
    if isinstance(images, vit.Patches):
        return config.for_patches(images.pixels.shape[-2])
    return config.for_pictures(*images.shape[-3:-1])


def encode_media(
    params: Params, config: ModelConfig, batch: Batch, run: Execution, dropout_key: jax.Array | None = None
) -> jax.Array | None:
    """The media tokens of a batch, [groups, tiles (or pictures whose tiles are stitched), tokens, the connector's out_width]; None for
    a batch without media."""
    if batch.features is not None:
        features = batch.features.astype(run.dtype)
    elif batch.images is not None:
        features = vision_features(params, config, batch.images, run, dropout_key)
        config = fitted(config, batch.images)
    else:
        return None
    if config.connector is None:
        if config.media_beside and batch.features is not None:  # adapters read them as they are
            return features
        raise ValueError("this model has no connector: it cannot read images")
    if batch.frames is not None:
        features = connectors.with_frames(params["connector"], config.connector, features, batch.frames)
    if config.features.stitching is not None:
        features = stitch(config.features.stitching, features, batch.grids)
    features = features.astype(run.dtype)
    leaves = adapters.bound(params, config, "connector")
    media = connectors.connect(leaves, config.connector, features, config.adapters, run, features.ndim == 5, connector_text(batch))
    return constrain(media, run.mesh, ROWS)


def connector_text(batch: Batch) -> qformer.Text | None:
    """The text that a Q-Former reads beside each tile, [groups, tiles, L]; None where there is none."""
    if batch.connector_tokens is None:
        return None
    return qformer.Text(batch.connector_tokens, batch.connector_segments)


def embed(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    run: Execution,
    media: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Token embeddings with the media tokens and the prompts' vectors spliced in, [rows, length, LLM width]; `media` are what
    `encode_media` would give, where they are made already.

    A gather: each position picks its media token or keeps its text embedding. Rows reach into their own group only, so no
    features cross devices when groups and rows are sharded alike.
    """
    x = embed_tokens(params, config, batch.tokens, run)
    x = prompts.spliced(params, config, batch, x)
    if config.cross_attention is not None or config.media_beside:  # media are read between the blocks, or in them
        return x
    media = encode_media(params, config, batch, run, dropout_key) if media is None else media
    if media is None:
        return x
    groups, tiles, tokens, width = media.shape
    media = media.reshape(groups, tiles * tokens, width)
    if config.connector is not None and config.connector.newline:
        newline = params["connector"]["newline"].astype(media.dtype)
        media = jnp.concatenate([media, jnp.broadcast_to(newline, (groups, 1, width))], 1)
    index = batch.media.reshape(groups, -1)
    picked = jax.vmap(lambda rows, i: rows[i])(media, jnp.maximum(index, 0))
    return constrain(jnp.where(batch.media[..., None] >= 0, picked.reshape(x.shape), x), run.mesh, ROWS, POSITIONS)


def embed_tokens(params: Params, config: ModelConfig, tokens: jax.Array, run: Execution) -> jax.Array:
    """Token embeddings alone: int [rows, length] -> [rows, length, LLM width]."""
    x = decoder.embed(adapters.bound(params, config, "llm", len(tokens)), config.language, tokens, run, config.adapters)
    return constrain(x, run.mesh, ROWS, POSITIONS)


def crossed_media(
    params: Params, config: ModelConfig, batch: Batch, run: Execution, media: jax.Array | None = None
) -> gated_cross_attention.Media | None:
    """The media that the blocks' cross-attention reads, brought from the groups to the rows; None for a batch without media. `media`
    as in `embed`."""
    if config.cross_attention is None or batch.row_media is None:
        return None
    tokens = encode_media(params, config, batch, run) if media is None else media
    if tokens is None:
        return None
    tokens = _in_rows(tokens, batch)
    count = tokens.shape[1]
    segments = (jnp.asarray(batch.segments), jnp.asarray(batch.media_segments))
    present = jnp.asarray(batch.row_media) >= 0
    seen = None if batch.media_seen is None else jnp.asarray(batch.media_seen)
    begun = jnp.asarray(batch.begun)
    mask = gated_cross_attention.media_mask(config.cross_attention, begun, count, tokens.shape[2], present, segments, seen)
    return gated_cross_attention.Media(tokens, mask)


def media_beside(
    params: Params, config: ModelConfig, batch: Batch, run: Execution, media: jax.Array | None = None
) -> Beside | None:
    """The media that adapters read in the blocks, brought to the rows; None for a batch without media. `media` as in `embed`."""
    if not config.media_beside or batch.row_media is None:
        return None
    tokens = encode_media(params, config, batch, run) if media is None else media
    if tokens is None:
        return None
    row_media, segments = jnp.asarray(batch.row_media), jnp.asarray(batch.media_segments)
    return Beside(_in_rows(tokens, batch), number_of_own(jnp.asarray(batch.segments), row_media, segments))


def _in_rows(tokens: jax.Array, batch: Batch) -> jax.Array:
    """Media tokens [groups, tiles, ...] as the rows have them: [rows, media, ...]."""
    rows, count = batch.row_media.shape
    index = jnp.asarray(batch.row_media).reshape(len(tokens), -1, count)
    return jax.vmap(lambda tiles, i: tiles[i])(tokens, jnp.maximum(index, 0)).reshape(rows, count, *tokens.shape[2:])


class Reading(NamedTuple):
    """What the LLM's decoder is run on: embeddings x [rows, T, input width], int segments and positions [rows, T]; of an
    encoder-decoder the memory of what its encoder read, with the encoder's own outputs; `spans` of the batch, and which positions
    hold media tokens, bool [rows, T]; the media of a cross-attention, and those that adapters read in the blocks; how a mixture of
    modality adapters is routed."""

    x: jax.Array
    segments: jax.Array
    positions: jax.Array
    memory: decoder.Memory | None = None
    encoded: decoder.Decoded | None = None
    spans: jax.Array | None = None
    is_media: jax.Array | None = None
    media: gated_cross_attention.Media | None = None
    beside: Beside | None = None
    routed: modality_mixture.Routed | None = None


class Remembered(NamedTuple):
    """What stays the same while tokens are generated: what an encoder-decoder's encoder has read, what the blocks'
    cross-attention makes of the media, the media that adapters read, and how a mixture of modality adapters is routed."""

    memory: decoder.Memory | None = None
    media: gated_cross_attention.Media | None = None
    beside: Beside | None = None
    routed: modality_mixture.Routed | None = None

    def repeated(self, times: int) -> Remembered:
        """Every row so many times, one after another."""
        memory = self.memory
        if memory is not None:
            keys, values = jnp.repeat(memory.keys, times, 1), jnp.repeat(memory.values, times, 1)
            memory = decoder.Memory(keys, values, jnp.repeat(memory.segments, times, 0))
        parts: Any = (self.media, self.beside, self.routed)
        return Remembered(memory, *(held.repeated(times) if held is not None else None for held in parts))


def read(
    params: Params, config: ModelConfig, batch: Batch, run: Execution, media: jax.Array | None = None, **settings: Any
) -> Reading:
    """A batch, embedded; an encoder-decoder's encoder reads `tokens` and its media (see `embed`). `settings` are the encoder's, those
    of mmjax.models.decoder.decode."""
    x = embed(params, config, batch, run, media, settings.get("dropout_key"))
    if config.language.encoder is None:
        is_media = None if batch.media is None else batch.media >= 0
        crossed = crossed_media(params, config, batch, run, media)
        held: dict[str, Any] = {"media": crossed, "beside": media_beside(params, config, batch, run, media)}
        held["routed"] = route(params, config, batch, run, **settings)
        return Reading(x, batch.segments, batch.positions, spans=batch.spans, is_media=is_media, **held)
    llm, leaves = config.language, adapters.bound(params, config, "llm", len(x))
    more: dict[str, Any] = {"run": run, "adapters": config.adapters}
    settings |= {"segments": batch.segments, "positions": batch.positions, "plugs": plugged.plugs(config, "encoder")}
    encoded = encoder_decoder.encode(leaves, llm, x, **more, **settings)
    memory = encoder_decoder.remember(leaves, llm, encoded.last, batch.segments, **more)
    tokens, segments = batch.decoder_tokens, batch.decoder_segments
    if tokens is None:
        tokens = jnp.full((x.shape[0], 1), llm.start_token, jnp.int32)
        segments = jnp.ones_like(tokens)
    return Reading(embed_tokens(params, config, tokens, run), segments, positions_within(segments), memory, encoded)


def route(
    params: Params, config: ModelConfig, batch: Batch, run: Execution, **settings: Any
) -> modality_mixture.Routed | None:
    """What becomes of the modality tokens, and which of them each position's sample has; None without a mixture of modality adapters.
    Only what sits in blocks acts on them beside the mixture, and what changes weights."""
    mixture = modality_mixture.of(config)
    if mixture is None:
        return None
    llm, tokens = config.language, params["llm"]["prompts"][mixture.name]["modality"].astype(run.dtype)[:, None]
    ones = jnp.ones(tokens.shape[:2], jnp.int32)
    plugs = (*plugged.plugs(config, "llm"), modality_mixture.asking(mixture, llm.layers))
    leaves = adapters.bound(params, config, "llm")
    known = {"dropout": settings.get("dropout", 0.0), "dropout_key": settings.get("dropout_key")}
    out = decoder.decode(
        leaves, llm, tokens, segments=ones, positions=ones - 1, run=run, adapters=config.adapters, plugs=plugs, **known
    )
    assert out.told is not None
    layers = jnp.array(mixture.layers or range(llm.layers))
    weights = {place: told[layers][:, :, 0] for place, told in out.told[mixture.name].items()}
    is_media = None if batch.media is None else jnp.asarray(batch.media) >= 0
    return modality_mixture.Routed(modality_mixture.modalities(batch.segments, is_media), weights, out.last)


def positions_within(segments: jax.Array) -> jax.Array:
    """int [rows, T]: the position of each token within its sample, by the samples' numbers (ascending, 0 = padding)."""
    counted = jnp.maximum(jnp.cumsum(segments > 0, 1) - 1, 0)
    before = jnp.pad(jax.lax.cummax(segments, 1)[:, :-1], ((0, 0), (1, 0)))
    return counted - jax.lax.cummax(jnp.where(segments > before, counted, 0), 1)


def decode_reading(
    params: Params, config: ModelConfig, reading: Reading, run: Execution, padding_sees: bool = False, **settings: Any
) -> decoder.Decoded:
    """The decoder's outputs; `settings` are those of mmjax.models.decoder.decode. With `padding_sees` it sees what is real, as in
    transformers; otherwise it sees nothing."""
    llm = adapters.bound(prepared(params, config), config, "llm", len(reading.x))
    plugs: tuple[ports.Plug, ...] = prefix.plugs(llm, config, reading.positions)
    plugs += plugged.plugs(config, "llm", reading.beside, params.get(adapters.WEIGHTS, {}), reading.routed)
    if (mixture := modality_mixture.of(config)) is not None:
        assert reading.routed is not None
        own = modality_mixture.with_routing(llm["plugs"][mixture.name], reading.routed)
        llm = {**llm, "plugs": {**llm["plugs"], mixture.name: own}}
    if config.cross_attention is not None:
        plugs += (gated_cross_attention.plug(config.cross_attention, reading.media, config.adapters, run),)
        leaves = gated_cross_attention.plugged(llm["plugs"][gated_cross_attention.NAME], reading.media)
        llm = {**llm, "plugs": {**llm["plugs"], gated_cross_attention.NAME: leaves}}
    return decoder.decode(
        llm,
        config.language,
        reading.x,
        segments=reading.segments,
        positions=reading.positions + prefix.count(config),
        mask=Mask(
            query_spans=reading.spans,
            key_spans=reading.spans,
            windowed_spans=config.mask == "media",
            query_segments=jnp.ones_like(reading.segments) if padding_sees else None,
        ),
        memory=reading.memory,
        is_media=reading.is_media,
        run=run,
        adapters=config.adapters,
        plugs=plugs,
        **settings,
    )


def prepared(params: Params, config: ModelConfig) -> Params:
    """The parameters with what would otherwise be computed of them alone in every step of a generation."""
    return prefix.prepared(params, config)


def remember(params: Params, config: ModelConfig, reading: Reading) -> Reading:
    """The reading with what its decoder would otherwise compute of the media for every token anew."""
    if config.cross_attention is None or reading.media is None:
        return reading
    leaves = adapters.bound(params, config, "llm", len(reading.x))["plugs"][gated_cross_attention.NAME]
    return reading._replace(media=gated_cross_attention.remember(leaves, config.cross_attention, reading.media, config.adapters))


def decode(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    run: Execution,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> decoder.Decoded:
    """The LLM's states after its final norm, and the routers' logits of a mixture of experts; `dropout` in its blocks where there is
    a key."""
    if config.language.encoder is not None and batch.decoder_tokens is None:
        raise UserError("the language model is an encoder-decoder: its batches need decoder_tokens")
    encoder_key = None if dropout_key is None else jax.random.fold_in(dropout_key, config.language.layers)
    reading = read(params, config, batch, run, dropout=dropout, dropout_key=encoder_key)
    return decode_reading(params, config, reading, run, dropout=dropout, dropout_key=dropout_key)


def hidden(params: Params, config: ModelConfig, batch: Batch, run: Execution) -> jax.Array:
    """The LLM's states after its final norm, [rows, length, width]."""
    return decode(params, config, batch, run).last


def decode_token(
    params: Params,
    config: ModelConfig,
    cache: decoder.Cache,
    token: jax.Array,
    position: jax.Array,
    segment: jax.Array,
    run: Execution,
    remembered: Remembered = Remembered(),
) -> tuple[jax.Array, decoder.Cache]:
    """One token a row through the LLM: float32 logits [rows, vocab] of the next one, and the cache.

    token, position, segment   int32 [rows]
    """
    x = embed_tokens(params, config, token[:, None], run)
    held: dict[str, Any] = {"media": remembered.media, "beside": remembered.beside, "routed": remembered.routed}
    reading = Reading(x, segment[:, None], position[:, None], remembered.memory, **held)
    out = decode_reading(params, config, reading, run, cache=cache)
    assert out.cache is not None
    return head(params, config, out.last[:, 0]), out.cache


def head(params: Params, config: ModelConfig, states: jax.Array) -> jax.Array:
    """float32 logits [rows, ..., vocab] of states [rows, ..., width] that `hidden` returned."""
    return decoder.head(adapters.bound(params, config, "llm", len(states)), config.language, states, config.adapters)


def classify(params: Params, config: ModelConfig, batch: Batch, run: Execution) -> jax.Array:
    """float32 class logits [groups, tiles, classes] of the vision encoder's own head."""
    pixels = normalise(config, batch.images)
    leaves, flat = adapters.bound(params, config, "vision"), pixels.reshape(-1, *pixels.shape[-3:])
    more: dict[str, Any] = {"plugs": plugged.plugs(config, "vision")} if isinstance(config.vision, ViTConfig) else {}
    logits = _encoder(config).classify(leaves, config.vision, flat, run, **more)
    return logits.reshape(*pixels.shape[:-3], -1)


def two_tower(
    params: Params,
    config: ModelConfig,
    pictures: vit.Pictures,
    tokens: jax.Array,
    run: Execution,
    segments: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """A contrastive model's outputs for n pictures and tokens [m, length]: normalised `image_embeds` and `text_embeds`,
    `logits_per_image` [n, m] (arXiv 2103.00020, 2303.15343), and both towers' states."""
    assert isinstance(config.vision, ViTConfig) and config.text is not None
    if not isinstance(pictures, vit.Patches):
        pictures = normalise(config, pictures)
    states = vit.hidden_states(params["vision"], config.vision, pictures, run, plugs=plugged.plugs(config, "vision"))
    pooled = vit.pooled(params["vision"], config.vision, states[-1], pictures)
    image = vit.project(params["vision"], config.vision, pooled)
    text = text_tower.encode(params["text"], config.text, tokens, run, segments)
    image, sentence = (e / jnp.linalg.norm(e, axis=-1, keepdims=True) for e in (image, text["embedding"]))
    logits = jnp.exp(params["logit_scale"]) * (image @ sentence.T) + params.get("logit_bias", 0.0)
    return {
        "logits_per_image": logits,
        "logits_per_text": logits.T,
        "image_embeds": image,
        "text_embeds": sentence,
        "vision_states": states,
        "vision_pooled": pooled,
        "text_states": text["states"],
        "text_last": text["last"],
        "text_pooled": text["pooled"],
        "text_embedding": text["embedding"],
    }


def _encoder(config: ModelConfig):
    """The module of the vision encoder: init, features, classify."""
    return mobilenet_v2 if isinstance(config.vision, MobileNetV2Config) else vit
