"""Several processes as one run: how they find each other, wait for each other, and stop together.

    with joined(asked):                       jax.distributed runs inside, where there are other processes
        several()                             whether there are
        with first_alone("tokenizer"): ...    process 0 does it, the others then find it on disk
        wait("results")                       nobody goes on before all have come here
        found = from_first("start", look)     process 0 looks, all hear what it found
        texts = gathered("broken", text)      everyone's text, by process

In a process alone all of these do nothing but their own part. Once a process has joined, an error of one is the end of all: the
others are told what it was, print it and leave within seconds. A process that was killed tells nobody: the others hear it from the
collective they are in (on CPUs at once), or, when it has sent no sign of life for `heartbeat` seconds, from jax.distributed.

What goes between the processes here are short texts through jax.distributed's own store; no device is waited for.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import clusters, distributed

from mmjax.errors import UserError

log = logging.getLogger(__name__)

HEARTBEAT = 30  # seconds
START = 300  # seconds
_LONG = 7 * 24 * 3600 * 1000  # milliseconds: who waits is freed by an error, not by the clock
_GRACE = 3.0  # seconds in which a process that is told of an error may still come to its own
_STOPPED, _LEFT = "mmjax/stopped", "mmjax/left"


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command says about other processes.

    coordinator   HOST:PORT where process 0 listens; processes: how many there are; process: which one this is. All three, or
                  none: then SLURM, Open MPI, Kubernetes and TPU pods are asked. `processes` = 1 alone: nobody is asked
    heartbeat     seconds without a sign of life after which a process counts as dead; start: seconds to wait for the others
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    heartbeat: int = HEARTBEAT
    start: int = START

    def __post_init__(self) -> None:
        given = {"--coordinator": self.coordinator, "--processes": self.processes, "--process": self.process}
        absent = [flag for flag, value in given.items() if value is None]
        if self.heartbeat < 1 or self.start < 1:
            raise UserError("--heartbeat and --start are 1 second or more.")
        if len(absent) == 3 or (self.processes == 1 and len(absent) == 2):
            return
        if absent:
            raise UserError(
                f"{' and '.join(flag for flag in given if flag not in absent)} without {' and '.join(absent)}: several processes need "
                "--coordinator=HOST:PORT (of process 0), --processes=N and --process=0 ... N-1 together."
            )
        assert self.coordinator is not None and self.processes is not None and self.process is not None
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"--coordinator={self.coordinator} is not HOST:PORT.")
        if self.processes < 1 or not 0 <= self.process < self.processes:
            raise UserError(f"--process={self.process} of --processes={self.processes}: they are numbered from 0 to N - 1.")

    @property
    def alone(self) -> bool:
        """Whether there are no other processes."""
        if self.processes is not None:
            return self.processes == 1
        return _environment() is None


@contextlib.contextmanager
def joined(asked: Asked) -> Iterator[None]:
    """Inside, jax.distributed runs, where there are other processes. The end waits for all of them; an error ends them all, and
    this process as well: what is printed and the exit code are as without other processes.

    Raises UserError where the others are not found within `asked.start` seconds."""
    if asked.alone:
        yield
        return
    _initialize(asked)
    listener = threading.Thread(target=_listen, name="cluster", daemon=True)
    listener.start()

    def end() -> None:
        wait("end")
        jax.distributed.shutdown()
        listener.join(_GRACE)  # it has been freed; coming back from jax while Python ends, it would abort the process

    try:
        yield
        end()
    except SystemExit:  # agreed on, see mmjax.training.termination
        try:
            end()
        except Exception as error:
            _stop(error)
        raise
    except BaseException as error:
        _stop(error)


def several() -> bool:
    """Whether there are other processes. Unlike jax.process_count() this does not ask for devices."""
    return distributed.global_state.client is not None and distributed.global_state.num_processes > 1


def wait(name: str) -> None:
    """Returns once all processes are here."""
    if (client := distributed.global_state.client) is not None:
        client.wait_at_barrier(_numbered(name), _LONG)


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Inside, process 0 is alone; the others come in when it has left, and find what it wrote. No place for collectives."""
    if jax.process_index() != 0:
        wait(name)
    yield
    if jax.process_index() == 0:
        wait(name)


def from_first(name: str, value: Callable[[], Any]) -> Any:
    """What `value` returns in process 0 (it goes through JSON); it is called in no other."""
    client = distributed.global_state.client
    if client is None:
        return value()
    key = f"mmjax/{_numbered(name)}"
    if jax.process_index() == 0:
        found = value()
        client.key_value_set(key, json.dumps(found))
        return found
    return json.loads(client.blocking_key_value_get(key, _LONG))


def gathered(name: str, text: str) -> list[str]:
    """The text of every process, by its number."""
    client = distributed.global_state.client
    if client is None:
        return [text]
    key = f"mmjax/{_numbered(name)}"
    client.key_value_set(f"{key}/{jax.process_index()}", text)
    return [client.blocking_key_value_get(f"{key}/{process}", _LONG) for process in range(jax.process_count())]


_counts: collections.Counter[str] = collections.Counter()


def _numbered(name: str) -> str:
    """The name with how often it was used: all processes use the names equally often."""
    _counts[name] += 1
    return f"{name}/{_counts[name]}"


def _environment() -> type[clusters.ClusterEnv] | None:
    """The cluster of several processes that this one was started in, as jax recognises it."""
    indexed = "JOB_COMPLETION_INDEX" in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ
    for cluster in (clusters.OmpiCluster, clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster, clusters.K8sCluster):
        if cluster is clusters.K8sCluster and not indexed:
            continue
        try:
            if cluster.is_env_present():
                return cluster if cluster.get_process_count() > 1 else None
        except Exception as error:  # whatever the services that are asked fail with
            if cluster is not clusters.GceTpuCluster:
                raise UserError(f"{cluster.__name__}: {error}. {_REMEDY}") from error
            log.warning("this TPU's metadata server does not answer (%s): it is taken to be alone", error)
    if indexed:
        raise UserError(f"an indexed Kubernetes job is found out about by the package `kubernetes`, which is not here. {_REMEDY}")
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        raise UserError(f"Open MPI (5 or newer) does not say where process 0 runs. {_REMEDY}")
    return None


_REMEDY = (
    "Say it: --coordinator=HOST:PORT --processes=N --process=I (or --processes=1 where this process is to be alone); I may be "
    "$OMPI_COMM_WORLD_RANK, $JOB_COMPLETION_INDEX or the like."
)


def _initialize(asked: Asked) -> None:
    """Starts jax.distributed. Raises UserError, or prints its text and ends the process: past its own limit jax would abort."""
    number = "this process" if asked.process is None else f"process {asked.process} of {asked.processes}"
    place = asked.coordinator or "the coordinator of this cluster"
    what = (
        f"{number} has not found all others in {asked.start} s (--start) at {place}. Does every one run, with the same --coordinator and "
        "--processes, and is that port free on the machine of process 0 and open to the others?"
    )

    def give_up() -> None:
        print(f"mmjax: {what}", file=sys.stderr, flush=True)
        os._exit(1)

    timing: dict[str, Any] = {"initialization_timeout": asked.start + 60, "heartbeat_timeout_seconds": asked.heartbeat, "shutdown_timeout_seconds": 60}
    limit = threading.Timer(asked.start, give_up)
    limit.daemon = True
    limit.start()
    # Or else jax would listen to SIGTERM for a service that is not used here (see mmjax.training.termination), and keep it from killing.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if asked.coordinator is not None:
            named = asked.coordinator, asked.processes, asked.process
            jax.distributed.initialize(*named, cluster_detection_method="deactivate", **timing)
        else:
            jax.distributed.initialize(local_device_ids=_all_of_node(), **timing)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{number} could not join the others at {place}: {_first_line(error)}") from error
    finally:
        limit.cancel()


def _all_of_node() -> list[int] | None:
    """The GPUs of a SLURM node that has one task: jax would take the first of them alone."""
    if os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1" and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        return list(range(int(os.environ.get("SLURM_GPUS_ON_NODE", "0")))) or None
    return None


def _listen() -> None:
    """Waits for another process's error, and ends this one with it."""
    own = distributed.global_state.process_id
    told = _told(_LONG)
    if told is not None and told["process"] != own:
        time.sleep(_GRACE)
        _leave(told["code"], _passed_on(told))


def _told(milliseconds: int) -> dict[str, Any] | None:
    """What the first process that stopped has said; None where nobody says anything for so long, or nobody can be heard."""
    try:
        assert distributed.global_state.client is not None
        return json.loads(distributed.global_state.client.blocking_key_value_get(_STOPPED, milliseconds))
    except Exception:
        return None


def _passed_on(told: dict[str, Any]) -> str:
    return f"process {told['process']} has stopped, and process {distributed.global_state.process_id} with it: {told['what']}"


def _stop(error: BaseException) -> None:
    """Says what went wrong, here and to the others, and ends the process: threads that wait for others would keep it from ending
    by itself."""
    own, code = distributed.global_state.process_id, 1
    if isinstance(error, UserError):
        what = str(error)
    elif isinstance(error, KeyboardInterrupt):
        what, code = "it was interrupted", 130
    elif isinstance(error, (RuntimeError, ValueError)) and any(word in str(error) for word in _LOST):
        if (told := _told(2000)) is not None:
            _leave(told["code"], _passed_on(told))
        what = (
            f"another process was killed or cannot be reached ({_first_line(error)}). Start all of them again with the same command: "
            "the run goes on from its last checkpoint."
        )
    else:
        traceback.print_exception(error)
        what = f"{type(error).__name__}: {_first_line(error)}"
    with contextlib.suppress(Exception):  # another one was first; or there is nobody left to tell
        assert distributed.global_state.client is not None
        distributed.global_state.client.key_value_set(_STOPPED, json.dumps({"process": own, "what": what, "code": code}))
    _leave(code, f"process {own} of {distributed.global_state.num_processes}: {what}")


# Words of what jax says when the other end of a collective, a barrier or the store is gone.
_LOST = ("Gloo", "UNAVAILABLE", "Connection", "oordination", "eartbeat", "NCCL", "DEADLINE_EXCEEDED", "arrier")


_leaving = threading.Lock()


def _leave(code: int, what: str) -> None:
    """Ends the process, once. The one with the store stays until the others have read what is in it."""
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()  # another thread is at it
    print(f"mmjax: {what}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():  # readers of data
        child.terminate()
    state = distributed.global_state
    with contextlib.suppress(Exception):
        assert state.client is not None
        state.client.key_value_set(f"{_LEFT}/{state.process_id}", "")
        until = time.monotonic() + 2 * _GRACE
        while state.service is not None and time.monotonic() < until:
            if len(state.client.key_value_dir_get(f"{_LEFT}/")) == state.num_processes:
                time.sleep(0.5)
                break
            time.sleep(0.1)
    os._exit(code)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
