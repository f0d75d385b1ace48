"""The audit: each code has one rule, and each rule finds what was planted and nothing where all is well.

In: times made up here, and small NWB files (nwb_builders). Out: nothing.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import plan, replace, running, stream, with_rois, with_units, write
from pynwb import NWBFile, TimeSeries

from prep.audit import ACTIONS, RULES, few, finding, in_milliseconds, overlap_findings
from prep.nwb.session import UnusableFile, plan_session
from prep.plan import Finding, SessionPlan
from prep.recipe import Recipe
from prep.settings import to_ns

ROOT = Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(0)


def only(session: SessionPlan, code: str) -> Finding:
    (found,) = [item for item in session.findings if item.code == code]
    return found


def codes_in(tree: ast.AST) -> Iterator[str]:
    """Codes that a module gives to note(), finding() and Finding(code=…), straight or by a loop over rows."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("note", "finding", "Finding"):
            given = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "code")]
            for value in given:
                for part in ast.walk(value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value
        is_loop = isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple)
        if is_loop and ast.unparse(node.target).lstrip("(").startswith("code"):
            for row in node.iter.elts:
                if isinstance(row, ast.Tuple) and isinstance(row.elts[0], ast.Constant):
                    yield str(row.elts[0].value)


def test_every_code_that_prep_uses_has_a_rule() -> None:
    used = {
        (code, path.relative_to(ROOT).as_posix())
        for path in sorted((ROOT / "prep").rglob("*.py"))
        for code in codes_in(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len(used) > 20
    assert {(code, path) for code, path in used if code not in RULES} == set()


def test_a_rule_says_what_is_meant_and_what_is_done() -> None:
    for code, rule in RULES.items():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code)
        assert rule.means and rule.done and rule.rule in ACTIONS


def test_the_action_of_a_finding_is_its_rule() -> None:
    assert finding("unsorted", "x", "m", num=1.0) == Finding(
        code="unsorted", path="x", action="repaired", message="m", numbers={"num": 1.0}
    )
    assert finding("gaps", "x", "m").action == "noted"


# ---------------------------------------------------------------- length


def test_a_difference_of_ten_samples_and_of_one_percent_is_few() -> None:
    assert few(1000, 1010) and few(1010, 1000) and few(30, 29) and few(5, 5)
    assert not few(1000, 1011) and not few(30, 28) and not few(0, 2)


@pytest.mark.parametrize(("num_samples", "num_stamps"), [(305, 303), (303, 305)])
def test_data_and_time_stamps_that_differ_by_a_few_are_cut_to_the_shorter(
    tmp_path: Path, num_samples: int, num_stamps: int
) -> None:
    data = RNG.normal(size=num_samples)
    path = write(tmp_path, running(data, timestamps=np.arange(num_samples) / 50))
    replace(path, "acquisition/running/timestamps", np.arange(num_stamps) / 50)
    session = plan_session(path, Recipe(), "d1")
    found = only(session, "length-mismatch")
    assert found.action == "repaired"
    expected = f"{num_samples} samples but {num_stamps} time stamps; the first 303 of both are taken"
    assert found.message == expected
    assert found.numbers == {"num_samples": num_samples, "num_stamps": num_stamps}
    item = stream(session, "running")
    tokens = item.reader.read(0, item.spec.num_tokens).reshape(-1)
    assert np.array_equal(tokens[:303], data[:303].astype(np.float32))
    assert np.isnan(tokens[303:]).all()


def test_data_and_time_stamps_that_differ_by_much_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, running(RNG.normal(size=300), timestamps=np.arange(300) / 50))
    replace(path, "acquisition/running/timestamps", np.arange(280) / 50)
    with pytest.raises(UnusableFile) as caught:
        plan_session(path, Recipe(), "d1")
    (found,) = [item for item in caught.value.findings if item.action == "refused"]
    assert (found.code, found.path) == ("broken-object", "acquisition/running")
    assert found.message == (
        "it has 300 samples but 280 time stamps, so which belongs to which cannot be told. Write the file again."
    )


# ---------------------------------------------------------------- milliseconds and rates


def test_milliseconds_are_told_by_unit_by_rate_or_by_what_is_around_them() -> None:
    time_ms = 5000 + np.arange(3000) * 20.0
    assert in_milliseconds(time_ms, says_ms=True) == "their unit says so"
    assert in_milliseconds(time_ms, stated_hz=50.0) == "the median step is 20, 1000 times that of 50 Hz"
    assert in_milliseconds(time_ms, others=[(0.0, 64.0)]) == "they take 5.998e+04, what is around them 64 s"


def test_seconds_are_not_taken_for_milliseconds() -> None:
    time_s = 5 + np.arange(3000) * 0.02
    assert in_milliseconds(time_s, stated_hz=50.0, others=[(0.0, 64.0)]) == ""
    slow_s = np.arange(3600.0)  # once a second for an hour, beside four seconds of trials
    assert in_milliseconds(slow_s + 1e6, others=[(0.0, 3.6)]) == ""  # would not lie among them
    assert in_milliseconds(slow_s, others=[(0.0, 3600.0)]) == ""
    assert in_milliseconds(np.array([7.0]), others=[(0.0, 3600.0)]) == ""


def test_a_series_in_milliseconds_among_spikes_in_seconds_is_divided(tmp_path: Path) -> None:
    def fill(nwb: NWBFile) -> None:
        with_units(np.sort(RNG.uniform(10, 70, 500)))(nwb)
        running(RNG.normal(size=3000), timestamps=10_000 + np.arange(3000) * 20.0)(nwb)

    session = plan(tmp_path, fill)
    found = only(session, "milliseconds")
    assert found.action == "repaired" and found.path == "acquisition/running"
    assert found.message.startswith("its times are milliseconds (they take 5.998e+04, what is around them ")
    assert stream(session, "running").start_ns[:3].tolist() == [10_000_000_000, 10_100_000_000, 10_200_000_000]


def test_time_stamps_in_milliseconds_by_their_own_unit_are_divided(tmp_path: Path) -> None:
    path = write(tmp_path, running(RNG.normal(size=300), timestamps=np.arange(300) * 20.0))
    with h5py.File(path, "r+") as file:
        file["acquisition/running/timestamps"].attrs["unit"] = "milliseconds"
    session = plan_session(path, Recipe(), "d1")
    assert only(session, "milliseconds").message == (
        "its times are milliseconds (their unit says so); they are divided by 1000"
    )
    assert stream(session, "running").start_ns[:2].tolist() == [0, 100_000_000]


def test_the_rate_of_the_imaging_plane_is_compared_with_the_clock(tmp_path: Path) -> None:
    path = write(tmp_path, with_rois({"DfOverF/dff": RNG.normal(size=(200, 4))}, 4, rate=10.0))
    with h5py.File(path, "r+") as file:
        file["general/optophysiology/plane/imaging_rate"] = 30.0
    found = only(plan_session(path, Recipe(), "d1"), "rate-mismatch")
    assert found.message == "its imaging plane states 30 Hz, but its clock runs at 10 Hz; the clock is taken"
    assert found.numbers == {"rate_hz": 10.0, "stated_hz": 30.0}


def test_a_nominal_rate_is_no_mismatch(tmp_path: Path) -> None:
    path = write(tmp_path, with_rois({"DfOverF/dff": RNG.normal(size=(200, 4))}, 4, rate=29.97))
    with h5py.File(path, "r+") as file:
        file["general/optophysiology/plane/imaging_rate"] = 30.0
    assert "rate-mismatch" not in {item.code for item in plan_session(path, Recipe(), "d1").findings}


def test_a_rate_beside_time_stamps_is_compared_with_them(tmp_path: Path) -> None:
    path = write(tmp_path, running(RNG.normal(size=300), timestamps=np.arange(300) / 50))
    with h5py.File(path, "r+") as file:
        file["acquisition/running/starting_time"] = 0.0
        file["acquisition/running/starting_time"].attrs["rate"] = 60.0
    found = only(plan_session(path, Recipe(), "d1"), "rate-mismatch")
    assert found.message == "it states a rate of 60 Hz, but its clock runs at 50 Hz; the clock is taken"


def test_milliseconds_are_told_by_other_series_where_there_is_no_table(tmp_path: Path) -> None:
    def fill(nwb: NWBFile) -> None:
        for name, unit in (("pupil", 1.0), ("wheel", 1.0), ("running", 1000.0)):
            running(RNG.normal(size=3000), name=name, timestamps=(5 + np.arange(3000) / 50) * unit)(nwb)

    session = plan(tmp_path, fill)
    assert only(session, "milliseconds").path == "acquisition/running"
    starts = {name: stream(session, name).start_ns.tolist() for name in ("pupil", "wheel", "running")}
    assert starts["running"] == starts["pupil"] == starts["wheel"]


def test_an_event_47_years_before_the_others_is_dropped(tmp_path: Path) -> None:
    times = 6e5 + np.cumsum(RNG.exponential(2.0, 50))
    times[20] = -1.5e9

    def fill(nwb: NWBFile) -> None:
        running(RNG.normal(size=5000), starting_time=6e5, rate=50.0)(nwb)
        nwb.add_acquisition(pulses("licks", times))

    session = plan(tmp_path, fill)
    found = only(session, "outlier-time")
    assert found.message == "1 of 50 events are far from the others (such as -1.5e+09 s); they are dropped"
    assert np.array_equal(stream(session, "licks").start_ns, to_ns(np.delete(times, 20)))


# ---------------------------------------------------------------- across streams


def test_a_stream_that_overlaps_no_other_is_named() -> None:
    spans = {"a": (0.0, 100.0), "b": (50.0, 60.0), "far": (1e6, 1e6 + 5)}
    (found,) = overlap_findings(spans)
    assert (found.code, found.path, found.numbers["away_s"]) == ("no-overlap", "far", 1e6 - 100)
    assert found.message == "it runs from 1e+06 s to 1e+06 s, 9.999e+05 s away from all other streams"
    assert overlap_findings({"alone": (0.0, 1.0)}) == []
    assert overlap_findings({"a": (0.0, 1.0), "b": (1.0, 2.0)}) == []


def test_spikes_beyond_all_that_else_was_recorded_are_noted(tmp_path: Path) -> None:
    def fill(nwb: NWBFile) -> None:
        with_units(np.arange(0.0, 1000.0))(nwb)
        running(RNG.normal(size=5000), starting_time=0.0, rate=50.0)(nwb)

    found = only(plan(tmp_path, fill), "spikes-alone")
    assert found.action == "noted"
    assert found.numbers == {"num_outside": 840.0, "outside_share": 0.84}  # running ends at 99.98 s, and 60 s are free
    assert found.message == (
        "84.0% of the spikes lie more than 60 s outside of all other streams and tables (0 s to 99.98 s)"
    )


def test_an_interval_table_counts_as_recorded_time(tmp_path: Path) -> None:
    def fill(nwb: NWBFile) -> None:
        with_units(np.arange(0.0, 1000.0))(nwb)
        running(RNG.normal(size=5000), starting_time=0.0, rate=50.0)(nwb)
        nwb.add_epoch(start_time=0.0, stop_time=1000.0)

    assert "spikes-alone" not in {item.code for item in plan(tmp_path, fill).findings}


def test_samples_that_are_not_numbers_are_counted(tmp_path: Path) -> None:
    data = RNG.normal(size=800)
    data[100:300] = np.nan
    found = only(plan(tmp_path, running(data, starting_time=0.0, rate=50.0)), "non-finite-data")
    assert found.message == "25.000% of its samples are not numbers; they are missing"
    assert found.numbers == {"missing_share": 0.25}


def test_a_sound_file_has_no_findings(tmp_path: Path) -> None:
    def fill(nwb: NWBFile) -> None:
        with_units(np.sort(RNG.uniform(0, 100, 500)))(nwb)
        running(RNG.normal(size=5000), starting_time=0.0, rate=50.0)(nwb)
        running(RNG.normal(size=3000), name="pupil", timestamps=np.arange(3000) / 30)(nwb)

    assert plan(tmp_path, fill).findings == ()


# ---------------------------------------------------------------- pulses in a file


def pulses(name: str, time_s: np.ndarray) -> TimeSeries:
    return TimeSeries(name=name, data=np.ones(len(time_s)), unit="n.a.", timestamps=time_s)


def test_licks_and_the_rewards_that_follow_some_of_them_are_not_taken_for_pulses(tmp_path: Path) -> None:
    licks = np.cumsum(RNG.exponential(0.4, 400))

    def fill(nwb: NWBFile) -> None:
        running(RNG.normal(size=8000), starting_time=0.0, rate=50.0)(nwb)
        nwb.add_acquisition(pulses("lick_times", licks))
        nwb.add_acquisition(pulses("reward_times", licks[::5] + 0.03))

    assert "clock-drift" not in {item.code for item in plan(tmp_path, fill).findings}


def test_two_records_on_one_clock_are_no_finding(tmp_path: Path) -> None:
    times = np.cumsum(RNG.uniform(0.5, 1.5, 100))

    def fill(nwb: NWBFile) -> None:
        running(RNG.normal(size=5000), starting_time=0.0, rate=50.0)(nwb)
        nwb.add_acquisition(pulses("sync_a", times))
        nwb.add_acquisition(pulses("sync_b", times + RNG.normal(0, 2e-5, 100)))

    assert "clock-drift" not in {item.code for item in plan(tmp_path, fill).findings}


@pytest.mark.parametrize("varied", [False, True])
def test_stimuli_that_are_repeated_later_are_not_taken_for_pulses(tmp_path: Path, varied: bool) -> None:
    times = np.cumsum(RNG.uniform(0.5, 1.5, 100)) if varied else np.arange(100.0)

    def fill(nwb: NWBFile) -> None:
        running(RNG.normal(size=5000), starting_time=0.0, rate=50.0)(nwb)
        nwb.add_acquisition(pulses("grating_onset", times))
        nwb.add_acquisition(pulses("grating_onset_again", times + 500))

    assert "clock-drift" not in {item.code for item in plan(tmp_path, fill).findings}


@pytest.mark.parametrize(("drift_ppm", "offset_s"), [(50.0, 0.0), (0.0, 0.03), (-80.0, -412.7), (200.0, 1e6)])
def test_a_planted_drift_and_a_planted_offset_are_measured(tmp_path: Path, drift_ppm: float, offset_s: float) -> None:
    times = np.cumsum(RNG.uniform(0.5, 1.5, 400))
    other = times * (1 + drift_ppm * 1e-6) + offset_s + RNG.normal(0, 1e-4, 400)
    other = np.delete(other, RNG.choice(400, 12, replace=False))  # dropped
    other = np.sort(np.append(other, RNG.uniform(other[0], other[-1], 5)))  # and extra ones

    def fill(nwb: NWBFile) -> None:
        running(RNG.normal(size=20_000), starting_time=0.0, rate=50.0)(nwb)
        nwb.add_acquisition(pulses("sync_line", times))
        nwb.add_acquisition(pulses("strobe_of_camera", other))

    found = only(plan(tmp_path, fill), "clock-drift")
    assert (found.path, found.action) == ("acquisition/strobe_of_camera", "noted")
    assert "If both record the same pulses, list them in the recipe's `sync`" in found.message
    numbers = found.numbers
    assert abs(numbers["drift_ppm"] - drift_ppm) < 5
    middle_s = times.mean() * drift_ppm * 1e-6 + offset_s
    assert abs(numbers["offset_ms"] - middle_s * 1e3) < 2
    assert numbers["num_pulses"] == 388 and numbers["residual_ms"] < 0.2
    assert numbers["num_unmatched_reference"] == 12 and numbers["num_unmatched_pulses"] == 5
    assert len(numbers["knot_s"]) == len(numbers["knot_residual_ms"]) == 200
