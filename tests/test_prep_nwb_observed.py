"""When units were observed: outside of it counts are missing, and intervals between spikes are none.

In: files that nwb_builders writes, with planted truth. Out: nothing.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import RNG, codes, plan, stream, with_units, write
from pynwb import NWBFile, TimeSeries
from spike_builders import bins, counted, message

from prep.nwb.session import plan_session
from prep.nwb.spike_features import interval_features
from prep.recipe import Recipe, Span, Splits
from prep.settings import COUNT_MISSING


def with_observed(spikes: list, observed: list) -> Callable[[NWBFile], None]:
    def fill(nwb: NWBFile) -> None:
        for times_s, stretches in zip(spikes, observed, strict=True):
            nwb.add_unit(spike_times=times_s, obs_intervals=stretches)

    return fill


def test_what_was_not_observed_is_missing_and_not_silent(tmp_path: Path):
    spikes = [np.array([0.5, 3.0, 9.5]), np.array([1.0, 6.99, 7.01])]
    session = plan(tmp_path, with_observed(spikes, [[[0.0, 2.0], [2.5, 10.0]]] * 2))
    counts, first_bin = bins(session)
    time_s = (np.arange(counts.shape[1]) + first_bin) * 0.02
    missing = (time_s >= 2.0 - 1e-9) & (time_s < 2.5 - 1e-9)
    assert missing.sum() == 25
    assert np.array_equal(counts == COUNT_MISSING, np.stack([missing, missing]))
    assert np.array_equal(counts[:, ~missing], counted(spikes, counts.shape[1], first_bin)[:, ~missing])
    assert codes(session) == ["obs-intervals"]
    assert "units were observed for 94.44 % of the time" in message(session, "obs-intervals")


def test_a_bin_that_is_observed_in_part_is_missing(tmp_path: Path):
    session = plan(tmp_path, with_observed([[1.0, 1.05, 1.5]], [[[1.0, 1.21], [1.235, 2.0]]]))
    counts, first_bin = bins(session)
    assert (np.flatnonzero(counts[0] == COUNT_MISSING) + first_bin).tolist() == [60, 61]  # 1.20 to 1.24 s


def test_stretches_that_touch_or_overlap_are_one(tmp_path: Path):
    session = plan(tmp_path, with_observed([[1.0, 1.05, 2.5]], [[[1.31, 2.01], [0.9, 1.31], [2.0, 3.0]]]))
    assert not (bins(session)[0] == COUNT_MISSING).any()
    assert codes(session) == []


def test_each_unit_has_its_own_observed_time(tmp_path: Path):
    spikes = [np.arange(0.01, 10, 0.1)] * 3
    observed = [[[0.0, 4.0]], [[0.0, 10.0]], [[2.0, 3.0], [6.0, 10.0]]]
    session = plan(tmp_path, with_observed(spikes, observed))
    counts, _ = bins(session)
    time_s = np.arange(counts.shape[1]) * 0.02 + 1e-9
    for unit, stretches in enumerate(observed):
        seen = np.any([(time_s >= start) & (time_s < stop) for start, stop in stretches], axis=0)
        assert np.array_equal(counts[unit] != COUNT_MISSING, seen)
        assert np.array_equal(counts[unit, seen], counted(spikes, counts.shape[1], 0)[unit, seen])
    outside = 60 + 50
    assert message(session, "spikes-outside-observed").startswith(f"{outside} spikes are outside the observed time")
    assert len(pickle.dumps(stream(session, "spikes").reader)) < 3000


def test_units_without_times_of_observation_count_as_observed_throughout(tmp_path: Path):
    session = plan(tmp_path, with_units([1.0, 5.0]))
    assert not (bins(session)[0] == COUNT_MISSING).any()
    (row,) = [row for row in session.coverage if row.path == "units"]
    assert row.reason == "no times of observation: every unit counts as observed throughout"


def test_stretches_that_end_before_they_start_are_dropped_and_counted(tmp_path: Path):
    fill = with_observed([[1.0, 4.5], [1.0]], [[[0.0, 2.0], [4.0, 3.0], [4.0, 5.0]], [[0.0, 5.0]]])
    session = plan(tmp_path, fill)
    assert "1 of 4 stretches end before they start" in message(session, "obs-intervals-backward")
    counts, first_bin = bins(session)
    time_s = (np.arange(counts.shape[1]) + first_bin) * 0.02 + 1e-9
    assert np.array_equal(counts[0] == COUNT_MISSING, (time_s >= 2) & (time_s < 4))


def test_a_broken_index_of_observed_time_is_refused_and_the_spikes_are_read(tmp_path: Path):
    path = write(tmp_path, with_observed([[1.0, 4.5], [1.0]], [[[0.0, 2.0]], [[0.0, 5.0]]]))
    with h5py.File(path, "r+") as file:
        file["units/obs_intervals_index"][1] = 9
    session = plan_session(path, Recipe(), "d1")
    assert [finding.path for finding in session.refused] == ["units/obs_intervals"]
    assert "obs_intervals_index points to stretch 9, but there are only 2" in session.refused[0].message
    assert bins(session)[0].sum() == 3


def test_observed_time_on_another_clock_is_refused(tmp_path: Path):
    session = plan(tmp_path, with_observed([[1.0, 4.5]], [[[1e6, 2e6]]]))
    assert session.refused[0].message.startswith("none of the spikes lies in them, so they are on another clock")
    assert bins(session)[0].sum() == 2


@pytest.mark.parametrize("factor", [1, 1000])
def test_times_of_observation_are_milliseconds_where_they_are_as_late_as_the_spikes(tmp_path: Path, factor: int):
    spikes = [np.arange(0.5, 600, 0.25)] * 3

    def fill(nwb: NWBFile) -> None:
        stretches = [[0.0, 100.0 * factor], [200.0 * factor, 600.0 * factor]]
        with_observed([times_s * 1000 for times_s in spikes], [stretches] * 3)(nwb)
        nwb.add_acquisition(TimeSeries(name="speed", data=RNG.normal(size=6000), unit="cm/s", rate=10.0))

    session = plan(tmp_path, fill)
    assert "spike-times-ms" in codes(session)
    counts, first_bin = bins(session)
    assert (np.flatnonzero(counts[0] == COUNT_MISSING) + first_bin).tolist() == list(range(5000, 10_000))


# ---------------------------------------------------------------- features of spikes


def test_regular_and_bursting_units_have_the_features_that_were_planted(tmp_path: Path):
    regular = np.arange(0.0, 100.0, 0.1)
    bursting = np.sort(np.concatenate([np.arange(0.0, 100.0, 1.0), np.arange(0.0, 100.0, 1.0) + 0.004]))
    few = np.array([1.0, 50.0])
    session = plan(tmp_path, with_units(regular, bursting, few), splits=Splits(gap_s=0.0))
    features = session.units.spike_features
    assert features is not None and features.shape == (3, 2)
    train = [time_s[time_s < 0.7 * regular[-1]] for time_s in (regular, bursting)]
    interval_s = np.diff(np.round(train[1], 9))
    assert features[0, 0] < 1e-6 and features[0, 1] == 0
    assert features[1] == pytest.approx([interval_s.std() / interval_s.mean(), (interval_s < 0.01).mean()], rel=1e-5)
    assert np.isnan(features[2]).all()


def test_intervals_count_within_one_train_block_only(tmp_path: Path):
    time_s = np.concatenate([np.arange(0, 10, 0.1), np.arange(20, 30, 0.1), np.arange(40, 60, 0.003)])
    spans = (
        Span(label="train", start_s=0, stop_s=10), Span(label="train", start_s=20, stop_s=30),
        Span(label="test", start_s=40, stop_s=60),
    )  # fmt: skip
    features = plan(tmp_path, with_units(time_s), splits=Splits(explicit=spans)).units.spike_features
    assert features is not None and features[0, 0] < 1e-6 and features[0, 1] == 0


def test_intervals_across_time_that_was_not_observed_do_not_count(tmp_path: Path):
    time_s = np.concatenate([np.arange(0, 10, 0.1), np.arange(50, 60, 0.1)])
    session = plan(tmp_path, with_observed([time_s], [[[0.0, 10.0], [50.0, 60.0]]]))
    reader = stream(session, "spikes").reader
    features = interval_features(reader, np.array([[0, 60 * 10**9]]))
    assert features[0, 0] < 1e-6


def test_sessions_without_spikes_have_no_spike_features(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        nwb.add_acquisition(TimeSeries(name="speed", data=RNG.normal(size=99), unit="cm/s", rate=10.0))

    assert plan(tmp_path, fill).units.spike_features is None


def test_intervals_that_hold_an_invalid_time_do_not_count(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units(np.concatenate([np.arange(0, 10, 0.1), np.arange(50, 60, 0.1)]))(nwb)
        nwb.add_invalid_time_interval(start_time=20.0, stop_time=30.0)

    spans = (Span(label="train", start_s=0, stop_s=60),)
    features = plan(tmp_path, fill, splits=Splits(explicit=spans)).units.spike_features
    assert features is not None and features[0, 0] < 1e-6
