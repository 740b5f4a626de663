"""The C library's memory allocator, set for programs that take and give back the same large buffers thousands of times."""

from __future__ import annotations

import ctypes
import importlib.util
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Keeps freed memory in the process instead of giving it back to the system, where JAX has only a CPU to run on.

    XLA:CPU asks for its temporaries anew in every step; by default glibc maps them afresh and the kernel clears every page again,
    a quarter of the time of a small model's step (0.16 s against 0.12 s for 2,048 tokens through 370,000 parameters). To be called
    before JAX starts its threads. Does nothing, and returns False, where the C library is another or an accelerator's plugin is there.
    """
    accelerated = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    if accelerated or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((M_ARENA_MAX, 1), (M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_MAX, 0))
    return all([mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings])
