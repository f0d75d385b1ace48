"""Sorted units of NWB files: every spike once, what was not observed is missing, one table by rule, metadata in units.

In: files that nwb_builders writes, with planted truth. Out: nothing.
"""

import dataclasses
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import RNG, codes, plan, reason, replace, running, stream, values, with_units, write
from pynwb import NWBFile, TimeSeries
from pynwb.misc import Units as UnitsTable
from spike_builders import BIN_NS, bins, counted, message

import prep.nwb.spikes
from prep.nwb.session import plan_session
from prep.nwb.spikes import SpikeReader, SpikeTimes
from prep.plan import PrepError
from prep.recipe import Recipe, Sync
from prep.settings import COUNT_MISSING

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("BRAINLOOM_NWB_DIR", ROOT.parent / "shared" / "nwb"))


def many_spikes(num_units: int = 4, stop_s: float = 100.0, rate_hz: float = 5.0) -> list[np.ndarray]:
    return [np.sort(RNG.uniform(1.0, stop_s, int(stop_s * rate_hz))) for _ in range(num_units)]


# ---------------------------------------------------------------- counts


def test_every_spike_is_counted_once_in_its_bin(tmp_path: Path):
    spikes = [np.sort(RNG.uniform(3.05, 9.0, 400)), np.array([]), np.array([3.0, 3.02, 3.0200001, 8.5])]
    item = stream(plan(tmp_path, with_units(*spikes)), "spikes")
    counts = values(item)
    assert item.start_ns[0] == 3_000_000_000
    assert (np.diff(item.start_ns) == 100_000_000).all()
    assert counts.sum(axis=(0, 2)).tolist() == [400, 0, 4]
    assert counts[0, 2].tolist() == [1, 2, 0, 0, 0]


def test_unsorted_placeholder_and_missing_spikes_are_repaired(tmp_path: Path):
    session = plan(tmp_path, with_units([2.0, 1.0, -1.0], [np.nan, 1.5]))
    assert codes(session) == ["non-finite-time", "placeholder-time", "unsorted"]
    assert values(stream(session, "spikes")).sum(axis=(0, 2)).tolist() == [2, 1]
    assert stream(session, "spikes").start_ns[[0, -1]].tolist() == [1_000_000_000, 2_000_000_000]


def test_spikes_before_time_zero_are_spikes(tmp_path: Path):
    session = plan(tmp_path, with_units([-2.0, -1.0, 3.0]))
    assert codes(session) == []
    assert values(stream(session, "spikes")).sum() == 3


def test_saturated_bins_are_reported(tmp_path: Path):
    session = plan(tmp_path, with_units(np.linspace(1.0, 1.01, 300)))
    assert codes(session) == ["saturated"]
    assert values(stream(session, "spikes")).max() == 254


def test_unit_keys_are_unique_and_metadata_is_read(tmp_path: Path):
    fill = with_units([1.0], [2.0], quality=["good", "mua"], location=["CA1", "CA3"])
    path = write(tmp_path, fill)
    with h5py.File(path, "r+") as file:
        file["units/id"][...] = [7, 7]
    units = plan_session(path, Recipe(), "d1").units
    assert list(units.unit_key) == ["d1/s1/7-0", "d1/s1/7-1"]
    assert (list(units.quality), list(units.region)) == (["good", "mua"], ["CA1", "CA3"])
    assert np.isnan(units.xyz_um).all()


def test_positions_and_regions_come_from_the_electrodes(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        group = nwb.create_electrode_group("g", "d", "V1", nwb.create_device("probe"))
        for row in range(3):
            nwb.add_electrode(x=1.0, y=10.0 * row, z=0.0, location="V2", group=group)
        nwb.add_unit(spike_times=[1.0], electrodes=[1, 2])
        nwb.add_unit(spike_times=[2.0], electrodes=[0])

    units = plan(tmp_path, fill).units
    assert units.xyz_um.tolist() == [[1, 15, 0], [1, 0, 0]]
    assert list(units.region) == ["V2", "V2"]


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("spike_times_index", np.array([2, 200]), "spike_times_index points to spike 200, but there are only 3"),
        ("spike_times_index", np.array([2, 1]), "spike_times_index goes backwards"),
        ("id", np.arange(3), "it has 3 units, but spike_times_index has 2 rows"),
    ],
)
def test_a_broken_table_is_refused_by_name_and_the_rest_of_the_file_is_read(
    tmp_path: Path, name: str, data: np.ndarray, told: str
):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 2.0], [3.0])(nwb)
        running(RNG.normal(size=99), starting_time=0.0, rate=10.0)(nwb)

    path = write(tmp_path, fill)
    replace(path, f"units/{name}", data)
    session = plan_session(path, Recipe(), "d1")
    assert [item.spec.name for item in session.streams] == ["running"]
    assert [(finding.path, told in finding.message) for finding in session.refused] == [("units", True)]


def test_blocks_change_nothing_whatever_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spikes = [*many_spikes(3, 20.0), np.array([]), RNG.permutation(many_spikes(1, 20.0)[0])]
    path = write(tmp_path, with_units(*spikes))
    whole = plan_session(path, Recipe(), "d1")
    monkeypatch.setattr(prep.nwb.spikes, "BLOCK_SPIKES", 7)
    parts = plan_session(path, Recipe(), "d1")
    assert np.array_equal(bins(whole)[0], bins(parts)[0])
    assert np.array_equal(bins(whole)[0], counted(spikes, bins(whole)[0].shape[1], bins(whole)[1]))
    assert [(finding.code, finding.message) for finding in whole.findings] == [
        (finding.code, finding.message) for finding in parts.findings
    ]
    assert np.array_equal(whole.units.spike_features, parts.units.spike_features, equal_nan=True)


def test_blocks_hold_each_spike_once_and_cut_no_unit_but_those_in_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prep.nwb.spikes, "BLOCK_SPIKES", 10)
    monkeypatch.setattr(prep.nwb.spikes, "COUNT_MAX", 3)
    stops = np.array([0, 4, 9, 30, 30, 31])
    times = SpikeTimes(path=Path("x"), dataset="d", stops=stops, num_units=6)
    file = {"d": np.arange(40.0)}
    assert np.concatenate([time_s for time_s, _ in times.blocks(file)]).tolist() == list(range(31))
    whole = list(times.blocks_in_order(file))
    assert [set(unit.tolist()) for _, unit, _ in whole] == [{1, 2}, {3}, {5}]
    cut = list(dataclasses.replace(times, in_order=np.ones(6, np.bool_)).blocks_in_order(file))
    assert [(time_s[:num_old].tolist(), set(unit.tolist())) for time_s, unit, num_old in cut] == [
        ([], {1, 2, 3}), ([9.0], {3}), ([17.0, 18.0, 19.0], {3}), ([], {5}),
    ]  # fmt: skip
    for blocks in (whole, cut):
        assert np.concatenate([time_s[num_old:] for time_s, _, num_old in blocks]).tolist() == list(range(31))
        units = np.concatenate([unit[num_old:] for _, unit, num_old in blocks])
        assert np.bincount(units, minlength=6).tolist() == [0, 4, 5, 21, 0, 1]


def test_bins_that_overflow_and_doubles_are_counted_once_wherever_a_unit_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    burst = np.sort(np.concatenate([np.arange(1000) / 100, np.full(300, 5.0), 5 + np.arange(400) / 100_000]))
    path = write(tmp_path, with_units(burst, burst[::-1]))
    messages = []
    for size in (10_000, 7, 64, 300):
        monkeypatch.setattr(prep.nwb.spikes, "BLOCK_SPIKES", size)
        messages.append([(finding.code, finding.message) for finding in plan_session(path, Recipe(), "d1").findings])
    assert messages[0] == messages[1] == messages[2] == messages[3]
    expected = 2 * int(np.maximum(np.bincount((burst * 50 + 1e-9).astype(int)) - 254, 0).sum())
    assert ("saturated", f"{expected} spikes beyond 254 in one 20 ms bin are not counted") in messages[0]


def test_spikes_of_a_far_clock_are_counted_to_the_nanosecond(tmp_path: Path):
    edge_s = 12_000_000.04
    spikes = [
        np.array([12_000_000.0, np.nextafter(edge_s, 0), edge_s + 1e-8, 12_000_003.999]),
        np.array([12_000_001.5]),
    ]
    counts, first_bin = bins(plan(tmp_path, with_units(*spikes)))
    assert first_bin * BIN_NS == 12_000_000 * 10**9
    assert np.array_equal(counts, counted(spikes, counts.shape[1], first_bin))


def test_spikes_at_the_same_time_are_counted_and_noted(tmp_path: Path):
    session = plan(tmp_path, with_units([1.0, 1.5, 1.5, 1.5], [1.5]))
    assert codes(session) == ["duplicate-spikes"]
    assert message(session, "duplicate-spikes") == "2 spikes are at the time of another of the same unit"
    assert bins(session)[0].sum(axis=1).tolist() == [4, 1]


def test_a_clock_that_starts_over_is_refused(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units(*[np.concatenate([many_spikes(1)[0], many_spikes(1)[0]]) for _ in range(4)])(nwb)
        running(RNG.normal(size=99), starting_time=0.0, rate=10.0)(nwb)

    session = plan(tmp_path, fill)
    assert [item.spec.name for item in session.streams] == ["running"]
    assert reason(session, "units").startswith("spike times of 4 of 4 units start over half-way: two recordings")


def test_blocks_of_time_that_are_stored_out_of_order_are_sorted(tmp_path: Path):
    spikes = [np.concatenate([times_s + 100, times_s]) for times_s in many_spikes()]
    session = plan(tmp_path, with_units(*spikes))
    assert codes(session) == ["unsorted"]
    counts, first_bin = bins(session)
    assert np.array_equal(counts, counted(spikes, counts.shape[1], first_bin))


def test_spikes_in_milliseconds_are_read_as_such_where_another_clock_tells(tmp_path: Path):
    spikes = [np.round(times_s, 4) for times_s in many_spikes(4, 1200.0)]

    def fill(nwb: NWBFile) -> None:
        with_units(*[times_s * 1000 for times_s in spikes])(nwb)
        running(RNG.normal(size=12_000), starting_time=0.0, rate=10.0)(nwb)

    session = plan(tmp_path, fill)
    assert [finding.action for finding in session.findings if finding.code == "spike-times-ms"] == ["repaired"]
    assert "but the file's other clocks end at 1200 s: read as milliseconds" in message(session, "spike-times-ms")
    counts, first_bin = bins(session)
    expected = counted([times_s * 1000 / 1000 for times_s in spikes], counts.shape[1], first_bin)
    assert np.array_equal(counts, expected)


def test_slow_units_on_the_same_clock_as_the_rest_are_no_milliseconds(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units(*many_spikes(4, 1200.0, rate_hz=0.05))(nwb)
        running(RNG.normal(size=12_000), starting_time=0.0, rate=10.0)(nwb)

    assert codes(plan(tmp_path, fill)) == []


def test_slow_units_without_another_clock_are_noted(tmp_path: Path):
    session = plan(tmp_path, with_units(*[times_s * 1000 for times_s in many_spikes(3, 200.0, rate_hz=2)]))
    assert codes(session) == ["maybe-milliseconds"]
    assert "No other clock of the file tells" in message(session, "maybe-milliseconds")


@pytest.mark.parametrize("far_s", [-1.5e9, 1.5e9, 400.0])
def test_spikes_far_outside_the_session_are_dropped(tmp_path: Path, far_s: float):
    spikes = many_spikes()
    planted = [np.sort(np.append(times_s, far_s)) if unit < 2 else times_s for unit, times_s in enumerate(spikes)]
    session = plan(tmp_path, with_units(*planted))
    assert codes(session) == ["spikes-outside-session"]
    assert message(session, "spikes-outside-session").startswith("2 spike times lie further outside")
    counts, first_bin = bins(session)
    assert np.array_equal(counts, counted(spikes, counts.shape[1], first_bin))


def test_a_clock_of_years_is_refused(tmp_path: Path):
    with pytest.raises(PrepError, match="nothing to use") as caught:
        plan(tmp_path, with_units(np.linspace(0, 1e8, 500)))
    (told,) = [row.reason for row in caught.value.coverage if row.path == "units"]
    assert told == "spike times run from 0 s to 1e+08 s, more than 30 days: not one clock"


def test_units_without_spikes_are_skipped(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        running(RNG.normal(size=99), starting_time=0.0, rate=10.0)(nwb)
        with_units([np.nan, np.nan])(nwb)

    assert reason(plan(tmp_path, fill), "units") == "the units have no spikes"


def test_spikes_on_another_clock_are_mapped_by_the_pulses(tmp_path: Path):
    pulses_s = np.arange(0.0, 100.0, 1.37)
    spikes = many_spikes(3)

    def fill(nwb: NWBFile) -> None:
        with_units(*[times_s * 1.0001 + 0.25 for times_s in spikes])(nwb)
        for name, stamps_s in (("sync", pulses_s), ("probe_sync", pulses_s * 1.0001 + 0.25)):
            nwb.add_acquisition(TimeSeries(name=name, data=np.ones(len(stamps_s)), unit="n.a.", timestamps=stamps_s))

    sync = Sync(reference="acquisition/sync", pulses="acquisition/probe_sync", streams=("units",))
    session = plan(tmp_path, fill, sync=(sync,))
    assert "clock-mapped" in codes(session)
    reader = stream(session, "spikes").reader
    assert isinstance(reader, SpikeReader)
    with h5py.File(tmp_path / "s1.nwb") as file:
        mapped = np.concatenate([time_s for time_s, _ in reader.times.blocks(file)])
    assert np.abs(mapped - np.concatenate(spikes)).max() < 1e-9
    assert bins(session)[0].sum() == sum(len(times_s) for times_s in spikes)


# ---------------------------------------------------------------- tables and rows


def two_tables(nwb: NWBFile) -> None:
    for name, first_s in (("beta_sorting", 2.0), ("alpha_sorting", 3.0)):
        table = UnitsTable(name=name, description="d")
        table.add_unit(spike_times=[first_s, first_s + 1], id=7)
        module = nwb.create_processing_module(f"ecephys_{name}", "d")
        module.add(table)


def test_the_first_table_by_path_is_read_where_the_root_has_none(tmp_path: Path):
    session = plan(tmp_path, two_tables)
    assert stream(session, "spikes").spec.origin == "processing/ecephys_alpha_sorting/alpha_sorting"
    told = reason(session, "processing/ecephys_beta_sorting/beta_sorting")
    assert told == "another table of units is read; name it in the recipe's `units`"
    assert list(session.units.unit_key) == ["d1/s1/7"]


def test_the_table_at_the_root_comes_first(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 2.0])(nwb)
        two_tables(nwb)

    assert stream(plan(tmp_path, fill), "spikes").spec.origin == "units"


def test_the_recipe_names_one_table_or_several(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 2.0])(nwb)
        two_tables(nwb)

    one = plan(tmp_path, fill, units=("beta_sorting",))
    assert [(item.spec.name, item.spec.origin[-12:]) for item in one.streams] == [("spikes", "beta_sorting")]
    assert list(one.units.unit_key) == ["d1/s1/7"]
    several = plan(tmp_path, fill, units=("units", "*_sorting"))
    names = [(item.spec.name, item.spec.first_unit, int(item.start_ns[0])) for item in several.streams]
    assert names == [
        ("spikes", 0, 10**9),
        ("spikes_alpha_sorting", 1, 3 * 10**9),
        ("spikes_beta_sorting", 2, 2 * 10**9),
    ]
    assert list(several.units.unit_key) == ["d1/s1/units-0", "d1/s1/alpha_sorting-7", "d1/s1/beta_sorting-7"]


def test_the_recipe_keeps_units_by_the_values_of_columns(tmp_path: Path):
    spikes = many_spikes(4, 20.0)
    fill = with_units(*spikes, quality=["good", "mua", "Good", "good"], label=[1.0, 1.0, 0.0, 1.0])
    session = plan(tmp_path, fill, keep_units={"quality": ("good",), "label": ("1",)})
    counts, first_bin = bins(session)
    assert np.array_equal(counts, counted([spikes[0], spikes[3]], counts.shape[1], first_bin))
    assert list(session.units.unit_key) == ["d1/s1/0", "d1/s1/3"]
    assert message(session, "keep-units") == "2 of 4 units are left out by `keep_units` of the recipe"
    assert session.units.xyz_um.shape == (2, 3)


def test_observed_time_stays_with_the_units_that_are_kept(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        nwb.add_unit_column("quality", "d")
        nwb.add_unit(spike_times=[1.0, 9.0], obs_intervals=[[0.0, 2.0]], quality="mua")
        nwb.add_unit(spike_times=[1.0, 9.0], obs_intervals=[[0.0, 5.0], [8.0, 10.0]], quality="good")

    session = plan(tmp_path, fill, keep_units={"quality": ("good",)})
    counts, first_bin = bins(session)
    assert ((counts[0] == COUNT_MISSING).sum(), first_bin) == (150, 50)


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (
            {"qualty": ("good",)},
            "names the column 'qualty', but units has no such column .* Its columns are .*quality",
        ),
        (
            {"quality": ("god", "ok")},
            "units whose quality is god or ok, but in units none is. Found: good, mua",
        ),
    ],
)
def test_a_column_or_value_that_fits_no_unit_is_an_error(tmp_path: Path, keep: dict, told: str):
    with pytest.raises(PrepError, match=told):
        plan(tmp_path, with_units([1.0], [2.0], quality=["good", "mua"]), keep_units=keep)


def test_keeping_no_unit_at_all_is_an_error(tmp_path: Path):
    fill = with_units([1.0], [2.0], quality=["good", "mua"], label=[0, 1])
    with pytest.raises(PrepError, match="`keep_units` of the recipe keeps none of the 2 units of units"):
        plan(tmp_path, fill, keep_units={"quality": ("good",), "label": ("1",)})


def test_one_value_of_several_that_fits_no_unit_is_noted(tmp_path: Path):
    fill = with_units([1.0], [2.0], quality=["good", "mua"])
    session = plan(tmp_path, fill, keep_units={"quality": ("good", "sua")})
    assert "`keep_units` of the recipe names it for quality" in message(session, "recipe-unmatched")


# ---------------------------------------------------------------- real recordings


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no real recordings at {FOLDER}; set BRAINLOOM_NWB_DIR")
@pytest.mark.parametrize(
    ("name", "regions"),
    [
        ("motor_cortex_anm00239123", {"Thalamus"}),
        ("rat_hippocampus_stub", {""}),
        ("head_direction_A2929", {"adn", "ca1"}),
    ],
)
def test_units_of_real_recordings_have_all_their_spikes_and_the_word_for_their_region(name: str, regions: set):
    path = FOLDER / f"{name}.nwb"
    session = plan_session(path, Recipe(), "d1")
    item = stream(session, "spikes")
    with h5py.File(path) as file:
        each = np.diff(file["units/spike_times_index"][()].astype(np.int64), prepend=0)
    counts = item.reader.read(0, item.spec.num_tokens)
    assert np.array_equal(counts.sum(axis=(0, 2), dtype=np.int64), each)
    assert set(session.units.region) == regions


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no real recordings at {FOLDER}; set BRAINLOOM_NWB_DIR")
def test_units_of_the_motor_cortex_recording_have_their_own_position():
    path = FOLDER / "motor_cortex_anm00239123.nwb"
    with h5py.File(path) as file:
        position_mm = np.stack([file[f"units/unit_{axis}"][()] for axis in "xyz"], axis=1)
    units = plan_session(path, Recipe(), "d1").units
    assert np.array_equal(units.xyz_um, (position_mm * 1000).astype(np.float32))
