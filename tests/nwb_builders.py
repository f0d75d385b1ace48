"""Small NWB files of every kind that the tests of prep/nwb read, written with pynwb, and helpers to look at plans.

In: functions that fill an NWBFile. Out: files in temporary folders, and the plans that prep makes of them.
"""

import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import h5py
import numpy as np
from pynwb import NWBHDF5IO, NWBFile, TimeSeries
from pynwb.behavior import CompassDirection, SpatialSeries
from pynwb.ophys import DfOverF, Fluorescence, ImageSegmentation, OpticalChannel, RoiResponseSeries

from prep.nwb.session import plan_session
from prep.plan import PlannedStream, SessionPlan
from prep.recipe import Recipe

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
    return plan_session(write(folder, fill), Recipe(**recipe), "d1")


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


def heading(data: np.ndarray, unit: str) -> Callable[[NWBFile], None]:
    series = SpatialSeries(name="heading", data=data, unit=unit, starting_time=0.0, rate=20.0, reference_frame="arena")
    return lambda nwb: nwb.add_acquisition(CompassDirection(spatial_series=series))


def with_units(*spikes: list[float] | np.ndarray, **columns: list) -> Callable[[NWBFile], None]:
    def fill(nwb: NWBFile) -> None:
        for name in columns:
            nwb.add_unit_column(name, "a column")
        for i, times in enumerate(spikes):
            nwb.add_unit(spike_times=times, **{name: column[i] for name, column in columns.items()})

    return fill


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
