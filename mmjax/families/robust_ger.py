"""RobustGER (arXiv 2401.10446) in its authors' layout, that of lit-gpt: `model_type` robust_ger.

Inputs: `idx` [rows, length], all real, and `emb_diff` [rows, prompts, n_state], the language-space noise embedding of each row. Outputs:
`logits`, and `emb_diff_mid_k`, for each layer with prompts the key's and then the value's embedding [rows, prompts, n_embd], which
the audio noise distillation reads.

config.json has the fields of lit-gpt's Config and those of the authors'. Its decoders are gated with RMS norms (LLaMA) or plain with layer
norms (Falcon, Pythia). A published file of an adapter alone stands beside a config.json whose `base_path` is the language model. The
denoising network's own layout (MINE) is `mine_rules`.
"""

from __future__ import annotations

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.errors import UserError
from mmjax.families import interleaved, language
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Form, Rule, linear, norm, numbered, rule, transposed
from mmjax.families.llama import require
from mmjax.models import noise_prompt
from mmjax.models.adaption_prompt import sits_on
from mmjax.models.block_config import BlockConfig, Rope
from mmjax.models.config import DecoderConfig, Execution, ModelConfig
from mmjax.models.tuning_config import NoisePromptConfig
from mmjax.tree import Params

PROMPTS = "prompts"  # the name of the adapter of a model that is read


def _read(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("_norm_class", "RMSNorm", "LayerNorm")
    fields.only("_mlp_class", "LLaMAMLP", "GptNeoxMLP")
    heads, width = fields.need("n_head"), fields.need("n_embd")
    head_dim = fields.get("head_size", width // heads)
    groups, rotated = fields.get("n_query_groups", heads), fields.get("rotary_percentage", 0.25)
    if heads * head_dim != width or heads % groups:
        raise UserError(f"{where}: n_embd = {width} with {heads} heads of {head_dim} in {groups} groups is not supported")
    gated, bias = fields.get("_mlp_class", "GptNeoxMLP") == "LLaMAMLP", bool(fields.get("bias", True))
    shared, layers = bool(fields.get("shared_attention_norm", False)), fields.need("n_layer")
    parallel = bool(fields.get("parallel_residual", True))
    if shared and not parallel:
        raise UserError(f"{where}: shared_attention_norm without parallel_residual is not supported")
    start = fields.get("adapter_start_layer", 2)
    if not 0 <= start < layers:
        raise UserError(f"{where}: adapter_start_layer = {start}, and there are {layers} layers")
    llm = DecoderConfig(
        vocab_size=fields.get("padded_vocab_size") or fields.need("vocab_size"),
        layers=layers,
        block=BlockConfig(
            width=width,
            heads=heads,
            kv_heads=groups,
            head_dim=head_dim,
            mlp_width=fields.get("intermediate_size", 4 * width),
            activation="silu" if gated else "gelu",
            norm="rms" if fields.get("_norm_class", "LayerNorm") == "RMSNorm" else "layer",
            norm_eps=fields.get("norm_eps", 1e-5),
            gated_mlp=gated,
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=bias,
            rope=Rope(theta=float(fields.get("rope_base", 10000)), fraction=float(rotated)) if rotated else None,
            parallel_norms=(1 if shared else 2) if parallel else 0,
        ),
        max_positions=fields.get("block_size", 4096),
    )
    length, width = fields.get("adapter_prompt_length", 20), fields.get("n_state", 384)
    return ModelConfig(llm=llm, adapters=(NoisePromptConfig(PROMPTS, length, layers - start, width),))


def expressible(config: ModelConfig) -> str:
    """Why this layout cannot hold a model; "" if it can."""
    if config.llm is None or [type(a) for a in config.adapters] != [NoisePromptConfig]:
        return "it is a language model with a noise embedding's prompts, and no other adapters"
    block = config.llm.block
    fused = block.qkv_bias == block.output_bias == block.mlp_bias
    gated = block.gated_mlp == (block.activation == "silu") and block.gated_mlp == (block.norm == "rms")
    if not fused or not gated or block.experts or block.memory_width or block.qk_norm or any(config.llm.windows) or config.llm.tied_head:
        return "its blocks are LLaMA's, or Falcon's and Pythia's"
    return "" if block.rope and block.rope.kind == "default" and block.heads * block.head_dim == block.width else "its positions are others"


def _write(config: ModelConfig, base: Config) -> Config:
    why = expressible(config)
    require(not why, "RobustGER", why)
    llm, block, prompts = config.language, config.language.block, prompts_of(config)
    assert block.rope is not None
    known = base.get("vocab_size")
    return {
        **{key: value for key, value in base.items() if key != "base_path"},
        "model_type": "robust_ger",
        "vocab_size": known if known and known <= llm.vocab_size else llm.vocab_size,
        "padded_vocab_size": llm.vocab_size,
        "block_size": llm.max_positions,
        "n_layer": llm.layers,
        "n_head": block.heads,
        "n_embd": block.width,
        "n_query_groups": block.kv_heads,
        "rotary_percentage": block.rope.fraction,
        **({"rope_base": block.rope.theta} if block.rope.theta != 10000 or "rope_base" in base else {}),
        "parallel_residual": bool(block.parallel_norms),
        "shared_attention_norm": block.parallel_norms == 1,
        "bias": block.qkv_bias,
        "_norm_class": "RMSNorm" if block.norm == "rms" else "LayerNorm",
        "norm_eps": block.norm_eps,
        "_mlp_class": "LLaMAMLP" if block.gated_mlp else "GptNeoxMLP",
        "intermediate_size": block.mlp_width,
        "adapter_prompt_length": prompts.length,
        "adapter_start_layer": llm.layers - len(sits_on(False, prompts.depth, llm.layers)),
        "n_state": prompts.channels,
    }


def prompts_of(config: ModelConfig) -> NoisePromptConfig:
    return next(a for a in config.adapters if isinstance(a, NoisePromptConfig))


def _rules(config: ModelConfig, foreign: Config) -> list[Rule]:
    llm, block = config.language, config.language.block
    layer, ours, bias, centred = "transformer.h.{i}.", "llm/layers/", block.qkv_bias, block.norm == "layer"
    fused = [f"{ours}attention/{name}" for name in ("query", "key", "value")]
    table = [
        rule("transformer.wte.weight", "llm/embed/embedding"),
        rule("lm_head.weight", "llm/head/kernel", form=transposed),
        *norm("transformer.ln_f", "llm/final_norm", centred),
        *norm(layer + "norm_1", ours + "attention_norm", centred),
        *linear(layer + "attn.proj", ours + "attention/output", bias),
        rule(layer + "attn.attn.weight", *(f"{path}/kernel" for path in fused), form=transposed, groups=block.kv_heads),
    ]
    if bias:
        table.append(rule(layer + "attn.attn.bias", *(f"{path}/bias" for path in fused), groups=block.kv_heads))
    if block.parallel_norms != 1:
        table += norm(layer + "norm_2", ours + "mlp_norm", centred)
    names = {"fc_1": "gate", "fc_2": "up", "proj": "down"} if block.gated_mlp else {"fc": "up", "proj": "down"}
    for theirs, name in names.items():
        table += linear(f"{layer}mlp.{theirs}", f"{ours}mlp/{name}", block.mlp_bias)
    prompts = prompts_of(config)
    return table + numbered(sits_on(False, prompts.depth, llm.layers), _prompt_rules(prompts))


def _prompt_rules(prompts: NoisePromptConfig) -> list[Rule]:
    start, path = "transformer.h.{i}.attn.", f"llm/plugs/{prompts.name}/"
    table = [
        rule(start + "adapter_wte.weight", path + "prompts"),
        rule(start + "gating_factor", path + "gate", form=_gates),
    ]
    for name in noise_prompt.NAMES:
        table += [
            *linear(f"{start}ef_{name}", path + name, bias=name == "value"),
            *norm(f"{start}projection_rms_{name}", f"{path}{name}_norm", bias=False),
            rule(f"{start}{name}_gating_factor", f"{path}{name}_gate", form=_channel_gates),
        ]
    return table


_gates = Form(lambda s: (1, 1, s[0], 1), lambda a: a.reshape(-1), lambda a: a.reshape(1, 1, -1, 1))
_channel_gates = Form(lambda s: (1, s[1], s[0], s[2]), lambda a: a[0].swapaxes(0, 1), lambda a: a.swapaxes(0, 1)[None])
"""[1, heads, prompts, head_dim]; ours [prompts, heads, head_dim]."""


def mine_rules(prefix: str = "", path: str = "") -> list[Rule]:
    """The key table of the MINE network (mmjax.models.mine)."""
    names = ("prefix", "proj1", "proj2", "proj3", "proj4")
    return [r for name in names for r in linear(prefix + name, path + name, bias=False)]


def _batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    if "idx" not in inputs:
        raise UserError("idx are missing")
    rows = language.text_batch(config, {"input_ids": inputs["idx"]})
    if "emb_diff" not in inputs:
        return rows
    count, prompts, found = len(inputs["idx"]), prompts_of(config), inputs["emb_diff"]
    if found.shape != (count, prompts.length, prompts.channels):
        raise UserError(f"emb_diff are [rows, prompts, n_state] = {[count, prompts.length, prompts.channels]}, not {list(found.shape)}")
    return interleaved.with_one_each(rows, features=np.asarray(found, np.float32))


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    found = language.run_language(params, _batch(config, foreign, inputs), config=config, run=run, states=states)
    if "emb_diff" not in inputs:
        return found
    leaves = params["llm"]["plugs"][prompts_of(config).name]
    noise = jax.numpy.asarray(inputs["emb_diff"], run.dtype)
    mids = noise_prompt.intermediate(leaves, prompts_of(config), noise)
    return {**found, **{f"emb_diff_mid_{k}": mid for k, mid in enumerate(mids)}}


FAMILY = Family(
    model_types=("robust_ger",),
    about="RobustGER, error correction of noisy speech's N-best lists (arXiv 2401.10446)",
    read_config=_read,
    write_config=_write,
    rules=_rules,
    inputs=("idx", "emb_diff"),
    outputs=_outputs,
    prompt=_batch,
    external=lambda config: {"llm": config["base_path"]} if config.get("base_path") else {},
    partial=("llm",),
    keeps_adapters=(NoisePromptConfig,),
)
