"""The decoding of one token, compiled: what a device holds of parameters and cache, and how long a token is likely to take."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.config import Recipe
from mmjax.inference import generate
from mmjax.inference.sampling import Sampling
from mmjax.models import multimodal
from mmjax.models.config import Execution, ModelConfig
from mmjax.parallel.mesh import data_shards
from mmjax.parallel.sharding import param_shardings
from mmjax.planning import arguments
from mmjax.planning.chips import Target
from mmjax.planning.compiled import compiled
from mmjax.planning.hlo import Program
from mmjax.planning.stages import mesh_for


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is printed, and the figures for results.json."""

    text: str
    figures: dict[str, float]


def plan_decoding(recipe: Recipe, config: ModelConfig, target: Target) -> Decoding:
    """Compiles the prefill of rows as long as the last stage's, then one token more, as generation runs them."""
    mesh = mesh_for(target, recipe.mesh)
    stage = dataclasses.replace(recipe.stages[recipe.run[-1]], rows=recipe.generate.batch, accumulate=1, packing=False)
    stage = arguments.fitting(stage, data_shards(mesh))
    params = arguments.frozen(multimodal.shapes(config), recipe.model.dtype)
    params = arguments.placed(params, param_shardings(params, mesh))
    batch = arguments.batch(config, stage, mesh, recipe.model.connector.text_length)
    batch = dataclasses.replace(batch, targets=None, weights=None)
    if batch.decoder_tokens is not None:  # an encoder-decoder begins with one token
        one: Any = {name: getattr(batch, name) for name in ("decoder_tokens", "decoder_segments")}
        one = {name: jax.ShapeDtypeStruct((leaf.shape[0], 1), leaf.dtype, sharding=leaf.sharding) for name, leaf in one.items()}
        batch = dataclasses.replace(batch, **one)
    run = Execution(dtype=stage.dtype, mesh=mesh)
    sampling = Sampling(max_new_tokens=-(-recipe.generate.max_new_tokens // generate.ROOM) * generate.ROOM)
    settings = {"config": config, "sampling": sampling, "run": run}
    key, limit = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.int32)
    start = functools.partial(generate._start, return_scores=False, **settings)
    made = compiled(jax.jit(start), (params, batch, key, limit))
    if not made.refused:
        state, remembered = arguments.placed(jax.eval_shape(start, params, batch, key, limit), made.results)
        advance = functools.partial(generate._advance, **settings)
        made = compiled(jax.jit(advance, donate_argnums=2), (params, remembered, state, limit))
    rows, shards = stage.rows, data_shards(mesh)
    begin = f"decoding on {target.name}: {rows} rows of {stage.length} tokens, room for {sampling.max_new_tokens} more"
    figures: dict[str, float] = {"decode_rows": rows, "bytes_per_device_decode": made.needed, "compile_seconds_decode": made.seconds}
    if made.refused:
        return Decoding(f"{begin}\n  IT DOES NOT FIT: {made.needed / 2**30:.2f} GiB of {target.chip.hbm / 2**30:.2f}", figures | {"fits_decode": 0})
    program = Program(made.text)
    held = made.memory["arguments"]
    reading = held / target.chip.hbm_speed if target.chip.hbm_speed else 0.0
    counted = program.cycles() / target.chip.clock if target.chip.clock else 0.0
    seconds = max(reading, counted)
    figures |= {"fits_decode": made.needed <= target.chip.hbm, "predicted_token_seconds": seconds}
    lines = [
        begin,
        f"  per device: {made.needed / 2**30:.2f} GiB ({rows // shards} rows)",
        f"  a token: {seconds * 1e3:.2f} ms, the larger of its cycles ({counted * 1e3:.2f} ms) and reading weights and cache once "
        f"({reading * 1e3:.2f} ms); communication is not in it. {rows / seconds if seconds else 0:,.0f} tokens/s in all",
    ]
    return Decoding("\n".join(lines), figures)
