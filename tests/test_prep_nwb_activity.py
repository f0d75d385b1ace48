"""ROI traces of NWB files: the right axis, one series of the same cells, units that follow the sorted ones.

In: files that nwb_builders writes. Out: nothing.
"""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import RNG, codes, plan, reason, replace, stream, values, with_rois, with_units, write
from pynwb import NWBFile
from pynwb.ophys import Fluorescence, ImageSegmentation, OpticalChannel, RoiResponseSeries

from prep.nwb.session import plan_session
from prep.recipe import Recipe
from prep.settings import to_ns


@pytest.mark.parametrize(
    ("paths", "recipe", "chosen"),
    [
        (["Fluorescence/Neuropil", "Fluorescence/Raw", "Fluorescence/Deconvolved", "DfOverF/dff"], (), "dff"),
        (["Fluorescence/Neuropil", "Fluorescence/Raw", "Fluorescence/Deconvolved"], (), "deconvolved"),
        (["Fluorescence/Neuropil", "Fluorescence/Raw", "Fluorescence/Demixed"], (), "demixed"),
        (["Fluorescence/Raw", "Fluorescence/NeuropilCorrected"], (), "neuropil_corrected"),
        (["Fluorescence/Neuropil", "Fluorescence/Deconvolved"], (), "deconvolved"),
        (["Fluorescence/Raw", "DfOverF/dff"], ("Raw",), "raw"),
        (["Fluorescence/Neuropil", "DfOverF/dff"], ("Neuropil",), "neuropil"),
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


def planes(
    *fields: dict, num_rois: int = 3, columns: dict[str, np.ndarray] | None = None, description: str = "d"
) -> Callable[[NWBFile], None]:
    """A file with one imaging plane, segmentation and fluorescence per field: Field0, Field1 and so on."""

    def fill(nwb: NWBFile) -> None:
        channel = OpticalChannel(name="c", description="d", emission_lambda=500.0)
        module = nwb.create_processing_module("ophys", "d")
        segmentation, fluorescence = ImageSegmentation(), Fluorescence()
        module.add([segmentation, fluorescence])
        device = nwb.create_device("scope")
        for i, field in enumerate(fields):
            plane = nwb.create_imaging_plane(
                name=f"Plane{i}", optical_channel=channel, description="d", device=device, excitation_lambda=900.0,
                indicator="GCaMP", location=f"area {i}", imaging_rate=10.0,
            )  # fmt: skip
            table = segmentation.create_plane_segmentation(name=f"Field{i}", description="d", imaging_plane=plane)
            for roi in range(num_rois):
                table.add_roi(image_mask=np.ones((4, 4)), id=roi)
            for name, column in (columns or {}).items():
                table.add_column(name, description, data=column)
            region = table.create_roi_table_region(region=list(range(num_rois)), description="all")
            series = RoiResponseSeries(name=f"Series{i}", unit="n.a.", rois=region, **field)
            fluorescence.add_roi_response_series(series)

    return fill


def test_each_plane_is_a_stream_on_its_own_clock_though_ids_repeat(tmp_path: Path):
    data = RNG.normal(size=(8, 40, 3))
    fields = [{"data": data[i], "rate": 8.0, "starting_time": 1.2e7 + i / 64} for i in range(7)]
    stamps = 1.2e7 + np.sort(RNG.uniform(0, 10, 40))
    session = plan(tmp_path, planes(*fields, {"data": data[7], "timestamps": stamps}))
    assert [item.spec.name for item in session.streams] == [f"series{i}" for i in range(8)]
    assert [item.spec.first_unit for item in session.streams] == [3 * i for i in range(8)]
    for i, item in enumerate(session.streams):
        assert np.array_equal(values(item)[:, :, 0], data[i].astype(np.float32))
    starts = [int(item.start_ns[0]) for item in session.streams[:7]]
    assert starts == [12_000_000_000_000_000 + i * 15_625_000 for i in range(7)]
    assert np.array_equal(session.streams[7].start_ns, to_ns(stamps))
    assert list(session.units.unit_key) == [f"d1/s1/Field{i}-{roi}" for i in range(8) for roi in range(3)]
    assert list(session.units.region) == [f"area {i}" for i in range(8) for _ in range(3)]


def test_a_rate_that_is_not_the_planes_is_noted_and_the_series_clock_used(tmp_path: Path):
    session = plan(tmp_path, planes({"data": RNG.normal(size=(40, 3)), "rate": 8.0}))
    assert "rate-mismatch" in codes(session)
    assert stream(session, "series0").spec.sample_ns == 125_000_000


def test_image_masks_are_never_read(tmp_path: Path):
    path = write(tmp_path, planes({"data": RNG.normal(size=(40, 3)), "rate": 10.0}))
    mask = "processing/ophys/ImageSegmentation/Field0/image_mask"
    make_unreadable(path, mask, (3, 4, 4))
    session = plan_session(path, Recipe(), "d1")
    assert len(session.units.unit_key) == stream(session, "series0").spec.num_sources == 3
    assert session.refused == ()
    assert reason(session, mask) == "image masks are not read"


def make_unreadable(path: Path, name: str, shape: tuple[int, ...]) -> None:
    """Let a dataset's bytes stand in another file that is not there."""
    with h5py.File(path, "r+") as file:
        attributes = dict(file[name].attrs)
        del file[name]
        num_bytes = 8 * int(np.prod(shape))
        file.create_dataset(name, shape, np.float64, external=[(str(path.parent / "lost.bin"), 0, num_bytes)])
        file[name].attrs.update(attributes)
        with pytest.raises(OSError, match="external"):
            file[name][()]


def test_a_series_that_cannot_be_read_is_refused_and_makes_way_for_the_next(tmp_path: Path):
    raw = RNG.normal(size=(50, 4))
    path = write(tmp_path, with_rois({"Fluorescence/Raw": raw, "DfOverF/dff": raw + 1}, 4))
    make_unreadable(path, "processing/ophys/DfOverF/dff/data", (50, 4))
    session = plan_session(path, Recipe(), "d1")
    assert np.array_equal(values(stream(session, "raw"))[:, :, 0], raw.astype(np.float32))
    (refused,) = session.refused
    assert refused.path == "processing/ophys/DfOverF/dff" and "it cannot be read (OSError" in refused.message


@pytest.mark.parametrize(
    ("name", "column", "quality"),
    [
        ("iscell", np.array([[1.0, 0.9], [0.0, 0.2], [1.0, 0.4]]), ["good", "noise", "good"]),
        ("Accepted", np.array([0, 1, 1]), ["noise", "good", "good"]),
        ("valid_roi", np.array([True, False, True]), ["good", "noise", "good"]),
        ("snr", np.array([1.0, 2.0, 3.0]), ["", "", ""]),
    ],
)
def test_the_verdict_of_the_segmentation_is_the_quality_and_no_roi_is_dropped(
    tmp_path: Path, name: str, column: np.ndarray, quality: list
):
    session = plan(tmp_path, planes({"data": RNG.normal(size=(40, 3)), "rate": 10.0}, columns={name: column}))
    assert list(session.units.quality) == quality
    assert stream(session, "series0").spec.num_sources == 3


@pytest.mark.parametrize(
    ("columns", "description", "xyz"),
    [
        ({"RoiCentroid": np.arange(6.0).reshape(3, 2)}, "x, y in pixels", [np.nan] * 3),
        ({"RoiCentroid": np.arange(6.0).reshape(3, 2)}, "x, y in microns", [2.0, 3.0, np.nan]),
        ({"centroid_um": np.arange(9.0).reshape(3, 3)}, "d", [3.0, 4.0, 5.0]),
        ({"x_um": np.arange(3.0), "z_um": np.arange(3.0) * 5}, "d", [1.0, np.nan, 5.0]),
    ],
)
def test_the_centre_of_a_roi_is_a_position_where_it_is_in_micrometres(
    tmp_path: Path, columns: dict, description: str, xyz: list
):
    fill = planes({"data": RNG.normal(size=(40, 3)), "rate": 10.0}, columns=columns, description=description)
    assert np.array_equal(plan(tmp_path, fill).units.xyz_um[1], xyz, equal_nan=True)


def test_a_region_of_its_own_is_a_rois_region(tmp_path: Path):
    fill = planes({"data": RNG.normal(size=(40, 3)), "rate": 10.0}, columns={"brain_area": ["V1", "", "LM"]})
    assert list(plan(tmp_path, fill).units.region) == ["V1", "area 0", "LM"]


def test_rois_that_point_past_their_table_are_numbered_and_noted(tmp_path: Path):
    path = write(tmp_path, planes({"data": RNG.normal(size=(40, 3)), "rate": 10.0}))
    replace(path, "processing/ophys/Fluorescence/Series0/rois", np.array([0, 1, 7]))
    session = plan_session(path, Recipe(), "d1")
    assert "roi-reference" in codes(session)
    assert list(session.units.unit_key) == [f"d1/s1/series0-{row}" for row in (0, 1, 7)]


def test_of_series_that_share_some_cells_the_better_is_read(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_rois({"Fluorescence/Raw": RNG.normal(size=(50, 4))}, 4)(nwb)
        module = nwb.processing["ophys"]
        table = module["ImageSegmentation"]["PlaneSegmentation"]
        some = table.create_roi_table_region(region=[3, 1], description="the good ones")
        better = RoiResponseSeries(name="zz_dff", data=RNG.normal(size=(50, 2)), unit="n.a.", rois=some, rate=10.0)
        module.add(better)

    session = plan(tmp_path, fill)
    assert list(session.units.unit_key) == ["d1/s1/PlaneSegmentation-103", "d1/s1/PlaneSegmentation-101"]
    told = reason(session, "processing/ophys/Fluorescence/Raw")
    assert told == "some of its cells are in processing/ophys/zz_dff, which is read"


def test_series_of_rois_stand_wherever_they_are(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        planes({"data": RNG.normal(size=(40, 3)), "rate": 10.0})(nwb)
        table = nwb.processing["ophys"]["ImageSegmentation"]["Field0"]
        region = table.create_roi_table_region(region=[0], description="one")
        data = RNG.normal(size=30)
        nwb.add_acquisition(RoiResponseSeries(name="dff", data=data, unit="n.a.", rois=region, rate=10.0))

    item = stream(plan(tmp_path, fill), "dff")
    assert (item.spec.origin, item.spec.num_sources) == ("acquisition/dff", 1)


def test_the_wrong_axis_is_told_by_the_cells_where_time_stamps_do_not_fit_either(tmp_path: Path):
    data = RNG.normal(size=(60, 3))
    path = write(tmp_path, planes({"data": data, "timestamps": np.arange(60) / 10}))
    replace(path, "processing/ophys/Fluorescence/Series0/data", data.T)
    replace(path, "processing/ophys/Fluorescence/Series0/timestamps", np.arange(59) / 10)
    session = plan_session(path, Recipe(), "d1")
    assert np.array_equal(values(stream(session, "series0"))[:, :, 0], data[:59].astype(np.float32))
    assert "wrong-axis" in codes(session)
