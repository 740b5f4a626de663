"""An encoder-decoder as a part: its leaves, their places on a mesh, and its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import tree
from mmjax.batch import Batch
from mmjax.config import Mesh
from mmjax.models import multimodal
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import DecoderConfig, Execution, ModelConfig, RelativeBias
from mmjax.models.tuning_config import LoraConfig
from mmjax.parallel import sharding
from mmjax.parallel.mesh import make_mesh
from tests.models import tiny

BLOCK = BlockConfig(16, 4, 4, 4, 24, "gelu_tanh", "rms", 1e-6, True, False, False, False, scale=1.0, wide_residual=True)
ENCODER = DecoderConfig(32, 2, BLOCK, 64, causal=False, has_head=False, relative_bias=RelativeBias(8, 16))
LLM = dataclasses.replace(
    ENCODER, layers=2, block=dataclasses.replace(BLOCK, memory_width=16), causal=True, has_head=True, encoder=ENCODER
)
LORA = LoraConfig("default", 2, 4.0, ("llm/**/{query,key,value}",))
CONFIG = ModelConfig(llm=LLM, adapters=(LORA,))


def batch(rows=2, length=9, decoder_length=5) -> Batch:
    rng = np.random.default_rng(0)
    segments = np.ones((rows, length), np.int32)
    segments[0, 6:] = 0
    return Batch(
        tokens=rng.integers(1, 32, (rows, length), np.int32),
        segments=segments,
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        decoder_tokens=rng.integers(1, 32, (rows, decoder_length), np.int32),
        decoder_segments=np.ones((rows, decoder_length), np.int32),
    )


@functools.partial(jax.jit, static_argnames="run")
def forward(params, batch, run):
    return multimodal.head(params, CONFIG, multimodal.hidden(params, CONFIG, batch, run))


@functools.partial(jax.jit, static_argnames="run")
@functools.partial(jax.grad, has_aux=True)
def gradients(params, batch, run):
    logits = forward(params, batch, run)
    return jax.nn.log_softmax(logits)[..., 3].sum(), logits


def test_leaves_and_their_places():
    shapes = multimodal.shapes(CONFIG)
    flat = tree.flatten(shapes)
    assert {path for path in flat if "embed" in path} == {"llm/embed/embedding"}  # one for both halves
    assert flat["llm/relative_bias"].shape == flat["llm/encoder/relative_bias"].shape == (8, 4)
    assert flat["llm/layers/cross_attention/key/adapters/default/lora_a"].shape == (2, 16, 2)
    mesh = make_mesh(Mesh(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    for row in sharding.table(shapes, mesh):
        assert any(row.spec) or not row.path.endswith(("kernel", "embedding")), row


def test_every_leaf_has_a_gradient():
    params, run = tiny.random_params(CONFIG), Execution(dtype="bfloat16", remat="full")
    found, logits = gradients(params, batch(), run)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))
    exact = forward(params, batch(), Execution())
    assert jnp.abs(logits - exact).max() < 0.1 * jnp.abs(exact).max()
