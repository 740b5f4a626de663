"""Eight devices train as one does: the loss, and the gradients of a step, however a mesh divides them.

`python -m tests.parallel.test_devices` compares every model on every mesh.
"""

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest

from mmjax import config, tree
from mmjax.models import multimodal
from mmjax.models.block_config import Experts
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, GatedCrossAttentionConfig
from mmjax.parallel.mesh import make_mesh
from tests.training import tiny
from tests.training.test_step import STAGE, Run

BLOCK = dataclasses.replace(tiny.LLM.block, heads=4, head_dim=8)
LLM = dataclasses.replace(tiny.LLM, layers=1, block=BLOCK)
VISION = dataclasses.replace(tiny.VISION, layers=1)
LLAVA = dataclasses.replace(tiny.CONFIG, llm=LLM, vision=VISION)
PERCEIVER = ConnectorConfig("perceiver", in_width=16, out_width=16, positions=4, depth=1, bias=False, latents=3, heads=2, head_dim=8)
CROSSED = GatedCrossAttentionConfig(dataclasses.replace(BLOCK, kv_heads=4, memory_width=16, rope=None), (0,))
FLAMINGO = dataclasses.replace(LLAVA, connector=PERCEIVER, cross_attention=CROSSED, adapters=())
MIXTRAL = ModelConfig(llm=dataclasses.replace(LLM, block=dataclasses.replace(BLOCK, experts=Experts(count=4, chosen=2))))
MODELS = {"llava": LLAVA, "flamingo": FLAMINGO, "mixtral": MIXTRAL}
TRAINED = {"llava": ("connector/**", "llm/**", "vision/layers/**"), "flamingo": ("connector/**", "llm/**"), "mixtral": ("llm/**",)}
STEP = dataclasses.replace(
    STAGE,
    router_loss=0.1,
    optimizer=config.Optimizer(name="sgd", learning_rate=100.0, schedule="constant", warmup_ratio=0.0),  # so that a step is its gradient
)
MESHES: dict[str, dict[str, int]] = {
    "one": {},
    "fsdp": dict(fsdp=8),
    "tensor": dict(data=2, tensor=4),
    "sequence": dict(sequence=8),
    "expert": dict(data=2, expert=4),
    "mixed": dict(fsdp=2, tensor=2, sequence=2),
    "mixed with experts": dict(fsdp=2, sequence=2, expert=2),
}


def batch(model: ModelConfig):
    made = tiny.batch(rows=8, groups=8)
    if model.vision is None:
        return dataclasses.replace(made, images=None, tiles=None, media=None)
    if model.cross_attention is None:
        return made
    begun = (np.arange(16) > 2) * np.asarray(made.segments)
    ones = np.ones((8, 1), np.int32)
    return dataclasses.replace(made, media=np.full_like(made.media, -1), begun=begun, row_media=ones * 0, media_segments=ones)


class Outcome(NamedTuple):
    """Of a step: loss and gradient norm, how far each leaf moved, and the compiled program."""

    figures: np.ndarray
    moved: dict[str, np.ndarray]
    program: str


@functools.cache
def step(name: str, mesh: str = "one") -> Outcome:
    run = Run(dataclasses.replace(STEP, trainable=TRAINED[name]), config.Mesh(**{"data": 1, **MESHES[mesh]}), MODELS[name])
    made, state = run.put(batch(MODELS[name])), run.fresh()
    before = tree.flatten(jax.device_get(state.trainable))
    compiled = run.step.lower(state, run.frozen, made).compile()
    state, metrics = compiled(state, run.frozen, made)
    after = tree.flatten(jax.device_get(state.trainable))
    figures = np.array([metrics.loss, metrics.gradient_norm])
    return Outcome(figures, {path: after[path] - before[path] for path in before}, compiled.as_text())


def compare(name: str, mesh: str) -> None:
    found, wanted = step(name, mesh), step(name)
    np.testing.assert_allclose(found.figures, wanted.figures, rtol=1e-5)
    rounding = 1e-7 * np.sqrt(sum(np.square(leaf).sum() for leaf in wanted.moved.values()))  # all the gradient that keys' biases have
    for path, leaf in wanted.moved.items():
        assert np.linalg.norm(found.moved[path] - leaf) <= 1e-5 * np.linalg.norm(leaf) + rounding, path


@pytest.mark.parametrize(
    "name, mesh",
    [("llava", "fsdp"), ("llava", "tensor"), ("llava", "sequence"), ("flamingo", "mixed"), ("mixtral", "mixed with experts")],
)
def test_eight_devices_equal_one(name, mesh):
    compare(name, mesh)


@pytest.mark.parametrize("name, mesh", [("llava", "fsdp"), ("llava", "tensor"), ("flamingo", "mixed")])
def test_no_rows_are_brought_together(name, mesh):
    """What is gathered is weights, a layer of them, and keys and values of a device's own rows: nothing has the first axis of a batch."""
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\][^=\n]*? (?:all-gather|all-to-all)(?:-start)?\(", step(name, mesh).program)
    shapes = [tuple(map(int, filter(None, shape.split(",")))) for shape in gathered]
    assert shapes and not [shape for shape in shapes if len(shape) > 2 and shape[0] == 8]
    if mesh == "fsdp":
        assert max(map(len, shapes)) == 2


@pytest.mark.parametrize("sizes", [dict(data=2, tensor=4), dict(fsdp=2, tensor=2, sequence=2)])
def test_tiles_are_divided_where_heads_are_not(sizes):
    """An encoder with 3 heads reads 2 x 3 tiles: one on each device, and dummies on two."""
    block = dataclasses.replace(VISION.block, heads=3, kv_heads=3, head_dim=4)
    model, images = dataclasses.replace(LLAVA, vision=dataclasses.replace(VISION, block=block)), tiny.batch(rows=6, groups=2).images
    params = {"vision": tiny.params(model)["vision"]}

    def loss(params, run):
        return (multimodal.vision_features(params, model, images, run) ** 2).sum()

    gradients = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    run = Execution(mesh=make_mesh(config.Mesh(**{"data": 1, **sizes})))
    compiled = gradients.lower(params, run).compile()
    for found, wanted in zip(jax.tree.leaves(compiled(params)), jax.tree.leaves(gradients(params, Execution()))):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)
    widened = re.findall(r"f32\[(\d+),32\]\S* dot\(", compiled.as_text())
    assert widened and set(widened) <= {"5", "16"}  # the positions of one tile, or the gradient of the weights


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (eight devices)

    for name in MODELS:
        for mesh in [*MESHES][1:]:
            if "expert" not in mesh or name == "mixtral":
                compare(name, mesh)
                print(f"{name} on {MESHES[mesh]}: equal")
