"""A whole NWB file becomes one session: coverage, ids, what is refused, splits.

In: files that nwb_builders writes, the synthetic brain's. Out: nothing.
"""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import RNG, heading, plan, reason, running, values, with_rois, with_units, write
from pynwb import NWBFile

from prep.nwb.file import open_file
from prep.nwb.inventory import walk
from prep.nwb.session import UnusableFile, plan_session
from prep.nwb.splits import fraction_spans
from prep.plan import PrepError
from prep.recipe import Recipe, Span, Splits


def typed_objects(path: Path) -> list[str]:
    """Every object with a neurodata_type, by h5py's own walk."""
    found = ["/"]
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.append(name) if "neurodata_type" in item.attrs else None)
    return sorted(name for name in found if not name.startswith("specifications"))


def test_every_object_is_in_the_coverage_table_once(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 2.0], [1.5])(nwb)
        with_rois({"DfOverF/dff": RNG.normal(size=(50, 3)), "Fluorescence/Raw": RNG.normal(size=(50, 3))}, 3)(nwb)
        running(RNG.normal(size=99), starting_time=0.0, rate=10.0)(nwb)
        nwb.add_trial(start_time=0.0, stop_time=1.0)

    path = write(tmp_path, fill)
    coverage = plan_session(path, Recipe(), "d1").coverage
    assert sorted(row.path for row in coverage) == typed_objects(path)
    assert all(row.used_as or row.reason for row in coverage)


def test_the_recipe_excludes_objects_and_what_is_in_them(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 2.0])(nwb)
        heading(np.linspace(0, 360, 100), "degrees")(nwb)

    session = plan(tmp_path, fill, exclude=("acquisition/Compass*",))
    assert [item.spec.name for item in session.streams] == ["spikes"]
    assert reason(session, "acquisition/CompassDirection/heading") == "excluded by the recipe"


def test_a_name_of_the_recipe_that_matches_nothing_is_noted(tmp_path: Path):
    session = plan(tmp_path, with_units([1.0, 2.0]), angles=("haeding",))
    assert ("recipe-unmatched", "haeding") in [(finding.code, finding.path) for finding in session.findings]


def test_links_that_lead_nowhere_do_not_stop_the_walk(tmp_path: Path):
    path = write(tmp_path, running(RNG.normal(size=99), starting_time=0.0, rate=10.0))
    with h5py.File(path, "r+") as file:
        file["acquisition/lost"] = h5py.ExternalLink("missing.nwb", "/acquisition/x")
        file["acquisition/soft"] = h5py.SoftLink("/nowhere")
        file["acquisition/again"] = file["acquisition/running"]
    session = plan_session(path, Recipe(), "d1")
    assert len(session.streams) == 1
    assert "missing.nwb:/acquisition/x, which cannot be opened" in reason(session, "acquisition/lost")
    with open_file(path) as file:
        assert sum("running" in node.path or "again" in node.path for node in walk(file)[0]) == 1


def test_ids_come_from_the_file_or_from_its_name(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 2.0])(nwb)
        nwb.session_id = "../a b/c"

    assert plan(tmp_path, fill).session_id == "a_b_c"
    assert plan(tmp_path, with_units([1.0, 2.0])).session_id == "s1"
    assert plan(tmp_path, with_units([1.0, 2.0])).subject_id == ""


def not_nwb(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = 1


def empty(path: Path) -> None:
    h5py.File(path, "w").close()


def zarr_folder(path: Path) -> None:
    path.mkdir()
    (path / ".zgroup").write_text("{}")


def folder_of_files(path: Path) -> None:
    path.mkdir()
    write(path, with_units([1.0, 2.0]))


def truncated(path: Path) -> None:
    whole = write(path.parent, with_units(RNG.random(10_000)), name="whole.nwb").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "0 bytes"),
        (lambda path: path.write_text("version https://git-lfs"), "not an HDF5 file"),
        (empty, "an HDF5 file with nothing in it"),
        (not_nwb, r"an HDF5 file, but not NWB \(no nwb_version\)"),
        (zarr_folder, "a Zarr folder with nothing in it"),
        (folder_of_files, r"a folder, not an NWB file; an NWB-Zarr folder has \.zgroup or zarr\.json at its top"),
        (truncated, "damaged or not complete"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, make: Callable, message: str):
    path = tmp_path / "x.nwb"
    make(path)
    with pytest.raises(PrepError, match=message) as caught:
        plan_session(path, Recipe(), "d1")
    assert "\n" not in str(caught.value)


def two_objects(path: Path, **attributes: str) -> Path:
    """Two typed objects that no reader takes, and a link that leads nowhere."""
    with h5py.File(path, "w") as file:
        file.attrs.update({"neurodata_type": "NWBFile", **attributes})
        for name, kind in (("acquisition/sweep", "VoltageClampSeries"), ("general/devices/rig", "Device")):
            file.create_group(name).attrs["neurodata_type"] = kind
        file["acquisition/lost"] = h5py.ExternalLink("missing.nwb", "/x")
    return path


@pytest.mark.parametrize(
    ("version", "message", "reasons"),
    [
        ("1.0.6", "NWB version 1.0.6, which is NWB 1", {"NWB 1 is not read"}),
        ("NWB-1.0.5", "NWB version 1.0.5, which is NWB 1", {"NWB 1 is not read"}),
        (
            "2.2.2",
            "intracellular recordings only",
            {"the file is refused", "intracellular recordings are out of scope", "device metadata"},
        ),
    ],
)
def test_a_refused_file_still_accounts_for_all_that_is_in_it(
    tmp_path: Path, version: str, message: str, reasons: set[str]
):
    path = two_objects(tmp_path / "s1.nwb", nwb_version=version)
    with pytest.raises(UnusableFile, match=message) as caught:
        plan_session(path, Recipe(), "d1")
    coverage = {row.path: row for row in caught.value.coverage}
    assert {name for name, row in coverage.items() if row.neurodata_type != "link"} == set(typed_objects(path))
    assert not any(row.used_as for row in coverage.values())
    assert "missing.nwb:/x, which cannot be opened" in coverage.pop("acquisition/lost").reason
    assert {row.reason for row in coverage.values()} == reasons


def test_a_file_that_is_refused_for_its_splits_uses_nothing(tmp_path: Path):
    path = write(tmp_path, with_units([0.0, 10.0]))
    with pytest.raises(UnusableFile, match="reference") as caught:
        plan_session(path, Recipe(splits=Splits(reference="hd")), "d1")
    assert sorted(row.path for row in caught.value.coverage) == typed_objects(path)
    assert not any(row.used_as for row in caught.value.coverage)
    assert all(row.reason for row in caught.value.coverage)


@pytest.mark.parametrize("version", [f"2.{minor}.0" for minor in range(12)])
def test_the_version_of_nwb_2_makes_no_difference(tmp_path: Path, version: str):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 2.0, 30.0], [1.5, 28.0])(nwb)
        running(np.arange(400.0), starting_time=0.0, rate=10.0)(nwb)
        nwb.add_trial(start_time=0.0, stop_time=1.0)

    path = write(tmp_path, fill)
    as_written = plan_session(path, Recipe(), "d1")
    with h5py.File(path, "r+") as file:
        file.attrs["nwb_version"] = version
    found = plan_session(path, Recipe(), "d1")
    assert found.coverage == as_written.coverage
    assert [item.spec for item in found.streams] == [item.spec for item in as_written.streams]
    for ours, theirs in zip(found.streams, as_written.streams, strict=True):
        assert np.array_equal(values(ours), values(theirs), equal_nan=True)
    assert (found.splits, found.findings) == (as_written.splits, as_written.findings)
    assert found.intervals.keys() == as_written.intervals.keys() == {"trials"}


def test_a_type_of_an_extension_is_skipped_by_name_without_its_package(tmp_path: Path):
    path = write(tmp_path, with_units([1.0, 2.0]))
    with h5py.File(path, "r+") as file:
        group = file.create_group("acquisition/novel")
        group.attrs.update({"neurodata_type": "MagnetoSeries", "namespace": "ndx-novel"})
        group["data"] = np.arange(9)
    session = plan_session(path, Recipe(), "d1")
    assert [item.spec.name for item in session.streams] == ["spikes"]
    assert reason(session, "acquisition/novel") == "MagnetoSeries is not read yet"


def test_files_of_the_synthetic_brain_are_read_whole(tmp_path: Path):
    from prep.synthetic import write_brain

    expected = {"running_speed", "head_direction", "pupil_diameter"}
    activity = {"t01": {"spikes", "movie"}, "t02": {"dff", "movie"}, "t03": {"spikes"}}
    for path in write_brain(tmp_path, None, "test", seed=0, duration_s=30.0):
        session = plan_session(path, Recipe(), "d1")
        assert {item.spec.name for item in session.streams} == activity[session.session_id] | expected
        for item in session.streams:
            missing = item.reader.read(0, item.spec.num_tokens) == {"counts": 255, "frames": -1}.get(item.spec.kind)
            # Of the first and the last token of spikes only a part was observed.
            assert not (missing[1:-1] if item.spec.kind == "counts" else missing).any()
        assert len(session.units.unit_key) == 20
        skipped = {row.neurodata_type for row in session.coverage if row.used_as is None}
        assert not skipped & {"TimeSeries", "SpatialSeries", "RoiResponseSeries", "IndexSeries", "ImageSeries", "Units"}


# ---------------------------------------------------------------- splits


def test_splits_are_fractions_of_the_reference_with_gaps(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([0.0, 100.0])(nwb)
        running(RNG.normal(size=401), starting_time=20.0, rate=10.0)(nwb)

    s = 1_000_000_000
    default = plan(tmp_path, fill).splits
    assert default == ((0, 69 * s, "train"), (71 * s, 79 * s, "valid"), (81 * s, 100 * s, "test"))
    for reference in ("running", "acquisition/running"):
        session = plan(tmp_path, fill, splits=Splits(reference=reference, gap_s=0))
        assert session.splits == ((20 * s, 48 * s, "train"), (48 * s, 52 * s, "valid"), (52 * s, 60 * s, "test"))


def test_explicit_splits_are_taken_as_they_are(tmp_path: Path):
    spans = (Span(label="test", start_s=5, stop_s=6), Span(label="train", start_s=1, stop_s=4))
    session = plan(tmp_path, with_units([1.0, 9.0]), splits=Splits(explicit=spans))
    assert session.splits == ((10**9, 4 * 10**9, "train"), (5 * 10**9, 6 * 10**9, "test"))


def test_a_split_too_short_for_its_gaps_is_left_out_and_noted(tmp_path: Path):
    session = plan(tmp_path, with_units([0.0, 10.0]))
    assert [label for _, _, label in session.splits] == ["train", "test"]
    assert [finding.code for finding in session.findings] == ["short-session"]


def test_an_unknown_reference_names_the_streams(tmp_path: Path):
    with pytest.raises(PrepError, match=r"`splits\.reference` is 'hd', but the session's streams are spikes"):
        plan(tmp_path, with_units([0.0, 10.0]), splits=Splits(reference="hd"))


def test_a_fraction_of_zero_makes_no_split():
    spans = fraction_spans(0.0, 100.0, Splits(fractions=(0.8, 0.0, 0.2), gap_s=0))
    assert [label for _, _, label in spans] == ["train", "test"]
