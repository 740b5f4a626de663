"""Any encoder x connector x port x language model by configuration alone: a few combinations in which each part occurs.

`python -m tests.matrix` has the shapes of every combination, and a run of a pairwise cover of them.
"""

from __future__ import annotations

import jax
import pytest

from tests import matrix


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return matrix.tokenizer(tmp_path_factory.mktemp("words"))


@pytest.mark.parametrize("row", matrix.once(matrix.combinations()), ids=" x ".join)
def test_every_part_learns_and_goes_out_and_comes_back(row, tokenizer, tmp_path):
    matrix.check_shapes(row, tokenizer)
    assert matrix.run(row, tokenizer, tmp_path)
    jax.clear_caches()
