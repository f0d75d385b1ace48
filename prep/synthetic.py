"""A synthetic brain that writes genuine NWB files, so that a laptop without data can walk the whole road.

In: a preset (sessions of several subjects) and a seed.
Out: one NWB file per session, and, apart from it, the reference predictions of an observer who knows the brain
(`prep/ceiling.py`). Nothing of the ground truth enters the NWB file. Same seed, same arrays.
"""

import argparse
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from pynwb import NWBHDF5IO, NWBFile, TimeSeries
from pynwb.behavior import BehavioralTimeSeries, CompassDirection, PupilTracking, SpatialSeries
from pynwb.device import Device
from pynwb.file import Subject
from pynwb.image import ImageSeries, IndexSeries
from pynwb.ophys import DfOverF, ImageSegmentation, OpticalChannel, RoiResponseSeries

from prep import ceiling
from prep.brain import BURN_STEPS, STEP_S, Course, Floats, Imaging, Law
from prep.brain_draw import (
    FRAME_HZ,
    MOVIE_HZ,
    PHOTODIODE_HZ,
    Kind,
    Samples,
    SessionSpec,
    draw_behavior,
    draw_course,
    draw_imaging,
    draw_law,
    draw_movie,
    draw_presentation,
    draw_pulses,
    draw_spike_times,
    draw_traces,
    on_camera_clock,
    photodiode_signal,
)
from prep.disk import appears_whole


def _spec(seed: int, name: str, kind: Kind, num_units: int, duration_s: float, start_s: float) -> SessionSpec:
    """A spec from `subject/session` and what every session differs in."""
    subject_id, session_id = name.split("/")
    return SessionSpec(
        session_id=session_id,
        subject_id=subject_id,
        kind=kind,
        num_units=num_units,
        duration_s=duration_s,
        start_s=start_s,
        seed=seed,
    )


PRESETS: dict[str, tuple[SessionSpec, ...]] = {
    "demo": (
        _spec(1, "loom01/s01", "spikes", 100, 400, 8.31),
        replace(_spec(2, "loom01/s02", "spikes", 70, 300, 1.2e7 + 0.137), clock_ppm=-45),
        replace(_spec(3, "loom02/s03", "spikes", 80, 360, 512.7), has_stimulus=False),
        replace(_spec(4, "loom02/s04", "traces", 120, 600, 3.9), clock_ppm=60),
        replace(_spec(5, "loom03/s05", "traces", 60, 300, 6.1e5), has_behavior=False),
    ),
    "test": (
        replace(_spec(1, "mini01/t01", "spikes", 20, 80, 1.2e7 + 0.137), num_frames=300),
        replace(_spec(2, "mini01/t02", "traces", 20, 80, 0.0), num_frames=300),
        replace(_spec(3, "mini02/t03", "spikes", 20, 60, 40.0), num_frames=300, has_stimulus=False),
    ),
    "clocks": (
        replace(_spec(1, "late01/c01", "spikes", 20, 120, 12.5), num_frames=300, has_pulses=True, camera_ppm=50),
        replace(_spec(2, "late01/c02", "spikes", 20, 120, 1.2e7), num_frames=300, has_pulses=True, camera_late_s=0.03),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Session:
    """All that a synthetic session is made of: what the file gets, and what only the reference knows."""

    spec: SessionSpec
    seed: int
    law: Law
    course: Course
    behavior: dict[str, Samples]
    movie: NDArray[np.uint8]
    shown: Samples  # frame indices
    imaging: Imaging | None
    recorded: list[Floats] | Samples  # spike times of each unit, or dF/F


def write_brain(out: Path, truth: Path | None, preset: str, seed: int, duration_s: float | None = None) -> list[Path]:
    """Write a preset's sessions as `<out>/<subject_id>_<session_id>.nwb`, references as `<truth>/<session_id>.npz`."""
    return [write_session(synthesize(spec, seed), out, truth) for spec in preset_specs(preset, duration_s)]


def preset_specs(preset: str, duration_s: float | None = None) -> tuple[SessionSpec, ...]:
    """The sessions of a preset, all of `duration_s` if that is given."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; choose one of {sorted(PRESETS)}")
    specs = PRESETS[preset]
    return specs if duration_s is None else tuple(replace(spec, duration_s=duration_s) for spec in specs)


def write_session(session: Session, out: Path, truth: Path | None) -> Path:
    """Write one session and its references; each file appears whole or not at all."""
    path = out / f"{session.spec.subject_id}_{session.spec.session_id}.nwb"
    with appears_whole(path) as partial, h5py.File(partial, "w") as file:
        with NWBHDF5IO(file=file, mode="w") as io:  # a path of its own would have to end in .nwb
            io.write(_nwb_file(session))
    if truth is not None:
        ceiling.save_references(truth / f"{session.spec.session_id}.npz", references(session))
    return path


def references(session: Session) -> list[ceiling.Reference]:
    """Every reference that the session's recorded streams allow."""
    spec, law, course = session.spec, session.law, session.course
    start_ns = ceiling.bin_start_ns(course) if isinstance(session.recorded, list) else session.recorded.start_ns
    rows = ceiling.encoding_references(law, course, spec.has_stimulus, spec.has_behavior, session.imaging, start_ns)
    if spec.kind == "spikes":
        rows.append(ceiling.co_smoothing_reference(law, course))
    if spec.kind == "spikes" and spec.has_behavior:
        origin_s = course.start_ns / 1e9
        since_s = {name: samples.times_s - origin_s for name, samples in session.behavior.items()}
        stamps = {name: samples.start_ns for name, samples in session.behavior.items()}
        rows += ceiling.decoding_references(law, course, since_s, stamps)
    return rows


def synthesize(spec: SessionSpec, seed: int) -> Session:
    """Draw a brain, a course of events and a recording; the movie depends on `seed` alone, all sessions share it."""
    movie = draw_movie(np.random.default_rng(seed), spec.num_frames)
    rng = np.random.default_rng([seed, spec.seed])
    law = draw_law(rng, spec, movie)
    behavior = draw_behavior(rng, spec)
    shown = draw_presentation(rng, spec)
    course = draw_course(rng, spec, law, behavior, shown)
    imaging = draw_imaging(rng, spec, course) if spec.kind == "traces" else None
    recorded = draw_spike_times(rng, course) if imaging is None else draw_traces(rng, course, imaging)
    return Session(
        spec=spec,
        seed=seed,
        law=law,
        course=course,
        behavior=behavior,
        movie=movie,
        shown=shown,
        imaging=imaging,
        recorded=recorded,
    )


# ---- NWB


def _nwb_file(session: Session) -> NWBFile:
    spec, seed = session.spec, session.seed
    nwb = NWBFile(
        session_description="A synthetic session: not recorded from an animal.",
        identifier=f"brainloom-synthetic-{seed}-{spec.subject_id}-{spec.session_id}",
        session_start_time=datetime(2025, 1, 1, 9, spec.seed % 60, tzinfo=UTC),
        session_id=spec.session_id,
        lab="Brainloom",
        keywords=["synthetic"],
    )
    nwb.subject = Subject(
        subject_id=spec.subject_id, species="Mus musculus", sex="U", age="P90D", description="A synthetic mouse."
    )
    if spec.has_behavior:
        stamps = {name: on_camera_clock(spec, samples.times_s) for name, samples in session.behavior.items()}
        _add_behavior(nwb, {name: replace(session.behavior[name], times_s=stamps[name]) for name in stamps})
    if spec.has_stimulus:
        late = replace(session.shown, times_s=session.shown.times_s + spec.camera_late_s)
        _add_movie(nwb, session.movie, late)
    if spec.has_pulses:
        _add_pulses(nwb, spec, np.random.default_rng([seed, spec.seed, 2]))
    if isinstance(session.recorded, list):
        _add_units(nwb, session.recorded, session.course)
    else:
        _add_rois(nwb, session)
    _add_trials(nwb, spec, np.random.default_rng([seed, spec.seed, 1]))
    return nwb


def _add_behavior(nwb: NWBFile, behavior: dict[str, Samples]) -> None:
    def series(name: str, unit: str) -> dict[str, Any]:
        return {"name": name, "data": behavior[name].data, "unit": unit, "timestamps": behavior[name].times_s}

    frame = "0 is along the long wall of the arena, counter-clockwise from above, in [0, 2 pi)."
    heading = SpatialSeries(**series("head_direction", "radians"), reference_frame=frame)
    module = nwb.create_processing_module("behavior", "What the animal does.")
    module.add(BehavioralTimeSeries(time_series=TimeSeries(**series("running_speed", "cm/s"))))
    module.add(PupilTracking(time_series=TimeSeries(**series("pupil_diameter", "mm"))))
    module.add(CompassDirection(spatial_series=heading))


def _add_movie(nwb: NWBFile, movie: NDArray[np.uint8], shown: Samples) -> None:
    template = ImageSeries(
        name="movie_frames", data=movie, unit="n.a.", format="raw", rate=MOVIE_HZ, description="Frame, row, column."
    )
    nwb.add_stimulus_template(template)
    # Files in the wild link an ImageSeries, but pynwb 4 only reads that link and refuses to make it anew: so it is
    # made the way that the reader makes it. The link is deprecated, and valid.
    index = IndexSeries.__new__(IndexSeries, in_construct_mode=True)
    index.__init__(name="movie", data=shown.data, unit="N/A", timestamps=shown.times_s, indexed_timeseries=template)
    index._in_construct_mode = False
    nwb.add_stimulus(index)


def _add_pulses(nwb: NWBFile, spec: SessionSpec, rng: np.random.Generator) -> None:
    pulses_s, recorded_s = draw_pulses(rng, spec)
    for name, times_s in (("sync_pulses", pulses_s), ("camera_pulses", recorded_s)):
        nwb.add_acquisition(TimeSeries(name=name, data=np.ones(len(times_s)), unit="n.a.", timestamps=times_s))
    volts = photodiode_signal(spec, pulses_s)
    clock = {"starting_time": spec.start_s, "rate": PHOTODIODE_HZ}
    nwb.add_acquisition(TimeSeries(name="photodiode", data=volts, unit="volts", **clock))


def _add_units(nwb: NWBFile, spike_times: list[Floats], course: Course) -> None:
    device = nwb.create_device(name="probe", description="A synthetic silicon probe.")
    group = nwb.create_electrode_group(name="shank0", description="One shank.", location="cortex", device=device)
    for row in range(len(spike_times)):
        nwb.add_electrode(x=0.0, y=20.0 * row, z=0.0, location="cortex", group=group)
    start_s = course.start_ns / 1e9
    stop_s = start_s + (len(course.heading_T) - BURN_STEPS) * STEP_S
    for row, times_s in enumerate(spike_times):
        nwb.add_unit(spike_times=times_s, obs_intervals=[[start_s, stop_s]], electrodes=[row], electrode_group=group)


def _add_rois(nwb: NWBFile, session: Session) -> None:
    imaging, traces = session.imaging, session.recorded
    assert imaging is not None and isinstance(traces, Samples)
    num_rois = traces.data.shape[1]
    plane = _imaging_plane(nwb, nwb.create_device(name="microscope", description="A synthetic two-photon microscope."))
    segmentation = ImageSegmentation()
    module = nwb.create_processing_module("ophys", "Two-photon imaging.")
    dff = DfOverF()
    module.add([segmentation, dff])
    table = segmentation.create_plane_segmentation("The ROIs.", plane, "PlaneSegmentation")
    for row in range(num_rois):
        table.add_roi(pixel_mask=[(8 * (row % 16), 8 * (row // 16), 1.0)])
    table.add_column(
        name="scan_offset_s", description="When in a frame the beam passes the ROI, in seconds.", data=imaging.offset_U
    )
    region = table.create_roi_table_region(region=list(range(num_rois)), description="All ROIs.")
    dff.add_roi_response_series(
        RoiResponseSeries(name="dff", data=traces.data, unit="n.a.", timestamps=traces.times_s, rois=region)
    )


def _imaging_plane(nwb: NWBFile, device: Device) -> object:
    return nwb.create_imaging_plane(
        name="plane",
        optical_channel=OpticalChannel(name="green", description="GCaMP.", emission_lambda=510.0),
        description="Layer 2/3.",
        device=device,
        excitation_lambda=920.0,
        indicator="GCaMP6f",
        location="cortex",
        imaging_rate=FRAME_HZ,
    )


def _add_trials(nwb: NWBFile, spec: SessionSpec, rng: np.random.Generator) -> None:
    """Trials without a meaning: a table that a reader has to carry along."""
    nwb.add_trial_column(name="rewarded", description="Whether a drop of water was given.")
    onsets_s = spec.start_s + np.cumsum(rng.uniform(8.0, 14.0, int(spec.duration_s / 8.0)))
    for onset_s in onsets_s[onsets_s < spec.start_s + spec.duration_s - 5.0]:
        nwb.add_trial(start_time=onset_s, stop_time=onset_s + rng.uniform(2.0, 4.0), rewarded=bool(rng.uniform() < 0.5))


# ---- command


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m prep synthesize`."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the NWB files")
    parser.add_argument("--truth", type=Path, help="folder for the reference predictions (default: none are made)")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo", help="which sessions (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same arrays (default: 0)")


def main(args: argparse.Namespace) -> int:
    """Write the preset's sessions, one line for each."""
    for spec in preset_specs(args.preset):
        session = synthesize(spec, args.seed)
        print(_summary(session, write_session(session, args.out, args.truth)))
    return 0


def _summary(session: Session, path: Path) -> str:
    spec = session.spec
    seconds = (len(session.course.heading_T) - BURN_STEPS) * STEP_S
    if isinstance(session.recorded, list):
        activity = f"{spec.num_units} units, {np.mean([len(t) for t in session.recorded]) / seconds:.1f} spikes/s"
    else:
        activity = f"{spec.num_units} ROIs, {len(session.recorded.times_s) / seconds:.1f} frames/s"
    has = [name for name, there in (("behavior", spec.has_behavior), ("stimulus", spec.has_stimulus)) if there]
    return f"{path}: {activity}, {seconds:.0f} s, {' + '.join([spec.kind, *has])}"
