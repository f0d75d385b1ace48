"""Recordings in the layouts of well-known collections, small, with planted truth, each odd in its collection's way.

In: a folder. Out: the path of an NWB file, and a Truth that says what its streams must hold.
"""

import warnings
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pynwb import NWBHDF5IO, NWBFile, TimeSeries
from pynwb.base import Images
from pynwb.behavior import BehavioralEvents, BehavioralTimeSeries, CompassDirection, SpatialSeries
from pynwb.core import DynamicTable, VectorData
from pynwb.epoch import TimeIntervals
from pynwb.file import Subject
from pynwb.image import GrayscaleImage, ImageSeries, IndexSeries
from pynwb.ophys import Fluorescence, ImageSegmentation, OpticalChannel, RoiResponseSeries

Floats = NDArray[np.float64]


@dataclass(kw_only=True)
class Truth:
    """What was planted, by a word of the builder's own."""

    path: Path
    arrays: dict[str, Any] = field(default_factory=dict)


def new_file(session_id: str, subject_id: str = "m1") -> NWBFile:
    """An empty recording."""
    nwb = NWBFile(
        session_description="a layout",
        identifier=session_id,
        session_start_time=datetime(2024, 1, 1, tzinfo=UTC),
        session_id=session_id,
    )
    nwb.subject = Subject(subject_id=subject_id, species="Mus musculus")
    return nwb


def save(nwb: NWBFile, path: Path) -> Path:
    """Write a recording."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these files are odd on purpose
        with NWBHDF5IO(path, "w") as io:
            io.write(nwb)
    return path


def poisson_spikes(rng: np.random.Generator, num_units: int, start_s: float, stop_s: float) -> list[Floats]:
    """Spike times of units that fire at about 5 Hz, in whole 0.1 ms and never on the edge of a bin of 20 ms."""
    trains = []
    for _ in range(num_units):
        ticks = np.unique(rng.integers(0, round((stop_s - start_s) * 1e4), round(5 * (stop_s - start_s))))
        trains.append(start_s + (ticks[ticks % 200 != 0]) / 1e4)
    return trains


def add_presentations(nwb: NWBFile, name: str, start_s: Floats, stop_s: Floats, **columns: Any) -> None:
    """A table of presentations."""
    table = TimeIntervals(name=name, description="presentations")
    for column in columns:
        table.add_column(column, "a column")
    for row, (start, stop) in enumerate(zip(start_s, stop_s, strict=True)):
        values = {column: data[row] for column, data in columns.items()}
        table.add_row(start_time=float(start), stop_time=float(stop), **values)
    nwb.add_time_intervals(table)


def add_electrodes(nwb: NWBFile, locations: list[str]) -> None:
    """An electrode table whose ids are not its rows."""
    probe = nwb.create_device(name="probeA")
    group = nwb.create_electrode_group(name="probeA", description="d", location="", device=probe)
    for row, location in enumerate(locations):
        nwb.add_electrode(id=850_000_000 + 7 * row, location=location, group=group, x=0.0, y=20.0 * row, z=0.0)


# ---------------------------------------------------------------- Visual Coding, Neuropixels


def visual_coding(folder: Path) -> Truth:
    """Tables of stimuli with phases as text and blanks as NaN, pupil in a DynamicTable, pictures by name."""
    rng = np.random.default_rng(1)
    nwb = new_file("760693773", "738651046")
    add_electrodes(nwb, ["VISam", "CA1", "LGd", "grey"])
    spikes = poisson_spikes(rng, 4, 20.0, 100.0)
    for name in ("quality", "peak_channel_id", "waveform_duration", "snr"):
        nwb.add_unit_column(name, "d")
    peaks = [850_000_000, 850_000_007, 850_000_014, 850_000_007]
    for row, times_s in enumerate(spikes):
        nwb.add_unit(
            id=951_791_918 + row, spike_times=times_s, quality="good", peak_channel_id=peaks[row],
            waveform_duration=[0.15, 0.25, 0.33, 0.41][row], snr=2.0,
        )  # fmt: skip
    onsets_s = 30 + 3.0 * np.arange(6)
    orientation = np.array([0.0, 90.0, np.nan, 315.0, 45.0, 90.0])
    add_presentations(
        nwb, "drifting_gratings_presentations", onsets_s, onsets_s + 2.0, orientation=orientation,
        temporal_frequency=np.where(np.isnan(orientation), np.nan, 2.0), contrast=np.full(6, 0.8),
        spatial_frequency=["0.04"] * 6, phase=["[42471.25, 42471.25]", "0.25", "nan", "0.5", "[3.75, 3.75]", "0.0"],
        size=["[250.0, 250.0]"] * 6, units=["deg"] * 6, stimulus_name=["drifting_gratings"] * 6,
    )  # fmt: skip
    scene_s = 60 + 0.25 * np.arange(8)
    names = ["im065", "im111", "im065", "omitted", "im024", "im111", "im024", "im065"]
    add_presentations(
        nwb, "natural_scenes_presentations", scene_s, scene_s + 0.25, image_name=names,
        stimulus_name=["Natural_Images_Lum_Matched"] * 8,
    )  # fmt: skip
    pictures = {name: rng.integers(0, 256, (6, 8)).astype(np.uint8) for name in ("im024", "im065", "im111")}
    nwb.add_stimulus_template(
        Images(
            name="natural_images",
            images=[GrayscaleImage(name=name, data=data) for name, data in pictures.items()],
            description="d",
        )
    )
    pupil_s = 20.0 + np.arange(1500) / 30
    pupil = {name: rng.normal(10, 1, 1500) for name in ("center_x", "center_y", "width", "height", "phi")}
    module = nwb.create_processing_module("eye_tracking", "d")
    fits = {"timestamps": pupil_s, **pupil}
    columns = [VectorData(name=name, description="d", data=data) for name, data in fits.items()]
    module.add(DynamicTable(name="pupil_ellipse_fits", description="d", columns=columns))
    running_s = 20.0 + np.arange(3000) / 60
    speed = rng.normal(10, 5, 3000)
    running = nwb.create_processing_module("running", "d")
    running.add(TimeSeries(name="running_speed", data=speed, unit="cm/s", timestamps=running_s))
    arrays = {
        "spikes": spikes, "orientation": orientation, "onsets_s": onsets_s, "scene_s": scene_s, "names": names,
        "pictures": pictures, "pupil_s": pupil_s, "pupil": pupil, "running_s": running_s, "speed": speed,
    }  # fmt: skip
    return Truth(path=save(nwb, folder / "ecephys_session_760693773.nwb"), arrays=arrays)


# ---------------------------------------------------------------- MICrONS


FIELD_PHASE_S = 0.0199


def functional_fields(folder: Path) -> Truth:
    """Eight fields of one scan, each with its phase; trials that name movies by hash; pixels in another file."""
    rng = np.random.default_rng(2)
    nwb = new_file("9-19", "17797")
    device = nwb.create_device(name="scope")
    channel = OpticalChannel(name="green", description="d", emission_lambda=510.0)
    module = nwb.create_processing_module("ophys", "d")
    segmentation, fluorescence = ImageSegmentation(), Fluorescence()
    module.add([segmentation, fluorescence])
    num_frames, rate_hz = 400, 6.3
    traces, times_s = [], []
    for number in range(8):
        plane = nwb.create_imaging_plane(
            name=f"ImagingPlane{number + 1}", optical_channel=channel, description="d", device=device,
            excitation_lambda=920.0, indicator="GCaMP6s", location=["VISp", "VISrl"][number % 2], imaging_rate=rate_hz,
        )  # fmt: skip
        table = segmentation.create_plane_segmentation(
            name=f"PlaneSegmentation{number + 1}", description="d", imaging_plane=plane
        )
        for roi in range(5):
            table.add_roi(pixel_mask=[(roi, number, 1.0)], id=1000 * number + roi)
        data = rng.gamma(2.0, 1.0, (num_frames, 5)).astype(np.float32)
        stamps_s = 7.0 + number * FIELD_PHASE_S + np.arange(num_frames) / rate_hz
        fluorescence.add_roi_response_series(
            RoiResponseSeries(
                name=f"RoiResponseSeries{number + 1}", data=data, unit="a.u.", timestamps=stamps_s,
                rois=table.create_roi_table_region(region=list(range(5)), description="all"),
            )
        )  # fmt: skip
        traces.append(data)
        times_s.append(stamps_s)
    hashes = ["0qcMlEJnHYjRh5iyUyPW", "6atjfmJLJAv7qSu67LDN", "0qcMlEJnHYjRh5iyUyPW", "uJ3F2ZpRxwQbGo9nBqEo"]
    starts_s = np.array([10.0, 20.5, 31.0, 41.5])
    nwb.add_trial_column("stimulus_type", "d")
    nwb.add_trial_column("condition_hash", "d")
    for start, name in zip(starts_s, hashes, strict=True):
        nwb.add_trial(start_time=start, stop_time=start + 10.0, stimulus_type="stimulus.Clip", condition_hash=name)
    movies = {name: rng.integers(0, 256, (300, 4, 6)).astype(np.uint8) for name in sorted(set(hashes))}
    (folder / "movies").mkdir(exist_ok=True)
    for name, movie in movies.items():
        np.save(folder / "movies" / f"{name}.npy", movie)
    treadmill_s = 6.9 + np.arange(1200) * 0.05
    velocity = rng.normal(0, 3, 1200)
    behavior = nwb.create_processing_module("behavior", "d")
    series = TimeSeries(name="treadmill_velocity", data=velocity, unit="cm/s", timestamps=treadmill_s)
    behavior.add(BehavioralTimeSeries(time_series=series))
    recipe = folder / "microns.yaml"
    recipe.write_text('assets:\n  - {match: "*", file: "movies/{name}.npy", rate_hz: 30}\n')
    arrays = {
        "traces": traces, "times_s": times_s, "hashes": hashes, "starts_s": starts_s, "movies": movies,
        "treadmill_s": treadmill_s, "velocity": velocity, "recipe": recipe,
    }  # fmt: skip
    return Truth(path=save(nwb, folder / "sub-17797_ses-9-19_behavior+image+ophys.nwb"), arrays=arrays)


# ---------------------------------------------------------------- International Brain Laboratory


def brainwide_map(folder: Path) -> Truth:
    """A wheel, cameras, and trials whose columns are times and contrasts, NaN where there is none."""
    rng = np.random.default_rng(3)
    nwb = new_file("4ecb5d24-f5cc-402c-be28-9d0f7cb14b3a", "SWC_043")
    spikes = poisson_spikes(rng, 6, 0.5, 120.0)
    nwb.add_unit_column("label", "d")
    nwb.add_unit_column("brain_area", "d")
    areas = ["VISp", "CA1", "MOs", "CP", "SCs", "root"]
    for row, times_s in enumerate(spikes):
        nwb.add_unit(spike_times=times_s, label=float(row % 2), brain_area=areas[row])
    starts_s = 5.0 + 11.0 * np.arange(10)
    on_s = starts_s + rng.uniform(0.4, 0.6, 10)
    feedback_s = on_s + rng.uniform(0.3, 1.5, 10)
    feedback_s[4] = np.nan
    left = np.array([1.0, np.nan, 0.25, np.nan, 0.0, np.nan, 0.125, np.nan, 1.0, np.nan])
    right = np.where(np.isnan(left), [np.nan, 0.5, np.nan, 1.0, np.nan, 0.0625, np.nan, 0.0, np.nan, 1.0], np.nan)
    choice = rng.choice([-1.0, 1.0], 10)
    columns = {
        "stimOn_times": on_s, "feedback_times": feedback_s, "contrastLeft": left, "contrastRight": right,
        "choice": choice, "feedbackType": np.where(np.isnan(feedback_s), 0.0, 1.0),
    }  # fmt: skip
    for name in columns:
        nwb.add_trial_column(name, "d")
    for row, start in enumerate(starts_s):
        values = {name: float(data[row]) for name, data in columns.items()}
        nwb.add_trial(start_time=float(start), stop_time=float(start + 9), **values)
    wheel_s = np.cumsum(rng.uniform(0.002, 0.05, 3000)) + 0.7
    wheel = np.cumsum(rng.normal(0, 0.01, 3000))
    behavior = nwb.create_processing_module("behavior", "d")
    wheel_series = {"name": "WheelPosition", "data": wheel, "unit": "radians", "timestamps": wheel_s}
    position = SpatialSeries(**wheel_series, reference_frame="zero")
    behavior.add(CompassDirection(name="CompassDirection", spatial_series=position))
    camera_s = 0.31 + np.arange(7200) / 60.0
    energy = rng.gamma(2.0, 3.0, 7200)
    camera = TimeSeries(name="left_camera_motion_energy", data=energy, unit="a.u.", timestamps=camera_s)
    behavior.add(BehavioralTimeSeries(name="motion_energy", time_series=camera))
    licks_s = np.sort(rng.uniform(1, 119, 60))
    licks = TimeSeries(name="licks", data=np.ones(60), unit="n.a.", timestamps=licks_s)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in most files
        behavior.add(BehavioralEvents(name="BehavioralEvents", time_series=licks))
    arrays = {
        "spikes": spikes, "on_s": on_s, "feedback_s": feedback_s, "left": left, "right": right, "choice": choice,
        "wheel_s": wheel_s, "wheel": wheel, "camera_s": camera_s, "energy": energy, "licks_s": licks_s,
        "starts_s": starts_s,
    }  # fmt: skip
    return Truth(path=save(nwb, folder / "sub-SWC-043_behavior+ecephys.nwb"), arrays=arrays)


# ---------------------------------------------------------------- OpenScope


def openscope(folder: Path) -> Truth:
    """A template shown through an IndexSeries, units observed in two stretches, a table of presentations."""
    rng = np.random.default_rng(4)
    nwb = new_file("1194644312", "621602")
    observed = [[10.0, 40.0], [50.0, 90.0]]
    spikes = [np.concatenate([poisson_spikes(rng, 1, a, b)[0] for a, b in observed]) for _ in range(3)]
    for times_s in spikes:
        nwb.add_unit(spike_times=times_s, obs_intervals=observed)
    movie = rng.integers(0, 256, (90, 5, 7)).astype(np.uint8)
    template = ImageSeries(name="movie_touchofevil", data=movie, unit="n.a.", format="raw", rate=30.0)
    nwb.add_stimulus_template(template)
    index = np.tile(np.arange(90), 4).astype(np.uint32)
    shown_s = 15.0 + np.arange(360) / 30.0
    # pynwb 4 only reads this link and refuses to make it anew: so it is made the way that the reader makes it
    series = IndexSeries.__new__(IndexSeries, in_construct_mode=True)
    series.__init__(name="movie_shown", data=index, unit="N/A", timestamps=shown_s, indexed_timeseries=template)
    series._in_construct_mode = False
    nwb.add_stimulus(series)
    flash_s = 60.0 + np.arange(12.0)
    color = np.where(np.arange(12) % 2, 1.0, -1.0)
    add_presentations(
        nwb, "flash_presentations", flash_s, flash_s + 0.25, color=[str(value) for value in color],
        contrast=np.full(12, 0.8), stimulus_name=["flash"] * 12,
    )  # fmt: skip
    arrays = {
        "spikes": spikes, "observed": observed, "movie": movie, "index": index, "shown_s": shown_s,
        "flash_s": flash_s, "color": color,
    }  # fmt: skip
    return Truth(path=save(nwb, folder / "sub-621602_ses-1194644312.nwb"), arrays=arrays)
