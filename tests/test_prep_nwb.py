"""Tests of prep/nwb on files that are written here."""

import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import h5py
import numpy as np
import pytest
from pynwb import NWBHDF5IO, NWBFile, TimeSeries
from pynwb.base import Images
from pynwb.behavior import CompassDirection, Position, SpatialSeries
from pynwb.image import GrayscaleImage, ImageSeries, IndexSeries
from pynwb.ophys import DfOverF, Fluorescence, ImageSegmentation, OpticalChannel, RoiResponseSeries

from prep.nwb.inventory import open_file, snake_case, walk
from prep.nwb.session import UnusableFile, fraction_spans, plan_session
from prep.plan import PlannedStream, PrepError, SessionPlan
from prep.recipe import Recipe, Span, Splits
from prep.settings import NO_TIME, to_ns

RNG = np.random.default_rng(0)


def write(folder: Path, fill: Callable[[NWBFile], None], name: str = "s1.nwb") -> Path:
    start = datetime(2024, 1, 1, tzinfo=UTC)
    nwb = NWBFile(session_description="test", identifier="i", session_start_time=start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these files are odd on purpose
        fill(nwb)
        with NWBHDF5IO(folder / name, "w") as io:
            io.write(nwb)
    return folder / name


def plan(folder: Path, fill: Callable[[NWBFile], None], **recipe: object) -> SessionPlan:
    return plan_session(write(folder, fill), Recipe(**recipe), "d1")  # type: ignore[arg-type]


def stream(session: SessionPlan, name: str) -> PlannedStream:
    return next(item for item in session.streams if item.spec.name == name)


def replace(path: Path, name: str, data: np.ndarray) -> None:
    """Put other values into a dataset: pynwb refuses to write what other tools write."""
    with h5py.File(path, "r+") as file:
        attributes = dict(file[name].attrs)
        del file[name]
        file[name] = data
        file[name].attrs.update(attributes)


def values(item: PlannedStream) -> np.ndarray:
    whole = item.reader.read(0, item.spec.num_tokens)
    assert whole.shape == item.spec.shape
    parts = [item.reader.read(k, k + 1) for k in range(0, item.spec.num_tokens, 7)]
    assert np.array_equal(whole[::7], np.concatenate(parts), equal_nan=True), "parts differ from the whole"
    return whole


def codes(session: SessionPlan) -> list[str]:
    """Findings, but for the splits: most sessions here are shorter than the gaps."""
    return [finding.code for finding in session.findings if finding.code != "short-session"]


def reason(session: SessionPlan, path: str) -> str:
    (row,) = [row for row in session.coverage if row.path == path]
    assert row.used_as is None
    return row.reason


def running(data: object, name: str = "running", unit: str = "cm/s", **clock: object) -> Callable[[NWBFile], None]:
    return lambda nwb: nwb.add_acquisition(TimeSeries(name=name, data=data, unit=unit, **clock))


# ---------------------------------------------------------------- behaviour and clocks


@pytest.mark.parametrize(
    "time_s",
    [
        np.arange(500) / 60,
        1.2e7 + np.arange(500) / 60,
        np.concatenate([np.arange(111) / 60, 40 + np.arange(200) / 60]),
        np.cumsum(RNG.uniform(0.01, 0.1, 300)),
    ],
    ids=["regular", "far from zero", "with a gap", "irregular"],
)
def test_a_query_at_the_time_of_a_sample_returns_that_sample(tmp_path: Path, time_s: np.ndarray):
    data = RNG.normal(size=(len(time_s), 2))
    item = stream(plan(tmp_path, running(data, timestamps=time_s)), "running")
    tokens = values(item)
    query_ns = to_ns(time_s)
    token = np.searchsorted(item.start_ns, query_ns, side="right") - 1
    place = np.rint((query_ns - item.start_ns[token]) / item.spec.sample_ns).astype(int)
    assert np.array_equal(tokens[token, :, place], data.astype(np.float32))
    assert np.isfinite(tokens).sum() == data.size


def test_a_clock_far_from_zero_keeps_nanoseconds(tmp_path: Path):
    item = stream(plan(tmp_path, running(RNG.normal(size=600), starting_time=1.2e7, rate=50.0)), "running")
    error_ns = item.start_ns - (12_000_000_000_000_000 + np.arange(120) * 100_000_000)
    assert np.abs(error_ns).max() <= np.spacing(1.2e7) * 1e9  # the file's own seconds resolve 1.9 ns here


def test_an_irregular_clock_keeps_every_time_stamp(tmp_path: Path):
    time_s = np.cumsum(RNG.uniform(0.01, 0.05, 300))
    session = plan(tmp_path, running(RNG.normal(size=300), timestamps=time_s))
    assert np.array_equal(stream(session, "running").start_ns, to_ns(time_s))
    assert codes(session) == ["irregular"]


def test_unsorted_and_missing_time_stamps_are_repaired_with_their_samples(tmp_path: Path):
    time_s = np.arange(100) / 10
    order = RNG.permutation(100)
    stamps, data = time_s[order], RNG.normal(size=100)[order]
    stamps[order == 50] = np.nan
    session = plan(tmp_path, running(data, timestamps=stamps))
    expected = data[np.argsort(order)][np.arange(100) != 50]
    assert values(stream(session, "running"))[:, 0, 0].tolist() == expected.astype(np.float32).tolist()
    assert codes(session)[:2] == ["non-finite-time", "unsorted"]


def test_conversion_and_offset_apply_once(tmp_path: Path):
    fill = running(np.arange(100), starting_time=0.0, rate=10.0, conversion=0.5, offset=3.0)
    assert values(stream(plan(tmp_path, fill), "running"))[:3, 0, 0].tolist() == [3.0, 3.5, 4.0]


def test_the_wrong_axis_is_transposed_and_reported(tmp_path: Path):
    data = RNG.normal(size=(3, 200))
    path = write(tmp_path, running(data.T, timestamps=np.arange(200) / 10))
    replace(path, "acquisition/running/data", data)
    session = plan_session(path, Recipe(), "d1")
    assert np.array_equal(values(stream(session, "running"))[:, :, 0], data.T.astype(np.float32))
    assert stream(session, "running").spec.channels == ("running/0", "running/1", "running/2")
    assert codes(session) == ["wrong-axis"]


@pytest.mark.parametrize(
    ("data", "clock", "message"),
    [
        (np.ones(50), {"timestamps": np.cumsum(RNG.exponential(size=50))}, "events are read in the next release"),
        (np.arange(50.0), {"timestamps": np.arange(50.0)}, "events are read in the next release"),
        (np.arange(500) / 50, {"rate": 50.0, "starting_time": 0.0}, "events are read in the next release"),
        (RNG.normal(size=500), {"timestamps": np.cumsum(RNG.exponential(size=500))}, "events are read in"),
        (np.array([1.0]), {"timestamps": [1.0]}, "single sample"),
        (RNG.normal(size=3), {"timestamps": [np.nan] * 3}, "none of its 3 time stamps is a number"),
        (np.zeros((0,)), {"starting_time": 0.0, "rate": 1.0}, "empty"),
    ],
)
def test_a_series_that_cannot_be_used_is_skipped_with_the_reason(
    tmp_path: Path, data: np.ndarray, clock: dict, message: str
):
    def fill(nwb: NWBFile) -> None:
        running(data, name="odd", **clock)(nwb)
        running(RNG.normal(size=99), starting_time=0.0, rate=10.0)(nwb)

    session = plan(tmp_path, fill)
    assert message in reason(session, "acquisition/odd")
    assert [item.spec.name for item in session.streams] == ["running"]


def test_samples_without_a_time_stamp_each_are_skipped_with_the_reason(tmp_path: Path):
    path = write(tmp_path, running(RNG.normal(size=30), timestamps=np.arange(30.0)))
    replace(path, "acquisition/running/timestamps", np.arange(29.0))
    with pytest.raises(UnusableFile, match="30 samples but 29 time stamps"):
        plan_session(path, Recipe(), "d1")


def heading(data: np.ndarray, unit: str) -> Callable[[NWBFile], None]:
    series = SpatialSeries(name="heading", data=data, unit=unit, starting_time=0.0, rate=20.0, reference_frame="arena")
    return lambda nwb: nwb.add_acquisition(CompassDirection(spatial_series=series))


@pytest.mark.parametrize(("unit", "turn"), [("degrees", 360.0), ("deg", 360.0), ("rad", 2 * np.pi)])
@pytest.mark.parametrize("centre", [0.0, 0.5])
def test_an_angle_is_found_by_unit_and_range(tmp_path: Path, unit: str, turn: float, centre: float):
    angle = (np.linspace(0, 0.999, 200) - centre) * turn
    item = stream(plan(tmp_path, heading(angle, unit)), "heading")
    assert item.spec.channels == ("heading/cos", "heading/sin")
    radian = np.linspace(0, 0.999, 200) * 2 * np.pi - centre * 2 * np.pi
    flat = values(item).transpose(0, 2, 1).reshape(-1, 2)
    assert np.allclose(flat, np.stack([np.cos(radian), np.sin(radian)], 1), atol=1e-6)


@pytest.mark.parametrize(
    ("unit", "turn", "recipe", "is_angle"),
    [
        ("degrees", 40.0, {}, False),  # a direction of gaze: within a turn, but it never turns
        ("degrees", 40.0, {"angles": ("acquisition/CompassDirection/heading",)}, True),
        ("degrees", 360.0, {"not_angles": ("heading",)}, False),
        ("rad/s", 2 * np.pi, {}, False),
        ("a.u.", 2 * np.pi, {}, False),
        ("a.u.", 2 * np.pi, {"angles": ("heading",)}, True),
    ],
)
def test_the_recipe_decides_what_unit_and_range_leave_open(
    tmp_path: Path, unit: str, turn: float, recipe: dict, is_angle: bool
):
    session = plan(tmp_path, heading(np.linspace(0, turn, 200), unit), **recipe)
    assert (stream(session, "heading").spec.num_sources == 2) == is_angle


def test_names_are_unique_and_short_ones_carry_their_container(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        for container in ("Position", "HeadPosition"):
            parts = [
                SpatialSeries(
                    name=name, data=RNG.normal(size=50), unit="m", rate=10.0, starting_time=0.0, reference_frame="r"
                )
                for name in ("x", "SnoutTip")
            ]
            nwb.add_acquisition(Position(name=container, spatial_series=parts))

    session = plan(tmp_path, fill, names={"acquisition/Position/x": "first"})
    names = [item.spec.name for item in session.streams]
    assert names == ["snout_tip", "head_position_x", "position_snout_tip", "first"]
    assert snake_case("DfOverF") == "df_over_f" and snake_case("FIP_falling time") == "fip_falling_time"


# ---------------------------------------------------------------- units


def with_units(*spikes: list[float] | np.ndarray, **columns: list) -> Callable[[NWBFile], None]:
    def fill(nwb: NWBFile) -> None:
        for name in columns:
            nwb.add_unit_column(name, "a column")
        for i, times in enumerate(spikes):
            nwb.add_unit(spike_times=times, **{name: column[i] for name, column in columns.items()})

    return fill


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


def with_rois(
    series: dict[str, np.ndarray], num_rois: int, offsets: list[float] | None = None, **clock: object
) -> Callable[[NWBFile], None]:
    def fill(nwb: NWBFile) -> None:
        device = nwb.create_device("scope")
        channel = OpticalChannel(name="c", description="d", emission_lambda=500.0)
        plane = nwb.create_imaging_plane(
            name="plane", optical_channel=channel, description="d", device=device, excitation_lambda=900.0,
            indicator="GCaMP", location="V1",
        )  # fmt: skip
        segmentation = ImageSegmentation()
        module = nwb.create_processing_module("ophys", "d")
        module.add(segmentation)
        table = segmentation.create_plane_segmentation(name="PlaneSegmentation", description="d", imaging_plane=plane)
        for roi in range(num_rois):
            table.add_roi(pixel_mask=[(roi, 0, 1.0)], id=100 + roi)
        if offsets is not None:
            table.add_column("scan_offset_s", "d", data=offsets)
        region = table.create_roi_table_region(region=list(range(num_rois)), description="all")
        containers = {"Fluorescence": Fluorescence(), "DfOverF": DfOverF()}
        module.add(list(containers.values()))
        for path, data in series.items():
            container, name = path.split("/")
            item = RoiResponseSeries(name=name, data=data, unit="n.a.", rois=region, **(clock or {"rate": 10.0}))
            containers[container].add_roi_response_series(item)

    return fill


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


# ---------------------------------------------------------------- stimulus and intervals


def movie(pixels: np.ndarray, **clock: object) -> ImageSeries:
    return ImageSeries(name="frames", data=pixels, unit="n.a.", format="raw", **(clock or {"rate": 30.0}))


def index_series(target: ImageSeries | Images, index: list[int], time_s: list[float]) -> IndexSeries:
    """pynwb only reads the link to an ImageSeries, so the series is made the way that its reader makes it."""
    link = "indexed_images" if isinstance(target, Images) else "indexed_timeseries"
    series = IndexSeries.__new__(IndexSeries, in_construct_mode=True)
    series.__init__(name="shown", data=index, unit="N/A", timestamps=time_s, **{link: target})
    series._in_construct_mode = False
    return series


def test_an_index_series_points_into_the_pixels_of_its_template(tmp_path: Path):
    pixels = RNG.integers(0, 256, (4, 6, 5), dtype=np.uint8)

    def fill(nwb: NWBFile) -> None:
        template = movie(pixels)
        nwb.add_stimulus_template(template)
        nwb.add_stimulus(index_series(template, [2, 0, 3, 9], [1.0, 1.5, 2.5, 2.6]))

    session = plan(tmp_path, fill)
    item, (stimulus,) = stream(session, "shown"), session.stimuli
    assert values(item)[:, 0, 0].tolist() == [2, 0, 3, -1]
    assert item.start_ns.tolist() == [1_000_000_000, 1_500_000_000, 2_500_000_000, 2_600_000_000]
    assert (item.spec.kind, item.spec.channels, item.spec.stimulus) == ("frames", ("screen",), stimulus.digest)
    assert np.array_equal(stimulus.reader.read(1, 4), pixels[1:])
    assert "frame-index" in codes(session)
    used = {row.path: row.used_as for row in session.coverage}
    assert used["stimulus/templates/frames"] == used["stimulus/presentation/shown"] == "shown"


def test_an_image_series_that_was_shown_is_its_own_index(tmp_path: Path):
    pixels = RNG.random((30, 4, 5)).astype(np.float32)
    session = plan(tmp_path, lambda nwb: nwb.add_stimulus(movie(pixels, rate=10.0, starting_time=2.0)))
    assert values(stream(session, "frames"))[:, 0, 0].tolist() == list(range(30))
    assert np.array_equal(session.stimuli[0].reader.read(0, 30), np.rint(pixels * 255.0).astype(np.uint8))


def test_images_are_shown_in_their_order(tmp_path: Path):
    first, second = (RNG.integers(0, 256, (3, 4), dtype=np.uint8) for _ in range(2))

    def fill(nwb: NWBFile) -> None:
        from pynwb.base import ImageReferences

        pictures = [GrayscaleImage(name="a", data=first), GrayscaleImage(name="b", data=second)]
        order = ImageReferences(name="order_of_images", data=pictures[::-1])
        images = Images(name="images", images=pictures, order_of_images=order)
        nwb.add_stimulus_template(images)
        nwb.add_stimulus(index_series(images, [0, 1, 0], [1.0, 2.0, 3.0]))

    (stimulus,) = plan(tmp_path, fill).stimuli
    assert np.array_equal(stimulus.reader.read(0, 2), np.stack([second, first]))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((3, 4, 5), np.uint16), "pixels are uint16; only uint8"),
        (np.full((3, 4, 5), 7.0), "floats beyond 0 to 1"),
        (np.zeros((3, 4, 5, 2), np.uint8), r"\(3, 4, 5, 2\), expected frames x height x width"),
    ],
)
def test_pixels_that_cannot_be_shown_are_skipped_with_the_reason(tmp_path: Path, pixels: np.ndarray, message: str):
    with pytest.raises(UnusableFile, match=message):
        plan(tmp_path, lambda nwb: nwb.add_stimulus(movie(pixels)))


def test_a_template_that_nobody_shows_is_no_stimulus(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        nwb.add_stimulus_template(movie(np.zeros((3, 4, 5), np.uint8)))
        with_units([1.0, 2.0])(nwb)

    session = plan(tmp_path, fill)
    assert session.stimuli == ()
    assert "no IndexSeries shows" in reason(session, "stimulus/templates/frames")


def test_trials_keep_their_columns_by_type(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([1.0, 9.0])(nwb)
        for name in ("is_good", "contrast", "outcome"):
            nwb.add_trial_column(name, "d")
        nwb.add_trial_column("licks", "d", index=True)
        nwb.add_trial(start_time=1.2e7, stop_time=1.2e7 + 1, is_good=True, contrast=3, outcome="hit", licks=[1.0])
        nwb.add_trial(start_time=1.3e7, stop_time=np.nan, is_good=False, contrast=4, outcome="", licks=[2.0, 3.0])

    session = plan(tmp_path, fill)
    trials = session.intervals["trials"]
    assert trials.start_ns.tolist() == [12_000_000_000_000_000, 13_000_000_000_000_000]
    assert trials.stop_ns.tolist() == [12_000_001_000_000_000, NO_TIME]
    assert {name: list(column) for name, column in trials.columns.items()} == {
        "is_good": [1.0, 0.0], "contrast": [3.0, 4.0], "outcome": ["hit", ""],
    }  # fmt: skip
    assert reason(session, "intervals/trials/licks") == "a list in each row: not read yet"


# ---------------------------------------------------------------- the whole file


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


def truncated(path: Path) -> None:
    whole = write(path.parent, with_units(RNG.random(10_000)), name="whole.nwb").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "0 bytes"),
        (lambda path: path.write_text("version https://git-lfs"), "not an HDF5 file"),
        (empty, "nothing in it"),
        (not_nwb, "but not NWB"),
        (zarr_folder, r"NWB-Zarr folders are not read yet \(next release\)"),
        (truncated, "damaged or not complete"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, make: Callable, message: str):
    path = tmp_path / "x.nwb"
    make(path)
    with pytest.raises(PrepError, match=message) as caught:
        plan_session(path, Recipe(), "d1")
    assert "\n" not in str(caught.value)


def test_files_of_the_synthetic_brain_are_read_whole(tmp_path: Path):
    from prep.synthetic import write_brain

    expected = {"running_speed", "head_direction", "pupil_diameter"}
    activity = {"t01": {"spikes", "movie"}, "t02": {"dff", "movie"}, "t03": {"spikes"}}
    for path in write_brain(tmp_path, None, "test", seed=0, duration_s=30.0):
        session = plan_session(path, Recipe(), "d1")
        assert {item.spec.name for item in session.streams} == activity[session.session_id] | expected
        for item in session.streams:
            missing = item.reader.read(0, item.spec.num_tokens) == {"counts": 255, "frames": -1}.get(item.spec.kind)
            assert not missing.any()
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
