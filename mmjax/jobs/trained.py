"""The model of a workdir, for the jobs that use what was trained."""

from __future__ import annotations

from pathlib import Path

import mmjax
from mmjax import vocabulary
from mmjax.architecture import model_config
from mmjax.config import Recipe
from mmjax.model import Model
from mmjax.models import multimodal
from mmjax.parallel import cluster
from mmjax.parallel.mesh import divide_processor, make_mesh
from mmjax.parallel.sharding import param_shardings


def trained(recipe: Recipe, workdir: Path) -> Model:
    """The model with the newest checkpoint's weights, in float32: on the default device, or, of several processes, on the recipe's mesh,
    which then must fit all of their devices (UserError)."""
    if not cluster.several():
        return mmjax.load(workdir)
    divide_processor(recipe.mesh)
    mesh = make_mesh(recipe.mesh)
    shapes = multimodal.shapes(model_config(recipe, vocabulary.trained(workdir)))
    return mmjax.load(workdir, shardings=param_shardings(shapes, mesh))
