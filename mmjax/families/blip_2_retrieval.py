"""BLIP-2 for retrieval and matching (arXiv 2301.12597) in transformers' layout: a `blip-2` whose architecture is
Blip2ForImageTextRetrieval, the first stage's model without what writes text.

Inputs: `pixel_values` [n, 3, height, width]; `input_ids` and `attention_mask` [m, L] in the Q-Former's vocabulary, behind one
`image_token_index` for each query where the config has one; `use_image_text_matching_head`. Outputs: `image_embeds` [n, queries, width],
`text_embeds` [m, width] and `logits_per_image` [n, m], the cosine of the nearest query; or, with that head and a text for each picture,
`logits_per_image` [n, 2], no and yes. `logits_per_text` is the transpose of either.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import UserError
from mmjax.families import blip_2, blip_2_vision, vision
from mmjax.families import qformer as names
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, norm, prefixed, rule
from mmjax.models import adapters, image_text, multimodal, qformer
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ViTConfig
from mmjax.models.qformer import Text
from mmjax.tree import Params

ARCHITECTURE = "Blip2ForImageTextRetrieval"
VISION, QFORMER, _ = blip_2.KINDS["blip-2"]


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("quantization_config")
    tower = blip_2_vision.read_tower(Fields(fields.part("vision_config", VISION), f"{where}: vision_config"))
    own = Fields(fields.part("qformer_config", QFORMER), f"{where}: qformer_config")
    own.only("use_qformer_text_input", True)
    connector = names.read(
        own,
        latents=fields.get("num_query_tokens", 32),
        in_width=tower.feature_width,
        out_width=0,
        positions=blip_2.FEATURES.positions(tower),
        text=True,
        contrast_width=fields.get("image_text_hidden_size", 256),
    )
    return ModelConfig(
        vision=tower,
        connector=connector,
        features=blip_2.FEATURES,
        image_mean=blip_2_vision.MEAN,
        image_std=blip_2_vision.STD,
    )


def _write(config: ModelConfig, base: Config) -> Config:
    c = config.connector
    assert c is not None and isinstance(config.vision, ViTConfig)
    image, own = base.get("vision_config") or {}, base.get("qformer_config") or {}
    return {
        **base,
        "architectures": [ARCHITECTURE],
        "model_type": "blip-2",
        "vision_config": blip_2_vision.write(config.vision, {**image, "model_type": VISION}),
        "qformer_config": {**names.write(c, own), "model_type": QFORMER, "use_qformer_text_input": True},
        "num_query_tokens": c.latents,
        "image_text_hidden_size": c.contrast_width,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.connector is not None and isinstance(config.vision, ViTConfig)
    return [
        *prefixed("vision_model.", blip_2_vision.tower_rules(config.vision)),
        names.QUERIES,
        rule("embeddings.word_embeddings.weight", "connector/embed/embedding"),
        rule("embeddings.position_embeddings.weight", "connector/embed/positions"),
        *norm("qformer.layernorm", "connector/embed/norm"),
        *names.layer_rules("qformer.encoder.layer.", config.connector, "attention"),
        *linear("vision_projection", "connector/heads/image"),
        *linear("text_projection", "connector/heads/text"),
        *linear("itm_head", "connector/heads/match"),
    ]


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    pixels, c = vision.pixels(inputs), config.connector
    assert c is not None
    if "input_ids" not in inputs:
        raise UserError("input_ids are missing")
    ids, matching = inputs["input_ids"], bool(np.any(inputs.get("use_image_text_matching_head", False)))
    mask = inputs.get("attention_mask", np.ones_like(ids))
    if foreign.get("image_token_index") is not None:  # they stand for the queries
        ids, mask = ids[:, c.latents :], mask[:, c.latents :]
    if matching and len(ids) != len(pixels):
        raise UserError(f"matching takes a text for each picture: {len(pixels)} pictures, {len(ids)} texts")
    text = Text(*(jnp.asarray(a, jnp.int32) for a in (ids, mask)))
    return _run(params, pixels, text, config=config, matching=matching, run=run)


@functools.partial(jax.jit, static_argnames=("config", "matching", "run"))
def _run(
    params: Params, pixels: jax.Array, text: Text, *, config: ModelConfig, matching: bool, run: Execution
) -> dict[str, jax.Array]:
    config = config.for_pictures(*pixels.shape[1:3])
    leaves, c = adapters.merge(params, config)[0]["connector"], config.connector
    assert c is not None
    features = multimodal.vision_features(params, config, pixels, run)
    if matching:
        logits = image_text.matching_logits(leaves, c, qformer.read(leaves, c, features, text, run=run).states)
        return {"logits_per_image": logits, "logits_per_text": logits.T}
    pictures = image_text.read_pictures(leaves, c, features, run=run)
    texts = image_text.read_texts(leaves, c, text, run=run)
    logits = image_text.best_of_queries(pictures, texts)
    embeddings = {"image_embeds": pictures.embeddings, "text_embeds": texts.embeddings}
    return {**embeddings, "logits_per_image": logits, "logits_per_text": logits.T}


FAMILY = Family(
    model_types=("blip-2",),
    about="BLIP-2 for retrieval and matching (arXiv 2301.12597)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=("pixel_values", "input_ids", "attention_mask", "use_image_text_matching_head"),
    outputs=_outputs,
    claims=lambda config: config.get("model_type") == "blip-2" and ARCHITECTURE in (config.get("architectures") or ()),
)
