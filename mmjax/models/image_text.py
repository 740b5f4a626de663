"""BLIP-2's first stage (arXiv 2301.12597, section 3.2): what a Q-Former learns from pictures and their texts without a language model.

    contrastive   the embedding of a text against those of every query of every picture of the batch; the best query counts
    matching      whether a text belongs to a picture: pairs of the batch, and two hard ones for each that do not belong together
    language      the text, word by word, from the picture

All functions take a Q-Former's leaves with its `heads` (ConnectorConfig.contrast_width) and n pictures with their n texts. A
picture without any text is no pair: it stands in for nothing and counts nowhere. A batch divided over devices is one batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmjax.models import qformer
from mmjax.models.block import KeysValues
from mmjax.models.config import Execution
from mmjax.models.encoder_config import ConnectorConfig
from mmjax.models.kernels import matmul
from mmjax.models.layers import ACTIVATIONS, Linear, Norm, apply
from mmjax.models.qformer import Params, Text
from mmjax.models.tuning_config import Adapters

SMOOTHING = 0.1  # of the targets of the contrastive and the language loss


class Negatives(NamedTuple):
    """For each text a picture, for each picture a text, int32 [n], which do not belong to it and look as if they did."""

    pictures: jax.Array
    texts: jax.Array


class Pictures(NamedTuple):
    """n pictures as queries have read them: states [n, latents, width], what text sees of them, float32 embeddings
    [n, latents, contrast width]."""

    states: jax.Array
    seen: KeysValues
    embeddings: jax.Array


class Texts(NamedTuple):
    """m texts read alone: states [m, L, width], float32 embeddings [m, contrast width]."""

    states: jax.Array
    embeddings: jax.Array


def stage1_losses(
    params: Params,
    config: ConnectorConfig,
    features: jax.Array,
    tokens: jax.Array,
    segments: jax.Array,
    key: jax.Array | None,
    *,
    negatives: Negatives | None = None,
    start: int | None = None,
    adapters: Adapters = (),
    run: Execution = Execution(),
) -> dict[str, jax.Array]:
    """The losses of a batch: `contrastive`, `matching`, `language`, and `loss`, their sum.

    params      the connector's leaves
    features    float [n, positions, in_width] of n pictures, as the encoder gives them
    tokens      int32 [n, L]: the text of each in the Q-Former's vocabulary, from the class token to the last separator
    segments    int32 [n, L]: 1 where there is text, 0 at padding (all 0: no text, no pair)
    key         draws the hard negatives; not needed where `negatives` are given
    start       what takes the class token's place where the text is written ([DEC]); None = the last word of the vocabulary
    """
    text, real = Text(tokens, segments), (segments > 0).any(-1)
    pictures = read_pictures(params, config, features, adapters, run)
    texts = read_texts(params, config, text, adapters, run)
    scores = similarities(params, best_of_queries(pictures, texts))
    if negatives is None:
        assert key is not None
        negatives = hard_negatives(key, scores, real)
    pairs = triples(features, text, negatives)
    matched = matching_logits(params, config, qformer.read(params, config, *pairs, adapters, run).states)
    written = with_start(config, text, start)
    behind = qformer.read_behind(params, config, pictures.seen, written, adapters, run).states
    losses = {
        "contrastive": contrastive_loss(scores, real),
        "matching": matching_loss(matched, real),
        "language": language_loss(language_logits(params, config, behind), written),
    }
    return {**losses, "loss": losses["contrastive"] + losses["matching"] + losses["language"]}


def read_pictures(
    params: Params,
    config: ConnectorConfig,
    features: jax.Array,
    adapters: Adapters = (),
    run: Execution = Execution(),
) -> Pictures:
    """Features [n, positions, in_width], read by the queries alone."""
    read = qformer.read(params, config, features, None, adapters, run)
    return Pictures(read.states, read.seen, _embeddings(params, "image", config, read.states))


def read_texts(
    params: Params,
    config: ConnectorConfig,
    text: Text,
    adapters: Adapters = (),
    run: Execution = Execution(),
) -> Texts:
    """Texts, read alone; the embedding is that of the class token."""
    states = qformer.read_text(params, config, text, adapters, run).states
    return Texts(states, _embeddings(params, "text", config, states[:, 0]))


def cosines(pictures: Pictures, texts: Texts) -> jax.Array:
    """Cosines of every picture's queries with every text, float32 [n, m, latents]."""
    return jnp.einsum("nqe,me->nmq", pictures.embeddings, texts.embeddings)


def best_of_queries(pictures: Pictures, texts: Texts) -> jax.Array:
    """How near every picture is to every text, float32 [n, m]: the cosine of its nearest query."""
    return cosines(pictures, texts).max(-1)


def similarities(params: Params, nearness: jax.Array) -> jax.Array:
    """Nearness [n, m] over the learned temperature."""
    return nearness / params["heads"]["temperature"].astype(jnp.float32)


def contrastive_loss(scores: jax.Array, real: jax.Array, smoothing: float = SMOOTHING) -> jax.Array:
    """Each picture among all texts and each text among all pictures: scores float32 [n, n], real bool [n]."""
    own = jnp.arange(len(scores))

    def one_way(scores: jax.Array) -> jax.Array:
        logits = jnp.where(real[None, :], scores, -1e30)
        logs = jax.nn.log_softmax(logits)
        spread = jnp.where(real[None, :], logs, 0).sum(-1) / jnp.maximum(real.sum(), 1)
        return _mean(-(1 - smoothing) * logs[own, own] - smoothing * spread, real)

    return (one_way(scores) + one_way(scores.T)) / 2


def hard_negatives(key: jax.Array, scores: jax.Array, real: jax.Array) -> Negatives:
    """Drawn by the softmax of the scores float32 [n, n] of pictures (rows) and texts, the own one left out as far as there are
    others."""
    scores = jax.lax.stop_gradient(scores)
    scores = jnp.where(jnp.eye(len(scores), dtype=bool), -1e4, scores)
    scores = jnp.where(real[:, None] & real[None, :], scores, -1e30)
    for_text, for_picture = jax.random.split(key)
    return Negatives(jax.random.categorical(for_text, scores.T), jax.random.categorical(for_picture, scores))


def triples(features: jax.Array, text: Text, negatives: Negatives) -> tuple[jax.Array, Text]:
    """3n pairs of features and text: n that belong together, n texts with a negative picture, n pictures with a negative text."""
    shown = jnp.concatenate([features, features[negatives.pictures], features])
    told = (jnp.concatenate([a, a, a[negatives.texts]]) for a in text)
    return shown, Text(*told)


def matching_logits(params: Params, config: ConnectorConfig, states: jax.Array) -> jax.Array:
    """float32 [pairs, 2] (no, yes) of states [pairs, latents (and text), width]: the mean of what every query says."""
    said = apply(Linear(2), params["heads"]["match"], states[:, : config.latents])
    return said.astype(jnp.float32).mean(1)


def matching_loss(logits: jax.Array, real: jax.Array) -> jax.Array:
    """Cross-entropy over the 3n pairs of `triples`; real bool [n]."""
    n = len(real)
    belongs = jnp.concatenate([jnp.ones(n, jnp.int32), jnp.zeros(2 * n, jnp.int32)])
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), belongs[:, None], -1)[:, 0]
    return _mean(losses, jnp.tile(real, 3))


def with_start(config: ConnectorConfig, text: Text, start: int | None = None) -> Text:
    """The text as it is written: the start token stands in the class token's place."""
    first = config.text_vocab - 1 if start is None else start
    return text._replace(tokens=text.tokens.at[:, 0].set(first))


def language_logits(params: Params, config: ConnectorConfig, states: jax.Array) -> jax.Array:
    """float32 [..., words] of states of text; the head's table is that of the words' embeddings."""
    head = params["heads"]["language"]
    x = ACTIVATIONS[config.activation](apply(Linear(config.inner_width), head["transform"], states))
    x = apply(Norm("layer", config.norm_eps), head["norm"], x)
    return matmul(x, params["embed"]["embedding"].T).astype(jnp.float32) + head["bias"].astype(jnp.float32)


def language_loss(logits: jax.Array, text: Text, smoothing: float = SMOOTHING) -> jax.Array:
    """Every word from those before it: logits float32 [n, L, words]; the mean over all words of the batch."""
    logs, following = jax.nn.log_softmax(logits[:, :-1]), text.tokens[:, 1:]
    own = jnp.take_along_axis(logs, following[..., None], -1)[..., 0]
    return _mean(-(1 - smoothing) * own - smoothing * logs.mean(-1), text.segments[:, 1:] > 0)


def write(
    params: Params,
    config: ConnectorConfig,
    features: jax.Array,
    count: int,
    start: int | None = None,
    run: Execution = Execution(),
) -> jax.Array:
    """What the Q-Former itself says of each picture: the likeliest words behind the start token, int32 [n, count]."""
    pictures = read_pictures(params, config, features, (), run)
    blank = jnp.zeros((len(features), count + 1), jnp.int32)
    text = with_start(config, Text(blank, jnp.ones_like(blank)), start)

    def one(i: jax.Array, tokens: jax.Array) -> jax.Array:
        states = qformer.read_behind(params, config, pictures.seen, Text(tokens, text.segments), (), run).states
        return tokens.at[:, i].set(language_logits(params, config, states[:, i - 1]).argmax(-1).astype(jnp.int32))

    return jax.lax.fori_loop(1, count + 1, one, text.tokens)[:, 1:]


def _embeddings(params: Params, name: str, config: ConnectorConfig, states: jax.Array) -> jax.Array:
    """float32, of length 1."""
    x = apply(Linear(config.contrast_width), params["heads"][name], states).astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _mean(losses: jax.Array, counted: jax.Array) -> jax.Array:
    return jnp.where(counted, losses, 0).sum() / jnp.maximum(counted.sum(), 1)
