"""Spikes and samples are cut into tokens: each once, at its place.

In: arrays made up here. Out: nothing.
"""

import numpy as np

from prep.tokens import CountTokens, cos_sin, cut_samples, num_saturated


def count(time_ns: list[int], unit: list[int], first_token: int = 0, num_tokens: int = 2, num_units: int = 2):
    tokens = CountTokens(first_token, num_tokens, num_units)
    tokens.add(np.array(time_ns, np.int64), np.array(unit))
    return tokens.values()


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
