"""Inputs and outputs of language models as transformers names them.

Inputs: `input_ids` [rows, length], `attention_mask` (1 = real), `position_ids`, `labels` (-100 = not predicted;
shifted inside); with multi-task prompts also `task_ids` [rows]. Outputs: `logits` [rows, length, vocab], `last_hidden_state`, `loss` with labels, `aux_loss` of a mixture of
experts (part of the loss where the config asks for router logits), and `hidden_states_i` on request (0 = the embeddings, the last one after the final norm). What stands at padded positions
means nothing.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families.family import Config, Inputs
from mmjax.models import decoder, multimodal, prompts, vit
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ViTConfig
from mmjax.models.experts import balance_loss
from mmjax.spans import spans_of
from mmjax.tree import Params

INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")
IGNORED = -100


def outputs(params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool) -> dict:
    """Without `position_ids` a position is its slot, padding counted, as in transformers' forward (not in its generate)."""
    ids = inputs.get("input_ids", np.zeros((0, 0), int))
    slots = np.broadcast_to(np.arange(ids.shape[-1]), ids.shape)
    return counted_outputs(params, config, foreign, {"position_ids": slots, **inputs}, run, states)


def counted_outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict:
    """The same for a family that counts real positions only (OPT)."""
    batch = prompts.prepended(config, text_batch(config, inputs), inputs.get("labels"))
    found = run_language(params, batch, config=config, run=run, states=states)
    if "loss" in found and "aux_loss" in found and foreign.get("output_router_logits"):
        found["loss"] = found["loss"] + foreign.get("router_aux_loss_coef", 0.001) * found["aux_loss"]
    return found


def prompt(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    return text_batch(config, inputs)


def text_batch(config: ModelConfig, inputs: Inputs, placeholder: int | None = None) -> Batch:
    """The batch of foreign inputs under the model's mask; every `placeholder` among the ids takes one media token, in order."""
    if "input_ids" not in inputs:
        raise UserError("input_ids are missing")
    ids = inputs["input_ids"]
    if ids.ndim != 2:
        raise UserError(f"input_ids are [rows, length], not {list(ids.shape)}")
    for name in INPUTS[1:]:
        if name in inputs and inputs[name].shape != ids.shape:
            raise UserError(f"{name} {list(inputs[name].shape)} and input_ids {list(ids.shape)} differ in shape")
    mask = inputs.get("attention_mask", np.ones_like(ids)) != 0
    is_media = (ids == placeholder) if placeholder is not None else np.zeros(ids.shape, bool)
    assert config.llm is not None
    outside = mask & ~is_media & ((ids < 0) | (ids >= config.llm.vocab_size))
    if outside.any():
        r, t = np.argwhere(outside)[0]
        raise UserError(f"input_ids[{r}, {t}] = {ids[r, t]} is outside the vocabulary of {config.llm.vocab_size}")
    counts = mask & ~is_media if config.llm.media_as_they_are else mask
    counted = np.where(counts, np.cumsum(counts, 1) - 1, 0)
    positions = inputs.get("position_ids", counted)
    decoder.require_positions(config.llm, int(positions.max(initial=0)) + 1)
    media = np.where(is_media, np.cumsum(is_media).reshape(ids.shape) - 1, -1)
    wanted = {**targets(inputs.get("labels")), **tasks_of(config, inputs)}
    supervised = wanted["weights"] > 0 if "weights" in wanted else np.zeros(ids.shape, bool)
    return Batch(
        tokens=np.where(mask & ~is_media, ids, 0).astype(np.int32),
        segments=mask.astype(np.int32),
        positions=positions.astype(np.int32),
        spans=spans_of(config.mask, mask.astype(np.int32), is_media & mask, supervised),
        media=media.astype(np.int32),
        **wanted,
    )


def tasks_of(config: ModelConfig, inputs: Inputs) -> dict[str, np.ndarray]:
    """`task` of a batch from `task_ids` [rows], which multi-task prompts read; nothing where they are not given."""
    if "task_ids" not in inputs:
        return {}
    ids, rows, known = np.asarray(inputs["task_ids"]).reshape(-1), inputs["input_ids"], prompts.tasks(config)
    if len(ids) != len(rows) or ids.min(initial=0) < 0 or ids.max(initial=0) >= known:
        raise UserError(f"task_ids {ids.tolist()} are not one of 0 to {known - 1} for each of {len(rows)} rows")
    return {"task": np.broadcast_to(ids[:, None], rows.shape).astype(np.int32)}


def targets(labels: np.ndarray | None, shifted: bool = True) -> dict[str, np.ndarray]:
    """`targets` and `weights` of a batch: each position predicts the next label (or, not `shifted`, its own)."""
    if labels is None:
        return {}
    if shifted:
        labels = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], IGNORED)], 1)
    supervised = labels != IGNORED
    return {"targets": np.where(supervised, labels, 0).astype(np.int32), "weights": supervised.astype(np.float32)}


def loss(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """The mean cross-entropy of a batch's targets, as `loss`; nothing for a batch without any."""
    if batch.targets is None or batch.weights is None:
        return {}
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
    return {"loss": (losses * batch.weights).sum() / batch.weights.sum()}


@functools.partial(jax.jit, static_argnames=("config", "run", "states"))
def run_language(
    params: Params, batch: Batch, *, config: ModelConfig, run: Execution, states: bool
) -> dict[str, jax.Array]:
    """All outputs of the LLM for a batch, and of the encoder and connector where there are images: `image_features`
    [images, positions, width] for each feature layer, as the encoder gives them (class token, registers and all), and
    `connector_output` [images, tokens, LLM width].
    """
    assert batch.segments is not None and batch.positions is not None
    found: dict[str, jax.Array] = {}
    if batch.images is not None:
        config = multimodal.fitted(config, batch.images)
        assert config.connector is not None
        features, connected = media_features(params, config, batch, run)
        names = ["image_features"] + [f"image_features_{i}" for i in range(1, len(features))]
        found.update(zip(names, features))
        leading = batch.images.pixels.shape[:-2] if isinstance(batch.images, vit.Patches) else batch.images.shape[:-3]
        connected = connected.reshape(*leading, *connected.shape[1:])
        batch = dataclasses.replace(batch, images=None, features=connected)
        media = multimodal.encode_media(params, config, batch, run)
        assert media is not None
        found["connector_output"] = media.reshape(-1, *media.shape[2:])
        return {**found, **decoded_outputs(params, config, batch, run, states, media)}
    return {**found, **decoded_outputs(params, config, batch, run, states)}


def decoded_outputs(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    run: Execution,
    states: bool,
    media: jax.Array | None = None,
    padding_sees: bool = False,
) -> dict[str, jax.Array]:
    """The LLM's share of `run_language`; `media` [groups, tiles, tokens, LLM width] are the media tokens. Of an encoder-decoder also
    `encoder_last_hidden_state`. With `padding_sees` it sees what is real, which matters where it predicts a label."""
    assert config.llm is not None
    found: dict[str, jax.Array] = {}
    batch = prompts.prepended(config, batch)
    reading = multimodal.read(params, config, batch, run, media)
    if reading.encoded is not None:
        found["encoder_last_hidden_state"] = reading.encoded.last
    decoded = multimodal.decode_reading(params, config, reading, run, padding_sees, return_states=states)
    logits = multimodal.head(params, config, decoded.last)
    found.update(inputs_embeds=reading.x, logits=logits, last_hidden_state=decoded.last)
    found.update(loss(logits, batch))
    if decoded.router is not None and config.llm.block.experts is not None:
        found["aux_loss"] = balance_loss(decoded.router, jnp.asarray(batch.segments) > 0, config.llm.block.experts.chosen)
    if states:
        assert decoded.states is not None
        found.update({f"hidden_states_{i}": decoded.states[i] for i in range(config.llm.layers)})
        found[f"hidden_states_{config.llm.layers}"] = decoded.last
    return without_virtual(config, found)


def without_virtual(config: ModelConfig, found: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The outputs at positions of text alone, as the inputs have them; `virtual_logits` are those at the prompts' virtual tokens."""
    new = prompts.count(config)
    if not new or config.language.encoder is not None:
        return found
    text = {name: value[:, new:] if value.ndim == 3 else value for name, value in found.items()}
    return {**text, "virtual_logits": found["logits"][:, :new]}


def media_features(
    params: Params, config: ModelConfig, batch: Batch, run: Execution
) -> tuple[list[jax.Array], jax.Array]:
    """The encoder's states of the feature layers with what stands before the patches, and what the connector reads: of all
    pictures one after another."""
    assert batch.images is not None
    images = jax.tree.map(jnp.asarray, batch.images)
    if not isinstance(config.vision, ViTConfig) or config.features.joined or len(config.features.scales) > 1:
        found = multimodal.vision_features(params, config, images, run)
        found = found.reshape(-1, *found.shape[-2:])
        return [found], found
    spec = dataclasses.replace(config.features, keep_class_token=True, keep_registers=True)
    whole = multimodal.vision_features(params, dataclasses.replace(config, features=spec), images, run)
    whole = whole.reshape(-1, *whole.shape[-2:])
    return jnp.split(whole, len(spec.layers), -1), vit.kept(config.vision, config.features, whole)
