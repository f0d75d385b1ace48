"""Behaviour and tables of time in NWB files: clocks, angles, names, trials.

In: files that nwb_builders writes. Out: nothing.
"""

from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import RNG, codes, heading, plan, reason, replace, running, stream, values, with_units, write
from pynwb import NWBFile, TimeSeries
from pynwb.behavior import BehavioralTimeSeries, EyeTracking, Position, PupilTracking, SpatialSeries

from prep.nwb.inventory import snake_case
from prep.nwb.session import UnusableFile, plan_session
from prep.recipe import Recipe
from prep.settings import NO_TIME, to_ns


@pytest.mark.parametrize(
    "time_s",
    [
        np.arange(500) / 60,
        1.2e7 + np.arange(500) / 60,
        np.concatenate([np.arange(111) / 60, 40 + np.arange(200) / 60]),
        np.cumsum(RNG.uniform(0.01, 0.1, 300)),
    ],
    ids=["regular", "far from zero", "with a gap", "irregular"],
)
def test_a_query_at_the_time_of_a_sample_returns_that_sample(tmp_path: Path, time_s: np.ndarray):
    data = RNG.normal(size=(len(time_s), 2))
    item = stream(plan(tmp_path, running(data, timestamps=time_s)), "running")
    tokens = values(item)
    query_ns = to_ns(time_s)
    token = np.searchsorted(item.start_ns, query_ns, side="right") - 1
    place = np.rint((query_ns - item.start_ns[token]) / item.spec.sample_ns).astype(int)
    assert np.array_equal(tokens[token, :, place], data.astype(np.float32))
    assert np.isfinite(tokens).sum() == data.size


def test_a_clock_far_from_zero_keeps_nanoseconds(tmp_path: Path):
    item = stream(plan(tmp_path, running(RNG.normal(size=600), starting_time=1.2e7, rate=50.0)), "running")
    error_ns = item.start_ns - (12_000_000_000_000_000 + np.arange(120) * 100_000_000)
    assert np.abs(error_ns).max() <= np.spacing(1.2e7) * 1e9  # the file's own seconds resolve 1.9 ns here


def test_an_irregular_clock_keeps_every_time_stamp(tmp_path: Path):
    time_s = np.cumsum(RNG.uniform(0.01, 0.05, 300))
    session = plan(tmp_path, running(RNG.normal(size=300), timestamps=time_s))
    assert np.array_equal(stream(session, "running").start_ns, to_ns(time_s))
    assert codes(session) == ["irregular"]


def test_unsorted_and_missing_time_stamps_are_repaired_with_their_samples(tmp_path: Path):
    time_s = np.arange(100) / 10
    order = RNG.permutation(100)
    stamps, data = time_s[order], RNG.normal(size=100)[order]
    stamps[order == 50] = np.nan
    session = plan(tmp_path, running(data, timestamps=stamps))
    expected = data[np.argsort(order)][np.arange(100) != 50]
    assert values(stream(session, "running"))[:, 0, 0].tolist() == expected.astype(np.float32).tolist()
    assert codes(session)[:2] == ["non-finite-time", "unsorted"]


def test_conversion_and_offset_apply_once(tmp_path: Path):
    fill = running(np.arange(100), starting_time=0.0, rate=10.0, conversion=0.5, offset=3.0)
    assert values(stream(plan(tmp_path, fill), "running"))[:3, 0, 0].tolist() == [3.0, 3.5, 4.0]


def test_the_wrong_axis_is_transposed_and_reported(tmp_path: Path):
    data = RNG.normal(size=(3, 200))
    path = write(tmp_path, running(data.T, timestamps=np.arange(200) / 10))
    replace(path, "acquisition/running/data", data)
    session = plan_session(path, Recipe(), "d1")
    assert np.array_equal(values(stream(session, "running"))[:, :, 0], data.T.astype(np.float32))
    assert stream(session, "running").spec.channels == ("running/0", "running/1", "running/2")
    assert codes(session) == ["wrong-axis"]


@pytest.mark.parametrize(
    ("data", "clock", "message"),
    [
        (np.full(50, np.nan), {"starting_time": 0.0, "rate": 10.0}, "all its samples are missing"),
        (np.zeros((50, 2)), {"starting_time": 0.0, "rate": 10.0}, "all its samples are the same or missing"),
        (np.zeros((50, 3, 2)), {"starting_time": 0.0, "rate": 10.0}, "float64 (50, 3, 2), not samples x columns"),
        (np.array([1.0]), {"starting_time": 0.0, "rate": 10.0}, "it has a single sample"),
        (RNG.normal(size=3), {"timestamps": [np.nan] * 3}, "3 time stamps"),
        (np.zeros((0,)), {"starting_time": 0.0, "rate": 1.0}, "empty"),
    ],
)
def test_a_series_that_cannot_be_used_is_skipped_with_the_reason(
    tmp_path: Path, data: np.ndarray, clock: dict, message: str
):
    def fill(nwb: NWBFile) -> None:
        running(data, name="odd", **clock)(nwb)
        running(RNG.normal(size=99), starting_time=0.0, rate=10.0)(nwb)

    session = plan(tmp_path, fill)
    assert message in reason(session, "acquisition/odd")
    assert [item.spec.name for item in session.streams] == ["running"]


def test_samples_without_a_time_stamp_are_left_out_where_they_are_few(tmp_path: Path):
    data = RNG.normal(size=30)
    path = write(tmp_path, running(data, timestamps=np.arange(30.0)))
    replace(path, "acquisition/running/timestamps", np.arange(29.0))
    assert (
        values(stream(plan_session(path, Recipe(), "d1"), "running")).ravel().tolist()
        == data[:29].astype("f4").tolist()
    )
    replace(path, "acquisition/running/timestamps", np.arange(12.0))
    with pytest.raises(UnusableFile, match="30 samples but 12 time stamps"):
        plan_session(path, Recipe(), "d1")


def test_text_where_a_place_should_be_is_skipped_with_the_reason(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        heading(RNG.normal(size=30), "cm")(nwb)
        running(RNG.normal(size=99), starting_time=0.0, rate=10.0)(nwb)

    path = write(tmp_path, fill)
    replace(path, "acquisition/CompassDirection/heading/data", np.array([b"left"] * 30, dtype=object))
    session = plan_session(path, Recipe(), "d1")
    assert reason(session, "acquisition/CompassDirection/heading") == "its data are text, not numbers"


def test_true_and_false_are_one_and_zero(tmp_path: Path):
    data = RNG.random(200) > 0.7
    item = stream(plan(tmp_path, running(data, starting_time=0.0, rate=10.0)), "running")
    assert values(item).ravel().tolist() == data.astype(float).tolist()


def test_columns_may_have_a_conversion_each_and_one_of_zero_is_not_applied(tmp_path: Path):
    data = RNG.normal(size=(100, 3))
    path = write(tmp_path, heading(data, "cm"))
    with h5py.File(path, "r+") as file:
        file["acquisition/CompassDirection/heading/data"].attrs["conversion"] = [2.0, 0.0, np.nan]
        file["acquisition/CompassDirection/heading/data"].attrs["offset"] = [1.0, 2.0, 3.0]
    session = plan_session(path, Recipe(), "d1")
    expected = (data * [2.0, 1.0, 1.0] + [1.0, 2.0, 3.0]).astype(np.float32)
    assert np.array_equal(values(stream(session, "heading")).transpose(0, 2, 1).reshape(100, 3), expected)
    (found,) = [finding for finding in session.findings if finding.code == "conversion"]
    assert found.message == "the conversion of 2 of 3 columns is 0 or not a number; 1 is taken"
    with h5py.File(path, "r+") as file:
        file["acquisition/CompassDirection/heading/data"].attrs["conversion"] = [2.0, 1.0]
    with pytest.raises(UnusableFile, match="conversion or offset has 2 numbers for 3 columns"):
        plan_session(path, Recipe(), "d1")


@pytest.mark.parametrize(
    ("shape", "code", "is_transposed"),
    [((1, 60), "wrong-axis", True), ((20, 60), "ambiguous-axis", False), ((60, 60), "ambiguous-axis", False)],
)
def test_the_axis_of_a_series_that_has_only_a_rate(tmp_path: Path, shape: tuple, code: str, is_transposed: bool):
    data = RNG.normal(size=shape)
    session = plan(tmp_path, running(data, starting_time=0.0, rate=10.0))
    expected = data.T if is_transposed else data
    assert np.array_equal(values(stream(session, "running"))[:, :, 0], expected.astype(np.float32))
    assert codes(session) == [code]


def test_halves_that_were_stored_in_the_wrong_order_are_read_in_the_right_one(tmp_path: Path):
    time_s = np.roll(np.arange(20_000) / 60, 10_000)
    data = RNG.normal(size=(20_000, 2))
    session = plan(tmp_path, running(data, timestamps=time_s))
    tokens = values(stream(session, "running")).transpose(0, 2, 1).reshape(-1, 2)
    expected = np.roll(data, 10_000, axis=0).astype(np.float32)
    assert np.array_equal(tokens[np.isfinite(tokens[:, 0])], expected)
    assert "unsorted" in codes(session)


def test_wheel_cameras_and_pupil_of_their_own_clocks_are_streams(tmp_path: Path):
    rng = np.random.default_rng(11)
    wheel_s = np.arange(2000) / 1000 + 4.2
    camera_s = np.sort(np.arange(120) / 60 + rng.uniform(0, 0.004, 120))
    position, velocity, motion, pupil = (rng.normal(size=n).cumsum() for n in (2000, 2000, 120, 120))
    pupil[[3, 4, 70]] = np.nan
    gaze = rng.normal(size=(120, 2))

    def fill(nwb: NWBFile) -> None:
        module = nwb.create_processing_module("behavior", "d")
        wheel = [
            TimeSeries(name=name, data=data, unit=unit, timestamps=wheel_s)
            for name, data, unit in (("wheel_position", position, "m"), ("wheel_velocity", velocity, "m/s"))
        ]
        module.add(BehavioralTimeSeries(name="wheel", time_series=wheel))
        energy = TimeSeries(name="leftMotionEnergy", data=motion, unit="a.u.", timestamps=camera_s)
        module.add(energy)
        diameter = TimeSeries(name="diameter", data=pupil, unit="px", timestamps=energy)
        module.add(PupilTracking(time_series=diameter))
        looks = SpatialSeries(name="gaze", data=gaze, unit="cm", timestamps=camera_s, reference_frame="screen")
        module.add(EyeTracking(spatial_series=looks))

    session = plan(tmp_path, fill)
    for name, data, time_s in (
        ("wheel_position", position, wheel_s),
        ("wheel_velocity", velocity, wheel_s),
        ("left_motion_energy", motion, camera_s),
        ("diameter", pupil, camera_s),
        ("gaze", gaze, camera_s),
    ):
        item = stream(session, name)
        tokens = values(item).transpose(0, 2, 1).reshape(len(data), -1)
        assert np.array_equal(tokens, data.reshape(len(data), -1).astype(np.float32), equal_nan=True)
        assert np.array_equal(item.start_ns, to_ns(time_s[:: item.spec.samples_per_token]))
        assert item.spec.modality == "behavior"
    assert stream(session, "gaze").spec.channels == ("gaze/0", "gaze/1")
    assert stream(session, "wheel_velocity").spec.unit == "m/s"


@pytest.mark.parametrize(("unit", "turn"), [("degrees", 360.0), ("deg", 360.0), ("rad", 2 * np.pi)])
@pytest.mark.parametrize("centre", [0.0, 0.5])
def test_an_angle_is_found_by_unit_and_range(tmp_path: Path, unit: str, turn: float, centre: float):
    angle = (np.linspace(0, 0.999, 200) - centre) * turn
    item = stream(plan(tmp_path, heading(angle, unit)), "heading")
    assert item.spec.channels == ("heading/cos", "heading/sin")
    radian = np.linspace(0, 0.999, 200) * 2 * np.pi - centre * 2 * np.pi
    flat = values(item).transpose(0, 2, 1).reshape(-1, 2)
    assert np.allclose(flat, np.stack([np.cos(radian), np.sin(radian)], 1), atol=1e-6)


@pytest.mark.parametrize(
    ("unit", "turn", "recipe", "is_angle"),
    [
        ("degrees", 40.0, {}, False),  # a direction of gaze: within a turn, but it never turns
        ("degrees", 40.0, {"angles": ("acquisition/CompassDirection/heading",)}, True),
        ("degrees", 360.0, {"not_angles": ("heading",)}, False),
        ("rad/s", 2 * np.pi, {}, False),
        ("a.u.", 2 * np.pi, {}, False),
        ("a.u.", 2 * np.pi, {"angles": ("heading",)}, True),
    ],
)
def test_the_recipe_decides_what_unit_and_range_leave_open(
    tmp_path: Path, unit: str, turn: float, recipe: dict, is_angle: bool
):
    session = plan(tmp_path, heading(np.linspace(0, turn, 200), unit), **recipe)
    assert (stream(session, "heading").spec.num_sources == 2) == is_angle


def test_names_are_unique_and_short_ones_carry_their_container(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        for container in ("Position", "HeadPosition"):
            parts = [
                SpatialSeries(
                    name=name, data=RNG.normal(size=50), unit="m", rate=10.0, starting_time=0.0, reference_frame="r"
                )
                for name in ("x", "SnoutTip")
            ]
            nwb.add_acquisition(Position(name=container, spatial_series=parts))

    session = plan(tmp_path, fill, names={"acquisition/Position/x": "first"})
    names = [item.spec.name for item in session.streams]
    assert names == ["snout_tip", "head_position_x", "position_snout_tip", "first"]
    assert snake_case("DfOverF") == "df_over_f" and snake_case("FIP_falling time") == "fip_falling_time"


# ---------------------------------------------------------------- intervals


def test_trials_keep_their_columns_by_type(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 9.0])(nwb)
        for name in ("is_good", "contrast", "outcome"):
            nwb.add_trial_column(name, "d")
        nwb.add_trial_column("licks", "d", index=True)
        nwb.add_trial(start_time=1.2e7, stop_time=1.2e7 + 1, is_good=True, contrast=3, outcome="hit", licks=[1.0])
        nwb.add_trial(start_time=1.3e7, stop_time=np.nan, is_good=False, contrast=4, outcome="", licks=[2.0, 3.0])

    session = plan(tmp_path, fill)
    trials = session.intervals["trials"]
    assert trials.start_ns.tolist() == [12_000_000_000_000_000, 13_000_000_000_000_000]
    assert trials.stop_ns.tolist() == [12_000_001_000_000_000, NO_TIME]
    assert {name: list(column) for name, column in trials.columns.items()} == {
        "is_good": [1.0, 0.0], "contrast": [3.0, 4.0], "outcome": ["hit", ""],
    }  # fmt: skip
    assert reason(session, "intervals/trials/licks").startswith("a list in each row")
