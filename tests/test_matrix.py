"""Any encoder x connector x port x language model by configuration alone: shapes of a pairwise cover, and a run of every part.

`python -m tests.matrix` does it for all: shapes of every combination, a run of the pairwise cover.
"""

from __future__ import annotations

import jax
import pytest

from tests import matrix

COMBINATIONS = matrix.combinations()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return matrix.tokenizer(tmp_path_factory.mktemp("words"))


def test_shapes_of_a_pairwise_cover(tokenizer):
    rows = matrix.cover(COMBINATIONS)
    assert len(rows) >= len(matrix.CONNECTORS) * len(matrix.LANGUAGE)
    for row in rows:
        matrix.check_shapes(row, tokenizer)


@pytest.mark.parametrize("row", matrix.once(COMBINATIONS), ids=" x ".join)
def test_every_part_learns_and_goes_out_and_comes_back(row, tokenizer, tmp_path):
    assert matrix.run(row, tokenizer, tmp_path)
    jax.clear_caches()
