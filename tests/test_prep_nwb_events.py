"""Events: licks, pulses, spans, annotations, tables of events and trial columns that are times.

In: small NWB files with planted events, and the real recordings where they are. Out: nothing.
"""

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import RNG, codes, plan, reason, replace, running, stream, values, with_units, write
from pynwb import NWBFile, TimeSeries
from pynwb.behavior import BehavioralEvents, SpatialSeries
from pynwb.event import DurationVectorData, EventsTable, TimestampVectorData
from pynwb.misc import AnnotationSeries, IntervalSeries

from prep.nwb.events import type_name
from prep.nwb.session import plan_session
from prep.plan import PlannedStream, SessionPlan
from prep.recipe import Recipe
from prep.settings import EVENT_FIELDS, to_ns

FAR_S = 1.2e7
ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("BRAINLOOM_NWB_DIR", ROOT.parent / "shared" / "nwb"))
TEXT = h5py.string_dtype()


def told(item: PlannedStream) -> list[tuple[int, str, float | None, float | None]]:
    """Each event: (ns, type, duration_s, value), None = not given."""
    spec = item.spec
    assert (spec.kind, spec.fields, spec.num_sources, spec.duration_ns) == ("event", EVENT_FIELDS, 1, 1)
    assert spec.types == tuple(sorted(set(spec.types)))
    assert item.types is not None
    assert item.types.dtype == np.int32
    fields = [[None if np.isnan(x) else float(x) for x in row] for row in values(item)[:, 0]]
    names = [spec.types[i] for i in item.types]
    return [(int(ns), name, *row) for ns, name, row in zip(item.start_ns, names, fields, strict=True)]


def events_of(folder: Path, fill: Callable[[NWBFile], None], name: str, **recipe: object) -> list[tuple]:
    return told(stream(plan(folder, fill, **recipe), name))


def ndx(path: Path, where: str, kind: str, attributes: dict | None = None, **members: object) -> Path:
    """Put an object of an extension into a file: its package is not needed to read it, nor here to write it."""
    with h5py.File(path, "r+") as file:
        group = file.create_group(where)
        group.attrs.update({"neurodata_type": kind, "namespace": "ndx-events", **(attributes or {})})
        for name, data in members.items():
            array = np.asarray(data)
            item = group.create_dataset(name, data=data, dtype=TEXT if array.dtype.kind == "U" else None)
            column = "VectorIndex" if name.endswith("_index") else "VectorData"
            if "Table" in kind:
                item.attrs["neurodata_type"] = "ElementIdentifiers" if name == "id" else column
    return path


def planned(path: Path, **recipe: object) -> SessionPlan:
    return plan_session(path, Recipe(**recipe), "d1")


@pytest.fixture
def spikes(tmp_path: Path) -> Path:
    """A file with two spikes, which other objects are put into."""
    return write(tmp_path, with_units([1.0, 9.0]))


UNEVEN_S = np.cumsum(np.tile([0.05, 0.06, 2.0, 5.0], 25))  # bursts
LICKS_S = FAR_S + np.sort(RNG.uniform(0, 60, 40))


# ---------------------------------------------------------------- series


def test_a_series_of_ones_is_events_exact_on_a_far_clock(tmp_path: Path):
    found = events_of(tmp_path, running(np.ones(40), "left_lick", timestamps=LICKS_S), "left_lick")
    assert found == [(int(ns), "left_lick", None, 1.0) for ns in to_ns(LICKS_S)]


def test_a_series_of_its_own_time_stamps_is_events_without_a_value(tmp_path: Path):
    found = events_of(tmp_path, running(LICKS_S, "lick_times", timestamps=LICKS_S), "lick_times")
    assert found == [(int(ns), "lick_times", None, None) for ns in to_ns(LICKS_S)]


def test_one_event_is_a_stream_and_one_time_that_is_not_a_number_is_none(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        running([5.0], "airpuff", timestamps=[3.5])(nwb)
        running([1.0], "optogenetics_time", timestamps=[np.nan])(nwb)
        with_units([1.0, 9.0])(nwb)

    session = plan(tmp_path, fill)
    assert told(stream(session, "airpuff")) == [(3_500_000_000, "airpuff", None, 5.0)]
    assert reason(session, "acquisition/optogenetics_time") == "its only time stamp is not a number"


def test_times_that_are_not_numbers_are_dropped_others_sorted_and_the_same_time_may_be_twice(tmp_path: Path):
    rewards = running([1.0, 2.5, 0.5, 4.5, 7.5], "reward", timestamps=[7.0, 2.0, np.nan, 7.0, 0.1])
    session = plan(tmp_path, rewards, events=("reward",))
    assert {"non-finite-time", "unsorted"} <= set(codes(session))
    assert told(stream(session, "reward")) == [
        (100_000_000, "reward", None, 7.5),
        (2_000_000_000, "reward", None, 2.5),
        (7_000_000_000, "reward", None, 1.0),
        (7_000_000_000, "reward", None, 4.5),
    ]


def test_bursts_keep_their_value_scaled_once(tmp_path: Path):
    bursts_s = np.concatenate([start + np.arange(5) * 0.01 for start in (1, 20, 50, 90)])
    volume = RNG.normal(size=20)
    found = events_of(tmp_path, running(volume, "drops", timestamps=bursts_s, conversion=2.0, offset=1.0), "drops")
    assert [event[3] for event in found] == [float(np.float32(x * 2 + 1)) for x in volume]


def test_edges_of_a_pulse_are_two_types(tmp_path: Path):
    edges_s = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    found = events_of(tmp_path, running([1, 0, 1, 0, 1, 0], "frame_ttl", timestamps=edges_s), "frame_ttl")
    assert [(event[0], event[1], event[3]) for event in found] == [
        (round(time_s * 1e9), f"frame_ttl_{level}", float(level))
        for time_s, level in zip(edges_s, [1, 0] * 3, strict=True)
    ]


def test_codes_are_types_and_a_negative_one_says_so(tmp_path: Path):
    code = np.array([7, -7, 12, 7] * 10)
    found = events_of(tmp_path, running(code, "strobe", timestamps=UNEVEN_S[:40]), "strobe")
    names = {7: "strobe_7", -7: "strobe_minus_7", 12: "strobe_12"}
    assert [event[1] for event in found] == [names[number] for number in code]


def test_codes_at_the_pace_of_trials_are_events(tmp_path: Path):
    paced_s = np.cumsum(np.tile([1.0, 2.0, 4.0], 10))
    item = stream(plan(tmp_path, running(np.tile([1, 2], 15), "strobe", timestamps=paced_s)), "strobe")
    assert item.spec.types == ("strobe_1", "strobe_2")


def test_pulses_of_a_fast_camera_are_events(tmp_path: Path):
    session = plan(tmp_path, running(np.ones(5000), "camera", timestamps=np.arange(5000) / 1000))
    assert stream(session, "camera").spec.kind == "event"


def test_signals_are_left_to_behavior(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        running(RNG.normal(size=100), "slow_position", timestamps=np.arange(100) * 0.7)(nwb)
        running((RNG.uniform(size=600) > 0.5).astype(int), "is_moving", timestamps=np.arange(600) / 60)(nwb)
        running(RNG.normal(size=(50, 2)), "two_columns", timestamps=UNEVEN_S[:50])(nwb)
        running(np.zeros(500), "dead_sensor", timestamps=np.arange(500) / 50)(nwb)
        running(np.ones(500), "stuck_sensor", rate=50.0)(nwb)

    session = plan(tmp_path, fill)
    assert {item.spec.kind for item in session.streams} == {"trace"}
    assert {"slow_position", "is_moving"} <= {item.spec.name for item in session.streams}


def test_the_recipe_decides_what_is_an_event(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        running(RNG.normal(size=100), "sensor", timestamps=np.arange(100) * 0.5)(nwb)
        running(RNG.normal(size=(100, 3)), "xyz", timestamps=np.arange(100) * 0.5)(nwb)
        running(RNG.normal(size=100), "wheel", timestamps=UNEVEN_S)(nwb)

    assert stream(plan(tmp_path, fill), "wheel").spec.kind == "event"
    session = plan(tmp_path, fill, events=("sens*", "xyz"), not_events=("acquisition/wheel",))
    assert stream(session, "sensor").spec.kind == "event"
    assert "wheel" not in {item.spec.name for item in session.streams if item.spec.kind == "event"}
    told_why = "it has 3 values at each time; an event has one. Take it out of the recipe's `events`"
    assert reason(session, "acquisition/xyz") == told_why


def test_a_series_of_behavioral_events_is_events_unless_it_samples(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        rewards = TimeSeries(name="reward_ul", data=[2.5, 3.5, 2.5], unit="ul", timestamps=[1.0, 4.0, 6.0])
        force = TimeSeries(name="force", data=RNG.normal(size=200), unit="N", timestamps=np.arange(200) / 50)
        module = nwb.create_processing_module("behavior", "d")
        module.add(BehavioralEvents(time_series=[rewards, force]))

    session = plan(tmp_path, fill)
    assert told(stream(session, "reward_ul")) == [
        (1_000_000_000, "reward_ul", None, 2.5), (4_000_000_000, "reward_ul", None, 3.5),
        (6_000_000_000, "reward_ul", None, 2.5),
    ]  # fmt: skip
    assert stream(session, "force").spec.kind == "trace"


def test_spans_have_a_duration_and_one_that_does_not_end_has_none(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        marks, times = [-1, 1, 2, -1, 1, 1, -2, -1, 2], [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 4.5, 6.0, 7.0]
        nwb.add_acquisition(IntervalSeries(name="contact", data=np.int8(marks), timestamps=times))
        nwb.add_acquisition(IntervalSeries(name="running_bouts", data=np.int8([1, -1]), timestamps=[FAR_S, FAR_S + 2]))

    session = plan(tmp_path, fill)
    assert told(stream(session, "contact")) == [
        (1_000_000_000, "contact_1", 1.0, None),
        (1_500_000_000, "contact_2", 3.0, None),
        (3_000_000_000, "contact_1", None, None),
        (4_000_000_000, "contact_1", 2.0, None),
        (7_000_000_000, "contact_2", None, None),
    ]
    assert told(stream(session, "running_bouts")) == [(12_000_000_000_000_000, "running_bouts", 2.0, None)]
    (finding,) = [finding for finding in session.findings if finding.code == "unmatched-end"]
    assert finding.message == "1 ends have no start before them; they are dropped"


def test_annotations_are_one_type_per_text(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        notes = AnnotationSeries(
            name="notes", data=["Drug given", "lights off", "drug given", ""], timestamps=np.arange(4.0)
        )
        nwb.add_acquisition(notes)
        many = AnnotationSeries(name="many", data=[f"note {i}" for i in range(1001)], timestamps=np.arange(1001.0))
        nwb.add_acquisition(many)
        shown = AnnotationSeries(name="screen", data=["on", "off"], timestamps=[1.0, 2.0])
        nwb.add_stimulus(shown)

    session = plan(tmp_path, fill)
    assert [event[1] for event in told(stream(session, "notes"))] == ["drug_given", "lights_off", "drug_given", "notes"]
    told_why = "it has 1,001 distinct texts; more than 1,000 are no types of events"
    assert reason(session, "acquisition/many") == told_why
    assert stream(session, "screen").spec.modality == "stimulus"


def test_a_name_of_a_type_depends_on_its_label_alone():
    assert [type_name(label) for label in ("goCue", "-1", "1", "Left lick!")] == [
        "go_cue", "minus_1", "1", "left_lick",
    ]  # fmt: skip
    long = [type_name(f"{'yes, this is an animal, as told in the question; ' * 4}{end}") for end in ("a", "b")]
    assert len(set(long)) == 2
    assert max(map(len, long)) == 60
    assert type_name("报酬") != type_name("光")


# ---------------------------------------------------------------- ndx-events, core tables


def test_events_of_an_extension_are_read_without_its_package(spikes: Path):
    ndx(spikes, "acquisition/Licks", "Events", timestamps=LICKS_S)
    session = planned(spikes)
    assert told(stream(session, "licks")) == [(int(ns), "licks", None, None) for ns in to_ns(LICKS_S)]


@pytest.mark.parametrize("kind", ["LabeledEvents", "TTLs"])
def test_labelled_events_have_a_type_per_label(spikes: Path, kind: str):
    ndx(spikes, "acquisition/Reward", kind, timestamps=[1.0, 2.0, 2.0, 5.0], data=np.uint8([0, 10, 2, 99]))
    with h5py.File(spikes, "r+") as file:
        labels = np.array(["No reward", *[""] * 9, "Full reward"], object)
        file["acquisition/Reward/data"].attrs.create("labels", labels, dtype=TEXT)
    assert told(stream(planned(spikes), "reward")) == [
        (1_000_000_000, "no_reward", None, None), (2_000_000_000, "full_reward", None, None),
        (2_000_000_000, "reward_2", None, None), (5_000_000_000, "reward_99", None, None),
    ]  # fmt: skip


def test_a_table_of_types_with_a_list_of_times_each(spikes: Path):
    ndx(
        spikes, "processing/events/AnnotatedEvents", "AnnotatedEventsTable", {"colnames": ["label", "event_times"]},
        id=[3, 4, 5], label=["Reward", "Lick", "Nothing"], event_times=[2.0, 9.0, 1.0, 2.0, 3.0],
        event_times_index=[2, 5, 5],
    )  # fmt: skip
    session = planned(spikes)
    item = stream(session, "annotated_events")
    assert [(event[0] // 10**9, event[1]) for event in told(item)] == [
        (1, "lick"), (2, "reward"), (2, "lick"), (3, "lick"), (9, "reward"),
    ]  # fmt: skip
    assert codes(session) == []
    inside = [row for row in session.coverage if row.path.startswith("processing/events/AnnotatedEvents/")]
    assert {row.used_as for row in inside} == {"annotated_events"}
    assert len(inside) == 4


def test_a_broken_list_of_times_is_refused_by_name_and_the_rest_is_read(spikes: Path):
    ndx(spikes, "acquisition/table", "AnnotatedEventsTable", id=[0], event_times=[1.0], event_times_index=[7])
    session = planned(spikes)
    assert "event_times_index points to event time 7, but there are only 1" in reason(session, "acquisition/table")
    assert [finding.path for finding in session.refused] == ["acquisition/table"]


@pytest.mark.parametrize(("kind", "column"), [("EventsTable", "event_type"), ("TtlsTable", "ttl_type")])
def test_a_table_of_events_whose_types_stand_in_another_table(spikes: Path, kind: str, column: str):
    types = "general/task/types"
    ndx(spikes, types, "EventTypesTable", id=[0, 1], event_name=["lick", "Left reward"])
    where = "processing/events/EventsTable"
    ndx(
        spikes, where, kind, id=[0, 1, 2], timestamp=[1.0, 2.0, 2.0], duration=[np.nan, 0.5, np.nan],
        value=[1.0, np.nan, 3.0], **{column: [0, 1, 0]},
    )  # fmt: skip
    with h5py.File(spikes, "r+") as file:
        file[f"{where}/{column}"].attrs.update({"neurodata_type": "DynamicTableRegion", "table": file[types].ref})
    session = planned(spikes)
    assert told(stream(session, "events_table")) == [
        (1_000_000_000, "lick", None, 1.0), (2_000_000_000, "left_reward", 0.5, None),
        (2_000_000_000, "lick", None, 3.0),
    ]  # fmt: skip
    assert {row.used_as for row in session.coverage if row.path.startswith(types)} == {"events_table"}
    replace(spikes, f"{where}/{column}", np.array([0, 1, 2]))
    with h5py.File(spikes, "r+") as file:
        file[f"{where}/{column}"].attrs["table"] = file[types].ref
    told_why = f"{column} points to row 2 of a table of 2 types. Write the file again."
    assert reason(planned(spikes), where) == told_why


def test_the_core_table_of_events_with_durations_and_annotations(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        columns = [
            TimestampVectorData(name="timestamp", description="d", data=[4.0, 5.0, 4.0]),
            DurationVectorData(name="duration", description="d", data=[0.25, np.nan, 1.0]),
        ]
        table = EventsTable(name="ripples", description="d", columns=columns)
        table.add_column(name="annotation", description="d", data=["", "Sharp wave", ""])
        table.add_column(name="amplitude", description="d", data=[1.0, 2.0, 3.0])
        nwb.add_events_table(table)

    session = plan(tmp_path, fill)
    assert told(stream(session, "ripples")) == [
        (4_000_000_000, "ripples", 0.25, None), (4_000_000_000, "ripples", 1.0, None),
        (5_000_000_000, "sharp_wave", None, None),
    ]  # fmt: skip
    assert reason(session, "events/ripples/amplitude") == "a column that is not read"


def test_numbers_that_a_table_explains_are_named_by_their_meaning(spikes: Path):
    where = "events/ttl"
    ndx(spikes, f"{where}/pulse_meanings", "MeaningsTable", value=[55, 1], meaning=["Start", "Stimulus onset"])
    with h5py.File(spikes, "r+") as file:
        group = file[where]
        group.attrs["neurodata_type"] = "EventsTable"
        for name, data in {"timestamp": [1.0, 2.0, 3.0], "pulse": [55, 1, 2]}.items():
            group[name] = data
            group[name].attrs["neurodata_type"] = "CategoricalVectorData" if name == "pulse" else "TimestampVectorData"
        group["pulse"].attrs["meanings"] = group["pulse_meanings"].ref
    session = planned(spikes)
    names = [event[1] for event in told(stream(session, "ttl"))]
    assert names == ["start", "stimulus_onset", "pulse_2"]
    assert all(row.used_as == "ttl" for row in session.coverage if row.path.startswith(f"{where}/"))


# ---------------------------------------------------------------- columns of trials that are times


def trials(nwb: NWBFile) -> None:
    """Ten trials of 5 s from FAR_S on."""
    with_units([FAR_S, FAR_S + 50])(nwb)
    starts = FAR_S + np.arange(10) * 5.0
    cue = np.where(np.arange(10) == 3, np.nan, starts + 0.5)
    columns = {
        "goCue_start_time": cue, "reaction_time": RNG.uniform(0.1, 0.4, 10), "delay_onset": np.full(10, 0.5),
        "frame_time": np.arange(10.0), "trial_number_on": np.arange(10), "contrast": starts,
    }  # fmt: skip
    for name in columns:
        nwb.add_trial_column(name, "d")
    nwb.add_trial_column("lick_times", "d", index=True)
    for i, start in enumerate(starts):
        row = {name: column[i] for name, column in columns.items()}
        nwb.add_trial(start_time=start, stop_time=start + 4, lick_times=[start + 1.0] * (i % 3), **row)


def test_columns_of_times_on_the_clock_are_events_of_their_table(tmp_path: Path):
    session = plan(tmp_path, trials)
    found = told(stream(session, "trials_events"))
    starts = FAR_S + np.arange(10) * 5.0
    cues = [(int(to_ns(t + 0.5)), "go_cue_start_time", None, None) for i, t in enumerate(starts) if i != 3]
    licks = [(int(to_ns(t + 1.0)), "lick_times", None, None) for i, t in enumerate(starts) for _ in range(i % 3)]
    assert found == sorted(cues + licks)
    used = {row.path: row.used_as for row in session.coverage}
    assert used["intervals/trials/goCue_start_time"] == "trials, trials_events"
    assert used["intervals/trials/lick_times"] == used["intervals/trials/lick_times_index"] == "trials_events"


def test_delays_and_durations_stay_columns_with_a_note(tmp_path: Path):
    session = plan(tmp_path, trials)
    notes = {finding.path: finding.message for finding in session.findings if finding.code == "relative-times"}
    assert set(notes) == {f"intervals/trials/{name}" for name in ("reaction_time", "delay_onset", "frame_time")}
    assert notes["intervals/trials/delay_onset"] == (
        "its values, 0.5 to 0.5, do not follow the rows on the session's clock; it is no stream of events"
    )
    assert {"reaction_time", "delay_onset", "contrast"} <= session.intervals["trials"].columns.keys()


def test_delays_of_early_trials_are_no_events_though_they_lie_near_their_rows(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 9.0])(nwb)
        nwb.add_trial_column("response_time", "d")
        for i, delay in enumerate([0.3, 0.2, 0.4, 0.1]):
            nwb.add_trial(start_time=float(i), stop_time=i + 1.0, response_time=delay)

    assert [item.spec.name for item in plan(tmp_path, fill).streams] == ["spikes"]


# ---------------------------------------------------------------- real recordings

real = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no real recordings at {FOLDER}; set BRAINLOOM_NWB_DIR")


@real
def test_a_foraging_session_is_events_to_the_nanosecond():
    path = FOLDER / "foraging_697929.nwb"
    session = plan_session(path, Recipe(), "d1")
    counts = {
        "FIP_falling_time": 102_250, "FIP_rising_time": 102_249, "left_lick_time": 1653, "right_lick_time": 1257,
        "left_reward_delivery_time": 135, "right_reward_delivery_time": 87,
    }  # fmt: skip
    with h5py.File(path) as file:
        for name, count in counts.items():
            (item,) = [item for item in session.streams if item.spec.origin == f"acquisition/{name}"]
            assert (item.spec.kind, item.spec.num_tokens) == ("event", count)
            assert np.array_equal(item.start_ns, to_ns(np.sort(file[f"acquisition/{name}/timestamps"][()])))
        table = file["intervals/trials"]
        item = stream(session, "trials_events")
        assert item.spec.types == ("delay_start_time", "go_cue_start_time", "reward_outcome_time")
        assert item.types is not None
        go = item.start_ns[item.types == 1]
        cue_s = table["goCue_start_time"][()]
        assert np.array_equal(go, to_ns(cue_s[np.isfinite(cue_s)]))
    assert reason(session, "acquisition/optogenetics_time") == "its only time stamp is not a number"
    assert len(session.intervals["trials"].start_ns) == 447
    assert len(session.intervals["trials"].columns) == 63


@real
def test_events_of_the_extension_in_a_third_party_file():
    item = stream(plan_session(FOLDER / "events_extension.nwb", Recipe(), "d1"), "events")
    assert told(item) == [(i * 10**9, "events", None, None) for i in range(3)]


@real
def test_trial_columns_with_missing_times():
    path = FOLDER / "motor_cortex_anm00239123.nwb"
    session = plan_session(path, Recipe(), "d1")
    item = stream(session, "trials_events")
    assert len(session.intervals["trials"].start_ns) == 412
    assert item.types is not None
    with h5py.File(path) as file:
        for i, name in enumerate(("cue_end_time", "cue_start_time", "pole_in_time", "pole_out_time")):
            time_s = file[f"intervals/trials/{name}"][()]
            assert item.spec.types[i] == name
            assert np.array_equal(item.start_ns[item.types == i], to_ns(np.sort(time_s[np.isfinite(time_s)])))


def test_a_spatial_series_is_never_events(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 9.0])(nwb)
        nwb.add_acquisition(
            SpatialSeries(name="nose", data=RNG.normal(size=50), timestamps=UNEVEN_S[:50], reference_frame="r")
        )

    assert "event" not in {item.spec.kind for item in plan(tmp_path, fill).streams}
