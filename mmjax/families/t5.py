"""T5 (arXiv 1910.10683), its version 1.1, Flan-T5 (arXiv 2210.11416) and mT5 (arXiv 2010.11934) in transformers' layout.

Inputs: `input_ids` [rows, length] and `attention_mask` of the encoder; `decoder_input_ids` [rows, T] and
`decoder_attention_mask`; `labels` [rows, T] (-100 = not predicted), which shifted right are the decoder's input where none is
given. Outputs: `logits` [rows, T, vocab], `loss` with labels, `last_hidden_state` [rows, T, width], `encoder_last_hidden_state`
[rows, length, width], and on request `encoder_hidden_states_i` and `decoder_hidden_states_i`. A T5EncoderModel is the encoder
alone: `last_hidden_state` and `hidden_states_i`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Mapping

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.checkpoints.safetensors import Stored
from mmjax.errors import UserError
from mmjax.families import language, llama
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields, activation_name
from mmjax.families.keys import Rule, linear, norm, rule
from mmjax.families.reading import same_tensor
from mmjax.models import decoder, multimodal, prompts
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import DecoderConfig, Execution, ModelConfig, RelativeBias
from mmjax.tree import Params

WHOLE, HEADLESS, ENCODER = "ForConditionalGeneration", "Model", "EncoderModel"


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("is_decoder", False)
    fields.only("quantization_config")
    kind = (fields.get("architectures") or [f"T5{WHOLE}"])[0].removeprefix("M").removeprefix("T5")
    if kind not in (WHOLE, HEADLESS, ENCODER):
        known = ", ".join(f"T5{kind}" for kind in (WHOLE, HEADLESS, ENCODER))
        raise UserError(f"{where}: the architecture {config['architectures'][0]} is not supported (only {known})")
    activation, gated = _feed_forward(fields)
    width, heads = fields.need("d_model"), fields.need("num_heads")
    block = BlockConfig(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=fields.need("d_kv"),
        mlp_width=fields.need("d_ff"),
        activation=activation,
        norm="rms",
        norm_eps=fields.get("layer_norm_epsilon", 1e-6),
        gated_mlp=gated,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        scale=1.0,
        wide_residual=True,
    )
    layers = fields.need("num_layers")
    half = DecoderConfig(
        vocab_size=fields.need("vocab_size"),
        layers=layers,
        block=block,
        max_positions=fields.get("n_positions", 512),
        relative_bias=RelativeBias(
            buckets=fields.get("relative_attention_num_buckets", 32),
            max_distance=fields.get("relative_attention_max_distance", 128),
        ),
        causal=False,
        has_head=False,
    )
    if kind == ENCODER:
        return ModelConfig(llm=half)
    predicts = kind == WHOLE
    whole = dataclasses.replace(
        half,
        layers=fields.get("num_decoder_layers", layers),
        block=dataclasses.replace(block, memory_width=width),
        causal=True,
        has_head=predicts,
        tied_head=predicts and bool(fields.get("tie_word_embeddings", True)),
        logit_scale=width**-0.5 if predicts and _scaled(config) else 1.0,
        encoder=half,
        start_token=fields.get("decoder_start_token_id", fields.get("pad_token_id", 0)),
    )
    return ModelConfig(llm=whole)


def _feed_forward(fields: Fields) -> tuple[Any, bool]:
    """The activation of the MLP, and whether it is gated. What "gated-gelu" means is an approximation of it."""
    project = fields.get("feed_forward_proj", "gated-gelu" if _type(fields.values) == "mt5" else "relu")
    kind, _, name = project.rpartition("-")
    if kind not in ("", "gated"):
        raise UserError(f"{fields.where}: feed_forward_proj = {project!r} is not supported (only NAME or gated-NAME)")
    named = Fields({"dense_act_fn": "gelu_new" if project == "gated-gelu" else name, **fields.values}, fields.where)
    return named.activation("dense_act_fn", "relu"), bool(fields.get("is_gated_act", kind == "gated"))


def _type(config: Config) -> str:
    return config.get("hf_model_type") or config["model_type"]


def _scaled(config: Config) -> bool:
    """Whether the head reads states / sqrt(width): only the first T5, which says so by tied embeddings."""
    natural = config.get("tie_word_embeddings") is not False
    return _type(config) == "t5" and bool(config.get("scale_decoder_outputs", natural))


def _complete(config: Config, stored: Mapping[str, Stored]) -> Config:
    """Configs say that the head is tied, or that it is not, whichever it is."""
    head, shared = stored.get("lm_head.weight"), stored.get("shared.weight")
    tied = head is None or shared is None or same_tensor(head, shared)
    return {**config, "tie_word_embeddings": tied, "scale_decoder_outputs": _scaled(config)}


def _write(config: ModelConfig, base: Config) -> Config:
    assert config.llm is not None
    ours, block, bias = config.llm, config.llm.block, config.llm.relative_bias
    fits = block.norm == "rms" and block.scale == 1.0 and not block.qkv_bias and block.rope is None and bias is not None
    llama.require(fits and (ours.encoder is not None) == ours.causal, "T5", "its norms, biases or positions are others")
    assert bias is not None
    kind = ENCODER if ours.encoder is None else WHOLE if ours.has_head else HEADLESS
    name = activation_name(block.activation, base.get("dense_act_fn"))
    name = "gelu_new" if name == "gelu_pytorch_tanh" else name
    project = ("gated-" * block.gated_mlp + name).replace("gated-gelu_new", "gated-gelu")
    return {
        **base,
        "architectures": base.get("architectures") or [f"T5{kind}"],
        "model_type": base.get("model_type", "t5"),
        "vocab_size": ours.vocab_size,
        "d_model": block.width,
        "d_kv": block.head_dim,
        "d_ff": block.mlp_width,
        "num_heads": block.heads,
        "num_layers": (ours.encoder or ours).layers,
        "num_decoder_layers": ours.layers if ours.encoder else base.get("num_decoder_layers"),
        "feed_forward_proj": project,
        "dense_act_fn": name,
        "is_gated_act": block.gated_mlp,
        "layer_norm_epsilon": block.norm_eps,
        "relative_attention_num_buckets": bias.buckets,
        "relative_attention_max_distance": bias.max_distance,
        "tie_word_embeddings": ours.tied_head if ours.has_head else base.get("tie_word_embeddings", True),
        "scale_decoder_outputs": ours.logit_scale != 1.0 if ours.has_head else _scaled({**base, "model_type": base.get("model_type", "t5")}),
        "decoder_start_token_id": ours.start_token if ours.encoder else base.get("decoder_start_token_id"),
        "is_encoder_decoder": ours.encoder is not None,
    }


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    assert config.llm is not None
    table = [rule("shared.weight", "llm/embed/embedding")]
    if config.llm.encoder is None:
        return table + _half("encoder", "llm", config.llm)
    table += _half("encoder", "llm/encoder", config.llm.encoder) + _half("decoder", "llm", config.llm)
    untied = config.llm.has_head and not config.llm.tied_head
    return table + linear("lm_head", "llm/head", bias=False) if untied else table


def _half(theirs: str, ours: str, config: DecoderConfig) -> list[Rule]:
    """The key table of an encoder or a decoder; its sublayers are numbered."""
    last = 2 if config.block.memory_width else 1
    sublayers = {"SelfAttention": "attention", "EncDecAttention": "cross_attention", "DenseReluDense": "mlp"}
    numbers = {"SelfAttention": 0, "EncDecAttention": 1, "DenseReluDense": last}
    table = [
        rule(f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{ours}/relative_bias"),
        *norm(f"{theirs}.final_layer_norm", f"{ours}/final_norm", bias=False),
    ]
    for name, sublayer in sublayers.items():
        if sublayer == "cross_attention" and not config.block.memory_width:
            continue
        layer = f"{theirs}.block.{{i}}.layer.{numbers[name]}."
        table += norm(layer + "layer_norm", f"{ours}/layers/{sublayer}_norm", bias=False)
        linears = {"q": "query", "k": "key", "v": "value", "o": "output"}
        if sublayer == "mlp":
            linears = {"wi_0": "gate", "wi_1": "up"} if config.block.gated_mlp else {"wi": "up"}
            linears["wo"] = "down"
        for short, path in linears.items():
            table += linear(f"{layer}{name}.{short}", f"{ours}/layers/{sublayer}/{path}", bias=False)
    return table


def _copies(config: ModelConfig) -> dict[str, str]:
    assert config.llm is not None
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    return dict.fromkeys(names + ["lm_head.weight"] * config.llm.tied_head, "shared.weight")


def _outputs(params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool) -> dict:
    if config.language.encoder is None:
        if unread := sorted(set(inputs) - {"input_ids", "attention_mask"}):
            raise UserError(f"a T5EncoderModel does not take {', '.join(unread)}")
        return _run_encoder(params, language.text_batch(config, inputs), config=config, run=run, states=states)
    labels = inputs.get("labels")
    if labels is not None and not config.language.has_head:
        raise UserError("labels are for a T5ForConditionalGeneration")
    if labels is None and "decoder_input_ids" not in inputs:
        raise UserError("decoder_input_ids (or labels, from which they are made) are missing")
    return _run(params, teaching(config, foreign, inputs), config=config, run=run, states=states)


def teaching(config: ModelConfig, foreign: Config, inputs: Inputs, placeholder: int | None = None) -> Batch:
    """The batch of foreign inputs with `labels` or `decoder_input_ids`, which, where they are not given, are made of the labels."""
    labels = inputs.get("labels")
    if labels is not None and "decoder_input_ids" not in inputs:
        shifted = np.concatenate([np.full_like(labels[:, :1], config.language.start_token), labels[:, :-1]], 1)
        pad = foreign.get("pad_token_id") or 0
        inputs = {**inputs, "decoder_input_ids": np.where(shifted == language.IGNORED, pad, shifted)}
    batch = dataclasses.replace(_batch(config, inputs, placeholder), **language.targets(labels, shifted=False))
    if labels is not None and labels.shape != batch.decoder_tokens.shape:
        raise UserError(f"labels are {list(labels.shape)}, decoder_input_ids {list(batch.decoder_tokens.shape)}")
    return batch


def _batch(config: ModelConfig, inputs: Inputs, placeholder: int | None = None) -> Batch:
    """What the encoder reads, and what the decoder has read of its own, if that is given."""
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "task_ids") if name in inputs}
    batch = language.text_batch(config, given, placeholder)
    prefix = {name: inputs[f"decoder_{name}"] for name in ("input_ids", "attention_mask") if f"decoder_{name}" in inputs}
    if "input_ids" not in prefix:
        return batch
    if len(prefix["input_ids"]) != len(batch.tokens):
        raise UserError(f"input_ids have {len(batch.tokens)} rows, decoder_input_ids {len(prefix['input_ids'])}")
    begun = language.text_batch(config, prefix)
    return dataclasses.replace(batch, decoder_tokens=begun.tokens, decoder_segments=begun.segments)


def prompt(config: ModelConfig, foreign: Config, inputs: Inputs, placeholder: int | None = None) -> Batch:
    """As in transformers, a beginning of the answer that has no start token is given one."""
    if config.language.encoder is None or not config.language.has_head:
        raise UserError("this T5 generates nothing: it is no T5ForConditionalGeneration")
    rows = len(inputs.get("input_ids", ()))
    named = foreign.get("decoder_start_token_id")
    start = np.full((rows, 1), config.language.start_token if named is None else named)
    given = inputs.get("decoder_input_ids")
    if given is None:
        inputs = {**inputs, "decoder_input_ids": start}
    elif (given[:, :1] != start).all():
        inputs = {**inputs, "decoder_input_ids": np.concatenate([start, given], 1)}
        if (mask := inputs.get("decoder_attention_mask")) is not None:
            inputs = {**inputs, "decoder_attention_mask": np.concatenate([np.ones_like(mask[:, :1]), mask], 1)}
    return _batch(config, inputs, placeholder)


@functools.partial(jax.jit, static_argnames=("config", "run", "states"))
def _run(
    params: Params, batch: Batch, *, config: ModelConfig, run: Execution, states: bool
) -> dict[str, jax.Array]:
    ours = config.language
    given = multimodal.read(params, config, prompts.prepended(config, batch), run, return_states=states)
    decoded = multimodal.decode_reading(params, config, given, run, return_states=states)
    assert given.encoded is not None
    found = {"last_hidden_state": decoded.last, "encoder_last_hidden_state": given.encoded.last}
    if ours.has_head:
        found["logits"] = multimodal.head(params, config, decoded.last)
        found.update(language.loss(found["logits"], batch))
    if states:
        found.update(_states("encoder_hidden_states", given.encoded), **_states("decoder_hidden_states", decoded))
    return found


@functools.partial(jax.jit, static_argnames=("config", "run", "states"))
def _run_encoder(
    params: Params, batch: Batch, *, config: ModelConfig, run: Execution, states: bool
) -> dict[str, jax.Array]:
    decoded = multimodal.decode_reading(params, config, multimodal.read(params, config, batch, run), run, return_states=states)
    return {"last_hidden_state": decoded.last, **(_states("hidden_states", decoded) if states else {})}


def _states(name: str, decoded: decoder.Decoded) -> dict[str, jax.Array]:
    assert decoded.states is not None
    return {f"{name}_{i}": state for i, state in enumerate([*decoded.states, decoded.last])}


FAMILY = Family(
    model_types=("t5", "mt5"),
    about="T5, FlanT5, mT5 (arXiv 1910.10683)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels"),
    outputs=_outputs,
    prompt=prompt,
    complete=_complete,
    copies=_copies,
    # Old files have a second table of positions, which never was used.
    unused=(r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",),
)
