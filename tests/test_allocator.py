"""Freed memory stays in the process: the same large block is had again without a page fault."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from mmjax.allocator import keep_freed_memory
if not keep_freed_memory():
    sys.exit(3)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(64 << 20)
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
print(first, max(faults() for _ in range(4)))
"""


def test_a_large_block_is_not_mapped_anew():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("not glibc, or an accelerator's plugin is installed: nothing is set")
    first, later = map(int, done.stdout.split())
    assert first > 1000 and later < 100
