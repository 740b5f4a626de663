"""Prompts and prefixes in peft's directories: PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING, PREFIX_TUNING.

All have one tensor `prompt_embeddings`: vectors [tokens, width], or, of a prefix, [tokens, layers * 2 * kv_heads * head_dim], each
layer's keys and then its values. What an encoder makes is written, and the encoder is not: a prompt or prefix that is read from such
a file is `settled`. MULTITASK_PROMPT_TUNING has the matrices of the tasks as well.

Of an encoder-decoder (num_transformer_submodules = 2, as peft makes them) the file holds as many vectors again, which PROMPT_TUNING and
P_TUNING never use; and peft hands layer l of a prefix the pair (2 l mod layers) of the file.
"""

from __future__ import annotations

import json
from typing import Any, Callable

import jax
import numpy as np

from mmjax import tree
from mmjax.checkpoints import weights
from mmjax.checkpoints.peft.method import NEUTRAL, Base, Directory, Fields, Method
from mmjax.checkpoints.safetensors import Tensor
from mmjax.errors import UserError
from mmjax.models import prefix, prompts
from mmjax.models.tuning_config import Adapter, MultitaskPromptConfig, PrefixConfig, PromptConfig, PTuningConfig
from mmjax.tree import Params

VECTORS = "prompt_embeddings"
TASKS = {"prefix_task_cols": "task_columns", "prefix_task_rows": "task_rows"}
_SHAPES = "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers".split()
# How a prompt was started, which its tensors say better.
_START = "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs".split()


def _reading(read: Callable[[Directory, Base], tuple[Adapter, Params]]) -> Callable[[Directory, Base], tuple[Adapter, Params]]:
    """`read` over bases that have a text to stand in front of."""

    def checked(directory: Directory, base: Base) -> tuple[Adapter, Params]:
        prompts.require_writer(base.config)
        return read(directory, base)

    return checked


def _read_prompt(directory: Directory, base: Base) -> tuple[Adapter, Params]:
    config = PromptConfig(directory.name, _tokens(directory), peft=_kept(directory))
    return config, _leaves(directory, base, config)


def _read_p_tuning(directory: Directory, base: Base) -> tuple[Adapter, Params]:
    fields = directory.fields
    kind = str(fields.get("encoder_reparameterization_type", "MLP")).lower()
    config = PTuningConfig(
        directory.name,
        _tokens(directory),
        encoder="lstm" if kind == "lstm" else "mlp",
        encoder_width=int(fields.get("encoder_hidden_size") or 0),
        encoder_depth=int(fields.get("encoder_num_layers") or 2),
        settled=True,
        peft=_kept(directory),
    )
    return config, _leaves(directory, base, config)


def _read_multitask(directory: Directory, base: Base) -> tuple[Adapter, Params]:
    fields = directory.fields
    config = MultitaskPromptConfig(
        directory.name,
        _tokens(directory),
        tasks=int(fields.get("num_tasks") or 1),
        task_rank=int(fields.get("num_ranks") or 1),
        peft=_kept(directory),
    )
    return config, _leaves(directory, base, config)


def _read_prefix(directory: Directory, base: Base) -> tuple[Adapter, Params]:
    fields, llm = directory.fields, base.config.language
    projected = bool(fields.get("prefix_projection", False))
    hidden = int(fields.get("encoder_hidden_size") or 0) if projected else 0
    config = PrefixConfig(directory.name, _tokens(directory), projected, hidden, settled=projected, peft=_kept(directory))
    width = prefix.width(llm)
    heads, dim = fields.get("num_attention_heads"), fields.get("token_dim")
    if dim not in (None, width) or heads not in (None, llm.block.kv_heads):
        raise UserError(
            f"{directory.path}: num_attention_heads = {heads} and token_dim = {dim}, but the base has {llm.block.kv_heads} heads of keys, "
            f"{width} wide in all"
        )
    [both] = _arrays(directory, {VECTORS: (config.tokens, llm.layers * 2 * width)})
    both = both.reshape(config.tokens, llm.layers, 2, width)[:, _pairs(base)].transpose(2, 1, 0, 3)
    found = {f"llm/plugs/{config.name}/{name}": jax.device_put(part) for name, part in zip(("keys", "values"), both)}
    return config, tree.unflatten(found)


def _kept(directory: Directory) -> str:
    """The fields that nobody knows, to be written again."""
    unknown = set(directory.fields) - NEUTRAL - directory.method.known - set(directory.method.refused)
    return json.dumps({name: directory.fields[name] for name in sorted(unknown)}) if unknown else ""


def _tokens(directory: Directory) -> int:
    found = directory.fields.get("num_virtual_tokens")
    if not isinstance(found, int) or found < 1:
        raise UserError(f"{directory.path}/adapter_config.json: num_virtual_tokens = {found!r} is no number of tokens")
    return found


def _leaves(directory: Directory, base: Base, config: prompts.Prompt) -> Params:
    width = base.config.language.input_width
    twice = base.config.language.encoder is not None and directory.fields.get("num_transformer_submodules") != 1
    if twice and isinstance(config, MultitaskPromptConfig):
        raise UserError(
            f"{directory.path}: num_transformer_submodules = 2 is not supported for multi-task prompts: peft reads them in the decoder while it "
            "trains and not while it generates. With num_transformer_submodules = 1 the encoder alone reads them"
        )
    shapes: dict[str, tuple[int, ...]] = {VECTORS: (config.tokens * (2 if twice else 1), width)}
    names = {VECTORS: "vectors"}
    if isinstance(config, MultitaskPromptConfig):
        shapes["prefix_task_cols"] = (config.tasks, config.tokens, config.task_rank)
        shapes["prefix_task_rows"] = (config.tasks, config.task_rank, width)
        names |= TASKS
    arrays = dict(zip(shapes, _arrays(directory, shapes)))
    arrays[VECTORS] = arrays[VECTORS][: config.tokens]
    at = prompts.path(config.name)
    return tree.unflatten({f"{at}/{names[name]}": jax.device_put(array) for name, array in arrays.items()})


def _arrays(directory: Directory, shapes: dict[str, tuple[int, ...]]) -> list[np.ndarray]:
    """The tensors of these names in float32. Raises UserError listing what is missing, unexpected, or of another shape."""
    there = directory.tensors
    wrong = [f"{name} is missing" for name in shapes if name not in there]
    wrong += [f"{name} is not known" for name in there if name not in shapes]
    wrong += [
        f"{name} is {list(there[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in there and tuple(there[name].shape) != shape
    ]
    if wrong:
        raise UserError(f"{directory.path} does not fit its base: {'; '.join(sorted(wrong))}")
    arrays = []
    for name in shapes:
        array = np.asarray(there[name].read(), np.float32)
        if not weights.is_finite(array):
            weights.refuse_broken([name], directory.path, array.dtype)
        arrays.append(array)
    return arrays


def _pairs(base: Base) -> np.ndarray:
    """Which of the pairs in a file each layer reads."""
    layers = np.arange(base.config.language.layers)
    return layers if base.config.language.encoder is None else 2 * layers % len(layers)


def _write_prompt(params: Params, adapter: Adapter, base: Base, dtype: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """Prompts of all kinds."""
    assert isinstance(adapter, prompts.Prompt)
    leaves, llm = params["llm"]["prompts"][adapter.name], base.config.language
    fields = _common(base, adapter, llm.input_width, llm.block.heads)
    held = {VECTORS: leaves["vectors"]}
    if isinstance(adapter, MultitaskPromptConfig):
        held |= {theirs: leaves[ours] for theirs, ours in TASKS.items()}
        fields |= {"num_tasks": adapter.tasks, "num_ranks": adapter.task_rank}
    elif isinstance(adapter, PTuningConfig):
        held[VECTORS] = prompts.vectors(leaves, adapter)[0]
        fields |= {
            "encoder_reparameterization_type": adapter.encoder.upper(),
            "encoder_hidden_size": adapter.encoder_width or llm.input_width,
            "encoder_num_layers": adapter.encoder_depth,
            "encoder_dropout": 0.0,
        }
    if not isinstance(adapter, PTuningConfig):
        fields["prompt_tuning_init"] = "RANDOM"
    return fields, [_tensor(name, array, dtype) for name, array in held.items()]


def _write_prefix(params: Params, adapter: Adapter, base: Base, dtype: Any) -> tuple[dict[str, Any], list[Tensor]]:
    assert isinstance(adapter, PrefixConfig)
    llm = base.config.language
    leaves = prefix.prepared(params, base.config)["llm"]["plugs"][adapter.name]
    both = np.stack([np.asarray(leaves["keys"], np.float32), np.asarray(leaves["values"], np.float32)], 1)  # [layers, 2, tokens, width]
    pairs = _pairs(base)
    placed = np.zeros_like(both)
    placed[pairs] = both
    if (placed[pairs] != both).any():
        raise UserError(
            f"adapter {adapter.name!r}: of an encoder-decoder with {llm.layers} layers peft hands layers l and l + {llm.layers // 2} the same "
            "keys and values, and here they differ: a workdir keeps it"
        )
    flat = placed.transpose(2, 0, 1, 3).reshape(adapter.tokens, -1)
    fields = _common(base, adapter, prefix.width(llm), llm.block.kv_heads)
    fields |= {
        "prefix_projection": adapter.projected,
        "encoder_hidden_size": adapter.encoder_width or prefix.width(llm),
        "num_transformer_submodules": 1 if llm.encoder is None else 2,
    }
    return fields, [_tensor(VECTORS, flat, dtype)]


def _common(base: Base, adapter: prompts.Prompt | PrefixConfig, width: int, heads: int) -> dict[str, Any]:
    return {
        **(json.loads(adapter.peft) if adapter.peft else {}),
        "task_type": "CAUSAL_LM" if base.config.language.encoder is None else "SEQ_2_SEQ_LM",
        "num_virtual_tokens": adapter.tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": base.config.language.layers,
        "modules_to_save": None,
    }


def _tensor(name: str, array: Any, dtype: Any) -> Tensor:
    kind = np.dtype(dtype or array.dtype)
    return Tensor(name, tuple(array.shape), kind, lambda: np.asarray(array, kind))


def _method(
    peft_type: str,
    fields: list[str],
    kind: type[Adapter],
    read: Callable[[Directory, Base], tuple[Adapter, Params]],
    write: Callable[[Params, Adapter, Base, Any], tuple[dict[str, Any], list[Tensor]]],
    problems: Callable[[Fields], list[str]] = lambda fields: [],
) -> Method:
    return Method(
        peft_type=peft_type,
        known=frozenset([*_SHAPES, *fields]),
        refused={"modules_to_save": "modules that are trained whole beside it"},
        problems=problems,
        read=_reading(read),
        writes=lambda adapter: isinstance(adapter, kind),
        write=write,
    )


def _encoder_problems(fields: Fields) -> list[str]:
    kind = fields.get("encoder_reparameterization_type", "MLP")
    return [] if kind in ("MLP", "LSTM") else [f"encoder_reparameterization_type = {kind!r} (MLP or LSTM)"]


PROMPT = _method("PROMPT_TUNING", _START, PromptConfig, _read_prompt, _write_prompt)
P_TUNING = _method(
    "P_TUNING",
    "encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout".split(),
    PTuningConfig,
    _read_p_tuning,
    _write_prompt,
    _encoder_problems,
)
MULTITASK = _method(
    "MULTITASK_PROMPT_TUNING",
    [*_START, "num_ranks", "num_tasks", "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"],
    MultitaskPromptConfig,
    _read_multitask,
    _write_prompt,
)
PREFIX = _method(
    "PREFIX_TUNING", ["encoder_hidden_size", "prefix_projection", "init_weights"], PrefixConfig, _read_prefix, _write_prefix
)
