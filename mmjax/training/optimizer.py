"""A stage's optimizer from optax, over the trainable tree only: one clip over all leaves, decay and rates by path."""

from __future__ import annotations

import math
from typing import Callable

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from mmjax import tree
from mmjax.config import Optimizer
from mmjax.errors import UserError
from mmjax.training.trainable import layer_rank, require_match
from mmjax.tree import Params

Schedule = Callable[[jax.Array], jax.Array]


def make_optimizer(options: Optimizer, trainable: Params, steps: int, key: str) -> optax.GradientTransformation:
    """The transformation for a stage of `steps` steps. `trainable` may be shapes; `key` names the options in messages.

    The order is: clip the global norm once, scale (Adam, Lion, ...), add decay, multiply by path, learning rate.
    `moment_dtype` is that of the first moment; second moments stay float32, since in bfloat16 a change of 1 - b2 is
    lost to rounding. Raises UserError for a glob that matches no trainable leaf."""
    parts = []
    if options.clip_norm > 0:
        parts.append(optax.clip_by_global_norm(options.clip_norm))
    parts.append(_scaler(options, trainable))
    if options.weight_decay > 0:
        parts.append(optax.add_decayed_weights(options.weight_decay, decay_mask(options, trainable, key)))
    if options.multipliers:
        factors = _multipliers(options, trainable, key)
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)))
    parts.append(optax.scale_by_learning_rate(make_schedule(options, steps)))
    return optax.chain(*parts)


def make_schedule(options: Optimizer, steps: int) -> Schedule:
    """Learning rate of step 0, 1, ...: linear warm-up from 0, then constant, linear or half a cosine to the end factor
    (as transformers' get_cosine_schedule_with_warmup: the first step of a warm-up has rate 0)."""
    warmup = options.warmup_steps or math.ceil(options.warmup_ratio * steps)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, steps - warmup), 0.0, 1.0)
        if options.schedule == "cosine":
            factor = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif options.schedule == "linear":
            factor = 1.0 - progress
        else:
            return options.learning_rate * jnp.minimum(1.0, step / max(1, warmup) if warmup else 1.0)
        factor = options.end_factor + (1.0 - options.end_factor) * factor
        return options.learning_rate * jnp.where(step < warmup, step / max(1, warmup), factor)

    return schedule


def decay_mask(options: Optimizer, trainable: Params, key: str) -> Params:
    """True where weight decay applies: leaves of a decay glob whose one layer has rank 2 or more."""
    flat = tree.flatten(trainable)
    for glob in options.decay:
        require_match([path for path in flat if tree.matches(path, glob)], glob, flat, f"{key}.decay")
    return tree.unflatten(
        {
            path: layer_rank(path, leaf) >= 2 and any(tree.matches(path, glob) for glob in options.decay)
            for path, leaf in flat.items()
        }
    )


def _multipliers(options: Optimizer, trainable: Params, key: str) -> Params:
    flat = tree.flatten(trainable)
    for glob in options.multipliers:
        require_match([path for path in flat if tree.matches(path, glob)], glob, flat, f"{key}.multipliers")
    return tree.unflatten(
        {
            path: next((factor for glob, factor in options.multipliers.items() if tree.matches(path, glob)), 1.0)
            for path in flat
        }
    )


def _scaler(options: Optimizer, trainable: Params) -> optax.GradientTransformation:
    moment = jnp.dtype(options.moment_dtype)
    adam = optax.scale_by_adam(options.b1, options.b2, options.eps, mu_dtype=moment)
    if options.name == "adamw":
        return adam
    if options.name == "lion":  # arXiv 2302.06675
        return optax.scale_by_lion(options.b1, options.b2, mu_dtype=moment)
    if options.name == "sgd":
        return optax.trace(options.b1, accumulator_dtype=moment)
    if options.name == "adafactor":  # arXiv 1804.04235, without its own step size rule
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if options.name == "muon":  # matrices by Muon; embeddings, heads and vectors by Adam
        labels = tree.unflatten(
            {path: "muon" if _is_muon(path, leaf) else "adam" for path, leaf in tree.flatten(trainable).items()}
        )
        muon = contrib.scale_by_muon(
            beta=options.b1, mu_dtype=moment, weight_dimension_numbers=lambda updates: jax.tree.map(_matrix, updates)
        )
        wide = optax.stateless(lambda updates, _: jax.tree.map(_by_width, updates))
        return optax.partition({"muon": optax.chain(muon, wide), "adam": adam}, labels)
    raise UserError(f"There is no optimizer {options.name!r}.")


def _is_muon(path: str, leaf: jax.Array) -> bool:
    return layer_rank(path, leaf) == 2 and not any(part in ("embed", "head", "positions") for part in path.split("/"))


def _matrix(leaf: jax.Array) -> contrib.MuonDimensionNumbers:
    """The last two axes are [in, out]; a layer axis before them is a batch."""
    return contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)


def _by_width(update: jax.Array) -> jax.Array:
    """Muon's step for a matrix [in, out] grows with sqrt(out / in) where that is more than 1."""
    return update * math.sqrt(max(1.0, update.shape[-1] / update.shape[-2]))
