"""LLaMA-Adapter V1 (arXiv 2303.16199) and V2 (arXiv 2304.15010) in their authors' layout, around LLaMA in its own: `model_type`
llama_adapter_v1 and llama_adapter_v2.

Inputs: `tokens` [rows, length], all of them real, and `labels`, 0 where nothing is to be predicted; V2's multimodal model takes `imgs`
[rows, 3, height, width], normalised, one for each row. Outputs: `logits`, with labels `loss` [1]; of pictures also `clip_feats` [rows,
positions, width], what the projector reads, and `visual_query` [rows, prompts, LLM width].

config.json has the fields of params.json and of the authors' classes. `gate_fn` says what becomes of the learned gates: V1's released
weights are meant for "identity" (the default of V1), while its training code and all of V2 have "tanh". A published file of an adapter
alone stands beside a config.json that says where the rest is: `llama_path` (a LLaMA, e.g. in transformers' layout) and `clip_path`.
Gates of layers without prompts, which the authors' files have as well, mean nothing: they are passed over, and not written.

The authors read pictures with red and blue exchanged (cv2), in training and in their demonstrations: for their released weights exchange
the channels of a picture before it is normalised.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.checkpoints.safetensors import Stored
from mmjax.errors import UserError
from mmjax.families import clip_vision, interleaved, language, open_flamingo, original_llama
from mmjax.families.family import Config, Family, Inputs
from mmjax.families.fields import Fields
from mmjax.families.keys import Form, Rule, linear, norm, numbered, prefixed, rule, transposed
from mmjax.families.original_llama import LINEARS, turned, vector
from mmjax.models.adaption_prompt import sits_on
from mmjax.models.block_config import BlockConfig
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.encoder_config import ConnectorConfig, FeatureSpec, ViTConfig
from mmjax.models.tuning_config import Adapter, AdaptionPromptConfig, AffineConfig, Ia3Config, LoraConfig
from mmjax.tree import Params

PROMPTS, AFFINE, LORA = "prompts", "affine", "lora"  # names of the adapters of a model that is read
ALL = ("llm/layers/**",)
BIASED = ("llm/layers/attention/{query,output}", "llm/layers/mlp/*")  # the Linears with a bias in V2's multimodal model
FEATURES = FeatureSpec(layers=(-1,), keep_class_token=True, post_norm=True, projected=True)


def _read_v1(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    return ModelConfig(llm=original_llama.read_decoder(fields), adapters=_prompts(fields, "adapter_len", "adapter_layer", "identity"))


def _read_v2(config: Config, where: str) -> ModelConfig:
    fields = Fields(config, where)
    fields.only("variant", "chat65b", "multimodal7b")
    llm = original_llama.read_decoder(fields)
    if fields.need("variant") == "chat65b":
        prompts = _prompts(fields, "adapter_len", "adapter_layer", "tanh")
        return ModelConfig(llm=llm, adapters=(*_scaled(fields), *prompts))
    clip = fields.part("clip", "clip")
    tower = openai_clip(Fields(clip, f"{where}: clip"), fields.get("clip_vision_head_dim", 64))
    width, heads = fields.get("v_embed_dim", 768), fields.get("v_num_heads", 16)
    connector = ConnectorConfig(
        "visual_blocks",
        in_width=tower.projection,
        out_width=llm.block.width,
        positions=FEATURES.positions(tower),
        depth=fields.get("v_depth", 8),
        hidden_width=width,
        latents=fields.get("query_len", 10),
        heads=heads,
        mlp_width=int(width * fields.get("v_mlp_ratio", 4.0)),
        norm_eps=fields.get("visual_block_layer_norm_eps", 1e-5),
    )
    beside: tuple[Adapter, ...] = ()
    if _biased(fields):
        beside += (AffineConfig(AFFINE, BIASED, "bias"),)
    if fields.get("w_lora", False):
        rank = fields.get("lora_rank", 16)
        beside += (LoraConfig(LORA, rank, float(rank), ALL),)  # no alpha
    prompts = _prompts(fields, "query_len", "query_layer", "tanh", 10, 31)
    prompts = tuple(
        dataclasses.replace(p, media="added", gate_scale=bool(fields.get("w_new_gate", False)), adapted=False) for p in prompts
    )
    return ModelConfig(
        llm=llm,
        vision=tower,
        connector=connector,
        features=FEATURES,
        adapters=(*beside, *prompts),
        image_mean=clip_vision.MEAN,
        image_std=clip_vision.STD,
        image_aspect="crop",
    )


def _prompts(fields: Fields, length: str, layers: str, gate_fn: str, usual: int = 0, usual_layers: int = 0) -> tuple[AdaptionPromptConfig, ...]:
    fields.only("gate_fn", "identity", "tanh")
    count, deep = fields.get(length, usual), fields.get(layers, usual_layers)
    if deep > fields.need("n_layers"):
        raise UserError(f"{fields.where}: {layers} = {deep}, and there are {fields.need('n_layers')} layers")
    return (AdaptionPromptConfig(PROMPTS, count, deep, gate_fn=fields.get("gate_fn", gate_fn)),) if count * deep else ()


def _scaled(fields: Fields) -> tuple[Adapter, ...]:
    """V2's chat model: every Linear is W (x * scale) + bias, or has only one of the two."""
    if not fields.get("add_scale", False):
        return (AffineConfig(AFFINE, ALL, "bias"),) if fields.get("add_bias", False) else ()
    return (AffineConfig(AFFINE, ALL, "input"),) if fields.get("add_bias", False) else (Ia3Config(AFFINE, ALL, ALL),)


def _biased(fields: Fields) -> bool:
    """V2's multimodal model has its biases from the second stage on."""
    return bool(fields.get("w_bias", fields.get("phase", "finetune") == "finetune"))


def openai_clip(fields: Fields, head_dim: int) -> ViTConfig:
    """OpenAI's CLIP, by the arguments of its class."""
    width = fields.need("vision_width")
    heads = width // head_dim
    return ViTConfig(
        image_size=fields.need("image_resolution"),
        patch_size=fields.need("vision_patch_size"),
        layers=fields.need("vision_layers"),
        block=BlockConfig(width, heads, heads, width // heads, 4 * width, "quick_gelu", "layer", 1e-5, False, True, True, True),
        class_token=True,
        patch_bias=False,
        pre_norm=True,
        post_norm="pooled",
        pooling="class_token",
        projection=fields.need("embed_dim"),
    )


def prompts_of(config: ModelConfig) -> AdaptionPromptConfig | None:
    return next((a for a in config.adapters if isinstance(a, AdaptionPromptConfig)), None)


def expressible(config: ModelConfig) -> str:
    """Why neither layout can hold a model; "" if one can."""
    kinds = [type(a) for a in config.adapters]
    prompts, known = prompts_of(config), (AdaptionPromptConfig, AffineConfig, Ia3Config, LoraConfig)
    if config.llm is None or not kinds or kinds.count(AdaptionPromptConfig) > 1:
        return "it is a LLaMA with adaption prompts of one kind, with scales and biases, or with both"
    if other := [a.name for a in config.adapters if not isinstance(a, known) or kinds.count(type(a)) > 1]:
        return f"it has no place for the adapters {', '.join(other)}"
    if prompts is None:
        return "" if config.connector is None else "there are no prompts to which pictures could be added"
    if prompts.gate != "head" or prompts.bottom or prompts.media == "alone":
        return "its prompts are those of the topmost layers, with a gate for each head, and pictures are added to them"
    if config.connector is None:
        return "" if not prompts.media and not prompts.gate_scale else "without a projector there is nothing to add to the prompts"
    tower = config.vision
    if not prompts.media or config.connector.kind != "visual_blocks" or config.features != FEATURES:
        return "its pictures are read by visual blocks over all of CLIP's projected states"
    if not isinstance(tower, ViTConfig) or not tower.projection or tower.block.activation != "quick_gelu" or not tower.pre_norm:
        return "its encoder is OpenAI's CLIP"
    if config.connector.latents != prompts.length:
        return f"there are as many visual queries ({config.connector.latents}) as prompts of a layer ({prompts.length})"
    return ""


def not_v1(config: ModelConfig) -> str:
    """Why V1's layout cannot hold a model; "" if it can."""
    if [type(a) for a in config.adapters] != [AdaptionPromptConfig] or config.connector is not None:
        return "it has prompts alone, without adapters beside them and without pictures"
    return expressible(config)


def _write_v1(config: ModelConfig, base: Config) -> Config:
    if why := not_v1(config):
        raise UserError(f"the model does not fit LLaMA-Adapter V1's layout: {why}")
    return {**_written(config, base, "llama_adapter_v1"), **_sizes(config, "adapter_len", "adapter_layer")}


def _write_v2(config: ModelConfig, base: Config) -> Config:
    _check(config)
    written, prompts = _written(config, base, "llama_adapter_v2"), prompts_of(config)
    affine = next((a for a in config.adapters if isinstance(a, AffineConfig | Ia3Config)), None)
    lora = next((a for a in config.adapters if isinstance(a, LoraConfig)), None)
    if config.connector is None:
        if lora is not None or (isinstance(affine, AffineConfig) and (affine.targets != ALL or affine.order == "output")):
            raise UserError("the model does not fit LLaMA-Adapter V2's chat layout: it scales what Linears read, and has no LoRA")
        return {
            **written,
            "variant": "chat65b",
            **_sizes(config, "adapter_len", "adapter_layer"),
            "add_bias": isinstance(affine, AffineConfig),
            "add_scale": affine is not None and not (isinstance(affine, AffineConfig) and affine.order == "bias"),
        }
    if affine is not None and (not isinstance(affine, AffineConfig) or affine.order != "bias" or affine.targets != BIASED):
        raise UserError("the model does not fit LLaMA-Adapter V2's multimodal layout: it has biases on all but keys and values, no scales")
    if lora is not None and (lora.scale != 1.0 or lora.targets != ALL):
        raise UserError("the model does not fit LLaMA-Adapter V2's multimodal layout: its LoRA is on every Linear, with alpha = rank")
    c, tower = config.connector, config.vision
    assert isinstance(tower, ViTConfig) and prompts is not None
    return {
        **written,
        "variant": "multimodal7b",
        **_sizes(config, "query_len", "query_layer"),
        "v_embed_dim": c.inner_width,
        "v_depth": c.depth,
        "v_num_heads": c.heads,
        "v_mlp_ratio": (c.mlp_width or c.widening * c.inner_width) / c.inner_width,
        "visual_block_layer_norm_eps": c.norm_eps,
        "clip_vision_head_dim": tower.block.head_dim,
        "w_bias": affine is not None,
        "phase": "finetune" if affine is not None else "pretrain",
        "w_lora": lora is not None,
        **({"lora_rank": lora.rank} if lora is not None else {}),
        "w_new_gate": prompts.gate_scale,
        "clip": {
            **(base.get("clip") or {}),
            "embed_dim": tower.projection,
            "image_resolution": tower.native_size or tower.image_size,
            "vision_layers": tower.layers,
            "vision_width": tower.block.width,
            "vision_patch_size": tower.patch_size,
        },
    }


def _check(config: ModelConfig) -> None:
    if why := expressible(config):
        raise UserError(f"the model does not fit LLaMA-Adapter's layouts: {why}")


def _written(config: ModelConfig, base: Config, model_type: str) -> Config:
    prompts = prompts_of(config)
    kept = {key: value for key, value in base.items() if not key.endswith("_path")}
    gates = {"gate_fn": prompts.gate_fn} if prompts is not None else {}
    return {**original_llama.write_decoder(config.language, kept), "model_type": model_type, **gates}


def _sizes(config: ModelConfig, length: str, layers: str) -> Config:
    """How many prompts there are, in how many layers."""
    prompts = prompts_of(config)
    if prompts is None:
        return {length: 0, layers: 0}
    return {length: prompts.length, layers: len(sits_on(False, prompts.depth, config.language.layers))}


def _rules_v1(config: ModelConfig, foreign: Config) -> list[Rule]:
    return [*original_llama.rules(config.language), *_prompt_rules(config, "")]


def _rules_v2(config: ModelConfig, foreign: Config) -> list[Rule]:
    table = original_llama.rules(config.language)
    for adapter in config.adapters:
        if isinstance(adapter, AffineConfig | Ia3Config):
            table += _affine_rules(config, adapter, "." if config.connector is not None else "_")
        elif isinstance(adapter, LoraConfig):
            table += _lora_rules(config, adapter)
    if config.connector is None:
        return [*table, *_prompt_rules(config, "")]
    assert isinstance(config.vision, ViTConfig)
    tower = prefixed("clip.visual.", open_flamingo.tower_rules(config.vision))
    return [*prefixed("llama.", table), *_prompt_rules(config, "llama."), *_projector_rules(), *tower]


def _prompt_rules(config: ModelConfig, prefix: str) -> list[Rule]:
    prompts = prompts_of(config)
    if prompts is None:
        return []
    path, length = f"llm/plugs/{prompts.name}/", prompts.length
    flat = Form(lambda s: (s[0] * s[1], s[2]), lambda a: a.reshape(-1, length, a.shape[-1]), lambda a: a.reshape(-1, a.shape[-1]))
    gates = [rule(f"{prefix}layers.{{i}}.attention.gate", path + "gate", form=_gates)]
    if prompts.gate_scale:
        gates.append(rule(f"{prefix}layers.{{i}}.attention.new_gate", path + "gate_scale", form=_gates))
    layers = sits_on(False, prompts.depth, config.language.layers)
    return [rule("adapter_query.weight", path + "prompts", form=flat), *numbered(layers, gates)]


_gates = Form(lambda s: (1, s[0], 1, 1), lambda a: a.reshape(-1), lambda a: a.reshape(1, -1, 1, 1))


def _affine_rules(config: ModelConfig, adapter: AffineConfig | Ia3Config, between: str) -> list[Rule]:
    """Biases and scales: `wq.bias` in the multimodal model, `wq_bias` and `wq_scale` in the chat model."""
    table, head_dim = [], config.language.block.head_dim
    for theirs, (name, turns) in LINEARS.items():
        if adapter.targets == BIASED and name in ("attention/key", "attention/value"):
            continue
        start, path = f"layers.{{i}}.{theirs}{between}", f"llm/layers/{name}/adapters/{adapter.name}/"
        if isinstance(adapter, AffineConfig):
            table.append(rule(start + "bias", path + "affine_bias", form=vector(head_dim, turns)))
        if isinstance(adapter, Ia3Config) or adapter.order == "input":
            table.append(rule(start + "scale", path + ("ia3_input" if isinstance(adapter, Ia3Config) else "affine_scale")))
    return table


def _lora_rules(config: ModelConfig, adapter: LoraConfig) -> list[Rule]:
    table, head_dim = [], config.language.block.head_dim
    for theirs, (name, turns) in LINEARS.items():
        group, linear_name = theirs.split(".")
        start, path = f"layers.{{i}}.{group}.lora_{linear_name}_", f"llm/layers/{name}/adapters/{adapter.name}/"
        table.append(rule(start + "l1.weight", path + "lora_a", form=transposed))
        table.append(rule(start + "l2.weight", path + "lora_b", form=turned(transposed, head_dim, turns)))
    return table


def _projector_rules() -> list[Rule]:
    theirs, ours = "visual_blocks.{i}.", "connector/layers/"
    fused = [f"{ours}attention/{name}" for name in ("query", "key", "value")]
    return [
        *linear("clip_proj", "connector/project_in"),
        *norm("clip_proj_norm", "connector/input_norm"),
        rule("visual_query.weight", "connector/queries"),
        *norm(theirs + "norm1", ours + "attention_norm"),
        rule(theirs + "attn.qkv.weight", *(f"{path}/kernel" for path in fused), form=transposed),
        rule(theirs + "attn.qkv.bias", *(f"{path}/bias" for path in fused)),
        *linear(theirs + "attn.proj", ours + "attention/output"),
        *norm(theirs + "norm2", ours + "mlp_norm"),
        *linear(theirs + "mlp.fc1", ours + "mlp/up"),
        *linear(theirs + "mlp.fc2", ours + "mlp/down"),
        *linear("visual_proj", "connector/project_out"),
        *norm("visual_proj_norm", "connector/output_norm"),
    ]


def _batch(config: ModelConfig, foreign: Config, inputs: Inputs) -> Batch:
    if "tokens" not in inputs:
        raise UserError("tokens are missing")
    given = {"input_ids": inputs["tokens"]}
    if "labels" in inputs:
        given["labels"] = np.where(inputs["labels"] == 0, language.IGNORED, inputs["labels"])
    rows = language.text_batch(config, given)
    pixels = interleaved.grid(inputs, "imgs", "rows, channels, height, width")
    if pixels is None:
        return rows
    count = len(inputs["tokens"])
    if len(pixels) != count:
        raise UserError(f"there are {len(pixels)} imgs for {count} rows of tokens; each row has one")
    return interleaved.with_one_each(rows, images=pixels)


def _outputs(
    params: Params, config: ModelConfig, foreign: Config, inputs: Inputs, run: Execution, states: bool
) -> dict[str, jax.Array]:
    found = language.run_language(params, _batch(config, foreign, inputs), config=config, run=run, states=states)
    if "loss" in found:
        found["loss"] = found["loss"].reshape(1)
    for ours, theirs in (("image_features", "clip_feats"), ("connector_output", "visual_query")):
        if ours in found:
            found[theirs] = found.pop(ours)
    return found


def _complete(config: Config, stored: Mapping[str, Stored]) -> Config:
    return original_llama.with_vocabulary(original_llama.with_vocabulary(config, stored), stored, "llama.")


def _external(config: Config) -> dict[str, str]:
    named: dict[str, Any] = {"llm": config.get("llama_path"), "vision": config.get("clip_path")}
    return {part: name for part, name in named.items() if name}


V1 = Family(
    model_types=("llama_adapter_v1",),
    about="LLaMA-Adapter V1 (arXiv 2303.16199)",
    read_config=_read_v1,
    write_config=_write_v1,
    rules=_rules_v1,
    inputs=("tokens", "labels"),
    outputs=_outputs,
    prompt=_batch,
    spellings=((r"^module\.", ""),),
    complete=_complete,
    unused=(r"attention\.(new_)?gate$", r"rope\.freqs$"),
    external=_external,
    partial=("llm",),
    keeps_adapters=(AdaptionPromptConfig,),
)
V2 = dataclasses.replace(
    V1,
    model_types=("llama_adapter_v2",),
    about="LLaMA-Adapter V2, chat and multimodal (arXiv 2304.15010)",
    read_config=_read_v2,
    write_config=_write_v2,
    rules=_rules_v2,
    inputs=("tokens", "labels", "imgs"),
    # CLIP's text half is not read.
    unused=(*V1.unused, r"^clip\.(token_embedding|positional_embedding|text_projection|ln_final|logit_scale|transformer)\b"),
    partial=("llm", "vision"),
    keeps_adapters=(AdaptionPromptConfig, AffineConfig, Ia3Config, LoraConfig),
)
