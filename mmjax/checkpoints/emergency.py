"""Checkpoints on each machine's own disk or in its memory, between those of mmjax.checkpoints.store: Orbax's emergency checkpoints.

    near = Emergency.of(options, workdir, stage, mesh, state)     None where there can be none
    step = near.newest()                                          what a slice that is still there has whole
    state = near.restore(step)                                    read there, and sent to the others
    near.save(step, state)

Slices (parts of the mesh's `data`) have the same state. All but the first keep it here every `checkpoint.local_every` steps, so that no more
is lost with a machine; a slice whose machines are new gets it from one that has it. It is for the same mesh and number of processes: any other start
goes on from the checkpoints of the workdir, as does one where no slice has all of it.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import uuid
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import flags
from jax.sharding import Mesh

from mmjax import config
from mmjax.parallel import cluster
from mmjax.training.state import State

log = logging.getLogger(__name__)


class Emergency:
    """Of one stage; `state` is one as it is on the mesh, whose shapes and places are what is kept. All processes must call every method."""

    def __init__(self, folder: Path, workdir: Path, options: config.Checkpoint, mesh: Mesh, state: State):
        # experimental, and so for those alone who want it
        from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax

        self.folder, self.every = folder, options.local_every
        self.folder.mkdir(parents=True, exist_ok=True)
        leaves, self._structure = jax.tree.flatten(state)
        shapes = _numbered([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for leaf in leaves])
        local = orbax.LocalCheckpointOptions(save_interval_steps=1, max_to_keep=1)
        persistent = orbax.PersistentCheckpointOptions(should_save_fn=lambda *_: False)  # those of the workdir mmjax.checkpoints.store writes
        given = orbax.CheckpointManagerOptions(local=local, persistent=persistent, replica_axis_index=0)
        unused = workdir.absolute() / "checkpoints" / ".emergency"
        if not flags.FLAGS.is_parsed():  # Orbax reads flags of its own, also where no command line was
            flags.FLAGS.mark_as_parsed()
        ocp.multihost.initialize_runtime_to_distributed_ids()
        ocp.multihost.initialize_distributed_to_device_ids()
        self._manager = orbax.CheckpointManager(self.folder, unused, mesh, shapes, options=given)

    @classmethod
    def of(cls, options: config.Checkpoint, workdir: Path, stage: str, mesh: Mesh, state: State) -> Emergency | None:
        """None where none are wanted, and, which is said, where there is nobody to keep them: one slice, or one in several processes of another."""
        if not options.local:
            return None
        if not slices_have_processes(mesh):
            log.warning(
                "checkpoint.local is not used: it is for several slices (mesh.data of 2 or more) of processes of their own, which this mesh has not: %s",
                dict(mesh.shape),
            )
            return None
        run = cluster.from_first("emergency", lambda: _name_of(workdir))
        sizes = "-".join(f"{axis}{size}" for axis, size in mesh.shape.items())
        own = f"{sizes}-{jax.process_index()}of{jax.process_count()}"  # processes of one machine have one disk
        return cls(Path(options.local) / run / stage / own, workdir, options, mesh, state)

    def newest(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, step: int) -> State:
        leaves = self._manager.restore(step)["state"]
        return jax.tree.unflatten(self._structure, [leaves[name] for name in sorted(leaves)])

    def save(self, step: int, state: State) -> None:
        """Begins to write (arrays are copied before this returns)."""
        leaves = _numbered(jax.tree.leaves(state))
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(leaves)))

    def close(self, finished: bool) -> None:
        """Waits for what was begun; what is here goes, once the stage is `finished`."""
        self._manager.wait_until_finished()
        self._manager.close()
        if finished:
            shutil.rmtree(self.folder, ignore_errors=True)


def slices_have_processes(mesh: Mesh) -> bool:
    """Whether the parts of `data` are several, and no process has devices of two of them."""
    owners = [{device.process_index for device in part.flat} for part in mesh.devices]
    return len(owners) > 1 and len(set().union(*owners)) == sum(map(len, owners))


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    return {f"{number:05d}": leaf for number, leaf in enumerate(leaves)}


def _name_of(workdir: Path) -> str:
    """A name for this run that another run in a folder of the same name would not have."""
    file = workdir / "checkpoints" / "run_id"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex)
    return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
