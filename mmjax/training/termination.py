"""SIGTERM: noted when it comes, and obeyed by all processes after the same step."""

from __future__ import annotations

import collections
import contextlib
import signal
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LAG = 2  # steps until a process hears what another has noted: the answer is then there, and no device is waited for


class Terminated(SystemExit):
    """The run was asked to stop (SIGTERM), and everything is saved."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextlib.contextmanager
def noting_sigterm() -> Iterator[list[bool]]:
    """Inside, SIGTERM is noted instead of killing: `train` saves and stops after one of the next steps.

    jax has a service for that, multihost_utils.reached_preemption_sync_point, but it would take the signal from everything else from the
    start of the process on, and a handler of Python's takes it from the service."""
    terminating: list[bool] = []
    before = signal.signal(signal.SIGTERM, lambda *_: terminating.append(True))
    try:
        yield terminating
    finally:
        signal.signal(signal.SIGTERM, before)


class Agreement:
    """Whether any process has noted SIGTERM in `terminating`; every process asks once a step, and all get the same answers."""

    def __init__(self, terminating: list[bool], mesh: Mesh):
        self._terminating = terminating
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._size = mesh.size
        self._asked: collections.deque[jax.Array] = collections.deque()

    def reached(self) -> bool:
        """In a step: with several processes, what they noted up to LAG steps ago."""
        if jax.process_count() == 1:
            return bool(self._terminating)
        self._ask()
        return len(self._asked) > LAG and bool(self._asked.popleft())

    def settled(self) -> bool:
        """Behind the last step: what is noted up to now."""
        if jax.process_count() == 1:
            return bool(self._terminating)
        self._ask()
        noted = any([bool(asked) for asked in self._asked])
        self._asked.clear()
        return noted

    def _ask(self) -> None:
        noted = np.full(1, bool(self._terminating))
        flags = jax.make_array_from_callback((self._size,), self._each, lambda _: noted)
        self._asked.append(self._any(flags))
