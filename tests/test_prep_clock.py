"""The clock of a stream: time stamps are repaired by named rules, and tokens end at gaps.

In: time stamps made up here. Out: nothing.
"""

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from prep.clock import clean_times, clock_findings, rate_times, regularity
from prep.plan import Finding, PrepError


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


def cleaned(times: NDArray[np.float64]) -> tuple[list[int], list[Finding]]:
    """Rows that are kept, and the findings; the times are those of the rows, strictly increasing."""
    kept, rows, findings = clean_times(times, "x")
    assert rows is not None and np.array_equal(kept, times[rows]) and (np.diff(kept) > 0).all()
    return rows.tolist(), findings


@pytest.mark.parametrize("stray_s", [-1.5e9, 1e12, -3600.0, 0.0])
def test_a_time_stamp_far_from_those_around_it_is_dropped(stray_s: float) -> None:
    times = 5000 + np.arange(1000) / 50
    times[[300, 700]] = stray_s
    rows, (found,) = cleaned(times)
    assert rows == [row for row in range(1000) if row not in (300, 700)]
    assert (found.code, found.action) == ("outlier-time", "repaired")
    assert found.message == (
        f"2 time stamps are far from the others (such as {stray_s:.6g} s); their samples are dropped"
    )
    assert found.numbers == {"num_dropped": 2.0, "worst_s": stray_s}


@pytest.mark.parametrize("row", [0, 999])
def test_an_outlier_is_dropped_at_either_end(row: int) -> None:
    times = 5000 + np.arange(1000) / 50
    times[row] = -1.5e9
    rows, (found,) = cleaned(times)
    assert rows == [other for other in range(1000) if other != row]
    assert found.code == "outlier-time"


def test_a_sample_between_two_long_gaps_is_no_outlier() -> None:
    times = np.concatenate([np.arange(100) / 50, [500.0], 1000 + np.arange(100) / 50])
    assert clean_times(times, "x")[1:] == (None, [])


def test_of_a_clock_that_was_reset_the_longest_piece_is_kept() -> None:
    times = np.concatenate([100 + np.arange(400) / 50, np.arange(600) / 50])
    rows, (found,) = cleaned(times)
    assert rows == list(range(400, 1000))
    assert (found.code, found.action) == ("jumps", "repaired")
    assert found.message == (
        "time goes back 1 times, by up to 107.98 s: the clock was reset; "
        "the longest piece is kept, 600 of 1,000 samples"
    )
    assert found.numbers == {"num_jumps": 1.0, "jump_s": pytest.approx(107.98), "num_dropped": 400.0}


def test_pieces_in_another_order_that_fit_together_are_sorted() -> None:
    times = np.roll(np.arange(1000) / 50, 400)
    rows, (found,) = cleaned(times)
    assert rows == [*range(400, 1000), *range(400)]
    assert found.code == "unsorted" and found.numbers == {"num_backwards": 1.0}


def test_shuffled_time_stamps_are_sorted_and_none_is_lost() -> None:
    times = np.random.default_rng(0).permutation(1000) / 50
    rows, (found,) = cleaned(times)
    assert sorted(rows) == list(range(1000)) and found.code == "unsorted"


def test_a_far_clock_is_no_outlier() -> None:
    assert clean_times(1.2e7 + np.arange(1000) / 50, "x")[1:] == (None, [])


def test_twelve_million_bad_time_stamps_take_seconds() -> None:
    times = np.arange(12_000_000) / 1000.0
    times[[5, 6_000_000]] = -1.5e9
    times[7_000_000] = np.nan
    times[[8_000_000, 8_000_001]] = times[[8_000_001, 8_000_000]]
    times[9_000_001] = times[9_000_000]
    begin = time.monotonic()
    _, findings = cleaned(times)
    assert [found.code for found in findings] == ["non-finite-time", "outlier-time", "unsorted", "duplicate-time"]
    assert time.monotonic() - begin < 20


def test_steps_that_scatter_about_one_period_are_jitter() -> None:
    rng = np.random.default_rng(0)
    (found,) = clock_findings(regularity(np.arange(2000) / 30 + rng.normal(0, 0.002, 2000)), "x")
    assert (found.code, found.action) == ("jitter", "noted")
    assert found.message.startswith("steps differ (median 33.")
    assert found.numbers["jitter_ms"] == pytest.approx(2 * np.sqrt(2), rel=0.1)
    assert found.numbers["rate_hz"] == pytest.approx(30, rel=0.02)


def test_gaps_are_counted_in_numbers() -> None:
    (found,) = clock_findings(regularity(np.concatenate([np.arange(25) / 100, 9 + np.arange(20) / 100])), "x")
    assert found.numbers["num_gaps"] == 1 and found.numbers["gap_s"] == pytest.approx(8.76)


def test_a_rate_that_wanders_is_drift() -> None:
    sample = np.arange(20_000)
    clock = regularity(sample / 100 + 2.5e-10 * sample**2)  # 1000 ppm slower at the end than at the start
    (found,) = clock_findings(clock, "x")
    assert (found.code, found.action) == ("drift", "noted")
    assert found.message == "its rate wanders: time stamps stray up to 25 ms from a straight line"
    assert found.numbers["residual_ms"] == pytest.approx(25, rel=1e-3)
    assert found.numbers["drift_ppm"] == pytest.approx(800, rel=0.01)  # of the last fifth over the first


def test_a_constant_offset_of_the_rate_is_no_drift() -> None:
    assert clock_findings(regularity(np.arange(100_000) / 100 * (1 + 5e-5)), "x") == []
