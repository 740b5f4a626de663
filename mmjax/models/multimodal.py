"""The whole model: encoders, connector and LLM joined at the embeddings port. Every system is a setting of it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.batch import Batch
from mmjax.models import adapters as lora
from mmjax.models import connectors, decoder, mobilenet_v2, text_tower, vit
from mmjax.models.config import Execution, MobileNetV2Config, ModelConfig, ViTConfig

Params = dict[str, Any]


@functools.partial(jax.jit, static_argnames="config")
def init(key: jax.Array, config: ModelConfig) -> Params:
    """Fresh float32 parameters of all parts, adapters included."""
    keys = jax.random.split(key, 5)
    params: Params = {}
    if config.vision is not None:
        params["vision"] = _encoder(config).init(keys[0], config.vision)
    if config.text is not None:
        params["text"] = text_tower.init(keys[1], config.text)
        params["logit_scale"] = jnp.zeros(())
        if config.logit_bias:
            params["logit_bias"] = jnp.zeros(())
    if config.connector is not None:
        params["connector"] = connectors.init(keys[2], config.connector)
    if config.llm is not None:
        params["llm"] = decoder.init(keys[3], config.llm)
    return lora.add_lora(keys[4], params, config)


def shapes(config: ModelConfig) -> Params:
    """The shapes of `init`'s parameters, without making any array."""
    return jax.eval_shape(functools.partial(init, config=config), jax.random.key(0))


def normalise(config: ModelConfig, images: jax.Array) -> jax.Array:
    """uint8 pixels [..., channels] -> (pixel / 255 - mean) / std in float32; floating-point pixels are taken as normalised."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    mean, std = jnp.asarray(config.image_mean, jnp.float32), jnp.asarray(config.image_std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


def vision_features(params: Params, config: ModelConfig, images: jax.Array, run: Execution) -> jax.Array:
    """Pixels [..., height, width, channels] -> what the connector reads [..., positions, width]."""
    pixels = normalise(config, images)
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    out = _encoder(config).features(params["vision"], config.vision, config.features, flat, run, config.adapters)
    return out.reshape(*pixels.shape[:-3], *out.shape[1:])


def encode_media(params: Params, config: ModelConfig, batch: Batch, run: Execution) -> jax.Array | None:
    """The media tokens of a batch, [groups, tiles, tokens, LLM width]; None for a batch without media."""
    if batch.features is not None:
        features = batch.features.astype(run.dtype)
    elif batch.images is not None:
        features = vision_features(params, config, batch.images, run)
    else:
        return None
    if config.connector is None:
        raise ValueError("this model has no connector: it cannot read images")
    return connectors.connect(params["connector"], config.connector, features.astype(run.dtype), config.adapters)


def embed(params: Params, config: ModelConfig, batch: Batch, run: Execution) -> jax.Array:
    """Token embeddings with the media tokens spliced in, [rows, length, LLM width].

    A gather: each position picks its media token or keeps its text embedding. Rows reach into their own group only, so no
    features cross devices when groups and rows are sharded alike.
    """
    x = decoder.embed(params["llm"], config.language, batch.tokens, run)
    media = encode_media(params, config, batch, run)
    if media is None:
        return x
    groups, tiles, tokens, width = media.shape
    media = media.reshape(groups, tiles * tokens, width)
    index = batch.media.reshape(groups, -1)
    picked = jax.vmap(lambda rows, i: rows[i])(media, jnp.maximum(index, 0))
    return jnp.where(batch.media[..., None] >= 0, picked.reshape(x.shape), x)


def hidden(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    run: Execution,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The LLM's states after its final norm, [rows, length, width]; `dropout` in its blocks where there is a key."""
    x = embed(params, config, batch, run)
    return decoder.decode(
        params["llm"],
        config.language,
        x,
        segments=batch.segments,
        positions=batch.positions,
        run=run,
        adapters=config.adapters,
        dropout=dropout,
        dropout_key=dropout_key,
    ).last


def decode_token(
    params: Params,
    config: ModelConfig,
    cache: decoder.Cache,
    token: jax.Array,
    position: jax.Array,
    segment: jax.Array,
    run: Execution,
) -> tuple[jax.Array, decoder.Cache]:
    """One token a row through the LLM: float32 logits [rows, vocab] of the next one, and the cache.

    token, position, segment   int32 [rows]
    """
    out = decoder.decode(
        params["llm"],
        config.language,
        decoder.embed(params["llm"], config.language, token[:, None], run),
        segments=segment[:, None],
        positions=position[:, None],
        run=run,
        adapters=config.adapters,
        cache=cache,
    )
    assert out.cache is not None
    return head(params, config, out.last[:, 0]), out.cache


def head(params: Params, config: ModelConfig, states: jax.Array) -> jax.Array:
    """float32 logits [..., vocab] of states that `hidden` returned."""
    return decoder.head(params["llm"], config.language, states)


def classify(params: Params, config: ModelConfig, batch: Batch, run: Execution) -> jax.Array:
    """float32 class logits [groups, tiles, classes] of the vision encoder's own head."""
    pixels = normalise(config, batch.images)
    logits = _encoder(config).classify(params["vision"], config.vision, pixels.reshape(-1, *pixels.shape[-3:]), run)
    return logits.reshape(*pixels.shape[:-3], -1)


def two_tower(
    params: Params, config: ModelConfig, images: jax.Array, tokens: jax.Array, run: Execution, segments: jax.Array | None = None
) -> dict[str, jax.Array]:
    """A contrastive model's outputs for pixels [n, height, width, channels] and tokens [m, length]: normalised `image_embeds` and
    `text_embeds`, `logits_per_image` [n, m] (arXiv 2103.00020, 2303.15343), and both towers' states."""
    assert isinstance(config.vision, ViTConfig) and config.text is not None
    states = vit.hidden_states(params["vision"], config.vision, normalise(config, images), run)
    pooled = vit.pooled(params["vision"], config.vision, states[-1])
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
