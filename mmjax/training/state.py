"""What a training step changes: the trainable leaves, their optimizer state, and the count of steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax.parallel.sharding import optimizer_shardings, param_shardings, placed
from mmjax.tree import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """step       int32 [], steps done in this stage
    trainable  the leaves that the stage trains (see mmjax.training.trainable)
    optimizer  optax state, for those leaves only
    """

    step: jax.Array
    trainable: Params
    optimizer: Any


def init_state(trainable: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state before step 0. `trainable` is placed on the mesh and belongs to the state from here on."""
    shardings = state_shardings(trainable, optimizer, mesh)
    trainable = jax.tree.map(placed, trainable, shardings.trainable)
    place: Any = shardings.step
    step = placed(np.zeros((), np.int32), place)
    state = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trainable)
    return State(step, trainable, state)


def state_shapes(trainable: Params, optimizer: optax.GradientTransformation) -> State:
    """Shapes of the state, from shapes of the trainable leaves."""
    shapes = jax.eval_shape(lambda leaves: leaves, trainable)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return State(step, shapes, jax.eval_shape(optimizer.init, shapes))


def state_shardings(trainable: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """NamedShardings for every leaf of the state; `trainable` may be shapes."""
    shapes = state_shapes(trainable, optimizer)
    step: Any = NamedSharding(mesh, PartitionSpec())
    return State(
        step,
        param_shardings(shapes.trainable, mesh),
        optimizer_shardings(shapes.optimizer, shapes.trainable, mesh),
    )
