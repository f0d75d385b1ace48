"""Tables of stimuli: one vocabulary for the layouts of several laboratories, blanks, times, and the pixels they name.

In: files that nwb_builders writes, and the shared file of the Allen layout where it is. Out: nothing.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nwb_builders import codes, plan, stream, values, with_units
from pynwb import NWBFile
from pynwb.base import Images
from pynwb.epoch import TimeIntervals
from pynwb.image import GrayscaleImage
from test_prep_nwb_stimulus import movie, noise

from prep.nwb.session import plan_session
from prep.nwb.stimulus_words import parse
from prep.plan import SessionPlan
from prep.recipe import Recipe
from prep.settings import STIMULUS_FIELDS

SHARED = Path(os.environ.get("BRAINLOOM_NWB_DIR", Path(__file__).parents[2] / "shared" / "nwb"))
NAN = float("nan")


def table(name: str, start_s: list[float], stop_s: list[float], **columns: list) -> Callable[[NWBFile], None]:
    def fill(nwb: NWBFile) -> None:
        intervals = TimeIntervals(name=name, description="d")
        for column in columns:
            intervals.add_column(column, "d")
        for row, times in enumerate(zip(start_s, stop_s, strict=True)):
            given = {column: data[row] for column, data in columns.items()}
            intervals.add_interval(start_time=times[0], stop_time=times[1], **given)
        nwb.add_time_intervals(intervals)

    return fill


def every(*fills: Callable[[NWBFile], None]) -> Callable[[NWBFile], None]:
    return lambda nwb: [fill(nwb) for fill in fills] and None


def field(session: SessionPlan, name: str, quantity: str) -> list[float]:
    column = values(stream(session, name))[:, 0, STIMULUS_FIELDS.index(quantity)]
    return [round(float(value), 6) for value in column]


def types(session: SessionPlan, name: str) -> list[str]:
    item = stream(session, name)
    assert item.types is not None
    return [item.spec.types[number] for number in item.types]


def frames(session: SessionPlan, name: str) -> list[tuple[float, int]]:
    """(time in s, frame) of each token."""
    item = stream(session, name)
    return list(zip((item.start_ns / 1e9).tolist(), values(item)[:, 0, 0].tolist(), strict=True))


def pixels(session: SessionPlan, name: str) -> np.ndarray:
    digest = stream(session, name).spec.stimulus
    stimulus = next(item for item in session.stimuli if item.digest == digest)
    return stimulus.reader.read(0, stimulus.shape[0])


# ---------------------------------------------------------------- quantities and types


def test_strings_of_numbers_are_read_whatever_brackets_they_have():
    texts = ("0.25", "[250.0, 250.0]", "(1, 2)", "None", "", "nan", "[0.0, [1.0]]", "circle", "__import__('os')")
    assert [parse(text) for text in texts] == [
        (0.25,), (250.0, 250.0), (1.0, 2.0), (), (), (), (0.0, 1.0), (), (),
    ]  # fmt: skip


def test_a_table_of_gratings_becomes_typed_tokens(tmp_path: Path):
    fill = table(
        "drifting_gratings_presentations", [1.0, 4.0, 7.0], [3.0, 6.0, 9.5],
        stimulus_name=["drifting_gratings"] * 3, orientation=[45.0, NAN, 90.0], temporal_frequency=[2.0, NAN, 8.0],
        spatial_frequency=["0.04", "", "[0.08, 0.08]"], phase=["[42471.25, 42471.25]", "None", "0.5"],
        size=["[250.0, 200.0]"] * 3, color=["[1.0, 1.0, 1.0]", "[1.0, 0.0, -1.0]", "-1.0"], units=["deg"] * 3,
    )  # fmt: skip
    session = plan(tmp_path, fill)
    item = stream(session, "drifting_gratings")
    assert (item.spec.kind, item.spec.modality, item.spec.fields) == ("event", "stimulus", STIMULUS_FIELDS)
    assert item.spec.duration_ns == item.spec.sample_ns == 1
    assert item.start_ns.tolist() == [1_000_000_000, 4_000_000_000, 7_000_000_000]
    assert types(session, "drifting_gratings") == ["drifting_gratings", "blank", "drifting_gratings"]
    expected = {
        "duration_s": [2.0, 2.0, 2.5],
        "orientation_deg": [45.0, NAN, 90.0],
        "spatial_frequency_cpd": [0.04, NAN, 0.08],
        "temporal_frequency_hz": [2.0, NAN, 8.0],
        "phase_cycles": [0.25, NAN, 0.5],
        "width_deg": [250.0] * 3,
        "height_deg": [200.0] * 3,
        "luminance": [1.0, 0.0, -1.0],
        "contrast": [NAN] * 3,
    }
    for quantity, numbers in expected.items():
        assert np.array_equal(field(session, "drifting_gratings", quantity), numbers, equal_nan=True), quantity


def test_the_tables_of_two_laboratories_give_the_same_words(tmp_path: Path):
    allen = table(
        "gabors_presentations", [1.0, 2.0], [1.25, 2.25], stimulus_name=["gabors"] * 2, contrast=[0.8, 0.25],
        x_position=[-35.0, 35.0], orientation=[0.0, 45.0],
    )  # fmt: skip
    ibl = table(
        "trials", [1.0, 2.0, 3.0], [1.9, 2.9, 3.9], contrastLeft=[0.8, NAN, 0.0], contrastRight=[NAN, 0.25, NAN],
        stimOn_times=[1.5, 2.5, 3.5], stimOff_times=[1.75, 2.75, NAN],
    )  # fmt: skip
    first, second = plan(tmp_path, allen), plan(tmp_path, ibl)
    assert stream(first, "gabors").spec.types == stream(second, "trials_stimuli").spec.types == ("gabor",)
    assert field(first, "gabors", "contrast") == [0.8, 0.25]
    assert field(second, "trials_stimuli", "contrast") == [0.8, 0.25, 0.0]
    assert field(second, "trials_stimuli", "x_deg") == [-35.0, 35.0, -35.0]
    assert stream(second, "trials_stimuli").start_ns.tolist() == [1_500_000_000, 2_500_000_000, 3_500_000_000]
    assert np.array_equal(field(second, "trials_stimuli", "duration_s"), [0.25, 0.25, NAN], equal_nan=True)


def test_columns_of_other_names_and_units_mean_the_same(tmp_path: Path):
    fill = table(
        "trials", [1.0, 2.0], [1.5, 2.5], Ori=[30.0, 60.0], stimulus_contrast_percent=[50.0, 100.0],
        tone_frequency_khz=[4.0, 8.0], sound_level_db=[60.0, 70.0], grating_phase_deg=[9.0, 18.0],
    )  # fmt: skip
    session = plan(tmp_path, fill)
    assert types(session, "trials_stimuli") == ["tone", "tone"]
    assert "stimulus-units" not in codes(session), "the names of the columns say it all"
    got = {name: field(session, "trials_stimuli", name) for name in STIMULUS_FIELDS}
    assert (got["orientation_deg"], got["contrast"]) == ([30.0, 60.0], [0.5, 1.0])
    assert (got["tone_hz"], got["level"], got["phase_cycles"]) == ([4000.0, 8000.0], [60.0, 70.0], [0.025, 0.05])


def test_percent_and_degrees_of_phase_are_told_by_their_values_and_recorded(tmp_path: Path):
    fill = table("gratings_presentations", [1.0, 2.0], [1.5, 2.5], contrast=[20.0, 100.0], phase=[90.0, 180.0])
    session = plan(tmp_path, fill)
    assert field(session, "gratings", "contrast") == [0.2, 1.0]
    assert field(session, "gratings", "phase_cycles") == [0.25, 0.5]
    told = [finding.message for finding in session.findings if finding.code == "stimulus-units"]
    assert told == [
        "contrasts reach 100: they are read as percent",
        "phases are whole numbers up to 180: they are read as degrees",
    ]


def test_sizes_in_pixels_are_no_degrees(tmp_path: Path):
    fill = table("films_presentations", [1.0, 2.0], [1.5, 2.5], size=["[1920, 1080]"] * 2, units=["pix", "deg"])
    assert np.array_equal(field(plan(tmp_path, fill), "films", "width_deg"), [NAN, 1920.0], equal_nan=True)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image_name": ["im1", "omitted", ""]}, ["flicker/im1", "blank", "blank"]),
        ({"frame": [0.0, -1.0, NAN]}, ["flicker", "blank", "blank"]),
        ({"orientation": [0.0, NAN, 90.0]}, ["flicker", "blank", "flicker"]),
        ({"orientation": [NAN, NAN, 90.0], "stimulus_name": ["dots", "bars", "bars"]}, ["dots", "blank", "bars"]),
        ({"movie_hash": ["aB3", "c-9", "aB3"]}, ["flicker/a_b3", "flicker/c_9", "flicker/a_b3"]),
    ],
)
def test_a_row_without_what_its_table_varies_is_blank(tmp_path: Path, columns: dict, expected: list[str]):
    fill = table("flicker_presentations", [1.0, 2.0, 3.0], [1.5, 2.5, 3.5], **columns)
    session = plan(tmp_path, fill)
    assert types(session, "flicker") == expected
    assert stream(session, "flicker").spec.types == tuple(sorted(set(expected)))


def test_a_table_stays_a_table_of_intervals_and_the_coverage_says_both(tmp_path: Path):
    session = plan(tmp_path, table("gabors_presentations", [1.0, 2.0], [1.5, 2.5], orientation=[0.0, 45.0]))
    (row,) = [row for row in session.coverage if row.path == "intervals/gabors_presentations"]
    assert row.used_as == "gabors_presentations, gabors"
    assert session.intervals["gabors_presentations"].columns["orientation"] == pytest.approx([0.0, 45.0], abs=0)


def test_trials_of_something_else_are_no_stimuli_unless_the_recipe_says_so(tmp_path: Path):
    trials = table("trials", [1.0, 2.0], [1.5, 2.5], phase=["early", "late"], frame=[10, 20], direction=[-1, 1])
    fill = every(trials, with_units(np.arange(1.0, 20.0)))
    assert [item.spec.name for item in plan(tmp_path, fill).streams] == ["spikes"]
    session = plan(tmp_path, fill, stimulus_tables=("trials",))
    assert field(session, "trials_stimuli", "frame") == [10.0, 20.0]


def test_light_into_the_brain_is_no_stimulus(tmp_path: Path):
    light = table("optogenetic_stimulation", [1.0, 2.0], [1.5, 2.5], stimulus_name=["pulse", "ramp"], level=[1.0, 2.0])
    session = plan(tmp_path, every(light, with_units(np.arange(1.0, 20.0))))
    assert [item.spec.name for item in session.streams] == ["spikes"]


def test_rows_are_put_in_order_and_those_without_a_time_left_out(tmp_path: Path):
    fill = table("gabors_presentations", [3.0, NAN, 1.0], [3.5, 2.5, 1.5], orientation=[90.0, 10.0, 45.0])
    session = plan(tmp_path, fill)
    assert field(session, "gabors", "orientation_deg") == [45.0, 90.0]
    assert {"non-finite-time", "unsorted"} <= set(codes(session))


@pytest.mark.skipif(not (SHARED / "allen_layout_truncated.nwb").exists(), reason="the shared recordings are not here")
def test_the_eight_tables_of_the_allen_layout():
    session = plan_session(SHARED / "allen_layout_truncated.nwb", Recipe(), "d1")
    shown = {item.spec.name: item.spec.types for item in session.streams if item.spec.modality == "stimulus"}
    assert shown == {
        "drifting_gratings": ("drifting_gratings",),
        "flashes": ("flashes",),
        "gabors": ("gabor",),
        "natural_movie_one": ("natural_movie_one",),
        "natural_movie_three": ("natural_movie_three",),
        "natural_scenes": ("natural_scenes",),
        "spontaneous": ("spontaneous",),
        "static_gratings": ("static_gratings",),
    }
    assert field(session, "drifting_gratings", "phase_cycles")[:1] == [0.866667]
    assert field(session, "static_gratings", "phase_cycles")[:3] == [0.25, 0.0, 0.0]
    assert field(session, "gabors", "x_deg")[:3] == [10.0, -40.0, -10.0]
    assert field(session, "natural_scenes", "frame")[:3] == [92.0, 72.0, 43.0]
    assert np.isnan(field(session, "natural_movie_one", "width_deg")).all(), "its units are pixels"


# ---------------------------------------------------------------- pixels by table


def pictures(**named: np.ndarray) -> Callable[[NWBFile], None]:
    images = [GrayscaleImage(name=name, data=data) for name, data in named.items()]
    return lambda nwb: nwb.add_stimulus_template(Images(name="natural_images", images=images))


def test_pictures_are_found_by_name_and_gone_at_the_stop(tmp_path: Path):
    one, two = noise(2, 6, 8)
    rows = table(
        "natural_images_presentations", [1.0, 1.25, 2.0, 3.0], [1.25, 1.5, 2.25, 3.25],
        image_name=["two", "one.jpg", "omitted", "two"],
    )  # fmt: skip
    session = plan(tmp_path, every(pictures(one=one, two=two), rows))
    assert frames(session, "natural_images_frames") == [
        (1.0, 1), (1.25, 0), (1.5, -1), (3.0, 1), (3.25, -1),
    ]  # fmt: skip
    assert np.array_equal(pixels(session, "natural_images_frames"), np.stack([one, two]))
    used = {row.path: row.used_as for row in session.coverage}
    assert used["stimulus/templates/natural_images/one"] == "natural_images_frames"
    assert used["intervals/natural_images_presentations"] == (
        "natural_images_presentations, natural_images, natural_images_frames"
    )


def test_a_stop_before_its_start_is_none(tmp_path: Path):
    one, two = noise(1, 6, 8)[0], noise(1, 6, 8)[0]
    rows = table("pairs_presentations", [1.0, 2.0, 3.0], [1.5, -1.0, 3.5], image_name=["one", "two", "one"])
    session = plan(tmp_path, every(pictures(one=one, two=two), rows))
    assert frames(session, "pairs_frames") == [(1.0, 0), (1.5, -1), (2.0, 1), (3.0, 0), (3.5, -1)]


def test_a_frame_column_points_into_the_template_of_its_film(tmp_path: Path):
    film = noise(4, 6, 8)
    start_s = [1.0, 1.04, 1.08, 5.0, 5.04]
    rows = table(
        "film_one_presentations", start_s, [time + 0.04 for time in start_s], frame=[0, 1, 2, 3, 4],
        stimulus_name=["film_one"] * 5,
    )  # fmt: skip
    session = plan(tmp_path, every(lambda nwb: nwb.add_stimulus_template(movie(film, name="film_one")), rows))
    assert frames(session, "film_one_frames") == [(1.0, 0), (1.04, 1), (1.08, 2), (1.12, -1), (5.0, 3), (5.04, -1)]
    assert "frame-index" in codes(session), "the film has no frame 4"


def test_frames_that_count_from_one_are_read_from_zero(tmp_path: Path):
    rows = table("film_presentations", [1.0, 2.0, 3.0], [2.0, 3.0, 4.0], frame=[1, 2, 3])
    session = plan(tmp_path, every(lambda nwb: nwb.add_stimulus_template(movie(noise(3, 6, 8), name="film")), rows))
    assert frames(session, "film_frames") == [(1.0, 0), (2.0, 1), (3.0, 2), (4.0, -1)]
    assert "frames-from-one" in codes(session)


def test_a_film_without_frame_numbers_plays_from_its_first_frame(tmp_path: Path):
    film = noise(4, 6, 8)
    rows = table(
        "trials", [1.0, 3.0, 5.0], [2.0, 3.3, 6.0], movie_hash=["x1", "x1", "y2"],
    )  # fmt: skip
    template = movie(film, name="x1", rate=4.0)
    session = plan(tmp_path, every(lambda nwb: nwb.add_stimulus_template(template), rows))
    assert frames(session, "trials_frames") == [
        (1.0, 0), (1.25, 1), (1.5, 2), (1.75, 3), (2.0, -1), (3.0, 0), (3.25, 1), (3.3, -1),
    ]  # fmt: skip
    assert stream(session, "trials_stimuli").spec.types == ("trials/x1", "trials/y2")


def test_a_film_that_ends_before_its_row_leaves_the_screen(tmp_path: Path):
    rows = table("trials", [1.0, 9.0], [3.0, 9.5], movie_name=["x1", "x1"])
    template = movie(noise(2, 6, 8), name="x1", rate=4.0)
    session = plan(tmp_path, every(lambda nwb: nwb.add_stimulus_template(template), rows))
    assert frames(session, "trials_frames") == [(1.0, 0), (1.25, 1), (1.5, -1), (9.0, 0), (9.25, 1), (9.5, -1)]


def test_a_series_with_a_clock_of_its_own_is_not_shown_twice(tmp_path: Path):
    rows = table("film_presentations", [1.0, 50.0], [2.0, 51.0], stimulus_name=["film", "film"])
    series = movie(noise(4, 6, 8), name="film", rate=4.0, starting_time=1.0)
    session = plan(tmp_path, every(lambda nwb: nwb.add_stimulus(series), rows))
    assert [time for time, _ in frames(session, "film")] == [1.0, 1.25, 1.5, 1.75]
    assert frames(session, "intervals_film_frames")[:2] == [(50.0, 0), (50.25, 1)], "beyond the series' own clock"
