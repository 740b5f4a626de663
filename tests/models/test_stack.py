"""Layers in a scan, alike ones of a group in one of their own, against a loop over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models.config import Execution
from mmjax.models.stack import run_stack

WIDTH, ROWS = 8, 64


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape) / WIDTH, jnp.float32)


def layer(x, kernel, index, extra):
    x = jnp.tanh(x @ kernel) + index
    return x if extra is None else x + extra


def stacked(params, extras, x, layers, period, pattern, remat):
    def body(x, own, j, index, extra):
        x = layer(x, own["kernel"], index * (1 + j % pattern), extra)
        return x, {"mean": x.mean()}

    return run_stack(body, x, params, layers=layers, period=period, pattern=pattern, extras=extras, run=Execution(remat=remat))


def looped(params, extras, x, layers, period, pattern):
    means = []
    for index in range(layers):
        extra = extras[index % period]
        x = layer(x, params["kernel"][index], index * (1 + index % period % pattern), None if extra is None else extra[index // period])
        means.append(x.mean())
    return x, {"mean": jnp.stack(means)}


CASES = {
    "one after the other": (8, 8, 1, 1, ()),
    "extras before four": (8, 8, 4, 1, (0,)),
    "extras amid four": (8, 8, 4, 1, (1,)),
    "a pattern of two": (8, 8, 4, 2, (0,)),
    "none has extras": (8, 8, 4, 1, ()),
    "a last group that is not full": (10, 10, 4, 1, (0,)),
    "below the top": (8, 5, 1, 1, ()),
    "groups below the top": (8, 6, 3, 1, (2,)),
}


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop(case, remat):
    total, layers, period, pattern, where = CASES[case]
    params, x = {"kernel": draw(total, WIDTH, WIDTH)}, draw(ROWS, WIDTH)
    extras = tuple(draw(-(-layers // period), ROWS, WIDTH) if j in where else None for j in range(period))

    def loss(run):
        def of(params, extras, x):
            last, told = run(params, extras, x)
            return (last * jnp.cos(last)).sum() + jnp.sin(told["mean"]).sum()

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2)))(params, extras, x)

    found = loss(lambda *given: stacked(*given, layers, period, pattern, remat))
    want = loss(lambda *given: looped(*given, layers, period, pattern))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), found, want)


def test_alike_layers_are_compiled_once_and_no_weights_are_kept_beside_the_stack():
    """Of a group of four one product for the layer with an extra and one for the three without; kept for the gradient is what each layer reads."""
    params, x, extras = {"kernel": draw(8, WIDTH, WIDTH)}, draw(ROWS, WIDTH), (draw(2, ROWS, WIDTH), None, None, None)
    forward = jax.make_jaxpr(lambda *given: stacked(*given, 8, 4, 1, "full")[0])(params, extras, x)
    assert str(forward).count("dot_general") == 2
    _, backward = jax.vjp(lambda *given: stacked(*given, 8, 4, 1, "full")[0], params, extras, x)
    kept = [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.shape[-2:] == (WIDTH, WIDTH)]
    assert kept == [(2, 4, WIDTH, WIDTH)], kept  # the stack itself, in groups
