"""Spikes and samples are cut into tokens: each once, at its place.

In: arrays made up here. Out: nothing.
"""

import numpy as np
import pytest

from prep.tokens import CountTokens, Observed, cos_sin, cut_samples, num_saturated, observed_stretches


def count(time_ns: list[int], unit: list[int], first_token: int = 0, num_tokens: int = 2, num_units: int = 2):
    tokens = CountTokens(first_token, num_tokens, num_units)
    tokens.add(np.array(time_ns, np.int64), np.array(unit))
    return tokens.values(first_token, first_token + num_tokens)


def test_a_spike_on_the_edge_belongs_to_the_later_bin():
    values = count([19_999_999, 20_000_000, 100_000_000], [0, 0, 1])
    assert values[0, 0].tolist() == [1, 1, 0, 0, 0]
    assert values[1, 1].tolist() == [1, 0, 0, 0, 0]
    assert values.sum() == 3


def test_spikes_before_zero_are_counted_in_their_own_bin():
    assert count([-1], [0], first_token=-1)[0, 0].tolist() == [0, 0, 0, 0, 1]


def test_tokens_read_in_parts_equal_tokens_read_at_once():
    rng = np.random.default_rng(0)
    time_ns, unit = rng.integers(0, 10**9, 5000), rng.integers(0, 2, 5000)
    whole = count(time_ns, unit, num_tokens=10)
    parts = [count(time_ns, unit, first_token=k, num_tokens=1) for k in range(10)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert whole.sum() == 5000


def test_counts_saturate_at_254_and_the_excess_is_reported():
    time_ns, unit = np.zeros(300, np.int64), np.zeros(300, np.int64)
    assert count(time_ns, unit)[0, 0, 0] == 254
    assert num_saturated(time_ns, unit) == 300 - 254
    assert num_saturated(time_ns[:254], unit[:254]) == 0


def test_samples_are_cut_at_the_bounds_and_the_rest_is_missing():
    samples = np.arange(10.0).reshape(5, 2)
    values = cut_samples(samples, np.array([0, 3, 5]), 3)
    assert values.shape == (2, 2, 3)
    assert values.dtype == np.float32
    assert values[0].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert np.array_equal(values[1], np.array([[6, 8, np.nan], [7, 9, np.nan]], np.float32), equal_nan=True)


def test_an_angle_becomes_cos_and_sin_side_by_side():
    pairs = cos_sin(np.array([[0.0, np.pi / 2]]))
    assert np.allclose(pairs, [[1, 0, 0, 1]])


def observed(*stretches: list[tuple[int, int]], list_of: list[int]) -> Observed:
    lists = [np.array(item, np.int64).reshape(-1, 2) for item in stretches]
    return observed_stretches(lists, np.array(list_of, np.int32))


def test_stretches_are_put_in_order_and_joined_where_they_touch():
    result = observed([(50, 60), (0, 10), (10, 20), (5, 7)], [], [(3, 4)], list_of=[0, 1, 2])
    assert result.start_ns.tolist() == [0, 50, 3]
    assert result.stop_ns.tolist() == [20, 60, 4]
    assert result.bounds.tolist() == [0, 2, 2, 3]


def test_each_spike_is_placed_in_the_stretch_of_its_unit():
    result = observed([(0, 10), (20, 30)], [], list_of=[0, -1, 1, 0])
    time_ns = np.array([0, 10, 11, 20, 31, 5, 5, 25])
    unit = np.array([0, 0, 0, 0, 0, 1, 2, 3])
    assert result.place(time_ns, unit).tolist() == [0, 0, -1, 1, -1, 2, -1, 1]
    assert result.place(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


def test_bins_that_are_not_wholly_observed_are_missing_for_their_units_only():
    bin_ns = 20_000_000
    result = observed([(0, 5 * bin_ns), (6 * bin_ns + 1, 9 * bin_ns)], list_of=[0, -1])
    counts = np.zeros((2, 2, 5), np.uint8)
    result.hide(counts, 0)
    assert counts[:, 0].tolist() == [[0, 0, 0, 0, 0], [255, 255, 0, 0, 255]]
    assert counts[:, 1].sum() == 0
    later = np.zeros((1, 2, 5), np.uint8)
    result.hide(later, 1)
    assert later[0].tolist() == counts[1].tolist()


def test_the_share_of_observed_time_is_the_mean_over_units():
    result = observed([(0, 10), (20, 30)], [(0, 40)], list_of=[0, 1, -1])
    assert result.share(0, 40) == pytest.approx((0.5 + 1 + 1) / 3)
    assert result.share(5, 25) == pytest.approx((0.5 + 1 + 1) / 3)
