"""A recipe's real training step, compiled for devices that need not be there."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any, Sequence

import jax
from jax.sharding import Mesh

from mmjax.config import Recipe, Stage
from mmjax.models import multimodal
from mmjax.models.config import ModelConfig
from mmjax.parallel.mesh import data_shards
from mmjax.parallel.sharding import param_shardings
from mmjax.planning import arguments
from mmjax.training.optimizer import make_optimizer, make_schedule
from mmjax.training.state import State, state_shapes, state_shardings
from mmjax.training.step import make_train_step
from mmjax.training.trainable import Selection, select, shapes, split
from mmjax.tree import Params


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Of a training step, as shapes with their places, and what it was made of. `stage` has the rows that the mesh can divide."""

    stage: Stage
    config: ModelConfig
    selection: Selection
    state: State
    frozen: Params
    batch: Any


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came of compiling a step.

    text       the optimised program (HLO); "" where it did not fit
    memory     bytes per device: arguments, outputs, aliased (arguments whose room the outputs take), temporaries
    needed     bytes per device in all
    refused    the compiler's own words where memory did not suffice; its largest allocations are in there
    seconds    of lowering and compiling
    results    shardings of what it returns; None where it did not fit
    """

    text: str
    memory: dict[str, int]
    needed: int
    refused: str
    seconds: float
    results: Any = None


def prepare(recipe: Recipe, name: str, config: ModelConfig, mesh: Any) -> Arguments:
    """The arguments of stage `name`. `mesh` may be abstract, where nothing is to be compiled."""
    key = f"stages.{name}"
    stage = arguments.fitting(recipe.stages[name], data_shards(mesh))
    config = config.without(stage.idle)
    params = multimodal.shapes(config)
    selection = select(params, stage.trainable, f"{key}.trainable")
    trainable = shapes(params, selection, stage.param_dtype)
    optimizer = make_optimizer(stage.optimizer, trainable, stage.steps or 1, f"{key}.optimizer")
    state = arguments.placed(state_shapes(trainable, optimizer), state_shardings(trainable, optimizer, mesh))
    frozen = arguments.frozen(jax.eval_shape(lambda p: split(p, selection, stage.param_dtype)[1], params), recipe.model.dtype)
    frozen = arguments.placed(frozen, param_shardings(frozen, mesh))
    batch = arguments.batch(config, stage, mesh, recipe.model.connector.text_length)
    return Arguments(stage, config, selection, state, frozen, batch)


def compile_step(recipe: Recipe, name: str, prepared: Arguments, mesh: Mesh) -> Compiled:
    """Compiles the step that training runs. Raises what the compiler raises, but for want of memory."""
    stage, steps = prepared.stage, prepared.stage.steps or 1000  # the number of steps bends the schedule alone
    optimizer = make_optimizer(stage.optimizer, prepared.state.trainable, steps, f"stages.{name}.optimizer")
    placed = state_shardings(prepared.state.trainable, optimizer, mesh)
    schedule = make_schedule(stage.optimizer, steps)
    step: Any = make_train_step(prepared.config, stage, prepared.selection, optimizer, schedule, mesh, placed, recipe.seed)
    return compiled(step, (prepared.state, prepared.frozen, prepared.batch))


def compiled(function: Any, shapes: Sequence[Any]) -> Compiled:
    """A jitted function compiled for the devices that its arguments' shardings name."""
    began = time.perf_counter()
    lowered = function.lower(*shapes)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"Used ([\d.]+[KMGT]) of [\d.]+[KMGT] hbm|HLO temporaries \(([\d.]+[KMGT])\) exceeds", str(error))
        if not found:
            raise
        return Compiled("", {}, _bytes(found[1] or found[2]), str(error), time.perf_counter() - began)
    stats = program.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
    }
    needed = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]
    return Compiled(program.as_text(), memory, needed, "", time.perf_counter() - began, program.output_shardings)


def _bytes(text: str) -> int:
    """Of XLA's 51.09G."""
    return int(float(text[:-1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[text[-1]])
