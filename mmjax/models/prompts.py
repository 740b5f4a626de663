"""Prompts at the embeddings port: virtual tokens, learned vectors that stand before the text of every sample.

    prompt             the vectors are learned as they are (prompt tuning, arXiv 2104.08691)
    p_tuning           an MLP or a bidirectional LSTM makes them of learned ones (P-tuning, arXiv 2103.10385)
    multitask_prompt   one shared prompt times a low-rank matrix for each task (arXiv 2303.02861)

Leaves stand at llm/prompts/NAME. A batch says where the virtual tokens are (mmjax.batch.Batch.virtual); those of several prompts
stand one prompt after another, in the order of config.adapters. An adapted model does not equal its base, not at its start either: the
text comes to stand behind something.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.models.config import ModelConfig
from mmjax.models.layers import Linear, apply
from mmjax.models.tuning_config import MultitaskPromptConfig, PromptConfig, PTuningConfig

Params = dict[str, Any]
Prompt = PromptConfig | PTuningConfig | MultitaskPromptConfig


def of(config: ModelConfig) -> tuple[Prompt, ...]:
    """The prompts among a model's adapters."""
    return tuple(adapter for adapter in config.adapters if isinstance(adapter, Prompt))


def count(config: ModelConfig) -> int:
    """Virtual tokens before each sample."""
    return sum(prompt.tokens for prompt in of(config))


def tasks(config: ModelConfig) -> int:
    """Tasks that its samples may be of: as many as every multi-task prompt knows; 0 = there is no such prompt."""
    return min((prompt.tasks for prompt in of(config) if isinstance(prompt, MultitaskPromptConfig)), default=0)


def require_writer(config: ModelConfig) -> None:
    """Raises UserError where there is no language model whose text a prompt or a prefix could stand in front of."""
    if config.llm is None or not config.llm.causal:
        raise UserError("prompts and prefixes stand in front of what a language model goes on from; this model writes nothing")


def path(name: str) -> str:
    """Where the leaves of a prompt stand, and those that make a prefix."""
    return f"llm/prompts/{name}"


def init(key: jax.Array, prompt: Prompt, width: int) -> Params:
    """Fresh float32 leaves.

    vectors [tokens, width] ~ U(-1/2, 1/2) of prompt tuning (arXiv 2104.08691, section 3.2); of the others ~ N(0, 1), as peft has them,
    with task matrices ~ N(0, 0.02) and encoders as torch starts Linears and LSTMs.
    """
    first, second, third = jax.random.split(key, 3)
    shape = (prompt.tokens, width)
    if isinstance(prompt, PromptConfig):
        return {"vectors": jax.random.uniform(first, shape, minval=-0.5, maxval=0.5)}
    vectors = jax.random.normal(first, shape)
    if isinstance(prompt, MultitaskPromptConfig):
        columns = jax.random.normal(second, (prompt.tasks, prompt.tokens, prompt.task_rank)) * 0.02
        rows = jax.random.normal(third, (prompt.tasks, prompt.task_rank, width)) * 0.02
        return {"vectors": vectors, "task_columns": columns, "task_rows": rows}
    if prompt.settled:
        return {"vectors": vectors}
    hidden = prompt.encoder_width or width
    if prompt.encoder == "mlp":
        sizes = (width, hidden, hidden, width)
        encoder = {"mlp": mlp_init(second, sizes)}
    else:
        encoder = {
            "lstm": _lstm_init(second, width, hidden, prompt.encoder_depth),
            "mlp": mlp_init(third, (2 * hidden, 2 * hidden, width)),
        }
    return {"vectors": vectors, "encoder": encoder}


def vectors(leaves: Params, prompt: Prompt) -> jax.Array:
    """What the virtual tokens are, float32 [tasks, tokens, width]; one task where they are the same for all."""
    learned = leaves["vectors"].astype(jnp.float32)
    if isinstance(prompt, MultitaskPromptConfig):
        changes = leaves["task_columns"].astype(jnp.float32) @ leaves["task_rows"].astype(jnp.float32)
        return learned * changes
    if isinstance(prompt, PTuningConfig) and not prompt.settled:
        encoder = leaves["encoder"]
        if prompt.encoder == "lstm":
            learned = _lstm(encoder["lstm"], learned)
        learned = mlp(encoder["mlp"], learned, jax.nn.relu)
    return learned[None]


def spliced(params: Params, config: ModelConfig, batch: Batch, x: jax.Array) -> jax.Array:
    """Embeddings x [rows, length, width] with the prompts' vectors at the places of the virtual tokens: a gather."""
    chosen = of(config)
    if not chosen:
        return x
    if batch.virtual is None:
        raise ValueError("the model has prompts, and the batch has no places for their virtual tokens (Batch.virtual)")
    made = [vectors(params["llm"]["prompts"][prompt.name], prompt) for prompt in chosen]
    table = jnp.concatenate([each.reshape(-1, each.shape[-1]) for each in made]).astype(x.dtype)
    # Of virtual token i and task t the row is start[i] + t * step[i].
    sizes = [each.shape[0] * each.shape[1] for each in made]
    begins = np.cumsum([0, *sizes])[:-1]
    start = np.concatenate([begin + np.arange(prompt.tokens) for begin, prompt in zip(begins, chosen)])
    step = np.concatenate([np.full(each.shape[1], each.shape[1] * (each.shape[0] > 1)) for each in made])
    number = jnp.maximum(batch.virtual, 0)
    row = jnp.asarray(start)[number]
    if batch.task is not None:
        row = row + batch.task * jnp.asarray(step)[number]
    return jnp.where(batch.virtual[..., None] >= 0, table[row], x)


def prepended(config: ModelConfig, batch: Batch, labels: Any = None) -> Batch:
    """A batch of one sample a row with places for the virtual tokens in front of each row; unchanged where it has them, or the model
    has no prompts. Of an encoder-decoder its encoder reads them.

    labels   int [rows, length] or None: what the first is, the last virtual token predicts (-100: nothing)
    Raises UserError where multi-task prompts are not told the rows' tasks.
    """
    new = count(config)
    if not new or batch.virtual is not None:
        return batch
    known = tasks(config)
    if known and batch.task is None:
        raise UserError(f"task_ids are missing: the model has prompts for {known} tasks, and each row is of one of them")
    tokens = jnp.asarray(batch.tokens)
    rows = tokens.shape[0]
    segments = jnp.asarray(batch.segments)

    def before(name: str, value: Any) -> jax.Array | None:
        """The field with `value` in front of each row."""
        field = getattr(batch, name)
        if field is None:
            return None
        field = jnp.asarray(field)
        front = jnp.broadcast_to(jnp.asarray(value, field.dtype), (rows, new, *field.shape[2:]))
        return jnp.concatenate([front, field], 1)

    each = jnp.arange(new)
    positions = jnp.asarray(batch.positions)
    shifted = dataclasses.replace(batch, positions=positions + new)
    places = jnp.broadcast_to(each[None], (rows, new))
    fields: dict[str, Any] = {
        "tokens": before("tokens", 0),
        "segments": before("segments", jnp.maximum(segments.max(1, keepdims=True), 1)),
        "virtual": jnp.concatenate([places, jnp.full(tokens.shape, -1, places.dtype)], 1).astype(jnp.int32),
        "media": before("media", -1),
        "begun": before("begun", 0),
        "media_seen": before("media_seen", False),
        "task": before("task", 0 if batch.task is None else jnp.asarray(batch.task)[:, :1]),
        "positions": jnp.concatenate(
            [
                jnp.broadcast_to(each.reshape(1, new, *[1] * (positions.ndim - 2)), (rows, new, *positions.shape[2:])),
                shifted.positions,
            ],
            1,
        ).astype(jnp.int32),
    }
    if batch.spans is not None:  # they see each other with the beginning of the text where that does
        spans = jnp.asarray(batch.spans)
        first = jnp.take_along_axis(spans, jnp.argmax(segments > 0, 1)[:, None], 1)
        fields["spans"] = before("spans", first if config.mask in ("prefix", "opening") else 0)
    if batch.decoder_tokens is None and batch.targets is not None:
        last = jnp.full((rows, 1), -100) if labels is None else jnp.asarray(labels)[:, :1]
        ahead = each[None] == new - 1
        fields["targets"] = before("targets", jnp.where(ahead & (last != -100), last, 0))
        fields["weights"] = before("weights", ahead & (last != -100))
    return dataclasses.replace(batch, **fields)


def mlp_init(key: jax.Array, sizes: tuple[int, ...]) -> Params:
    """Linears from each size to the next: weights and biases U(-1/sqrt(in), 1/sqrt(in)), as torch starts them."""
    layers = {}
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        key, first, second = jax.random.split(key, 3)
        bound = inputs**-0.5
        layers[f"linear_{i}"] = {
            "kernel": jax.random.uniform(first, (inputs, outputs), minval=-bound, maxval=bound),
            "bias": jax.random.uniform(second, (outputs,), minval=-bound, maxval=bound),
        }
    return layers


def mlp(leaves: Params, x: jax.Array, activation: Any) -> jax.Array:
    """Linears with an activation between them: x [..., in] -> [..., out]."""
    for i in range(len(leaves)):
        layer = leaves[f"linear_{i}"]
        x = apply(Linear(layer["bias"].shape[0]), layer, activation(x) if i else x)
    return x


def _lstm_init(key: jax.Array, width: int, hidden: int, depth: int) -> Params:
    """Of each layer and direction two Linears to the gates (input, forget, cell, output), of the input and of the state before:
    U(-1/sqrt(hidden), 1/sqrt(hidden)), as torch starts them."""
    bound, layers = hidden**-0.5, {}
    for i in range(depth):
        directions: Params = {}
        for direction in ("forward", "backward"):
            leaves: Params = {}
            for name, inputs in (("input", width if i == 0 else 2 * hidden), ("state", hidden)):
                key, first, second = jax.random.split(key, 3)
                leaves[name] = {
                    "kernel": jax.random.uniform(first, (inputs, 4 * hidden), minval=-bound, maxval=bound),
                    "bias": jax.random.uniform(second, (4 * hidden,), minval=-bound, maxval=bound),
                }
            directions[direction] = leaves
        layers[f"layer_{i}"] = directions
    return layers


def _lstm(leaves: Params, x: jax.Array) -> jax.Array:
    """A bidirectional LSTM over x [tokens, width] -> [tokens, 2 hidden]."""

    def run(layer: Params, x: jax.Array) -> jax.Array:
        inputs = apply(Linear(layer["input"]["bias"].shape[0]), layer["input"], x)
        blank = jnp.zeros(layer["state"]["kernel"].shape[0], x.dtype)

        def step(carry, gates):
            state, cell = carry
            gates = gates + state @ layer["state"]["kernel"].astype(x.dtype) + layer["state"]["bias"].astype(x.dtype)
            enter, forget, new, leave = jnp.split(gates, 4)
            cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
            state = jax.nn.sigmoid(leave) * jnp.tanh(cell)
            return (state, cell), state

        return jax.lax.scan(step, (blank, blank), inputs)[1]

    for i in range(len(leaves)):
        layer = leaves[f"layer_{i}"]
        x = jnp.concatenate([run(layer["forward"], x), run(layer["backward"], x[::-1])[::-1]], -1)
    return x
