"""Interval tables with typed columns, and invalid times that make bins and samples missing.

In: small NWB files with planted rows, and the real recordings where they are. Out: nothing.
"""

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from hdmf.common import DynamicTable, DynamicTableRegion, EnumData, VectorData
from nwb_builders import RNG, plan, reason, replace, running, stream, values, with_rois, with_units, write
from pynwb import NWBFile
from pynwb.epoch import TimeIntervals

from prep.nwb.invalid import ValidTokens, invalid_spans, touches
from prep.nwb.session import plan_session
from prep.plan import IntervalTable
from prep.recipe import Recipe
from prep.settings import COUNT_MISSING, NO_TIME
from prep.tokens import HeldTokens

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("BRAINLOOM_NWB_DIR", ROOT.parent / "shared" / "nwb"))
real = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no real recordings at {FOLDER}; set BRAINLOOM_NWB_DIR")


def table(name: str, starts: list[float], stops: list[float], **columns: list) -> TimeIntervals:
    result = TimeIntervals(name=name, description="d")
    for column in columns:
        result.add_column(name=column, description="d")
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        result.add_row(start_time=start, stop_time=stop, **{key: column[i] for key, column in columns.items()})
    return result


def with_table(*tables: TimeIntervals | DynamicTable, module: str = "") -> Callable[[NWBFile], None]:
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 9.0])(nwb)
        for item in tables:
            if module:
                processing = nwb.processing.get(module) or nwb.create_processing_module(module, "d")
                processing.add(item)
            else:
                nwb.add_time_intervals(item)

    return fill


# ---------------------------------------------------------------- columns


def test_columns_are_numbers_or_texts_on_a_far_clock(tmp_path: Path):
    columns = {"is_good": [True, False], "contrast": [3, 4], "outcome": ["hit", ""], "level": [np.nan, 0.5]}
    session = plan(tmp_path, with_table(table("trials", [1.2e7, 1.3e7], [1.2e7 + 1, np.nan], **columns)))
    trials = session.intervals["trials"]
    assert trials.start_ns.tolist() == [12_000_000_000_000_000, 13_000_000_000_000_000]
    assert trials.stop_ns.tolist() == [12_000_001_000_000_000, NO_TIME]
    level = trials.columns.pop("level")
    assert np.array_equal(np.asarray(level), [np.nan, 0.5], equal_nan=True)
    assert {name: list(column) for name, column in trials.columns.items()} == {
        "is_good": [1.0, 0.0], "contrast": [3.0, 4.0], "outcome": ["hit", ""],
    }  # fmt: skip


def test_lists_of_tags_are_joined_and_lists_of_numbers_are_left_out(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 9.0])(nwb)
        nwb.add_trial_column("choices", "d", index=True)
        nwb.add_trial_column("powers", "d", index=True)
        for i, tags in enumerate((["left", "right"], [], ["left"])):
            nwb.add_trial(start_time=float(i), stop_time=i + 1.0, choices=tags, powers=[float(i)] * i)

    path = write(tmp_path, fill)
    session = plan_session(path, Recipe(), "d1")
    assert session.intervals["trials"].columns == {"choices": ["left, right", "", "left"]}
    assert reason(session, "intervals/trials/powers") == "a list in each row (3 values)"
    assert reason(session, "intervals/trials/powers_index") == "the index of a column that is not read"
    used = {row.path: row.used_as for row in session.coverage}
    assert used["intervals/trials/choices_index"] == "trials"


def test_a_broken_index_costs_its_column_alone(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 9.0])(nwb)
        nwb.add_epoch(0.0, 5.0, ["a"])
        nwb.add_epoch(5.0, 9.0, ["b"])

    path = write(tmp_path, fill)
    replace(path, "intervals/epochs/tags_index", np.array([1, 70]))
    session = plan_session(path, Recipe(), "d1")
    assert session.intervals["epochs"].start_ns.tolist() == [0, 5_000_000_000]
    assert session.intervals["epochs"].columns == {}
    assert "tags_index points to value 70, but there are only 2" in reason(session, "intervals/epochs/tags")
    assert [finding.path for finding in session.refused] == ["intervals/epochs/tags"]


def test_words_of_an_enumeration_and_rows_of_another_table(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 9.0], [2.0, 8.0])(nwb)
        side = EnumData(name="side", description="d", data=np.uint8([1, 0]), elements=["left", "right"])
        unit = DynamicTableRegion(name="unit", description="d", data=[1, 0], table=nwb.units)
        times = [VectorData(name=name, description="d", data=[1.0, 2.0]) for name in ("start_time", "stop_time")]
        nwb.create_processing_module("behavior", "d").add(
            DynamicTable(name="choices", description="d", columns=[*times, unit, side, side.elements])
        )

    columns = plan(tmp_path, fill).intervals["choices"].columns
    assert columns["side"] == ["right", "left"]
    assert list(columns["unit"]) == [1.0, 0.0]


def test_a_table_that_gives_no_stops_has_no_stops(tmp_path: Path):
    path = write(tmp_path, with_table(table("cues", [1.0, 2.0], [3.0, 4.0])))
    with h5py.File(path, "r+") as file:
        del file["intervals/cues/stop_time"]
    assert plan_session(path, Recipe(), "d1").intervals["cues"].stop_ns.tolist() == [NO_TIME, NO_TIME]


def test_tables_of_one_name_keep_apart(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_table(table("ripples", [1.0], [2.0]))(nwb)
        for module in ("behavior", "ecephys"):
            nwb.create_processing_module(module, "d").add(table("ripples", [3.0], [4.0]))

    assert set(plan(tmp_path, fill).intervals) == {"ripples", "behavior_ripples", "ecephys_ripples"}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("start_time", "it has no start_time and stop_time for each row"),
        ("rows", "it has no rows"),
        ("stop_time", "it has no start_time and stop_time for each row"),
    ],
)
def test_a_table_without_times_is_skipped_with_the_reason(tmp_path: Path, damage: str, told: str):
    path = write(tmp_path, with_table(table("cues", [1.0, 2.0], [3.0, 4.0])))
    if damage == "start_time":
        with h5py.File(path, "r+") as file:
            del file["intervals/cues/start_time"]
    elif damage == "stop_time":
        replace(path, "intervals/cues/stop_time", np.zeros(3))
    else:
        for name in ("start_time", "stop_time", "id"):
            replace(path, f"intervals/cues/{name}", np.zeros(0))
    session = plan_session(path, Recipe(), "d1")
    assert session.intervals == {}
    assert reason(session, "intervals/cues") == told


def test_an_excluded_table_and_an_excluded_column_are_left_out(tmp_path: Path):
    fill = with_table(table("cues", [1.0], [3.0]), table("trials", [1.0], [3.0], a=[1], b=[2]))
    session = plan(tmp_path, fill, exclude=("intervals/cues", "intervals/trials/a"))
    assert {name: list(item.columns) for name, item in session.intervals.items()} == {"trials": ["b"]}
    assert reason(session, "intervals/trials/a") == "excluded by the recipe"


# ---------------------------------------------------------------- invalid times


def invalid(*spans: tuple[float, float]) -> Callable[[NWBFile], None]:
    def fill(nwb: NWBFile) -> None:
        for start, stop in spans:
            nwb.add_invalid_time_interval(start_time=start, stop_time=stop)

    return fill


def test_bins_that_touch_invalid_times_are_missing_and_the_others_are_as_before(tmp_path: Path):
    spikes = np.sort(RNG.uniform(100, 110, 2000))

    def fill(nwb: NWBFile) -> None:
        with_units(spikes, spikes + 1e-3)(nwb)
        invalid((102.01, 103.0), (102.5, 103.02), (106.0, 106.0), (108.003, 108.004))(nwb)

    (tmp_path / "without").mkdir()
    before = values(stream(plan(tmp_path / "without", with_units(spikes, spikes + 1e-3)), "spikes"))
    item = stream(plan(tmp_path, fill), "spikes")
    found = values(item)
    bin_ns = item.start_ns[:, None] + np.arange(5) * 20_000_000
    missing = np.zeros(bin_ns.shape, bool)
    for start_ns, stop_ns in ((102_010_000_000, 103_020_000_000), (108_003_000_000, 108_004_000_000)):
        missing |= (bin_ns < stop_ns) & (bin_ns + 20_000_000 > start_ns)
    assert missing.sum() == 52
    missing = np.broadcast_to(missing[:, None, :], found.shape)
    assert (found[missing] == COUNT_MISSING).all()
    assert np.array_equal(found[~missing], before[~missing])


def test_samples_inside_invalid_times_are_missing_to_the_sample(tmp_path: Path):
    speed = RNG.normal(size=600)

    def fill(nwb: NWBFile) -> None:
        running(speed, timestamps=50 + np.arange(600) / 50)(nwb)
        invalid((52.0, 53.0))(nwb)

    found = values(stream(plan(tmp_path, fill), "running")).reshape(-1)
    expected = speed.astype(np.float32)
    expected[100:150] = np.nan
    assert np.array_equal(found, expected, equal_nan=True)


def test_the_phase_of_a_source_decides_which_of_its_samples_is_invalid(tmp_path: Path):
    traces = RNG.normal(size=(100, 2))

    def fill(nwb: NWBFile) -> None:
        with_rois({"DfOverF/dff": traces}, 2, offsets=[0.0, 0.05], rate=10.0)(nwb)
        invalid((2.04, 2.16))(nwb)

    session = plan(tmp_path, fill)
    (item,) = session.streams
    assert item.offset_ns is not None
    found = values(item)
    expected = traces.astype(np.float32)
    expected[21, 0] = np.nan  # at 2.1 s
    expected[20:22, 1] = np.nan  # at 2.05 and 2.15 s
    assert np.array_equal(found.transpose(0, 2, 1).reshape(-1, 2), expected, equal_nan=True)


def test_events_inside_invalid_times_stay(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        running(np.ones(5), "lick", timestamps=[1.0, 2.0, 2.5, 7.0, 7.1])(nwb)
        invalid((1.5, 3.0))(nwb)

    assert stream(plan(tmp_path, fill), "lick").start_ns.tolist() == [
        1_000_000_000, 2_000_000_000, 2_500_000_000, 7_000_000_000, 7_100_000_000,
    ]  # fmt: skip


def test_what_is_held_in_memory_is_not_overwritten():
    held = HeldTokens(values=np.ones((3, 1, 2), np.float32))
    spans = np.array([[10, 11]])
    reader = ValidTokens(
        reader=held, token=np.array([1]), start_ns=np.array([10]), offset_ns=np.zeros(1, np.int64), sample_ns=5,
        lasts_ns=1, spans=spans, fill=np.nan,
    )  # fmt: skip
    assert np.isnan(reader.read(0, 3)).ravel().tolist() == [False, False, True, False, False, False]
    assert (held.values == 1).all()


def test_invalid_spans_are_joined_and_open_where_a_time_is_not_given():
    start_ns, stop_ns = np.array([30, NO_TIME, 5, 50, 20, 40]), np.array([35, 2, 10, NO_TIME, 30, 40])
    spans = invalid_spans(IntervalTable(start_ns=start_ns, stop_ns=stop_ns))
    assert spans.tolist() == [[NO_TIME, 2], [5, 10], [20, 35], [50, np.iinfo(np.int64).max]]
    moments = np.array([0, 2, 4, 5, 9, 10, 19, 34, 35, 49, 60])
    assert touches(moments, 1, spans).tolist() == [bool(x) for x in (1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1)]
    assert touches(moments, 2, spans).tolist() == [bool(x) for x in (1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1)]
    assert not touches(moments, 2, np.zeros((0, 2), np.int64)).any()


# ---------------------------------------------------------------- real recordings


@real
def test_the_epochs_and_ripples_of_a_head_direction_session():
    session = plan_session(FOLDER / "head_direction_A2929.nwb", Recipe(), "d1")
    epochs = session.intervals["epochs"]
    assert epochs.start_ns.tolist() == [0, 600_000_000_000]
    assert epochs.stop_ns.tolist() == [600_000_000_000, 1_200_000_000_000]
    assert epochs.columns == {"tags": ["sleep", "wake"]}
    assert len(session.intervals["sleep_ripples"].start_ns) == 594
    ripples = stream(session, "sleep_ripples")
    assert (ripples.spec.kind, ripples.spec.num_tokens) == ("event", 594)


@real
def test_the_eight_tables_of_stimuli_of_an_allen_file_keep_their_columns():
    session = plan_session(FOLDER / "allen_layout_truncated.nwb", Recipe(), "d1")
    tables = {name: item for name, item in session.intervals.items() if name.endswith("_presentations")}
    assert len(tables) == 8
    assert {len(item.start_ns) for item in tables.values()} == {10}
    assert all({"tags", "stimulus_name"} <= item.columns.keys() for item in tables.values())
    told = reason(session, "intervals/gabors_presentations/timeseries")
    assert told == "references to other objects are not read"


@real
def test_trials_and_licks_of_a_zarr_folder():
    session = plan_session(FOLDER / "foraging_717121.nwb.zarr", Recipe(), "d1")
    assert len(session.intervals["trials"].start_ns) == 571
    assert stream(session, "trials_events").spec.num_tokens == 3 * 571
    assert stream(session, "left_lick_time").spec.num_tokens == 2322
    assert reason(session, "acquisition/FIP_rising_time") == "its data are empty"
