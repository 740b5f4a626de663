"""What holding a model's kernels in few bits costs: `python -m tests.quantised TEXT.txt[.gz] [STEPS]`.

A small Llama over bytes learns the first nine tenths of a text; the perplexity of the rest is that of its float32 weights, and of each
format (AWQ calibrated on text that it learnt from). One line for each: bytes of the blocks' kernels, perplexity for a byte, change.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax import tree
from mmjax.batch import Batch
from mmjax.models import calibration, multimodal, quantised
from mmjax.models.block_config import BlockConfig, Rope
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.models.quantised import Quantisation

BLOCK = BlockConfig(128, 4, 4, 32, 384, "silu", "rms", 1e-5, True, False, False, False, Rope())
CONFIG = ModelConfig(llm=DecoderConfig(256, 4, BLOCK, 128))
LENGTH, ROWS = 128, 16
FORMATS = {
    "int8": Quantisation("int8"),
    "nf4": Quantisation("nf4", double=False),
    "nf4 double": Quantisation("nf4"),
    "int4 rounded": Quantisation("int4", block=128),
    "int4 AWQ": Quantisation("int4", block=128),
}


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__)
        return 2
    path, steps = Path(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 400
    text = np.frombuffer(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes(), np.uint8)
    learnt, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    began = time.perf_counter()
    params = train(learnt, steps)
    print(f"{path.name}: {steps} steps of {ROWS * LENGTH} bytes in {time.perf_counter() - began:.0f} s")
    base = 0.0
    for name, found, size in [("float32", perplexity(params, CONFIG, held_out), _bytes(params)), *rows(params, learnt, held_out)]:
        base = base or found
        print(f"{name:13} {size / 2**20:6.3f} MiB  perplexity {found:7.4f}  {100 * (found / base - 1):+.2f} %", flush=True)
    return 0


def rows(params: Any, learnt: np.ndarray, held_out: np.ndarray):
    """Name, perplexity and bytes of each format."""
    for name, spec in FORMATS.items():
        if name == "int4 AWQ":
            found = calibration.quantised_by_awq(params, CONFIG, _rows(learnt, 32), spec)
        else:
            found = quantised.converted(params, spec)
        yield name, perplexity(found, dataclasses.replace(CONFIG, quantisation=spec), held_out), _bytes(found)


def train(text: np.ndarray, steps: int) -> Any:
    params = multimodal.init(jax.random.key(0), CONFIG)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, steps), weight_decay=0.1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        gradients = jax.grad(lambda params: _loss(params, CONFIG, tokens))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state, random = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        starts = random.integers(0, len(text) - LENGTH - 1, ROWS)
        params, state = step(params, state, np.stack([text[s : s + LENGTH + 1] for s in starts]).astype(np.int32))
    return params


def perplexity(params: Any, config: ModelConfig, text: np.ndarray, count: int = 256) -> float:
    """For a byte, over the first rows of a text."""
    loss = jax.jit(functools.partial(_loss, config=config))
    tokens = _rows(text, count, LENGTH + 1)
    return float(np.exp(np.mean([loss(params, tokens=tokens[i : i + 32]) for i in range(0, count, 32)])))


def _loss(params: Any, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    read = jnp.asarray(tokens[:, :-1], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(read.shape[1], dtype=jnp.int32), read.shape)
    batch = Batch(tokens=read, segments=jnp.ones_like(read), positions=positions)
    logits = multimodal.head(params, config, multimodal.hidden(params, config, batch, Execution()))
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def _rows(text: np.ndarray, count: int, length: int = LENGTH) -> np.ndarray:
    return text[: count * length].reshape(count, length).astype(np.int32)


def _bytes(params: Any) -> int:
    flat = tree.flatten(params).items()
    return sum(leaf.nbytes for path, leaf in flat if path.startswith("llm/layers/") and "/kernel" in path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
