"""The clock of a stream: time stamps are repaired by named rules, and tokens end at gaps.

In: time stamps made up here. Out: nothing.
"""

import numpy as np
import pytest

from prep.clock import clean_times, clock_findings, rate_times, regularity
from prep.plan import PrepError


def test_a_regular_clock_gets_tokens_of_about_100_ms():
    clock = regularity(rate_times(5.0, 120.0, 1200))
    assert clock.samples_per_token == 12
    assert clock.num_tokens == 100
    assert clock.duration_ns == 100_000_000
    assert clock.start_ns[:2].tolist() == [5_000_000_000, 5_100_000_000]


def test_tokens_start_at_the_time_stamps_of_the_file_even_where_they_are_rounded():
    time_s = np.round(670.6407 + np.arange(600) / 120, 5)
    clock = regularity(time_s)
    assert clock.samples_per_token == 12
    assert clock.start_ns.tolist() == [round(t * 1e5) * 10_000 for t in time_s[::12]]


def test_the_start_is_exact_far_from_zero():
    time_s = 1.2e7 + np.arange(3000) / 30
    clock = regularity(time_s)
    assert clock.samples_per_token == 3
    assert (np.abs(clock.start_ns - (12_000_000_000_000_000 + np.arange(0, 3000, 3) * 10**9 // 30)) <= 2).all()


def test_a_gap_ends_a_token_early_and_the_next_starts_at_the_next_sample():
    time_s = np.concatenate([np.arange(25) / 100, 9 + np.arange(20) / 100])
    clock = regularity(time_s)
    assert clock.samples_per_token == 10
    assert clock.bounds.tolist() == [0, 10, 20, 25, 35, 45]
    assert clock.start_ns[3] == 9_000_000_000
    assert [finding.code for finding in clock_findings(clock, "x")] == ["gaps"]


def test_an_irregular_clock_keeps_every_time_stamp():
    time_s = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.05, 500))
    clock = regularity(time_s)
    assert clock.samples_per_token == 1
    assert clock.num_tokens == 500
    assert [finding.code for finding in clock_findings(clock, "x")] == ["irregular"]


def test_one_percent_of_a_sample_is_the_border_of_regular():
    time_s = np.arange(1000) / 100
    time_s[505] += 0.00009
    assert regularity(time_s).samples_per_token == 10
    time_s[505] += 0.00009
    assert regularity(time_s).samples_per_token == 1


def test_a_slow_drift_does_not_make_a_clock_irregular():
    time_s = np.arange(100_000) / 100 * (1 + 5e-5) + 1e-6 * np.sin(np.arange(100_000) / 1e4)
    assert regularity(time_s).samples_per_token == 10


def test_a_slow_clock_has_one_sample_per_token_and_no_finding():
    clock = regularity(np.arange(100) / 4)
    assert clock.samples_per_token == 1
    assert clock_findings(clock, "x") == []


def test_good_time_stamps_are_left_alone():
    times, rows, findings = clean_times([1.0, 2.0, 3.0], "x")
    assert (times.tolist(), rows, findings) == ([1.0, 2.0, 3.0], None, [])


def test_bad_time_stamps_are_repaired_by_named_rules():
    times, rows, findings = clean_times([3.0, np.nan, 1.0, 2.0, 2.0, np.inf], "x")
    assert times.tolist() == [1.0, 2.0, 3.0]
    assert rows is not None and rows.tolist() == [2, 3, 0]  # of two equal stamps the first is kept
    assert [finding.code for finding in findings] == ["non-finite-time", "unsorted", "duplicate-time"]
    assert all(finding.action == "repaired" and finding.path == "x" for finding in findings)


def test_time_stamps_that_are_all_nan_are_refused():
    with pytest.raises(PrepError, match="none of its 1 time stamps is a number"):
        clean_times([np.nan], "x")
