"""RobustGER's audio noise distillation (arXiv 2401.10446): the language-space noise embedding is taught to know the noise of the audio."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.batch import Batch
from mmjax.models import mine, noise_prompt
from mmjax.models.config import ModelConfig
from mmjax.models.tuning_config import NoisePromptConfig
from mmjax.tree import Params


def noise_loss(params: Params, config: ModelConfig, batch: Batch, weight: float) -> jax.Array:
    """MINE's own loss, and `weight` times what it has the layers' embeddings learn (mmjax.models.mine): means over the batch's samples, float32 [].

    The authors update MINE first and the adapter then, with the MINE of the same step; here both are updated at once, the adapter by
    the MINE of the step before. Neither loss reaches the other's leaves.
    """
    adapter = next(a for a in config.adapters if isinstance(a, NoisePromptConfig) and a.audio)
    if batch.features is None or batch.audio is None:
        return jnp.zeros(())
    noise, audio = jnp.asarray(batch.features, jnp.float32), jnp.asarray(batch.audio)
    noise, audio = noise.reshape(-1, *noise.shape[2:]), audio.reshape(-1, *audio.shape[2:])
    real = jnp.asarray(batch.tiles).reshape(-1).astype(jnp.float32)
    noisy, clean = audio[:, :1], audio[:, 1:]
    network = params["mine"][adapter.name]
    embeddings = noise_prompt.intermediate(params["llm"]["plugs"][adapter.name], adapter, noise)
    losses = mine.estimation_loss(network, noise, noisy, clean) + weight * mine.distillation_loss(network, embeddings, noisy)
    return (losses * real).sum() / jnp.maximum(real.sum(), 1.0)
