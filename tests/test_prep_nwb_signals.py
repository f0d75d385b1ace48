"""Fibre photometry and TimeSeries of one cell each: units, their keys and regions, one clock for all of a group.

In: files that nwb_builders writes. Out: nothing.
"""

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import RNG, codes, plan, reason, replace, running, stream, values, with_units, write
from pynwb import NWBFile, TimeSeries
from pynwb.core import DynamicTable, VectorData

from prep.nwb.session import plan_session
from prep.plan import SessionPlan
from prep.recipe import Recipe, Signals

FOLDER = Path(os.environ.get("BRAINLOOM_NWB_DIR", Path(__file__).parent.parent.parent / "shared" / "nwb"))
SIGNALS = (Signals(pattern="acquisition/Activity_*", name="activity", region="head"),)


def fibers(folder: Path, data: np.ndarray, rows: list[int] | None = None, **clock: object) -> SessionPlan:
    """A response series as ndx-fiber-photometry writes it, with a table of four fibres where rows are given."""

    def fill(nwb: NWBFile) -> None:
        nwb.add_acquisition(TimeSeries(name="dff", data=data, unit="a.u.", **(clock or {"rate": 20.0})))
        places = VectorData(name="location", description="d", data=["VTA", "NAc", "DMS", "DLS"])
        nwb.add_acquisition(DynamicTable(name="fibers", description="d", columns=[places]))
        with_units([1.0, 2.0])(nwb)

    path = write(folder, fill)
    with h5py.File(path, "r+") as file:
        file["acquisition/dff"].attrs["neurodata_type"] = "FiberPhotometryResponseSeries"
        if rows is not None:
            file["acquisition/dff/fiber_photometry_table_region"] = rows
            region = file["acquisition/dff/fiber_photometry_table_region"]
            region.attrs.update({"neurodata_type": "DynamicTableRegion", "table": file["acquisition/fibers"].ref})
    return plan_session(path, Recipe(), "d1")


@pytest.mark.parametrize("is_transposed", [False, True])
def test_fibres_are_units_keyed_by_their_row_of_the_photometry_table(tmp_path: Path, is_transposed: bool):
    data = RNG.normal(size=(500, 2))
    session = fibers(tmp_path, data.T if is_transposed else data, rows=[2, 0])
    item = stream(session, "dff")
    assert np.array_equal(values(item).transpose(0, 2, 1).reshape(-1, 2), data.astype(np.float32))
    assert (item.spec.modality, item.spec.kind, item.spec.first_unit, item.spec.num_sources) == (
        "traces",
        "trace",
        1,
        2,
    )
    assert list(session.units.unit_key) == ["d1/s1/0", "d1/s1/dff-2", "d1/s1/dff-0"]
    assert list(session.units.region) == ["", "DMS", "VTA"]
    assert list(session.units.kind) == ["unit", "fiber", "fiber"]
    used = {row.path: row.used_as for row in session.coverage}
    assert used["acquisition/dff/fiber_photometry_table_region"] == used["acquisition/fibers/location"] == "units"
    assert ("wrong-axis" in codes(session)) == is_transposed


def test_a_fibre_without_a_table_is_numbered(tmp_path: Path):
    time_s = 1.2e7 + np.arange(100) / 20
    session = fibers(tmp_path, RNG.normal(size=100), timestamps=time_s)
    assert list(session.units.unit_key)[1:] == ["d1/s1/dff-0"]
    assert stream(session, "dff").start_ns[0] == 12_000_000_000_000_000


@pytest.mark.parametrize(
    ("data", "rows", "message"),
    [
        (np.zeros((0, 2)), None, "its data are empty"),
        (np.full((50, 2), 3.0), None, "all its samples are the same or missing"),
        (RNG.normal(size=(50, 3)), [0, 1], "it has 3 columns but 2 rows of the photometry table"),
    ],
)
def test_fibres_that_cannot_be_read_say_why(tmp_path: Path, data: np.ndarray, rows: list | None, message: str):
    session = fibers(tmp_path, data, rows)
    assert reason(session, "acquisition/dff") == message
    assert [item.spec.name for item in session.streams] == ["spikes"]


def test_a_table_of_fibres_that_is_too_short_is_not_trusted(tmp_path: Path):
    session = fibers(tmp_path, RNG.normal(size=(50, 2)), rows=[3, 9])
    assert list(session.units.unit_key)[1:] == ["d1/s1/dff-0", "d1/s1/dff-1"]
    assert set(session.units.region) == {""}


@pytest.mark.skipif(not FOLDER.exists(), reason="no shared recordings here")
def test_the_extension_is_read_without_its_package():
    path = FOLDER / "fiber_photometry_extension.nwb"
    session = plan_session(path, Recipe(), "d1")
    item = stream(session, "fiber_photometry_response_series")
    with h5py.File(path) as file:
        series = file["acquisition/FiberPhotometryResponseSeries"]
        data, time_s = series["data"][()], series["timestamps"][()]
    flat = values(item).ravel()
    assert np.array_equal(flat[np.isfinite(flat)], data.astype(np.float32))
    assert item.start_ns[0] == round(time_s[0] * 1e9)
    assert list(session.units.kind) == ["fiber"]


# ---------------------------------------------------------------- one series per cell


def cells(numbers: list[int], odd: dict[int, dict] | None = None, num_samples: int = 300) -> Callable[[NWBFile], None]:
    """Activity_0007 and so on, each of its own numbers; `odd` overrides what a cell's series is made with."""

    def fill(nwb: NWBFile) -> None:
        for number in numbers:
            given = {
                "data": planted(number, num_samples),
                "rate": 4.0,
                "starting_time": 3.0,
                **(odd or {}).get(number, {}),
            }
            nwb.add_acquisition(TimeSeries(name=f"Activity_{number}", unit="a.u.", **given))
        running(RNG.normal(size=400), starting_time=0.0, rate=20.0)(nwb)

    return fill


def planted(number: int, num_samples: int = 300) -> np.ndarray:
    return np.random.default_rng(number).normal(size=num_samples)


def test_series_of_one_cell_each_become_one_stream_in_natural_order(tmp_path: Path):
    fill = cells([10, 2, 101], {2: {"conversion": 0.5, "offset": 1.0}})
    session = plan(tmp_path, fill, signals=SIGNALS)
    item = stream(session, "activity")
    expected = np.stack([planted(2) * 0.5 + 1.0, planted(10), planted(101)], axis=1).astype(np.float32)
    assert np.array_equal(values(item)[:, :, 0], expected)
    assert item.start_ns[:2].tolist() == [3_000_000_000, 3_250_000_000]
    assert list(session.units.unit_key) == ["d1/s1/activity-2", "d1/s1/activity-10", "d1/s1/activity-101"]
    assert (set(session.units.region), set(session.units.kind)) == ({"head"}, {"roi"})
    assert (item.spec.modality, item.spec.first_unit) == ("traces", 0)
    assert [item.spec.name for item in session.streams] == ["activity", "running"]
    assert {row.path: row.used_as for row in session.coverage}["acquisition/Activity_10"] == "activity"


def test_cells_without_numbers_keep_their_names(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        for name in ("AVAL", "AVAR"):
            nwb.add_acquisition(TimeSeries(name=name, data=RNG.normal(size=50), unit="a.u.", rate=4.0))

    session = plan(tmp_path, fill, signals=(Signals(pattern="AVA?", name="neurons"),))
    assert list(session.units.unit_key) == ["d1/s1/neurons-AVAL", "d1/s1/neurons-AVAR"]


def test_cells_with_the_same_time_stamps_share_a_clock(tmp_path: Path):
    time_s = np.sort(RNG.uniform(0, 100, 300))
    odd = {number: {"timestamps": time_s.copy(), "rate": None, "starting_time": None} for number in (1, 2)}
    item = stream(plan(tmp_path, cells([1, 2], odd), signals=SIGNALS), "activity")
    assert np.array_equal(item.start_ns, np.rint(time_s * 1e9).astype(np.int64))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"data": planted(1, 299)},
            "it has 299 samples at 4 Hz from 3 s, acquisition/Activity_1 has 300 samples at 4 Hz",
        ),
        ({"rate": 5.0}, "it has 300 samples at 5 Hz from 3 s"),
        ({"starting_time": 3.5}, "it has 300 samples at 4 Hz from 3.5 s"),
        ({"timestamps": np.arange(300.0), "rate": None, "starting_time": None}, "it has 300 samples with time stamps"),
    ],
)
def test_a_cell_on_another_clock_is_named_and_the_rest_of_the_file_is_read(tmp_path: Path, given: dict, message: str):
    session = plan(tmp_path, cells([1, 2, 3], {2: given}), signals=SIGNALS)
    assert [item.spec.name for item in session.streams] == ["running"]
    (refused,) = session.refused
    assert refused.path == "acquisition/Activity_2"
    assert message in refused.message and "Leave it out by `exclude`, or narrow the pattern" in refused.message
    assert reason(session, "acquisition/Activity_3").endswith("need one clock; acquisition/Activity_2 has another")


def test_a_series_of_several_columns_is_no_cell_and_is_left_out_with_the_reason(tmp_path: Path):
    session = plan(tmp_path, cells([1, 2, 3], {2: {"data": RNG.normal(size=(300, 2))}}), signals=SIGNALS)
    assert reason(session, "acquisition/Activity_2") == "its data are (300, 2); a signal of one unit is one column"
    assert stream(session, "activity").spec.num_sources == 2


def test_a_cell_that_cannot_be_read_is_refused_by_name(tmp_path: Path):
    path = write(tmp_path, cells([1, 2]))
    replace(path, "acquisition/Activity_1/data", np.array([b"a", b"b"], dtype=object))
    session = plan_session(path, Recipe(signals=SIGNALS), "d1")
    assert reason(session, "acquisition/Activity_1") == "its data are text, not numbers"
    assert list(session.units.unit_key) == ["d1/s1/activity-2"]


def test_a_pattern_without_a_series_and_a_name_that_is_taken_are_told(tmp_path: Path):
    signals = (
        Signals(pattern="Activity_1", name="a"),
        Signals(pattern="Activity_2", name="a"),
        Signals(pattern="z", name="z"),
    )
    session = plan(tmp_path, cells([1, 2]), signals=signals)
    assert [finding.path for finding in session.findings if finding.code == "recipe-unmatched"] == ["z"]
    assert reason(session, "acquisition/Activity_2") == (
        "the stream 'a' is there already. Give the recipe's signals another name"
    )


def test_signals_and_sorted_units_are_counted_on(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0], [2.0])(nwb)
        cells([1, 2])(nwb)

    session = plan(tmp_path, fill, signals=SIGNALS)
    assert stream(session, "activity").spec.first_unit == 2
    assert len(session.units.unit_key) == len(session.units.xyz_um) == 4
