"""What a recipe's Q-Former begins as: a BERT, a Q-Former that somebody trained, or both, the second over the first.

Leaves that neither has (queries and cross-attention over a BERT, another stage's heads, the Linear in front of another language
model) begin fresh; the log names them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mmjax import config as recipes
from mmjax import published, tree
from mmjax.checkpoints import weights
from mmjax.errors import UserError
from mmjax.families import keys, lavis, reading
from mmjax.models import multimodal
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ConnectorConfig
from mmjax.models.qformer import DEVIATION
from mmjax.parallel.sharding import placed
from mmjax.published import locate, open_published
from mmjax.tree import Params

log = logging.getLogger(__name__)

WRAPPED = (r"^model\.", "")  # LAVIS's and MiniGPT-4's checkpoints keep the weights under "model"
PROJECTION = "connector/project_out/"


def load(section: recipes.Connector, config: ConnectorConfig, seed: int = 0, shardings: Params | None = None) -> Params:
    """The leaves that `section.bert` and `section.path` have, float32. Raises UserError for what is no BERT or Q-Former, or of other
    shapes.

    seed       draws the rows of words that the BERT has not ([DEC])
    shardings  where each leaf goes, by its path in the model; none = the default device
    """
    shapes = {path: leaf.shape for path, leaf in tree.flatten(multimodal.shapes(ModelConfig(connector=config))).items()}
    found: dict[str, Any] = {}
    if section.bert:
        places = tree.flatten(shardings or {})
        begun = _fitting(_of_bert(section.bert, config, seed), shapes, section.bert)  # of 110 million parameters: read whole
        found |= {path: placed(leaf, places[path]) if path in places else leaf for path, leaf in begun.items()}
    if section.path:
        trained = _of_file(section.path, config, shardings) if Path(section.path).is_file() else _of_directory(section.path, shardings)
        if not section.projection:
            trained = {path: leaf for path, leaf in trained.items() if not path.startswith(PROJECTION)}
        found |= _fitting(trained, shapes, section.path)
    fresh = sorted({"/".join(path.split("/")[1:3]) for path in set(shapes) - set(found)})
    log.info("the Q-Former begins fresh at: %s", ", ".join(fresh) or "nothing")
    return tree.unflatten(found)


def _fitting(leaves: dict[str, Any], shapes: dict[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """The leaves that the recipe's Q-Former has as well."""
    wrong = [
        f"{path} is {list(leaf.shape)}, the recipe asks for {list(shapes[path])}"
        for path, leaf in leaves.items()
        if path in shapes and leaf.shape != shapes[path]
    ]
    if wrong:
        raise UserError(f"the Q-Former in {where} does not fit model.connector:\n" + "\n".join(f"  {line}" for line in wrong[:20]))
    return {path: leaf for path, leaf in leaves.items() if path in shapes}


def _of_directory(path: str, shardings: Params | None) -> dict[str, Any]:
    """Of a whole model's directory (BLIP-2, InstructBLIP)."""
    source = open_published(locate(path))
    if source.config.connector is None or source.config.connector.kind != "qformer":
        raise UserError(f"model.connector.path: the model in {source.directory} has no Q-Former")
    return tree.flatten(published.load_part(source, "connector", dtype="float32", shardings=shardings))


def _of_file(path: str, config: ConnectorConfig, shardings: Params | None) -> dict[str, Any]:
    """Of a file in LAVIS's layout, whatever else it holds."""
    stored = keys.renamed(weights.read(path), (WRAPPED, *lavis.SPELLINGS))
    shapes = multimodal.shapes(ModelConfig(connector=config))
    rules = [rule for rule in lavis.qformer_rules(config) if all(name in stored for name in keys.names(rule, shapes))]
    if not rules:
        raise UserError(f"model.connector.path: {path} holds no Q-Former, nor the Linear behind one, in LAVIS's layout")
    named = {name: stored[name] for rule in rules for name in keys.names(rule, shapes)}
    return tree.flatten(reading.load(named, rules, shapes, dtype="float32", shardings=shardings, where=path))


def _of_bert(path: str, config: ConnectorConfig, seed: int) -> dict[str, Any]:
    """A BERT's leaves where a Q-Former has them: its feed-forward begins both that of the queries and that of the text."""
    source = open_published(locate(path))
    llm = source.config.llm
    if source.config.vision is not None or llm is None or not llm.token_types:
        raise UserError(f"model.connector.bert: {source.directory} is no BERT")
    bert = tree.flatten(published.load_part(source, "llm", dtype="float32"))
    found: dict[str, Any] = {}
    for leaf, value in bert.items():
        name = leaf.removeprefix("llm/")
        if name.startswith("embed/norm/") or name == "embed/positions":
            found[f"connector/{name}"] = value
        elif name == "embed/embedding":
            found[f"connector/{name}"] = _longer(value, config.text_vocab, seed)
        elif name.startswith(("layers/attention/", "layers/attention_norm/")):
            found[f"connector/{name}"] = value
        elif name.startswith(("layers/mlp/", "layers/mlp_norm/")):
            found[f"connector/{name}"] = value
            found["connector/" + name.replace("layers/mlp", "layers/text_mlp", 1)] = value
        elif name.startswith(("head/transform/", "head/norm/")):
            found[f"connector/heads/language/{name.removeprefix('head/')}"] = value
        elif name == "head/bias":
            found["connector/heads/language/bias"] = jnp.pad(value, (0, max(0, config.text_vocab - len(value))))
    return found


def _longer(words: jax.Array, rows: int, seed: int) -> jax.Array:
    """The table with so many rows, new ones drawn as BERT's are."""
    if rows <= len(words):
        return words
    drawn = DEVIATION * jax.random.normal(jax.random.key(seed), (rows - len(words), words.shape[1]))
    return jnp.concatenate([jnp.asarray(words), drawn])
