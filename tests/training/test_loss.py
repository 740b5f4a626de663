"""The chunked loss equals the plain one, and never holds full logits."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models.config import Execution
from mmjax.training import loss as loss_module
from mmjax.training.loss import classification_loss, cross_entropy
from tests.training import tiny

ROWS, LENGTH, WIDTH, VOCAB = 4, 24, 8, 50


def _inputs(supervised: float = 0.3):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(WIDTH, VOCAB)), jnp.float32)
    targets = jnp.asarray(random.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
    weights = jnp.asarray((random.random((ROWS, LENGTH)) < supervised) * random.random((ROWS, LENGTH)), jnp.float32)
    return hidden, kernel, targets, weights


def _plain(hidden, kernel, targets, weights, smoothing):
    log_p = jax.nn.log_softmax(hidden @ kernel)
    target = (1 - smoothing) * jax.nn.one_hot(targets, VOCAB) + smoothing / VOCAB
    return -(target * log_p).sum(-1) * weights


def _chunked(hidden, kernel, targets, weights, smoothing=0.0, groups=2):
    return cross_entropy(
        lambda states: states @ kernel, hidden, targets, weights, vocab=VOCAB, groups=groups, smoothing=smoothing
    )


@pytest.mark.parametrize("smoothing, groups", [(0.0, 1), (0.1, 2)])
def test_losses_and_gradients_equal_the_plain_ones(smoothing, groups):
    hidden, kernel, targets, weights = _inputs()

    @jax.jit
    def both(hidden, kernel):
        ours, ours_back = jax.vjp(lambda h, k: _chunked(h, k, targets, weights, smoothing, groups), hidden, kernel)
        plain, plain_back = jax.vjp(lambda h, k: _plain(h, k, targets, weights, smoothing).sum(-1), hidden, kernel)
        return (ours, *ours_back(jnp.ones(ROWS))), (plain, *plain_back(jnp.ones(ROWS)))

    for mine, reference in zip(*both(hidden, kernel)):
        np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-6)


def test_nothing_supervised_is_zero_with_finite_gradients():
    hidden, kernel, targets, weights = _inputs(0.0)
    value, gradient = jax.jit(jax.value_and_grad(lambda h: _chunked(h, kernel, targets, weights).sum()))(hidden)
    assert value == 0 and np.all(np.asarray(gradient) == 0)


def _sizes(text: str) -> list[int]:
    """Elements of every array in a compiled program."""
    shapes = re.findall(r"\b(?:f32|bf16|f16|s32|pred)\[([\d,]+)\]", text)
    return [int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes]


def test_full_logits_exist_neither_forward_nor_backward(monkeypatch):
    rows, length, width, vocab = 4, 64, 8, 512
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 8 * vocab)  # eight positions at a time

    def summed(hidden, kernel, targets, weights):
        return cross_entropy(lambda h: h @ kernel, hidden, targets, weights, vocab=vocab, groups=1).sum()

    arguments = (
        jax.ShapeDtypeStruct((rows, length, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
        jax.ShapeDtypeStruct((rows, length), jnp.float32),
    )
    compiled = jax.jit(jax.value_and_grad(summed, (0, 1))).lower(*arguments).compile()
    full = rows * length * vocab
    assert max(_sizes(compiled.as_text())) < full / 8
    assert compiled.memory_analysis().temp_size_in_bytes < full * 4 / 4


def test_a_frozen_head_gets_no_gradient():
    def products(wanted):
        def summed(hidden, kernel, targets, weights):
            return _chunked(hidden, kernel, targets, weights, groups=1).sum()

        return len(re.findall(r" = \S+ dot\(", jax.jit(jax.grad(summed, wanted)).lower(*_inputs()).compile().as_text()))

    # With value dropped: logits made again, the gradient of the hidden states, and for a trained head its own.
    assert products((0, 1)) == products(0) + 1


def test_classification_counts_real_tiles_only():
    params, batch = tiny.params(), tiny.batch(classes=True)
    classes = np.array(batch.classes)
    classes[0, 0] = -1
    batch.classes[:] = classes
    losses = jax.jit(lambda params, batch: classification_loss(params, tiny.CONFIG, batch, Execution()))(params, batch)
    assert losses.shape == (8,) and losses[0] == 0 and np.all(np.asarray(losses[1:]) > 0)
    assert loss_module.total_weight(dataclasses.replace(batch, weights=None)) == 7
