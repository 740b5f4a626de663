"""BLIP-2's first stage (arXiv 2301.12597) in LAVIS's own layout: an EVA ViT, a Q-Former and its heads. `model_type` lavis_qformer.

Inputs: `image` [n, 3, height, width]; `input_ids` and `attention_mask` [n, L] in the Q-Former's vocabulary, the class token first; and,
in place of drawn hard negatives, `negative_image_index` and `negative_text_index` [n]. Outputs: `image_features`, `qformer_output` (the
queries), `image_feats` (their embeddings); with text `text_hidden`, `text_feat`, `sim_q2t` (cosines), `sim_i2t`, `sim_t2i`, `loss_itc`,
`multimodal_hidden` (queries and text), `itm_logits` of the pairs, `decoder_labels`, `lm_logits`, `loss_lm`; with negatives
`itm_logits_3b`, `loss_itm` and the `loss`, the sum of the three.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import UserError
from mmjax.families import blip_2_vision, eva, vision
from mmjax.families import qformer as names
from mmjax.families.blip_2 import FEATURES
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Rule, linear, norm, rule
from mmjax.families.language import IGNORED
from mmjax.models import adapters, image_text, multimodal, qformer
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, ViTConfig
from mmjax.models.image_text import Negatives
from mmjax.models.qformer import Text
from mmjax.tree import Params

# What LAVIS calls the Linear in front of a language model, which MiniGPT-4 calls llama_proj.
PROJECTION = "llm_proj"
SPELLINGS = ((r"^(opt|t5|llama)_proj\.", f"{PROJECTION}."),)
COPIES = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}


def qformer_rules(config: ConnectorConfig, projection: str = PROJECTION) -> list[Rule]:
    """All that a Q-Former of this shape has in LAVIS's files; `projection` is the name of the Linear behind it."""
    table = [
        names.QUERIES,
        *names.embedding_rules("Qformer.bert.embeddings.", config),
        *names.layer_rules("Qformer.bert.encoder.layer.", config, "self"),
    ]
    if config.out_width:
        table += linear(projection, "connector/project_out")
    if not config.contrast_width:
        return table
    heads = "connector/heads/"
    return [
        *table,
        *linear("vision_proj", f"{heads}image"),
        *linear("text_proj", f"{heads}text"),
        rule("temp", f"{heads}temperature"),
        *linear("itm_head", f"{heads}match"),
        *linear("Qformer.cls.predictions.transform.dense", f"{heads}language/transform"),
        *norm("Qformer.cls.predictions.transform.LayerNorm", f"{heads}language/norm"),
        rule("Qformer.cls.predictions.bias", f"{heads}language/bias"),
    ]


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    tower = eva.read(Fields(fields.part("vision_config", "eva"), f"{where}: vision_config"))
    own = Fields(fields.part("qformer_config", "qformer"), f"{where}: qformer_config")
    connector = names.read(
        own,
        latents=own.get("query_length", 32),
        in_width=tower.feature_width,
        out_width=0,
        positions=FEATURES.positions(tower),
        text=True,
        contrast_width=fields.get("embed_dim", 256),
    )
    return ModelConfig(
        vision=tower,
        connector=connector,
        features=FEATURES,
        image_mean=blip_2_vision.MEAN,
        image_std=blip_2_vision.STD,
    )


def _write(config: ModelConfig, base: Config) -> Config:
    c = config.connector
    fits = isinstance(config.vision, ViTConfig) and not config.vision.block.key_bias and config.features == FEATURES
    if c is None or names.expressible(c) or not fits or not c.contrast_width or c.out_width or config.llm is not None:
        raise UserError("LAVIS's first stage is an EVA ViT and a Q-Former with its heads, without a language model")
    assert isinstance(config.vision, ViTConfig)
    written = names.write(c, base.get("qformer_config") or {})
    written["cross_attention_freq"] = written.pop("cross_attention_frequency")
    written["query_length"] = c.latents
    return {
        **base,
        "model_type": "lavis_qformer",
        "embed_dim": c.contrast_width,
        "qformer_config": written,
        "vision_config": eva.write(config.vision, base.get("vision_config") or {}),
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.connector is not None and isinstance(config.vision, ViTConfig)
    return [*eva.rules(config.vision), *qformer_rules(config.connector)]


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    pixels, ids = vision.pixels(inputs, "image"), inputs.get("input_ids")
    if ids is None:
        return _run(params, pixels, None, None, config=config, start=0, run=run)
    mask = inputs.get("attention_mask", np.ones_like(ids))
    if ids.ndim != 2 or mask.shape != ids.shape or len(ids) != len(pixels):
        raise UserError(f"input_ids and attention_mask are [{len(pixels)}, length], a text for each picture")
    text = Text(*(jnp.asarray(a, jnp.int32) for a in (ids, mask)))
    drawn = [inputs[name] for name in ("negative_image_index", "negative_text_index") if name in inputs]
    if drawn and [a.shape for a in drawn] != [(len(ids),)] * 2:
        raise UserError("negative_image_index and negative_text_index are given together, one for each pair")
    negatives = Negatives(*(jnp.asarray(a, jnp.int32) for a in drawn)) if drawn else None
    assert config.connector is not None
    start = foreign.get("bos_token_id", config.connector.text_vocab - 1)
    return _run(params, pixels, text, negatives, config=config, start=start, run=run)


@functools.partial(jax.jit, static_argnames=("config", "start", "run"))
def _run(
    params: Params,
    pixels: jax.Array,
    text: Text | None,
    negatives: Negatives | None,
    *,
    config: ModelConfig,
    start: int,
    run: Execution,
) -> dict[str, jax.Array]:
    config = config.for_pictures(*pixels.shape[1:3])
    features = multimodal.vision_features(params, config, pixels, run)
    leaves, c = adapters.merge(params, config)[0]["connector"], config.connector
    assert c is not None
    pictures = image_text.read_pictures(leaves, c, features, run=run)
    found = {
        "image_features": features,
        "qformer_output": pictures.states,
        "image_feats": pictures.embeddings,
    }
    if text is None:
        return found
    texts, real = image_text.read_texts(leaves, c, text, run=run), (text.segments > 0).any(-1)
    scores = image_text.similarities(leaves, image_text.best_of_queries(pictures, texts))
    both = qformer.read(leaves, c, features, text, run=run).states
    written = image_text.with_start(c, text, start)
    behind = qformer.read_behind(leaves, c, pictures.seen, written, run=run).states
    logits = image_text.language_logits(leaves, c, behind)
    found.update(
        text_hidden=texts.states,
        text_feat=texts.embeddings,
        sim_q2t=image_text.cosines(pictures, texts),
        sim_i2t=scores,
        sim_t2i=scores.T,
        loss_itc=image_text.contrastive_loss(scores, real),
        multimodal_hidden=both,
        itm_logits=image_text.matching_logits(leaves, c, both),
        decoder_labels=jnp.where(text.segments > 0, written.tokens, IGNORED),
        lm_logits=logits,
        loss_lm=image_text.language_loss(logits, written),
    )
    if negatives is None:
        return found
    pairs = image_text.triples(features, text, negatives)
    found["itm_logits_3b"] = image_text.matching_logits(leaves, c, qformer.read(leaves, c, *pairs, run=run).states)
    found["loss_itm"] = image_text.matching_loss(found["itm_logits_3b"], real)
    found["loss"] = found["loss_itc"] + found["loss_itm"] + found["loss_lm"]
    return found


FAMILY = Family(
    model_types=("lavis_qformer",),
    about="BLIP-2's first stage in LAVIS's layout (arXiv 2301.12597)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=("image", "input_ids", "attention_mask", "negative_image_index", "negative_text_index"),
    outputs=_outputs,
    copies=lambda config: COPIES,
)
