"""--job=train: the recipe's stages one after the other, from wherever an earlier start of the same command was stopped, then
its evaluations, pictures, model card and, where asked for, the export."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from mmjax import drawing, tree
from mmjax.assembly import assemble
from mmjax.card import write_card
from mmjax.checkpoints.store import Store
from mmjax.config import Recipe, Stage, read_recipe, write_recipe
from mmjax.config_parsing import to_dict
from mmjax.data import sources, templates
from mmjax.data.features import cached
from mmjax.data.pipeline import Pipeline
from mmjax.errors import UserError
from mmjax.evaluation.run import evaluate
from mmjax.jobs.export import export
from mmjax.model import Model
from mmjax.models import modality_mixture, prefix, quantised
from mmjax.models.adapters import leaves_of
from mmjax.models.decoder import require_positions
from mmjax.parallel import cluster
from mmjax.parallel.mesh import data_shards, divide_processor, make_mesh, own_shards
from mmjax.parallel.sharding import format_table, param_shardings, table
from mmjax.results import record
from mmjax.training.loop import Run, train
from mmjax.training.metrics import Journal
from mmjax.training.optimizer import make_optimizer
from mmjax.training.termination import noting_sigterm
from mmjax.training.trainable import Selection, select, shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Fields of a stage that may change between two starts: they change how it is run or watched, not what comes out.
_FREE = ("validation", "attention", "remat", "unroll")


def run(recipe: Recipe, workdir: Path) -> None:
    """Trains, and leaves everything in the workdir, which several processes share. Raises UserError; SystemExit(143) after a SIGTERM."""
    began = time.perf_counter()
    divide_processor(recipe.mesh)
    mesh = make_mesh(recipe.mesh)
    _log_to_terminal()
    workdir.mkdir(parents=True, exist_ok=True)
    with cluster.first_alone("recipe"):
        if first := jax.process_index() == 0:
            check_same_run(recipe, workdir)
            write_recipe(recipe, workdir)
        elif not (workdir / "recipe.json").exists():
            raise UserError(f"{workdir.resolve()} is not what it is for process 0: give a --workdir that all machines share.")

    model = assemble(recipe, workdir, functools.partial(param_shardings, mesh=mesh))
    _check_stages(recipe, model)
    for notice in modality_mixture.notices(model.config):
        log.warning("%s", notice)
    if first:
        (workdir / "sharding.txt").write_text(format_table(table(model.params, mesh)) + "\n")

    with noting_sigterm() as terminating:
        store = Store(workdir, recipe.checkpoint, model.bases)
        params = train(
            Run(recipe, workdir, mesh, store, terminating),
            model.config,
            model.params,
            set(model.own),
            lambda name, params: _pipelines(name, recipe, dataclasses.replace(model, params=params), mesh, workdir),
        )
        store.close()
    model = dataclasses.replace(model, params=params)

    figures = {"train_seconds": time.perf_counter() - began, "parameters": _count(params)}
    lines = Journal(workdir / "metrics.jsonl").read()
    for line in lines:  # the last line of a stage stays
        for name in ("loss", "validation_loss", "tokens_per_second", "samples_per_second", "mfu"):
            if line.get(name) is not None:
                figures[f"{name}_{line['stage']}"] = line[name]
    if first:
        record(workdir, figures)
        drawing.losses(workdir / "losses.png", lines)
    if recipe.evaluations:
        evaluate(model, recipe, workdir)
    if recipe.export.after_training:
        export(model, recipe, workdir)
    if first:
        write_card(model, recipe, workdir)
        record(workdir, {"seconds": time.perf_counter() - began})
        log.info("everything is in %s", workdir)


def check_same_run(recipe: Recipe, workdir: Path) -> None:
    """Raises UserError, naming the keys, where the workdir holds checkpoints of a run that this recipe would not have made."""
    if not (workdir / "recipe.json").exists():
        return
    earlier = read_recipe(workdir)
    begun = [name for name in earlier.run if any((workdir / "checkpoints" / name).glob("[0-9]*"))]
    then, now = _decisive(earlier, begun), _decisive(recipe, begun)
    changed = [
        f"{key} was {then.get(key, 'absent')!r} and is {now.get(key, 'absent')!r}"
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
    if begun and changed:
        raise UserError(
            f"{workdir} holds checkpoints of another recipe; use another --workdir, or restore these values:\n"
            + "\n".join(f"  {line}" for line in changed)
        )


def _decisive(recipe: Recipe, begun: list[str]) -> dict[str, object]:
    """Dotted key -> value of everything that decides the outcome of the stages begun."""
    flat: dict[str, object] = {}

    def visit(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, below in value.items():
                visit(f"{prefix}.{key}", below)
        else:
            flat[prefix] = value

    values = json.loads(json.dumps(to_dict(recipe)))  # a tuple of free options is a list in recipe.json
    visit("seed", values["seed"])
    visit("model", values["model"])
    for name in begun:
        stage = values["stages"].get(name, {})
        visit(f"stages.{name}", {key: value for key, value in stage.items() if key not in _FREE})
    flat["run"] = list(recipe.run[: len(begun)])
    return flat


def _check_stages(recipe: Recipe, model: Model) -> None:
    """Everything about the stages that shapes alone can show to be wrong, before anything is compiled."""
    experts = model.config.llm.block.experts if model.config.llm else None
    if recipe.mesh.expert > 1 and (experts is None or experts.count % recipe.mesh.expert):
        has = f"{experts.count} experts, which it does not divide" if experts else "no experts"
        raise UserError(f"mesh.expert = {recipe.mesh.expert}: this model has {has}.")
    for name in recipe.run:
        stage, key = recipe.stages[name], f"stages.{name}"
        selection = select(model.params, stage.trainable, f"{key}.trainable")
        _check_idle(model, stage, selection, key)
        trainable = shapes(model.params, selection, stage.param_dtype)
        make_optimizer(stage.optimizer, trainable, stage.steps or 1, f"{key}.optimizer")
        if stage.template:
            templates.get(stage.template, model.tokenizer, recipe.model.system)
        if stage.objective == "contrastive" and not (model.config.connector and model.config.connector.contrast_width):
            raise UserError(
                f"{key}.objective is 'contrastive', but the connector has no heads for it: give model.connector.contrast_width "
                "(a Q-Former's; 256 in BLIP-2)."
            )
        if stage.objective == "language":
            require_positions(model.config.language, stage.length + prefix.count(model.config.without(stage.idle)))
            _warn_of_settled(model, selection, key)
        if stage.cache_features and any(path.startswith("vision/") for path in selection.leaves):
            raise UserError(f"{key}.cache_features: the features change, since {key}.trainable has leaves of the encoder.")


def _check_idle(model: Model, stage: Stage, selection: Selection, key: str) -> None:
    known = [adapter.name for adapter in model.config.adapters]
    if unknown := [name for name in stage.idle if name not in known]:
        raise UserError(f"{key}.idle names {unknown[0]!r}, and the model's adapters are {', '.join(known) or 'none'}.")
    theirs = tree.flatten(leaves_of(model.params, stage.idle))
    if trained := [path for path in selection.leaves if path in theirs]:
        raise UserError(f"{key}.trainable has {trained[0]}, of an adapter that {key}.idle keeps from acting.")


def _warn_of_settled(model: Model, selection: Selection, key: str) -> None:
    """Says where what is trained was made by an encoder that is not there: peft's files hold its results alone."""
    for adapter in model.config.adapters:
        held = (f"llm/prompts/{adapter.name}/", f"llm/plugs/{adapter.name}/")
        if getattr(adapter, "settled", False) and any(path.startswith(held) for path in selection.leaves):
            log.warning(
                "%s: adapter %r comes from a peft directory, which does not hold the encoder that made its vectors. Its training cannot "
                "be gone on with; what is trained now are the vectors themselves.",
                key,
                adapter.name,
            )


def _pipelines(
    name: str, recipe: Recipe, model: Model, mesh: Mesh, workdir: Path
) -> tuple[Pipeline, Pipeline | None]:
    """The training and the held-out data of a stage; the first batch is drawn."""
    stage = recipe.stages[name]
    model = dataclasses.replace(model, config=model.config.without(stage.idle))
    training = _pipeline(stage, recipe, model, mesh, workdir)
    picture = workdir / f"first_batch_{name}.png"
    if jax.process_index() == 0 and not picture.exists():
        batch, _ = next(iter(training.batches(0, 1)))
        tokenizer = model.connector_tokenizer if stage.objective == "contrastive" else model.tokenizer
        drawing.first_batch(picture, batch, functools.partial(_decode, tokenizer), model.config.tokens_per_tile)
    if not stage.validation.every:
        return training, None
    held_out = dataclasses.replace(
        stage, sources=stage.validation.sources, steps=stage.validation.batches, epochs=0.0, augment=()
    )
    return training, _pipeline(held_out, recipe, model, mesh, workdir)


def _pipeline(stage: Stage, recipe: Recipe, model: Model, mesh: Mesh, workdir: Path) -> Pipeline:
    encoder, processor = None, model.image_processor
    if processor is not None and processor.tiling is not None and not stage.tiled:
        processor = dataclasses.replace(processor, tiling=None, aspect=recipe.model.image.aspect)
        model = dataclasses.replace(model, image_processor=processor)
    if stage.objective == "contrastive":
        encoder = dataclasses.replace(model.encoder(), beside=model.text_beside(stage.length))
    if stage.objective == "language":
        encoder = model.encoder(stage.length)
        if stage.template:
            template = templates.get(stage.template, model.tokenizer, recipe.model.system)
            encoder = dataclasses.replace(encoder, template=template)
    datasets = {name: sources.open(source) for name, source in stage.sources.items()}
    features = None
    if stage.cache_features:
        features = cached(
            workdir / "features",
            model.config,
            model.params,
            stage.sources,
            datasets,
            processor,
            flip="flip" in stage.augment,
            mesh=mesh,
            run=model.run,
            threads=recipe.loader.threads,
        )
    with cluster.first_alone("lengths"):  # the others read the tables that process 0 has made
        return Pipeline(
            stage,
            datasets,
            encoder,
            processor if stage.tiles else None,
            seed=recipe.seed,
            loader=recipe.loader,
            shards=data_shards(mesh),
            own=own_shards(mesh),
            features=features,
            workdir=workdir,
        )


def _decode(tokenizer: PreTrainedTokenizerBase | None, ids: list[int]) -> str:
    assert tokenizer is not None
    return str(tokenizer.decode(ids))


def _count(params: dict) -> int:
    return quantised.count(params)


class _Terminal(logging.Handler):
    """Lines of the log, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def _log_to_terminal() -> None:
    logging.basicConfig(handlers=[_Terminal()], format="%(message)s", level=logging.WARNING, force=True)
    if jax.process_index() == 0:
        logging.getLogger("mmjax").setLevel(logging.INFO)
