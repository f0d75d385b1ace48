"""Behaviour, stimulus and tables of time in NWB files: clocks, angles, names, pixels, trials.

In: files that nwb_builders writes. Out: nothing.
"""

from pathlib import Path

import numpy as np
import pytest
from nwb_builders import RNG, codes, heading, plan, reason, replace, running, stream, values, with_units, write
from pynwb import NWBFile
from pynwb.base import Images
from pynwb.behavior import Position, SpatialSeries
from pynwb.image import GrayscaleImage, ImageSeries, IndexSeries

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
        (np.ones(50), {"timestamps": np.cumsum(RNG.exponential(size=50))}, "events are read in the next release"),
        (np.arange(50.0), {"timestamps": np.arange(50.0)}, "events are read in the next release"),
        (np.arange(500) / 50, {"rate": 50.0, "starting_time": 0.0}, "events are read in the next release"),
        (RNG.normal(size=500), {"timestamps": np.cumsum(RNG.exponential(size=500))}, "events are read in"),
        (np.array([1.0]), {"timestamps": [1.0]}, "single sample"),
        (RNG.normal(size=3), {"timestamps": [np.nan] * 3}, "none of its 3 time stamps is a number"),
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


def test_samples_without_a_time_stamp_each_are_skipped_with_the_reason(tmp_path: Path):
    path = write(tmp_path, running(RNG.normal(size=30), timestamps=np.arange(30.0)))
    replace(path, "acquisition/running/timestamps", np.arange(29.0))
    with pytest.raises(UnusableFile, match="30 samples but 29 time stamps"):
        plan_session(path, Recipe(), "d1")


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


# ---------------------------------------------------------------- stimulus and intervals


def movie(pixels: np.ndarray, **clock: object) -> ImageSeries:
    return ImageSeries(name="frames", data=pixels, unit="n.a.", format="raw", **(clock or {"rate": 30.0}))


def index_series(target: ImageSeries | Images, index: list[int], time_s: list[float]) -> IndexSeries:
    """pynwb only reads the link to an ImageSeries, so the series is made the way that its reader makes it."""
    link = "indexed_images" if isinstance(target, Images) else "indexed_timeseries"
    series = IndexSeries.__new__(IndexSeries, in_construct_mode=True)
    series.__init__(name="shown", data=index, unit="N/A", timestamps=time_s, **{link: target})
    series._in_construct_mode = False
    return series


def test_an_index_series_points_into_the_pixels_of_its_template(tmp_path: Path):
    pixels = RNG.integers(0, 256, (4, 6, 5), dtype=np.uint8)

    def fill(nwb: NWBFile) -> None:
        template = movie(pixels)
        nwb.add_stimulus_template(template)
        nwb.add_stimulus(index_series(template, [2, 0, 3, 9], [1.0, 1.5, 2.5, 2.6]))

    session = plan(tmp_path, fill)
    item, (stimulus,) = stream(session, "shown"), session.stimuli
    assert values(item)[:, 0, 0].tolist() == [2, 0, 3, -1]
    assert item.start_ns.tolist() == [1_000_000_000, 1_500_000_000, 2_500_000_000, 2_600_000_000]
    assert (item.spec.kind, item.spec.channels, item.spec.stimulus) == ("frames", ("screen",), stimulus.digest)
    assert np.array_equal(stimulus.reader.read(1, 4), pixels[1:])
    assert "frame-index" in codes(session)
    used = {row.path: row.used_as for row in session.coverage}
    assert used["stimulus/templates/frames"] == used["stimulus/presentation/shown"] == "shown"


def test_an_image_series_that_was_shown_is_its_own_index(tmp_path: Path):
    pixels = RNG.random((30, 4, 5)).astype(np.float32)
    session = plan(tmp_path, lambda nwb: nwb.add_stimulus(movie(pixels, rate=10.0, starting_time=2.0)))
    assert values(stream(session, "frames"))[:, 0, 0].tolist() == list(range(30))
    assert np.array_equal(session.stimuli[0].reader.read(0, 30), np.rint(pixels * 255.0).astype(np.uint8))


def test_images_are_shown_in_their_order(tmp_path: Path):
    first, second = (RNG.integers(0, 256, (3, 4), dtype=np.uint8) for _ in range(2))

    def fill(nwb: NWBFile) -> None:
        from pynwb.base import ImageReferences

        pictures = [GrayscaleImage(name="a", data=first), GrayscaleImage(name="b", data=second)]
        order = ImageReferences(name="order_of_images", data=pictures[::-1])
        images = Images(name="images", images=pictures, order_of_images=order)
        nwb.add_stimulus_template(images)
        nwb.add_stimulus(index_series(images, [0, 1, 0], [1.0, 2.0, 3.0]))

    (stimulus,) = plan(tmp_path, fill).stimuli
    assert np.array_equal(stimulus.reader.read(0, 2), np.stack([second, first]))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((3, 4, 5), np.uint16), "pixels are uint16; only uint8"),
        (np.full((3, 4, 5), 7.0), "floats beyond 0 to 1"),
        (np.zeros((3, 4, 5, 2), np.uint8), r"\(3, 4, 5, 2\), expected frames x height x width"),
    ],
)
def test_pixels_that_cannot_be_shown_are_skipped_with_the_reason(tmp_path: Path, pixels: np.ndarray, message: str):
    with pytest.raises(UnusableFile, match=message):
        plan(tmp_path, lambda nwb: nwb.add_stimulus(movie(pixels)))


def test_a_template_that_nobody_shows_is_no_stimulus(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        nwb.add_stimulus_template(movie(np.zeros((3, 4, 5), np.uint8)))
        with_units([1.0, 2.0])(nwb)

    session = plan(tmp_path, fill)
    assert session.stimuli == ()
    assert "no IndexSeries shows" in reason(session, "stimulus/templates/frames")


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
    assert reason(session, "intervals/trials/licks") == "a list in each row: not read yet"
