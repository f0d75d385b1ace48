"""Clocks that are odd and honest: milliseconds, few events, rates and time stamps in the forms of other tools.

In: files of odd_builders. Out: nothing.
"""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import RNG, codes, plan, reason, running, stream, values, with_units
from odd_builders import REGULAR, bent, moments, only, swap, together, with_trials
from pynwb import NWBFile
from pynwb.misc import IntervalSeries

from prep.settings import EVENT_FIELDS, to_ns

# ---------------------------------------------------------------- time


def test_sparse_events_beside_a_short_invalid_time_stay_seconds(tmp_path: Path):
    licks = np.sort(RNG.uniform(0, 3000, 900))

    def fill(nwb: NWBFile) -> None:
        moments("licks", licks)(nwb)
        running(RNG.normal(size=60_000), starting_time=0.0, rate=20.0)(nwb)
        nwb.add_invalid_time_interval(start_time=1.0, stop_time=4.0)

    session = plan(tmp_path, fill)
    assert np.array_equal(stream(session, "licks").start_ns, to_ns(licks))
    assert "milliseconds" not in codes(session)


def test_events_beside_three_seconds_of_anything_else_stay_seconds(tmp_path: Path):
    licks = np.sort(RNG.uniform(0, 3000, 900))
    fill = together(moments("licks", licks), lambda nwb: nwb.add_invalid_time_interval(start_time=1.0, stop_time=4.0))
    assert np.array_equal(stream(plan(tmp_path, fill), "licks").start_ns, to_ns(licks))


def test_durations_of_events_in_milliseconds_become_seconds_too(tmp_path: Path):
    on_ms = np.arange(100) * 3000.0
    series = IntervalSeries(
        name="laser",
        data=np.tile([1, -1], 100).astype("i1"),
        timestamps=np.stack([on_ms, on_ms + 500], axis=1).ravel(),
    )
    session = plan(tmp_path, together(REGULAR, lambda nwb: nwb.add_acquisition(series)))
    laser = stream(session, "laser")
    assert np.array_equal(laser.start_ns, to_ns(on_ms / 1000))
    assert values(laser)[:, 0, EVENT_FIELDS.index("duration_s")].tolist() == [0.5] * 100


def test_a_table_in_milliseconds_is_in_seconds_wherever_it_goes(tmp_path: Path):
    start_ms = np.arange(50) * 6000.0
    fill = together(REGULAR, with_trials(start_ms, 3000.0, go_time=start_ms + 1000, contrast=[0.1, 1.0] * 25))
    session = plan(tmp_path, fill)
    trials = session.intervals["trials"]
    assert np.array_equal(trials.start_ns, to_ns(start_ms / 1000))
    assert np.array_equal(trials.stop_ns, to_ns(start_ms / 1000 + 3))
    assert trials.columns["go_time"].tolist() == (start_ms / 1000 + 1).tolist()
    assert trials.columns["contrast"].tolist() == [0.1, 1.0] * 25
    assert np.array_equal(stream(session, "trials_stimuli").start_ns, trials.start_ns)
    assert np.array_equal(stream(session, "trials_events").start_ns, to_ns(start_ms / 1000 + 1))
    assert only(session, "milliseconds").path == "intervals/trials"


def test_reaction_times_of_few_trials_are_no_events(tmp_path: Path):
    starts_s = np.arange(3) * 5.0
    fill = together(REGULAR, with_trials(starts_s, 4.0, response_time=[0.3, 0.4, 0.5], go_time=starts_s + 1))
    assert stream(plan(tmp_path, fill), "trials_events").spec.types == ("go_time",)


def test_spike_times_that_are_sample_numbers_are_refused(tmp_path: Path):
    fill = together(REGULAR, with_units(*(np.sort(RNG.uniform(0, 300, 2000)) for _ in range(2))))

    def edit(file: h5py.File) -> None:
        samples = (file["units/spike_times"][()] * 30_000).astype("i8")
        samples[-1] = 8_999_999
        attributes = dict(file["units/spike_times"].attrs)
        del file["units/spike_times"]
        file["units/spike_times"] = samples
        file["units/spike_times"].attrs.update(attributes)

    session = bent(tmp_path, fill, edit)
    assert only(session, "broken-object").message == (
        "its spike times are whole numbers up to 8,999,999, while the longest of the other clocks takes 300 s: "
        "they are numbers of samples, not seconds. Divide them by the sampling rate."
    )
    assert [item.spec.name for item in session.streams] == ["running"]


def test_time_stamps_of_float32_that_round_the_clock_are_told(tmp_path: Path):
    def edit(file: h5py.File) -> None:
        put_path = "acquisition/odd/timestamps"
        del file[put_path]
        file[put_path] = (20_000 + np.arange(500) / 100).astype(np.float32)

    session = bent(tmp_path, moments("odd", np.arange(500.0), RNG.normal(size=500)), edit)
    found = only(session, "coarse-time")
    assert found.message == "its time stamps are float32, which at 20005 s are 1.95 ms apart"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda group: group["starting_time"].attrs.modify("rate", 0.0), "a rate of 0 Hz; expected a time, and more"),
        (lambda group: group["starting_time"].attrs.modify("rate", -20.0), "a rate of -20 Hz; expected"),
        (lambda group: group["starting_time"].attrs.__delitem__("rate"), "a rate of nan Hz; expected"),
        (lambda group: group.__delitem__("starting_time"), "it has neither `timestamps` nor `starting_time`, so when"),
        (
            lambda group: group.__setitem__("timestamps", h5py.SoftLink("/nowhere")),
            "its `timestamps` is a link that leads nowhere. Get the file or the object that it names",
        ),
        (
            lambda group: group.__setitem__("timestamps", np.array([b"12:00:00"] * 90)),
            "its `timestamps` is |S8 (90,), expected seconds as numbers, one for each sample",
        ),
        (lambda group: group.__setitem__("timestamps", 3.0), "its `timestamps` is float64 (), expected seconds"),
        (lambda group: group.__setitem__("timestamps", np.zeros((90, 2))), "expected one number for each sample"),
    ],
)
def test_a_series_without_a_clock_says_what_it_lacks(tmp_path: Path, edit: Callable[[h5py.Group], None], message: str):
    odd = running(RNG.normal(size=90), name="odd", starting_time=0.0, rate=20.0)
    session = bent(tmp_path, together(REGULAR, odd), lambda file: edit(file["acquisition/odd"]))
    assert message in reason(session, "acquisition/odd")
    assert [item.spec.name for item in session.streams] == ["running"]


def test_a_bad_clock_is_not_blamed_on_its_neighbours(tmp_path: Path):
    odd = moments("broken", np.arange(50.0), RNG.normal(size=50))
    fill = together(
        odd, moments("licks", np.arange(50) * 2.0), moments("slow", np.arange(50) * 1.5, RNG.normal(size=50))
    )
    stamps = np.array([b"2020-01-01T00:00:00"] * 50)
    session = bent(tmp_path, fill, lambda file: swap(file, "acquisition/broken/timestamps", stamps))
    assert {item.spec.name for item in session.streams} == {"licks", "slow"}
    assert session.refused == ()


def test_a_start_and_a_rate_in_lists_of_one_are_read(tmp_path: Path):
    def edit(file: h5py.File) -> None:
        swap(file, "acquisition/running/starting_time", np.array([3.0]))
        file["acquisition/running/starting_time"].attrs["rate"] = np.array([20.0])

    assert stream(bent(tmp_path, REGULAR, edit), "running").start_ns[:2].tolist() == [3_000_000_000, 3_100_000_000]


def test_columns_and_rows_of_matlab_are_read_as_lists(tmp_path: Path):
    data, time_s = RNG.normal(size=300), np.arange(300) / 10
    licks = np.sort(RNG.uniform(0, 30, 50))

    def edit(file: h5py.File) -> None:
        swap(file, "acquisition/column/timestamps", time_s[:, None])
        swap(file, "acquisition/licks/timestamps", licks[None])
        swap(file, "acquisition/licks/data", np.ones((1, 50)))

    session = bent(tmp_path, together(moments("column", time_s, data), moments("licks", licks)), edit)
    assert np.array_equal(values(stream(session, "column")).ravel(), data.astype(np.float32))
    assert np.array_equal(stream(session, "licks").start_ns, to_ns(licks))


def test_the_longest_stream_is_split_where_there_is_no_activity(tmp_path: Path):
    session = plan(tmp_path, together(moments("start_of_session", [5.0]), REGULAR))
    assert [label for *_, label in session.splits] == ["train", "valid", "test"]
    assert session.splits[-1][1] == int(to_ns(5999 / 20))
