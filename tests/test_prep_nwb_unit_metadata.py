"""What files know about sorted units: region, quality, position, depth and waveform, from wherever they say it.

In: files that nwb_builders writes, with planted truth. Out: nothing.
"""

from pathlib import Path

import numpy as np
import pytest
from nwb_builders import plan, reason, with_units
from pynwb import NWBFile

from prep.nwb.unit_metadata import region_word


def with_probe(nwb: NWBFile, locations: list[str], **columns: list) -> None:
    """Electrodes whose ids are not their rows, 20 um apart."""
    group = nwb.create_electrode_group("g", "d", "unknown", nwb.create_device("probe"))
    for name in columns:
        nwb.add_electrode_column(name, "a column")
    for row, location in enumerate(locations):
        more = {name: column[row] for name, column in columns.items()}
        place = {"x": 5.0, "y": 20.0 * row, "z": 0.0}
        nwb.add_electrode(id=900 - row, **place, location=location, group=group, **more)


def test_the_peak_channel_gives_region_position_and_depth(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_probe(nwb, ["VISp", "CA1", "LGd"], probe_vertical_position=[3000, 2000, 1000])
        with_units([1.0], [2.0], [3.0], peak_channel_id=[898, 900, 17], waveform_duration=[0.2, 0.4, np.nan])(nwb)

    units = plan(tmp_path, fill).units
    assert list(units.region) == ["LGd", "VISp", ""]
    assert units.depth_um is not None and units.waveform_ms is not None
    assert np.array_equal(units.depth_um, np.array([1000, 3000, np.nan], np.float32), equal_nan=True)
    assert np.array_equal(units.xyz_um[:2], np.array([[5, 40, 0], [5, 0, 0]], np.float32))
    assert np.isnan(units.xyz_um[2]).all()
    assert np.array_equal(units.waveform_ms, np.array([0.2, 0.4, np.nan], np.float32), equal_nan=True)


def test_columns_that_are_read_are_used_and_the_others_are_skipped_with_a_reason(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_probe(nwb, ["VISp", "CA1"])
        with_units([1.0], [2.0], peak_channel_id=[899, 900], KSLabel=["good", "mua"], snr=[1.0, 2.0])(nwb)

    session = plan(tmp_path, fill)
    used = {row.path for row in session.coverage if row.used_as}
    assert {"units/peak_channel_id", "units/KSLabel", "general/extracellular_ephys/electrodes/location"} <= used
    assert reason(session, "units/snr") == "a unit column that is not read"
    assert list(session.units.quality) == ["good", "mua"]


def test_the_location_of_the_electrode_group_comes_before_that_of_the_electrodes(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        probe = nwb.create_device("probe")
        known = nwb.create_electrode_group("known", "d", "CA1", probe)
        unknown = nwb.create_electrode_group("unknown", "d", "unknown", probe)
        for group in (known, unknown):
            nwb.add_electrode(location="V1", group=group)
        nwb.add_unit(spike_times=[1.0], electrodes=[0], electrode_group=known)
        nwb.add_unit(spike_times=[2.0], electrodes=[1], electrode_group=unknown)

    assert list(plan(tmp_path, fill).units.region) == ["CA1", "V1"]


def test_all_electrodes_at_the_origin_have_no_position(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        group = nwb.create_electrode_group("g", "d", "V1", nwb.create_device("probe"))
        for _ in range(2):
            nwb.add_electrode(x=0.0, y=0.0, z=0.0, location="V1", group=group)
        nwb.add_unit(spike_times=[1.0], electrodes=[1])

    assert np.isnan(plan(tmp_path, fill).units.xyz_um).all()


@pytest.mark.parametrize(
    ("column", "described", "given", "expected_ms"),
    [
        ("waveform_duration", "no description", 0.4, 0.4),
        ("trough_to_peak", "in seconds", 0.0004, 0.4),
        ("peak_to_valley", "d", 0.0004, 0.4),
        ("spike_width", "in microseconds", 400.0, 0.4),
        ("duration", "of the waveform (ms)", 0.4, 0.4),
        ("duration", "of the recording in s", 3600.0, np.nan),
    ],
)
def test_widths_of_waveforms_are_milliseconds(
    tmp_path: Path, column: str, described: str, given: float, expected_ms: float
):
    def fill(nwb: NWBFile) -> None:
        nwb.add_unit_column(column, described)
        nwb.add_unit(spike_times=[1.0], **{column: given})

    width_ms = plan(tmp_path, fill).units.waveform_ms
    assert width_ms is not None
    assert np.array_equal(width_ms, np.array([expected_ms], np.float32), equal_nan=True)


def test_positions_in_millimetres_become_micrometres(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        for axis in "xyz":
            nwb.add_unit_column(f"unit_{axis}", f"{axis}-coordinate of this unit (mm)")
        nwb.add_unit_column("depth", "depth in mm")
        nwb.add_unit(spike_times=[1.0], unit_x=0.5, unit_y=-4.0, unit_z=1.25, depth=1.5)

    units = plan(tmp_path, fill).units
    assert units.xyz_um.tolist() == [[500.0, -4000.0, 1250.0]]
    assert units.depth_um is not None and units.depth_um.tolist() == [1500.0]


@pytest.mark.parametrize(
    ("column", "given", "expected"),
    [
        ("quality", ["good", "N/A"], ["good", ""]),
        ("ks_label", ["good", "mua"], ["good", "mua"]),
        ("cluster_group", [2, 1], ["good", "mua"]),
        ("quality", [3, 1], ["3", "1"]),
        ("is_good", [True, False], ["good", ""]),
        ("group", ["good", "noise"], ["good", "noise"]),
        ("group", ["probe0", "probe1"], ["", ""]),
        ("group", [0, 1], ["", ""]),
        ("label", [1.0, 0.0], ["", ""]),
    ],
)
def test_quality_is_the_sorters_word(tmp_path: Path, column: str, given: list, expected: list):
    assert list(plan(tmp_path, with_units([1.0], [2.0], **{column: given})).units.quality) == expected


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (" CA1 ", "CA1"),
        ("brain_region: Thalamus; brain_subregion: N/A; hemisphere: left", "Thalamus"),
        ('{"skull_reference": "bregma", "brain_regions": "left ALM", "ap": "2.5"}', "left ALM"),
        ("{'region': 'unknown', 'area': 'V1'}", "V1"),
        ("CA1 region: left", "CA1 region: left"),
        ("unknown", ""),
        ("N/A", ""),
        ("not specified", ""),
    ],
)
def test_a_free_text_is_reduced_to_the_word_for_the_region(text: str, word: str):
    assert region_word(text) == word
