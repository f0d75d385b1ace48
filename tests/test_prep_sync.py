"""Sync: pulses are matched though some are lost, and the map between clocks is right between and beyond them.

In: trains of pulses made up here, small NWB files (nwb_builders), the synthetic brain. Out: nothing.
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from nwb_builders import plan, running, stream, with_units
from pynwb import NWBFile, TimeSeries

from prep import synthetic
from prep.nwb.session import plan_session
from prep.plan import Finding, PrepError, SessionPlan
from prep.recipe import Recipe, Sync
from prep.sync import ClockMap, match_clocks, rising_edges

Floats = NDArray[np.float64]
RNG = np.random.default_rng(0)


def train(num: int = 400, seed: int = 0) -> Floats:
    return np.cumsum(np.random.default_rng(seed).uniform(0.5, 1.5, num))


# ---------------------------------------------------------------- the map


def test_the_map_is_linear_between_pulses_and_exact_at_them() -> None:
    found = ClockMap(other_s=np.array([0.0, 10.0, 20.0]), session_s=np.array([5.0, 16.0, 25.0]))
    assert found.to_session(np.array([0.0, 5.0, 10.0, 15.0, 20.0])).tolist() == [5.0, 10.5, 16.0, 20.5, 25.0]


def test_beyond_the_pulses_the_map_goes_on_at_the_mean_slope_of_its_end() -> None:
    found = ClockMap(other_s=np.array([0.0, 10.0, 20.0]), session_s=np.array([5.0, 16.0, 25.0]))
    assert found.to_session(np.array([-10.0, 30.0])).tolist() == [-5.0, 35.0]  # 20 s in 20 s, not 11 s in 10 s
    assert found.outside(np.array([-10.0, 0.0, 20.0, 21.0])) == (2, 10.0)
    assert found.outside(np.array([1.0, 2.0])) == (0, 0.0)


def test_two_clocks_that_agree_are_mapped_to_the_bit_far_from_zero() -> None:
    times = 1.2e7 + train()
    between = 1.2e7 + np.sort(RNG.uniform(0, 500, 1000))
    assert np.array_equal(ClockMap(other_s=times, session_s=times).to_session(between), between)


def test_the_line_measures_drift_and_offset_in_the_middle() -> None:
    times = train()
    other = times + 50e-6 * times + 0.03
    drift_ppm, offset_s, residual_s = ClockMap(other_s=other, session_s=times).line()
    assert drift_ppm == pytest.approx(50, abs=1e-6)
    assert offset_s == pytest.approx(0.03 + 50e-6 * times.mean(), abs=1e-12)
    assert np.abs(residual_s).max() < 1e-12


# ---------------------------------------------------------------- matching


@pytest.mark.parametrize("drift", [0.0, 50e-6, -9e-4])
@pytest.mark.parametrize("offset_s", [0.0, 0.03, -1234.5, 1.2e7])
def test_pulses_are_matched_though_some_are_lost_and_some_are_extra(drift: float, offset_s: float) -> None:
    session_s, rng = train(), np.random.default_rng(1)
    other_s = session_s * (1 + drift) + offset_s
    lost, missed = rng.choice(400, 30, replace=False), rng.choice(400, 20, replace=False)
    extra = rng.uniform(other_s[0], other_s[-1], 8)
    reference, other = np.delete(session_s, missed), np.sort(np.append(np.delete(other_s, lost), extra))
    found = match_clocks(reference, other)
    both = np.delete(session_s, np.union1d(lost, missed))
    assert set(found.session_s) == set(both)  # each pulse that both have, and no other
    assert np.abs(found.other_s - (both * (1 + drift) + offset_s)).max() < 1e-8
    assert found.num_unmatched == (len(reference) - len(both), len(other) - len(both))


def test_a_clock_that_wanders_is_followed() -> None:
    session_s = train(2000)
    other_s = session_s + 0.02 * np.sin(session_s / 200) + 7
    found = match_clocks(session_s, np.delete(other_s, [5, 100, 1500]))
    assert len(found.session_s) == 1997
    between = np.linspace(10, 1900, 5000)
    mapped = found.to_session(between + 0.02 * np.sin(between / 200) + 7)
    assert np.abs(mapped - between).max() < 1e-6


def test_numbers_for_the_report_are_few() -> None:
    numbers = match_clocks(train(3000), train(3000) + 5).numbers()
    assert numbers["num_pulses"] == 3000 and numbers["offset_ms"] == pytest.approx(5000)
    assert isinstance(numbers["knot_s"], list) and len(numbers["knot_s"]) == 200


def test_residuals_are_measured_between_neighbours() -> None:
    session_s, rng = train(2000), np.random.default_rng(1)
    numbers = match_clocks(session_s, session_s * (1 + 3e-5) + rng.normal(0, 3e-4, 2000)).numbers()
    assert 0.1 < numbers["residual_ms"] < 0.4
    assert numbers["residual_max_ms"] < 3


def test_constant_intervals_are_matched_by_count_alone() -> None:
    session_s = np.arange(300.0)
    found = match_clocks(session_s, session_s * (1 + 1e-4) + 3)
    assert np.array_equal(found.session_s, session_s)


@pytest.mark.parametrize(
    ("reference", "other", "message"),
    [
        (np.arange(300.0), np.arange(299.0), "pulses come every 1 s, 300 of `reference` and 299 of `pulses`"),
        (
            np.arange(300.0),
            np.delete(np.arange(301.0), 100),
            "pulses come every 1 s, and one of 300 was lost or doubled",
        ),
        (np.array([1.0, 2.5]), train(), "`reference` has 2 pulses; at least 3 are needed"),
        (train(), np.zeros(0), "`pulses` has 0 pulses; at least 3 are needed"),
        (np.cumsum(np.tile([1.0, 2.0], 100)), np.cumsum(np.tile([1.0, 2.0], 90)), "match in more than one way"),
        (train(60), 9 * train(60, seed=1), "their intervals do not match at all. Are these two records of the same"),
        (train(400), train(400, seed=1), "their intervals do not match at all"),
        (
            train(400),
            np.append(train(400)[:60], 70 + train(340, seed=1)),
            "their intervals do not match: only 6",
        ),
        (train(20_000) / 3, train(20_000, seed=1) / 3, "and these scatter by"),  # dense: neighbours by chance
    ],
)
def test_trains_that_cannot_be_matched_are_refused(reference: Floats, other: Floats, message: str) -> None:
    with pytest.raises(PrepError) as caught:
        match_clocks(reference, other)
    assert message in str(caught.value)


# ---------------------------------------------------------------- edges


def test_a_rising_edge_lies_where_the_signal_passes_mid_range() -> None:
    times = np.arange(8) / 10
    signal = np.array([0.0, 0.0, 1.0, 4.0, 4.0, 0.0, 0.0, 4.0])
    edges = rising_edges([(times, signal)], 0.0, 4.0, is_sampled=True)
    np.testing.assert_allclose(edges, [0.2 + 0.1 / 3, 0.65], rtol=0, atol=1e-12)


def test_of_changes_of_state_the_time_stamp_counts() -> None:
    edges = rising_edges([(np.array([1.0, 1.5, 7.0, 7.2]), np.array([0.0, 1.0, 0.0, 1.0]))], 0.0, 1.0, is_sampled=False)
    assert edges.tolist() == [1.5, 7.2]


def test_noise_on_an_edge_is_no_second_pulse_and_a_high_start_is_none() -> None:
    times = np.arange(9.0)
    signal = np.array([4.0, 0.0, 1.9, 2.1, 1.9, 2.1, 4.0, 2.1, 1.9])
    assert len(rising_edges([(times, signal)], 0.0, 4.0, is_sampled=True)) == 1


def test_edges_are_the_same_however_the_signal_is_cut_into_blocks() -> None:
    times = np.arange(5000) / 1000
    signal = np.where(np.sin(times * 40) > 0.5, 5.0, 0.0) + RNG.normal(0, 0.1, 5000)
    whole = rising_edges([(times, signal)], 0.0, 5.0, is_sampled=True)
    parts = rising_edges([(times[i : i + 7], signal[i : i + 7]) for i in range(0, 5000, 7)], 0.0, 5.0, is_sampled=True)
    assert len(whole) == 32 and np.array_equal(whole, parts)


# ---------------------------------------------------------------- from the file to tokens


def pulses(name: str, times: Floats) -> TimeSeries:
    return TimeSeries(name=name, data=np.ones(len(times)), unit="n.a.", timestamps=times)


def recorded(times: Floats, other: Floats, pupil_s: Floats) -> object:
    """A session whose pupil has time stamps of the other clock; its running is on the session's."""

    def fill(nwb: NWBFile) -> None:
        with_units(np.sort(RNG.uniform(0, times[-1], 500)))(nwb)
        running(RNG.normal(size=int(times[-1] * 50)), starting_time=0.0, rate=50.0)(nwb)
        running(RNG.normal(size=len(pupil_s)), name="pupil", timestamps=pupil_s)(nwb)
        nwb.add_acquisition(pulses("sync_line", times))
        nwb.add_acquisition(pulses("camera_line", other))

    return fill


def sync(*streams: str, reference: str = "acquisition/sync_line", pulses: str = "acquisition/camera_line") -> Sync:
    return Sync(reference=reference, pulses=pulses, streams=streams)


def found(session: SessionPlan, code: str, path: str) -> Finding:
    (row,) = [item for item in session.findings if (item.code, item.path) == (code, path)]
    return row


def test_the_streams_that_the_recipe_names_are_mapped_before_tokens_are_cut(tmp_path: Path) -> None:
    times, true_s = train(100), 5 + np.arange(2000) / 30
    other, pupil_s = times * (1 + 5e-5) + 0.25, true_s * (1 + 5e-5) + 0.25
    session = plan(tmp_path, recorded(times, other, pupil_s), sync=(sync("pupil"),))
    item = stream(session, "pupil")
    assert item.spec.samples_per_token == 3
    assert np.abs(item.start_ns - np.rint(true_s[::3] * 1e9)).max() <= 10
    assert stream(session, "running").start_ns[:2].tolist() == [0, 100_000_000]
    told = found(session, "clock-residuals", "acquisition/camera_line")
    assert told.message.startswith("100 pulses of acquisition/sync_line: this clock runs +50 ppm and is +25")
    assert told.numbers["num_pulses"] == 100
    mapped = found(session, "clock-mapped", "acquisition/pupil")
    assert mapped.action == "repaired" and mapped.numbers["moved_ms"] == pytest.approx(253.58, abs=0.01)
    assert "clock-drift" not in {row.code for row in session.findings}  # it is known


def test_times_outside_of_the_pulses_are_flagged(tmp_path: Path) -> None:
    times, true_s = train(50), np.arange(3000) / 30
    fill = recorded(times, times + 2, true_s + 2)
    session = plan(tmp_path, fill, sync=(sync("acquisition/pupil"),))
    told = found(session, "extrapolated", "acquisition/pupil")
    outside = int(((true_s < times[0] - 1e-9) | (true_s > times[-1] + 1e-9)).sum())
    assert abs(told.numbers["num_outside"] - outside) <= 2
    assert told.numbers["extrapolated_s"] == pytest.approx(true_s[-1] - times[-1], abs=1e-6)
    assert np.abs(stream(session, "pupil").start_ns - np.rint(true_s[::3] * 1e9)).max() <= 10


def test_without_streams_the_clocks_are_compared_and_nothing_is_moved(tmp_path: Path) -> None:
    times, pupil_s = train(100), 5 + np.arange(2000) / 30
    session = plan(tmp_path, recorded(times, times + 0.03, pupil_s), sync=(sync(),))
    told = found(session, "clock-residuals", "acquisition/camera_line")
    assert told.numbers["offset_ms"] == pytest.approx(30)
    assert stream(session, "pupil").start_ns[0] == 5_000_000_000
    assert "clock-mapped" not in {row.code for row in session.findings}


def test_pulses_that_do_not_match_refuse_the_file_where_streams_depend_on_them(tmp_path: Path) -> None:
    fill = recorded(train(100), train(100, seed=5), 5 + np.arange(2000) / 30)
    with pytest.raises(PrepError) as caught:
        plan(tmp_path, fill, sync=(sync("pupil"),))
    text = str(caught.value)
    assert text.startswith("`sync` of acquisition/camera_line to acquisition/sync_line: their intervals do not match")


def test_pulses_that_are_not_in_the_file_refuse_it_where_streams_depend_on_them(tmp_path: Path) -> None:
    fill = recorded(train(100), train(100), 5 + np.arange(2000) / 30)
    wrong = sync("pupil", pulses="acquisition/nothing")
    with pytest.raises(PrepError) as caught:
        plan(tmp_path, fill, sync=(wrong,))
    assert "the file has no acquisition/nothing. Name a series or a column of times" in str(caught.value)


def test_a_stream_that_sync_names_and_the_file_does_not_have_is_told(tmp_path: Path) -> None:
    fill = recorded(train(100), train(100), 5 + np.arange(2000) / 30)
    session = plan(tmp_path, fill, sync=(sync("pupil", "wheel"),))
    told = found(session, "recipe-unmatched", "wheel")
    assert told.message == "`sync` of the recipe names it, but the file has no such object"


@pytest.mark.parametrize("rate_hz", [1000.0, 997.0])
def test_rising_edges_of_a_photodiode_are_pulses(tmp_path: Path, rate_hz: float) -> None:
    times, true_s = train(100), 5 + np.arange(2000) / 30
    at = np.arange(int(times[-1] * rate_hz) + 500) / rate_hz
    knots = (times[:, None] + np.array([-0.003, 0.003, 0.1, 0.106])).ravel()
    volts = np.interp(at, knots, np.tile([0.0, 3.0, 3.0, 0.0], 100))

    def fill(nwb: NWBFile) -> None:
        recorded(times, times + 0.03, true_s + 0.03)(nwb)
        nwb.add_acquisition(TimeSeries(name="photodiode", data=volts, unit="volts", starting_time=0.0, rate=rate_hz))

    session = plan(tmp_path, fill, sync=(sync("pupil", reference="acquisition/photodiode"),))
    told = found(session, "clock-residuals", "acquisition/camera_line")
    assert told.numbers["num_pulses"] == 100
    assert np.abs(stream(session, "pupil").start_ns - np.rint(true_s[::3] * 1e9)).max() <= 10


# ---------------------------------------------------------------- the synthetic brain

BEHAVIOR = ("running_speed", "pupil_diameter", "head_direction")


@pytest.fixture(scope="module")
def clocks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, synthetic.Session]]:
    folder = tmp_path_factory.mktemp("clocks")
    sessions = [synthetic.synthesize(spec, seed=0) for spec in synthetic.preset_specs("clocks")]
    return [(synthetic.write_session(session, folder, None), session) for session in sessions]


def test_a_drift_of_50_ppm_of_the_camera_is_found_without_a_recipe(
    clocks: list[tuple[Path, synthetic.Session]],
) -> None:
    path, truth = clocks[0]
    assert truth.spec.camera_ppm == 50
    told = found(plan_session(path, Recipe(), "d1"), "clock-drift", "acquisition/camera_pulses")
    assert abs(told.numbers["drift_ppm"] - 50) < 5
    assert told.numbers["residual_ms"] < 0.05 and told.numbers["num_pulses"] > 100


def test_an_offset_of_30_ms_of_the_camera_is_found_without_a_recipe(
    clocks: list[tuple[Path, synthetic.Session]],
) -> None:
    path, truth = clocks[1]
    assert truth.spec.camera_late_s == 0.03
    told = found(plan_session(path, Recipe(), "d1"), "clock-drift", "acquisition/camera_pulses")
    assert abs(told.numbers["offset_ms"] - 30) < 2
    assert abs(told.numbers["drift_ppm"]) < 5


@pytest.mark.parametrize("reference", ["sync_pulses", "photodiode"])
@pytest.mark.parametrize("number", [0, 1])
def test_with_sync_the_times_of_the_synthetic_brain_are_the_true_ones(
    clocks: list[tuple[Path, synthetic.Session]], number: int, reference: str
) -> None:
    path, truth = clocks[number]
    streams = ("processing/behavior", *(["movie"] if truth.spec.camera_late_s else []))
    recipe = Recipe(sync=(sync(*streams, reference=f"acquisition/{reference}", pulses="acquisition/camera_pulses"),))
    session, unmapped = plan_session(path, recipe, "d1"), plan_session(path, Recipe(), "d1")
    for name, samples in {**truth.behavior, "movie": truth.shown}.items():
        item = stream(session, name)
        assert item.spec.samples_per_token == stream(unmapped, name).spec.samples_per_token
        true_ns = samples.start_ns[:: item.spec.samples_per_token]
        assert np.abs(item.start_ns - true_ns).max() < 100_000, name
        if name in BEHAVIOR:
            assert np.abs(stream(unmapped, name).start_ns - true_ns).max() > 5_000_000
