"""What a published checkpoint family is."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping

import jax
import numpy as np

from mmjax.batch import Batch
from mmjax.checkpoints.safetensors import Stored
from mmjax.data.tiling import Tiling
from mmjax.families.keys import Rule
from mmjax.models.config import Execution, ModelConfig
from mmjax.tree import Params

Config = dict[str, Any]
Inputs = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A sub-folder with one part of a model: its name, what the key table puts before the names of its tensors, and the section of
    the whole's config.json that it has as its own."""

    name: str
    prefix: str
    section: str


@dataclasses.dataclass(frozen=True)
class Family:
    """A family's configuration, key table and names of inputs and outputs.

    model_types    values of config.json's `hf_model_type` or `model_type`
    about          which models these are, and where they were published
    read_config    (config.json, its name in errors) -> shapes. Raises UserError naming a field that is missing or not
                   supported
    write_config   (shapes, the config.json that they were read from or {}) -> config.json
    rules          (shapes, config.json) -> the key table
    inputs         names that `model(inputs)` takes
    outputs        (params, shapes, config.json, inputs, execution, whether all hidden states are wanted) -> arrays by
                   foreign name
    prompt         (shapes, config.json, inputs) -> the batch of prompts to be continued; None = the family generates
                   nothing
    spellings      other spellings of foreign tensor names: (regular expression, replacement), applied in order on
                   reading
    complete       (config.json, the stored tensors by name) -> config.json with what only the tensors tell; asked where there
                   are weights
    copies         foreign tensors that may be stored although they are tied to others: name -> original
    copies_in      the same, where the names depend on config.json: (shapes, config.json) -> name -> original
    unused         regular expressions of foreign tensors that are not weights
    claims         whether a config.json is this family's although its model_type does not say so (or says more)
    sections       config.json -> the configs of its parts, by part ("llm", "vision"); empty where they stand among the others
    folders        config.json -> the sub-folders among which its parts are spread, by part ("llm", "vision", "connector")
    external       config.json -> parts of the model whose weights may be published elsewhere: "vision" -> a directory
                   or repository id
    partial        of these parts a directory may hold some tensors only, the others being where `external` says
    tokens         (field of config.json, token whose id it is): asked of the directory's tokenizer where it is absent
    keeps_adapters   the kinds of adapters (mmjax.models.tuning_config) that the layout keeps apart; others are merged into the weights
    keeps_rows     the layout keeps vocabulary rows beyond the tables apart
    unneeded       globs of our leaves that the family has no place for because it never uses them
    tiling         (config.json, shapes) -> how pictures are cut where no image processor's file says it; None = not at all
    modules        (regular expression, replacement) from the table's names to those of the modules in memory, which
                   PEFT files use
    """

    model_types: tuple[str, ...]
    about: str
    read_config: Callable[[Config, str], ModelConfig]
    write_config: Callable[[ModelConfig, Config], Config]
    rules: Callable[[ModelConfig, Config], list[Rule]]
    inputs: tuple[str, ...]
    outputs: Callable[[Params, ModelConfig, Config, Inputs, Execution, bool], dict[str, jax.Array]]
    prompt: Callable[[ModelConfig, Config, Inputs], Batch] | None = None
    spellings: tuple[tuple[str, str], ...] = ()
    complete: Callable[[Config, Mapping[str, Stored]], Config] | None = None
    copies: Callable[[ModelConfig], dict[str, str]] = lambda config: {}
    copies_in: Callable[[ModelConfig, Config], dict[str, str]] = lambda config, foreign: {}
    unused: tuple[str, ...] = (r"rotary_emb\.inv_freq$", r"\.position_ids$")
    claims: Callable[[Config], bool] = lambda config: False
    sections: Callable[[Config], dict[str, Config]] = lambda config: {
        "llm": config.get("text_config", {}),
        "vision": config.get("vision_config", {}),
    }
    folders: Callable[[Config], dict[str, Folder]] = lambda config: {}
    external: Callable[[Config], dict[str, str]] = lambda config: {}
    partial: tuple[str, ...] = ()
    tokens: tuple[tuple[str, str], ...] = ()
    keeps_adapters: tuple[type, ...] = ()
    keeps_rows: bool = False
    unneeded: tuple[str, ...] = ()
    tiling: Callable[[Config, ModelConfig], Tiling | None] = lambda foreign, config: None
    modules: tuple[tuple[str, str], ...] = ()
