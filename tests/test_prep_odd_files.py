"""Files that are odd and honest: what no reader may drop, read twice, or name like its neighbour.

In: files of odd_builders. Out: nothing.
"""

import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hdmf.common import DynamicTable, VectorData
from nwb_builders import RNG, codes, plan, reason, running, stream, values, with_rois, with_units, write
from odd_builders import REGULAR, bent, moments, only, swap, table, together, with_trials
from pynwb import NWBFile, TimeSeries
from pynwb.base import ImageReferences, Images
from pynwb.behavior import BehavioralEvents, Position, SpatialSeries
from pynwb.epoch import TimeIntervals
from pynwb.image import GrayscaleImage, IndexSeries
from pynwb.misc import AnnotationSeries

from prep.nwb.session import plan_session
from prep.recipe import Recipe
from prep.settings import EVENT_FIELDS, to_ns

AWAY = "Where one is hidden and the other shown, one tells the other; leave one out by the recipe's `exclude`"


# ---------------------------------------------------------------- what is read


def test_a_table_of_words_and_times_is_events(tmp_path: Path):
    licks = np.sort(RNG.uniform(0, 300, 60))
    sides = np.array(["left", "right", "left"] * 20, dtype=object)
    session = plan(tmp_path, together(REGULAR, table("licks", timestamps=licks, side=sides)))
    found = stream(session, "licks")
    assert (found.spec.kind, found.spec.types) == ("event", ("left", "right"))
    assert np.array_equal(found.start_ns, to_ns(licks))
    assert found.types is not None and found.types.tolist() == [0, 1, 0] * 20


@pytest.mark.parametrize(
    ("words", "types"), [(["L", "R"] * 20, ("l", "r")), ([f"note {i}" for i in range(40)], ("licks",))]
)
def test_words_that_recur_are_the_types_of_a_table_of_events(tmp_path: Path, words: list[str], types: tuple[str, ...]):
    def edit(file: h5py.File) -> None:
        group = file.create_group("events/licks")
        group.attrs.update({"neurodata_type": "EventsTable", "colnames": np.array(["timestamp", "side"], dtype=object)})
        columns = {"id": np.arange(40), "timestamp": np.arange(40) * 0.7, "side": np.array(words, dtype="S")}
        for name, column in columns.items():
            group[name] = column
            group[name].attrs["neurodata_type"] = "ElementIdentifiers" if name == "id" else "VectorData"

    assert stream(bent(tmp_path, REGULAR, edit), "licks").spec.types == types


@pytest.mark.parametrize("name", ["time", "timestamp", "times", "time_s"])
def test_the_times_of_a_table_may_have_another_name(tmp_path: Path, name: str):
    data = RNG.normal(size=600)
    session = plan(tmp_path, table("eye", **{name: np.arange(600) / 30, "width": data}))
    found = stream(session, "eye")
    assert np.array_equal(values(found).ravel(), data.astype(np.float32))
    assert found.spec.channels == ("eye/width",)


def test_a_column_called_time_that_does_not_rise_is_no_clock(tmp_path: Path):
    session = plan(tmp_path, together(REGULAR, table("reactions", time=RNG.normal(size=9), score=RNG.normal(size=9))))
    assert reason(session, "processing/behavior/reactions").startswith("a table without a column of times that rise")


def test_pulses_of_a_stimulus_are_events_of_the_stimulus(tmp_path: Path):
    pulses = np.sort(RNG.uniform(0, 300, 20))
    series = TimeSeries(name="laser", data=np.ones(20), unit="n.a.", timestamps=pulses)
    trace = TimeSeries(name="contrast", data=RNG.normal(size=600), unit="n.a.", starting_time=0.0, rate=2.0)
    session = plan(tmp_path, together(REGULAR, lambda nwb: (nwb.add_stimulus(series), nwb.add_stimulus(trace))))
    assert stream(session, "laser").spec.modality == "stimulus"
    assert np.array_equal(stream(session, "laser").start_ns, to_ns(pulses))
    assert reason(session, "stimulus/presentation/contrast") == "a stimulus that is a signal is not read"


def test_a_series_of_missing_samples_makes_way_for_another_of_the_same_cells(tmp_path: Path):
    raw = RNG.normal(size=(300, 3))
    session = plan(tmp_path, with_rois({"DfOverF/dff": np.full((300, 3), np.nan), "Fluorescence/raw": raw}, 3))
    assert [item.spec.name for item in session.streams] == ["raw"]
    assert reason(session, "processing/ophys/DfOverF/dff") == "all its samples are missing"


def test_of_a_fibre_as_measured_and_its_dff_one_is_read(tmp_path: Path):
    dff, raw, other = (RNG.normal(size=300) for _ in range(3))
    place = VectorData(name="location", description="d", data=["VTA", "NAc"])

    def fill(nwb: NWBFile) -> None:
        for name, data in (("a_raw", raw), ("b_dff", dff), ("c_raw", other)):
            running(data, name=name, starting_time=0.0, rate=20.0)(nwb)
        nwb.add_acquisition(DynamicTable(name="fibers", description="d", columns=[place]))

    def edit(file: h5py.File) -> None:
        for name, row in (("a_raw", 0), ("b_dff", 0), ("c_raw", 1)):
            group = file["acquisition"][name]
            group.attrs["neurodata_type"] = "FiberPhotometryResponseSeries"
            group["fiber_photometry_table_region"] = [row]
            group["fiber_photometry_table_region"].attrs.update(
                {"neurodata_type": "DynamicTableRegion", "table": file["acquisition/fibers"].ref}
            )

    session = bent(tmp_path, fill, edit)
    assert [item.spec.name for item in session.streams] == ["b_dff", "c_raw"]
    assert list(session.units.region) == ["VTA", "NAc"]
    assert reason(session, "acquisition/a_raw") == "some of its fibres are in acquisition/b_dff, which is read"


def test_rois_of_one_id_are_different_units(tmp_path: Path):
    def edit(file: h5py.File) -> None:
        file["processing/ophys/ImageSegmentation/PlaneSegmentation/id"][:] = [7, 7, 9]

    session = bent(tmp_path, with_rois({"DfOverF/dff": RNG.normal(size=(300, 3))}, 3), edit)
    assert [key.rsplit("/", 1)[-1] for key in session.units.unit_key] == [
        "PlaneSegmentation-7-0",
        "PlaneSegmentation-7-1",
        "PlaneSegmentation-9",
    ]


def test_a_conversion_in_a_list_of_one_is_read_for_events(tmp_path: Path):
    def edit(file: h5py.File) -> None:
        file["acquisition/drops/data"].attrs["conversion"] = np.array([0.5])

    session = bent(tmp_path, moments("drops", np.arange(20) * 2.0, np.full(20, 4.0)), edit)
    assert values(stream(session, "drops"))[:, 0, EVENT_FIELDS.index("value")].tolist() == [2.0] * 20


def test_two_texts_at_one_time_are_no_event(tmp_path: Path):
    def notes(nwb: NWBFile) -> None:
        nwb.add_acquisition(AnnotationSeries(name="notes", data=["a"] * 5, timestamps=np.arange(5.0)))

    fill = together(REGULAR, notes)
    session = bent(tmp_path, fill, lambda file: swap(file, "acquisition/notes/data", np.full((5, 2), b"a")))
    assert reason(session, "acquisition/notes") == "its texts are (5, 2); an event has one"


def test_trials_whose_times_are_text_are_refused_by_name(tmp_path: Path):
    fill = together(REGULAR, with_trials(np.arange(9.0), 0.5))
    session = bent(tmp_path, fill, lambda file: swap(file, "intervals/trials/stop_time", np.array([b"x"] * 9)))
    message = "its stop_time is |S1, expected seconds as numbers. Write it again."
    assert only(session, "broken-object").message == message


def test_units_whose_spikes_cannot_be_told_apart_say_so(tmp_path: Path):
    fill = together(REGULAR, with_units([1.0, 2.0], [3.0]))
    session = bent(tmp_path, fill, lambda file: file["units"].__delitem__("spike_times_index"))
    assert reason(session, "units") == "the units have no spike_times_index"


def test_a_smooth_signal_on_an_irregular_clock_is_told_to_be_read_as_events(tmp_path: Path):
    time_s = np.cumsum(np.where(RNG.random(2000) < 0.5, RNG.exponential(1.0, 2000), 0.001))
    assert "maybe-signal" not in codes(plan(tmp_path, moments("drops", time_s, RNG.normal(size=2000))))
    found = only(plan(tmp_path, moments("wheel", time_s, np.cumsum(RNG.normal(size=2000)))), "maybe-signal")
    assert found.message == (
        "its clock is irregular, so its 2,000 values are read as events. "
        "If they sample a signal, list it in `not_events`"
    )


# ---------------------------------------------------------------- names


def test_names_with_brackets_are_named_by_a_recipe_as_they_stand(tmp_path: Path):
    fill = running(RNG.uniform(0, 6, size=300), name="angle [rad]", unit="n.a.", starting_time=0.0, rate=20.0)
    session = plan(tmp_path, fill, angles=("acquisition/angle [rad]",), names={"angle [rad]": "heading"})
    assert stream(session, "heading").spec.channels == ("heading/cos", "heading/sin")
    assert "recipe-unmatched" not in codes(session)


def test_names_of_any_language_stay_apart(tmp_path: Path):
    names = ["Läufe", "速度", "位置", "lick∕left"]  # noqa: RUF001  not the slash of a path
    fills = [running(RNG.normal(size=300), name=name, starting_time=0.0, rate=20.0) for name in names]
    session = plan(tmp_path, together(*fills))
    by_origin = {item.spec.origin.removeprefix("acquisition/"): item.spec.name for item in session.streams}
    assert set(by_origin) == set(names) and len(set(by_origin.values())) == 4
    assert (by_origin[names[0]], by_origin[names[3]]) == ("laufe", "lick_left")


# ---------------------------------------------------------------- the same numbers twice


def test_a_cue_that_is_a_series_and_a_column_of_the_trials_is_told(tmp_path: Path):
    starts_s = np.arange(40) * 6.0
    go_s = starts_s + RNG.uniform(0.5, 1.5, 40)
    cue = TimeSeries(name="cue", data=np.ones(40), unit="n.a.", timestamps=go_s)

    def fill(nwb: NWBFile) -> None:
        with_trials(starts_s, 3.0, go_time=go_s)(nwb)
        nwb.create_processing_module("behavior", "d").add(BehavioralEvents(time_series=cue))

    found = only(plan(tmp_path, fill), "same-data")
    assert found.path == "processing/behavior/BehavioralEvents/cue"
    assert found.message == f"its 40 events have the times of intervals/trials/go_time. {AWAY}"


def test_a_position_in_two_units_is_told_and_another_is_not(tmp_path: Path):
    place = np.cumsum(RNG.normal(size=(3000, 2)), axis=0)
    data = {"in_cm": place, "in_pixels": 20 - 7.5 * place, "noisy": place + RNG.normal(size=place.shape)}
    series = [
        SpatialSeries(name=name, data=array, unit="n.a.", reference_frame="arena", starting_time=0.0, rate=20.0)
        for name, array in data.items()
    ]
    session = plan(tmp_path, lambda nwb: nwb.add_acquisition(Position(spatial_series=series)))
    found = only(session, "same-data")
    assert found.path == "acquisition/Position/in_pixels"
    assert found.message == f"in_pixels/0 is in_cm/0 of acquisition/Position/in_cm, but for its unit. {AWAY}"


# ---------------------------------------------------------------- size


def test_six_hundred_pictures_and_as_many_series_are_planned_in_seconds(tmp_path: Path):
    pixels = RNG.integers(0, 255, (600, 8, 8)).astype(np.uint8)
    shown = RNG.integers(0, 600, 1000)

    def fill(nwb: NWBFile) -> None:
        pictures = [GrayscaleImage(name=f"im{i:04d}", data=image) for i, image in enumerate(pixels)]
        scenes = Images(
            name="scenes", images=pictures, order_of_images=ImageReferences(name="order_of_images", data=pictures)
        )
        nwb.add_stimulus_template(scenes)
        nwb.add_stimulus(
            IndexSeries(
                name="index",
                data=shown.astype("u4"),
                unit="N/A",
                indexed_images=scenes,
                timestamps=np.arange(1000) * 0.25,
            )
        )
        rows = TimeIntervals(name="scenes_presentations", description="d")
        rows.add_column("image_name", "d")
        for row, number in enumerate(shown):
            rows.add_row(start_time=row * 0.25, stop_time=row * 0.25 + 0.25, image_name=f"im{number:04d}")
        nwb.add_time_intervals(rows)
        for number in range(600):
            moments(f"licks_{number}", np.sort(RNG.uniform(0, 250, 20)))(nwb)

    path = write(tmp_path, fill)
    begin_s = time.process_time()
    session = plan_session(path, Recipe(), "d1")
    assert time.process_time() - begin_s < 60  # it took 400 s where each object was looked for among all others
    frames = next(item for item in session.streams if item.spec.name == "scenes_frames")
    held = session.stimuli[0].reader.read(0, session.stimuli[0].shape[0])
    assert np.array_equal(held[values(frames).ravel()[:1000]], pixels[shown])
