import numpy as np
import pytest

from mmjax.data import packing


@pytest.mark.parametrize("seed", range(4))
def test_rows_keep_their_budgets_and_hold_every_sample_once(seed):
    rng = np.random.default_rng(seed)
    lengths, tiles = rng.integers(1, 65, 3000), rng.integers(0, 4, 3000)
    order = rng.permutation(3000)[:2500]
    rows = packing.plan(lengths, tiles, order, 64, 5)
    for number in range(len(rows)):
        assert 0 < lengths[rows[number]].sum() <= 64 and tiles[rows[number]].sum() <= 5
    assert sorted(rows.samples.tolist()) == sorted(order.tolist())
    again = packing.plan(lengths, tiles, order, 64, 5)
    assert (again.samples == rows.samples).all() and (again.starts == rows.starts).all()


def test_little_is_left_empty():
    lengths = np.random.default_rng(0).integers(5, 60, 5000)
    rows = packing.plan(lengths, np.zeros(5000, int), np.arange(5000), 128, 0)
    assert lengths.sum() / (128 * len(rows)) > 0.97


def test_without_packing_a_row_is_a_sample_and_the_order_stays():
    order = np.array([3, 1, 2])
    rows = packing.plan(np.full(4, 9), np.ones(4, int), order, 64, 9, packing=False)
    assert [rows[number].tolist() for number in range(3)] == [[3], [1], [2]]


def test_a_sample_larger_than_a_row_is_an_error():
    for lengths, tiles in (([65], [0]), ([1], [3])):
        with pytest.raises(ValueError, match="larger than a row of 64 tokens and 2 tiles"):
            packing.plan(np.array(lengths), np.array(tiles), np.array([0]), 64, 2)


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own():
    orders = [packing.order([5, 7], [0, 0], seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert all(sorted(order.tolist()) == list(range(12)) for order in orders)
    assert (orders[0] == orders[3]).all()
    assert (orders[0] != orders[1]).any() and (orders[0] != orders[2]).any()


def test_weights_set_shares_and_no_sample_comes_twice_before_all_came():
    sizes, weights = [1000, 100, 50], [1.0, 3.0, 0.0]
    counts, seen = np.zeros(3), []
    for epoch in range(4):
        order = packing.order(sizes, weights, 0, epoch)
        assert len(order) == 1150
        sources = np.searchsorted([1000, 1100], order, side="right")
        counts += np.bincount(sources, minlength=3)
        seen.append(order[order < 1000])
    assert (counts == [275 * 4, 825 * 4, 50 * 4]).all()
    assert len(np.unique(np.concatenate(seen[:3]))) == 825
    assert np.bincount(np.concatenate(seen), minlength=1000).min() == 1
