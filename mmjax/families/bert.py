"""BERT (arXiv 1810.04805) in transformers' layout: the one decoder, bidirectional, with learned positions and norms behind the
sublayers.

Inputs: `input_ids` [rows, length], `attention_mask`, `token_type_ids`, `position_ids`, `labels`. Outputs: `last_hidden_state`,
`hidden_states_i` on request, `pooler_output` [rows, width] where the pooler's weights are; with the pretraining heads `logits`
(or, of a BertForPreTraining, `prediction_logits` and `seq_relationship_logits` [rows, 2]), and `loss` with labels.
"""

from __future__ import annotations

import functools
from typing import Mapping

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.checkpoints.safetensors import Stored
from mmjax.errors import UserError
from mmjax.families import language, llama
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, linear, norm, rule
from mmjax.models import adapters, decoder, multimodal
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.tree import Params

# Which classes of transformers are known: whether they pool, predict tokens, and tell whether one sentence follows the other.
ARCHITECTURES = {
    "BertModel": (True, False, False),
    "BertForMaskedLM": (False, True, False),
    "BertLMHeadModel": (False, True, False),
    "BertForPreTraining": (True, True, True),
}
POOLER = "add_pooling_layer"  # transformers' name for what only the tensors tell


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("position_embedding_type", "absolute")
    fields.only("add_cross_attention", False)
    fields.only("quantization_config")
    fields.only("pruned_heads", {})
    name = (fields.get("architectures") or ["BertModel"])[0]
    if name not in ARCHITECTURES:
        raise UserError(f"{where}: the architecture {name} is not supported (only {', '.join(ARCHITECTURES)})")
    pools, predicts, classifies = ARCHITECTURES[name]
    pools = bool(fields.get(POOLER, pools))
    if classifies and not pools:
        raise UserError(f"{where}: a {name} needs its pooler's weights, which are not there")
    width, heads = fields.get("hidden_size", 768), fields.get("num_attention_heads", 12)
    length = fields.get("max_position_embeddings", 512)
    return ModelConfig(
        llm=DecoderConfig(
            vocab_size=fields.get("vocab_size", 30522),
            layers=fields.get("num_hidden_layers", 12),
            block=BlockConfig(
                width=width,
                heads=heads,
                kv_heads=heads,
                head_dim=width // heads,
                mlp_width=fields.get("intermediate_size", 3072),
                activation=fields.activation("hidden_act", "gelu"),
                norm="layer",
                norm_eps=fields.get("layer_norm_eps", 1e-12),
                norm_place="after",
                gated_mlp=False,
                qkv_bias=True,
                output_bias=True,
                mlp_bias=True,
            ),
            max_positions=length,
            causal=bool(fields.get("is_decoder", False)),
            tied_head=predicts and bool(fields.get("tie_word_embeddings", True)),
            head_bias=predicts,
            learned_positions=length,
            token_types=fields.get("type_vocab_size", 2),
            embed_norm=True,
            final_norm=False,
            has_head=predicts,
            head_transform=predicts,
            pooler=pools,
            classes=2 if classifies else 0,
        )
    )


def _complete(config: Config, stored: Mapping[str, Stored]) -> Config:
    return {**config, POOLER: "bert.pooler.dense.weight" in stored}


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    ours, block = config.llm, config.llm.block
    fits = block.norm == "layer" and block.norm_place == "after" and not block.gated_mlp and block.mlp_bias
    fits = fits and ours.embed_norm and not ours.final_norm and ours.learned_positions == ours.max_positions
    llama.require(fits and block.rope is None, "BERT", "its norms, MLP or positions are others")
    natural = "BertForPreTraining" if ours.classes else "BertModel"
    if ours.has_head and not ours.classes:
        natural = "BertLMHeadModel" if ours.causal else "BertForMaskedLM"
    return {
        **base,
        "architectures": base.get("architectures") or [natural],
        "model_type": "bert",
        "vocab_size": ours.vocab_size,
        "hidden_size": block.width,
        "intermediate_size": block.mlp_width,
        "num_hidden_layers": ours.layers,
        "num_attention_heads": block.heads,
        "hidden_act": activation_name(block.activation, base.get("hidden_act")),
        "layer_norm_eps": block.norm_eps,
        "max_position_embeddings": ours.max_positions,
        "type_vocab_size": ours.token_types,
        "is_decoder": ours.causal,
        "tie_word_embeddings": ours.tied_head if ours.has_head else base.get("tie_word_embeddings", True),
        POOLER: ours.pooler,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.llm is not None
    start, layer, ours = "bert.embeddings.", "bert.encoder.layer.{i}.", "llm/layers/"
    table = [
        rule(start + "word_embeddings.weight", "llm/embed/embedding"),
        rule(start + "position_embeddings.weight", "llm/embed/positions"),
        rule(start + "token_type_embeddings.weight", "llm/embed/token_types"),
        *norm(start + "LayerNorm", "llm/embed/norm"),
        *linear(layer + "attention.output.dense", ours + "attention/output"),
        *norm(layer + "attention.output.LayerNorm", ours + "attention_norm"),
        *linear(layer + "intermediate.dense", ours + "mlp/up"),
        *linear(layer + "output.dense", ours + "mlp/down"),
        *norm(layer + "output.LayerNorm", ours + "mlp_norm"),
    ]
    for name in ("query", "key", "value"):
        table += linear(f"{layer}attention.self.{name}", f"{ours}attention/{name}")
    if config.llm.pooler:
        table += linear("bert.pooler.dense", "llm/pooler")
    if config.llm.classes:
        table += linear("cls.seq_relationship", "llm/classifier")
    if not config.llm.has_head:
        return table
    table += linear("cls.predictions.transform.dense", "llm/head/transform")
    table += norm("cls.predictions.transform.LayerNorm", "llm/head/norm")
    if config.llm.tied_head:
        return [*table, rule("cls.predictions.bias", "llm/head/bias")]
    return table + linear("cls.predictions.decoder", "llm/head")


def _copies(config: ModelConfig) -> dict[str, str]:
    if config.llm is None or not config.llm.tied_head:
        return {}
    return {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


def _batch(config: ModelConfig, inputs: Inputs) -> Batch:
    """Positions are slots, padded ones too, as in transformers; a causal model's labels are those of the next tokens."""
    ids = inputs.get("input_ids", np.zeros((0, 0), int))
    slots = np.broadcast_to(np.arange(ids.shape[-1]), ids.shape)
    labels = inputs.get("labels")
    rest = {name: value for name, value in inputs.items() if name not in ("labels", "token_type_ids")}
    batch = language.text_batch(config, {"position_ids": slots, **rest})
    for name, value in (("labels", labels), ("token_type_ids", inputs.get("token_type_ids"))):
        if value is not None and value.shape != ids.shape:
            raise UserError(f"{name} {list(value.shape)} and input_ids {list(ids.shape)} differ in shape")
    shifted = config.language.causal
    return Batch(batch.tokens, batch.segments, batch.positions, media=batch.media, **language.targets(labels, shifted))


def _outputs(params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool) -> dict:
    if "labels" in inputs and (config.language.classes or not config.language.has_head):
        raise UserError("labels are for a BertForMaskedLM or a BertLMHeadModel")
    kinds = inputs.get("token_type_ids")
    if kinds is not None and ((kinds < 0) | (kinds >= config.language.token_types)).any():
        raise UserError(f"token_type_ids are from 0 to {config.language.token_types - 1}")
    kinds = None if kinds is None else kinds.astype(np.int32)
    found = _run(params, _batch(config, inputs), kinds, config=config, run=run, states=states)
    if config.language.classes:
        found["prediction_logits"] = found.pop("logits")
    return found


@functools.partial(jax.jit, static_argnames=("config", "run", "states"))
def _run(
    params: Params, batch: Batch, kinds: jax.Array | None, *, config: ModelConfig, run: Execution, states: bool
) -> dict[str, jax.Array]:
    ours, leaves = config.language, adapters.bound(params, config, "llm", len(batch.tokens))
    reading = multimodal.read(params, config, batch, run)
    decoded = multimodal.decode_reading(params, config, reading, run, token_types=kinds, return_states=states)
    found = {"last_hidden_state": decoded.last}
    if ours.pooler:
        found["pooler_output"] = decoder.pool(leaves, decoded.last)
    if ours.classes:
        found["seq_relationship_logits"] = decoder.classify(leaves, ours, found["pooler_output"])
    if ours.has_head:
        found["logits"] = multimodal.head(params, config, decoded.last)
        found.update(language.loss(found["logits"], batch))
    if states:
        assert decoded.states is not None
        found.update({f"hidden_states_{i}": decoded.states[i] for i in range(ours.layers)})
        found[f"hidden_states_{ours.layers}"] = decoded.last
    return found


def _prompt(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    if not (config.language.has_head and config.language.causal):
        raise UserError("this BERT generates nothing: it is no BertLMHeadModel with is_decoder")
    if np.any(inputs.get("token_type_ids", 0)):
        raise UserError("token_type_ids other than 0 are not supported in generation")
    return language.text_batch(config, {name: value for name, value in inputs.items() if name != "token_type_ids"})


FAMILY = Family(
    model_types=("bert",),
    about="BERT (arXiv 1810.04805)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels"),
    outputs=_outputs,
    prompt=_prompt,
    spellings=((r"^(?=(embeddings|encoder|pooler)\.)", "bert."), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
    complete=_complete,
    copies=_copies,
    unused=(r"\.position_ids$", r"^cls\."),
)
