"""The checkpoints of a run: WORKDIR/checkpoints/STAGE/STEP, written by Orbax in the background, each with its own checksums.

A checkpoint holds every leaf that differs from its published base, trained in this stage or an earlier one, or that has no
published base; and the optimizer state of its stage. The base itself is a reference with a fingerprint. `manifest.json` is
written last and lists every file with its size and digest: a checkpoint whose manifest is absent or does not fit is not used.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp

from mmjax import config, tree
from mmjax.config import Recipe, read_recipe
from mmjax.errors import UserError
from mmjax.parallel import cluster
from mmjax.training.state import State
from mmjax.tree import Params

MANIFEST = "manifest.json"
LONGEST = 24 * 3600  # seconds in which all processes must have written their parts; that of one which dies is not waited for
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk; `manifest` is the content of its manifest.json."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def ended(self) -> bool:
        """Whether its stage is over."""
        return self.manifest["ended"]

    def leaves(self, shardings: Params | None = None) -> dict[str, Any]:
        """All saved leaves by path, as numpy arrays, or on devices where shardings of the whole model are given.

        A leaf trained in a range of its layers holds those alone; see `overlay`."""
        flat = tree.flatten(shardings) if shardings is not None else {}
        args = {name: _restore_args(name.split("/", 1)[1], flat) for name in self.manifest["leaves"]}
        return tree.flatten(self._restore("params", tree.unflatten(args)))

    def optimizer(self, like: Any, shardings: Any) -> Any:
        """The optimizer state, of the structure of `like` (shapes). Raises UserError where it is that of another optimizer."""
        names, shapes, structure = _numbered(like)
        recorded, wanted = self.manifest["optimizer"], [_described(leaf) for leaf in shapes.values()]
        if recorded != [[name, *shape] for name, shape in zip(names, wanted)]:
            raise UserError(
                f"{self.path} holds the state of another optimizer than stages.{self.stage}.optimizer now describes. "
                f"Restore the recipe, or use another --workdir."
            )
        args = {
            number: ocp.ArrayRestoreArgs(sharding=sharding, dtype=leaf.dtype)
            for (number, leaf), sharding in zip(shapes.items(), jax.tree.leaves(shardings))
        }
        restored = self._restore("optimizer", args)
        return jax.tree.unflatten(structure, [restored[number] for number in shapes])

    def _restore(self, item: str, args: Params) -> Params:
        checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        restored = checkpointer.restore(
            self.path.absolute(), args=ocp.args.Composite(**{item: ocp.args.PyTreeRestore(restore_args=args)})
        )
        return restored[item]


def overlay(params: Params, checkpoint: Checkpoint, shardings: Params | None = None) -> Params:
    """`params`, left empty, with the checkpoint's leaves over them, trained layer ranges laid over their stack.

    Raises UserError, naming the leaf, where shapes differ or the model has no such leaf."""
    flat = tree.take(params)
    for name, saved in checkpoint.manifest["leaves"].items():  # what is replaced as a whole goes before the other comes
        if saved["layers"] is None and (path := name.split("/", 1)[1]) in flat:
            flat[path] = jax.ShapeDtypeStruct(flat[path].shape, flat[path].dtype)
    leaves = checkpoint.leaves(shardings)
    for name in sorted(leaves):  # "own/..." before "trained/...": a partly trained leaf may be in both
        path, leaf = name.split("/", 1)[1], leaves[name]
        layers = checkpoint.manifest["leaves"][name]["layers"]
        expected = tuple(flat[path].shape) if path in flat else None
        shape = tuple(leaf.shape) if layers is None or expected is None else (expected[0], *leaf.shape[1:])
        if shape != expected:
            raise UserError(
                f"{checkpoint.path} holds {path} with shape {list(leaf.shape)}, but the recipe's model "
                + (f"has {list(expected)} there." if expected is not None else "has no such leaf.")
                + " Restore the recipe's model section, or use another --workdir."
            )
        if layers is not None:
            stack = flat[path].astype(np.promote_types(flat[path].dtype, leaf.dtype))
            leaf = jax.lax.dynamic_update_slice_in_dim(stack, leaf.astype(stack.dtype), layers[0], axis=0)
        flat[path] = leaf
    return tree.unflatten(flat)


def open_workdir(workdir: str | Path) -> tuple[Recipe, Checkpoint | None]:
    """The recipe a workdir was trained with, and its newest sound checkpoint (None if there is none yet): the model is what
    the recipe assembles, with `overlay` of the checkpoint."""
    recipe = read_recipe(workdir)
    return recipe, newest(Path(workdir), recipe.run)


def newest(workdir: Path, run: Sequence[str]) -> Checkpoint | None:
    """The newest sound checkpoint of the last stage in `run` that has one; unsound ones are said aloud and passed over."""
    for stage in reversed(run):
        folder = workdir / "checkpoints" / stage
        for step in sorted(_steps(folder), reverse=True):
            path = folder / _name(step)
            fault = fault_of(path)
            if fault is None:
                return Checkpoint(path, json.loads((path / MANIFEST).read_text()))
            log.warning("checkpoint %s is not used: %s. Looking for the one before it.", path, fault)
    return None


def fault_of(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, None if every file is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        digest = manifest.pop("digest")
        files = manifest["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST} (its writing was not finished)"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    if digest != _digest_of(manifest):
        return f"its {MANIFEST} is damaged"
    for name, (size, expected) in files.items():
        file = path / name
        if not file.is_file():
            return f"its file {name} is missing"
        if file.stat().st_size != size:
            return f"its file {name} has {file.stat().st_size} bytes instead of {size}"
        if _digest(file) != expected:
            return f"its file {name} was changed after it was written"
    return None


def check_bases(checkpoint: Checkpoint, bases: Mapping[str, str]) -> None:
    """Raises UserError where a published base is not the one that the checkpoint was trained on."""
    for reference, fingerprint in checkpoint.manifest["bases"].items():
        if reference not in bases:
            raise UserError(f"{checkpoint.path} was trained on {reference}, which the recipe no longer names.")
        if bases[reference] != fingerprint:
            raise UserError(
                f"{reference} has changed since {checkpoint.path} was written (fingerprint {fingerprint}, "
                f"now {bases[reference]}). Restore those weights, or use another --workdir."
            )


class Store:
    """Writes the checkpoints of one run.

    bases   reference -> fingerprint of the published weights under the model
    """

    def __init__(self, workdir: Path, options: config.Checkpoint, bases: Mapping[str, str]):
        self.folder = workdir.absolute() / "checkpoints"
        self.options, self.bases = options, dict(bases)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), timeout_secs=LONGEST)
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._finishing: concurrent.futures.Future[None] | None = None

    def save(
        self,
        stage: str,
        step: int,
        state: State,
        own: Mapping[str, Any],
        layers: Mapping[str, tuple[int, int]],
        *,
        ended: bool = False,
        validation_loss: float | None = None,
    ) -> None:
        """Begins to write a checkpoint (arrays are copied before this returns, so the state may be donated).

        own      leaves outside the trainable tree that differ from their published base or have none, by path
        layers   for trainable leaves that are a range of layers, the range
        """
        leaves = {f"own/{path}": leaf for path, leaf in own.items()}
        leaves |= {f"trained/{path}": leaf for path, leaf in tree.flatten(state.trainable).items()}
        names, optimizer, _ = _numbered(state.optimizer)
        manifest = {
            "stage": stage,
            "step": step,
            "ended": ended,
            "validation_loss": validation_loss,
            "bases": self.bases,
            "leaves": {
                name: {
                    "shape": list(leaf.shape),
                    "dtype": str(leaf.dtype),
                    "layers": list(layers[path]) if (path := name.removeprefix("trained/")) in layers else None,
                }
                for name, leaf in leaves.items()
            },
            "optimizer": [[name, *_described(leaf)] for name, leaf in zip(names, optimizer.values())],
        }
        folder = self.folder / stage / _name(step)
        self.wait()
        cluster.wait("checkpoint")  # for process 0, which has had the manifest of the one before to make
        self._checkpointer.save(
            folder,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(tree.unflatten(leaves)), optimizer=ocp.args.PyTreeSave(optimizer)
            ),
            force=True,
        )
        self._finishing = self._background.submit(self._finish, folder, manifest)
        if not self.options.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when everything begun is on disk; raises what went wrong on the way."""
        if self._finishing is not None:
            self._finishing.result()

    def close(self) -> None:
        self.wait()
        self._background.shutdown()
        self._checkpointer.close()

    def resume(self, run: Sequence[str]) -> Checkpoint | None:
        """The checkpoint to go on from. What is newer than it (unsound, or half written) is set aside as NAME.broken."""

        def look() -> str | None:
            found = newest(self.folder.parent, run)
            self._set_aside(run, found)
            return None if found is None else str(found.path.relative_to(self.folder))

        found = self._as_first("resume", look)
        if found is not None:
            check_bases(found, self.bases)
        return found

    def _as_first(self, name: str, look: Callable[[], str | None]) -> Checkpoint | None:
        """The checkpoint whose folder `look` finds; process 0 looks (and reads all of it), the others take the same one."""
        place = cluster.from_first(name, look)
        if place is None:
            return None
        return Checkpoint(self.folder / place, json.loads((self.folder / place / MANIFEST).read_text()))

    def _set_aside(self, run: Sequence[str], found: Checkpoint | None) -> None:
        """Renames what is newer than the checkpoint to go on from, and deletes what was never finished."""
        for stage in run[run.index(found.stage) :] if found else run:
            for step in _steps(self.folder / stage):
                path = self.folder / stage / _name(step)
                if found is None or stage != found.stage or step > found.step:
                    shutil.rmtree(path.with_suffix(".broken"), ignore_errors=True)
                    path.rename(path.with_suffix(".broken"))
            for unfinished in (self.folder / stage).glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished)

    def best(self, stage: str) -> Checkpoint | None:
        """The sound checkpoint of a stage with the lowest validation loss."""
        self.wait()

        def look() -> str | None:
            for _, step in sorted(_validated(self.folder / stage)):
                if fault_of(self.folder / stage / _name(step)) is None:
                    return f"{stage}/{_name(step)}"
            return None

        return self._as_first("best", look)

    def _finish(self, path: Path, manifest: dict[str, Any]) -> None:
        """Waits until Orbax has put a checkpoint in its place, then writes its manifest."""
        self._checkpointer.wait_until_finished()
        if jax.process_index() != 0:
            return
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)
        manifest["files"] = {str(file.relative_to(path)): [file.stat().st_size, _digest(file)] for file in files}
        manifest["digest"] = _digest_of(manifest)
        unfinished = path / f"{MANIFEST}.tmp"
        unfinished.write_text(json.dumps(manifest, indent=1))
        os.replace(unfinished, path / MANIFEST)
        self._discard(path.parent)

    def _discard(self, folder: Path) -> None:
        """Deletes what is neither among the newest nor among the best of a stage."""
        steps = sorted(_steps(folder))
        kept = set(steps[-max(1, self.options.keep) :])
        if self.options.keep_best:
            kept |= {step for _, step in sorted(_validated(folder))[: self.options.keep_best]}
        for step in steps:
            if step not in kept:
                shutil.rmtree(folder / _name(step))


def _name(step: int) -> str:
    return f"{step:08d}"


def _steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []


def _validated(folder: Path) -> list[tuple[float, int]]:
    """(validation loss, step) of a stage's checkpoints that have one."""
    found = []
    for step in _steps(folder):
        try:
            loss = json.loads((folder / _name(step) / MANIFEST).read_text())["validation_loss"]
        except (OSError, ValueError, KeyError):
            continue
        if loss is not None:
            found.append((loss, step))
    return found


def _numbered(state: Any) -> tuple[list[str], dict[str, Any], Any]:
    """Names of the leaves of an optimizer state, the leaves under their numbers, and the state's structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(keys) for keys, _ in leaves]
    return names, {f"{i:05d}": leaf for i, (_, leaf) in enumerate(leaves)}, structure


def _described(leaf: Any) -> list[Any]:
    return [list(leaf.shape), str(leaf.dtype)]


def _restore_args(path: str, shardings: Mapping[str, Any]) -> ocp.RestoreArgs:
    if path in shardings:
        return ocp.ArrayRestoreArgs(sharding=shardings[path])
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()
