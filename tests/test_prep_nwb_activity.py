"""Sorted units and ROI traces of NWB files: every spike once, the right axis, one series of the same cells.

In: files that nwb_builders writes. Out: nothing.
"""

from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import RNG, codes, plan, stream, values, with_rois, with_units, write
from pynwb import NWBFile

from prep.nwb.session import plan_session
from prep.plan import PrepError
from prep.recipe import Recipe


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


def test_a_broken_ragged_index_is_refused_and_names_the_units_table(tmp_path: Path):
    path = write(tmp_path, with_units([1.0, 2.0], [3.0]))
    with h5py.File(path, "r+") as file:
        file["units/spike_times_index"][1] = 200
    with pytest.raises(
        PrepError, match=r"the units table is broken: spike_times_index points to spike 200, but .* only 3"
    ):
        plan_session(path, Recipe(), "d1")


# ---------------------------------------------------------------- imaging


@pytest.mark.parametrize(
    ("paths", "recipe", "chosen"),
    [
        (["Fluorescence/Neuropil", "Fluorescence/Raw", "Fluorescence/Deconvolved", "DfOverF/dff"], (), "dff"),
        (["Fluorescence/Neuropil", "Fluorescence/Raw", "Fluorescence/Deconvolved"], (), "raw"),
        (["Fluorescence/Neuropil", "Fluorescence/Deconvolved"], (), "deconvolved"),
        (["Fluorescence/Raw", "DfOverF/dff"], ("Raw",), "raw"),
    ],
)
def test_one_series_of_the_same_cells_is_chosen_by_rule(tmp_path: Path, paths: list, recipe: tuple, chosen: str):
    fill = with_rois({path: RNG.normal(size=(50, 4)) for path in paths}, 4)
    session = plan(tmp_path, fill, series=recipe)
    assert [item.spec.name for item in session.streams] == [chosen]
    skipped = [row.reason for row in session.coverage if row.neurodata_type == "RoiResponseSeries" and not row.used_as]
    assert len(skipped) == len(paths) - 1
    assert all(text.startswith("same cells as processing/ophys/") for text in skipped)


def test_rois_become_units_with_the_scan_phase_as_offset(tmp_path: Path):
    fill = with_rois({"DfOverF/dff": RNG.normal(size=(50, 3))}, 3, offsets=[0.0, 0.01, 0.0305])
    session = plan(tmp_path, fill)
    item = stream(session, "dff")
    assert item.offset_ns is not None and item.offset_ns.tolist() == [0, 10_000_000, 30_500_000]
    assert (item.spec.first_unit, item.spec.kind, item.spec.modality) == (0, "trace", "traces")
    assert list(session.units.unit_key) == [f"d1/s1/PlaneSegmentation-{roi}" for roi in (100, 101, 102)]
    assert set(session.units.region) == {"V1"} and set(session.units.kind) == {"roi"}


def test_rois_come_after_the_sorted_units(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0], [2.0])(nwb)
        with_rois({"DfOverF/dff": RNG.normal(size=(50, 3))}, 3)(nwb)

    session = plan(tmp_path, fill)
    assert [(item.spec.name, item.spec.first_unit) for item in session.streams] == [("spikes", 0), ("dff", 2)]
    assert len(session.units.unit_key) == len(session.units.xyz_um) == 5


@pytest.mark.parametrize(("shape", "code"), [((3, 50), ["wrong-axis"]), ((50, 3), []), ((3, 3), ["ambiguous-axis"])])
def test_the_axis_of_rois_is_told_by_their_number(tmp_path: Path, shape: tuple, code: list):
    data = RNG.normal(size=shape)
    session = plan(tmp_path, with_rois({"DfOverF/dff": data}, 3))
    expected = data.T if code == ["wrong-axis"] else data
    assert np.array_equal(values(stream(session, "dff"))[:, :, 0], expected.astype(np.float32))
    assert [c for c in codes(session) if "axis" in c] == code
