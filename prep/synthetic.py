"""A synthetic brain that writes genuine NWB files, so that a laptop without data can walk the whole road.

In: a preset (sessions of several subjects) and a seed.
Out: one NWB file per session, and, apart from it, the reference predictions of an observer who knows the brain
(`prep/ceiling.py`). Nothing of the ground truth enters the NWB file. Same seed, same arrays.
"""

import argparse
import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray
from pynwb import NWBHDF5IO, NWBFile, TimeSeries
from pynwb.behavior import BehavioralTimeSeries, CompassDirection, PupilTracking, SpatialSeries
from pynwb.device import Device
from pynwb.file import Subject
from pynwb.image import ImageSeries, IndexSeries
from pynwb.ophys import DfOverF, ImageSegmentation, OpticalChannel, RoiResponseSeries
from scipy.signal import lfilter

from prep import ceiling
from prep.ceiling import BIN_NS, BURN_STEPS, STEP_NS, STEP_S, Course, Floats, Imaging, Ints, Law

Kind = Literal["spikes", "traces"]

MOVIE_SIZE = 24
MOVIE_HZ = 10.0
CLIP_FRAMES = 50
FRAME_HZ = 10.0  # of the microscope
BEHAVIOR_HZ = {"running_speed": 60.0, "pupil_diameter": 30.0, "head_direction": 50.0}
LATENT_TAUS_S = (0.3, 0.8, 2.0)
EDGE_NS = 1_000  # spikes keep this far from the edges of a step: rounding of the clock never moves one across


@dataclass(frozen=True, kw_only=True)
class SessionSpec:
    """One session to synthesize; `start_s` is where its clock starts, `clock_ppm` how far its devices run off it."""

    session_id: str
    subject_id: str
    kind: Kind
    num_units: int
    duration_s: float
    start_s: float = 0.0
    has_stimulus: bool = True
    has_behavior: bool = True
    clock_ppm: float = 30.0
    num_frames: int = 1_500  # distinct frames of the movie
    seed: int = 0


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
        _spec(1, "loom01/s01", "spikes", 100, 480, 8.31),
        replace(_spec(2, "loom01/s02", "spikes", 70, 360, 1.2e7 + 0.137), clock_ppm=-45),
        replace(_spec(3, "loom02/s03", "spikes", 80, 360, 512.7), has_stimulus=False),
        replace(_spec(4, "loom02/s04", "traces", 120, 420, 3.9), clock_ppm=60),
        replace(_spec(5, "loom03/s05", "traces", 60, 360, 6.1e5), has_behavior=False),
    ),
    "test": (
        replace(_spec(1, "mini01/t01", "spikes", 20, 80, 1.2e7 + 0.137), num_frames=300),
        replace(_spec(2, "mini01/t02", "traces", 20, 80, 0.0), num_frames=300),
        replace(_spec(3, "mini02/t03", "spikes", 20, 60, 40.0), num_frames=300, has_stimulus=False),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A recorded series: float64 seconds on the session clock, and its data."""

    times_s: Floats
    data: NDArray[np.generic]

    @property
    def start_ns(self) -> Ints:
        return np.rint(self.times_s * 1e9).astype(np.int64)


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
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{session.spec.subject_id}_{session.spec.session_id}.nwb"
    partial = path.with_name(f"{path.name}.partial")
    try:
        with h5py.File(partial, "w") as file, NWBHDF5IO(file=file, mode="w") as io:  # its paths must end in .nwb
            io.write(_nwb_file(session))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if truth is not None:
        truth.mkdir(parents=True, exist_ok=True)
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


# ---- the brain and what happens in it


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


def draw_movie(rng: np.random.Generator, num_frames: int) -> NDArray[np.uint8]:
    """(F, H, W) frames with 1/f amplitude in space and time, periodic, so that a loop has no seam."""
    shape = (num_frames, MOVIE_SIZE, MOVIE_SIZE)
    spectrum = np.fft.rfftn(rng.standard_normal(shape))
    time_f, y_f, x_f = np.fft.fftfreq(num_frames), np.fft.fftfreq(MOVIE_SIZE), np.fft.rfftfreq(MOVIE_SIZE)
    radius = np.sqrt((2 * time_f[:, None, None]) ** 2 + y_f[:, None] ** 2 + x_f**2)
    radius[0, 0, 0] = np.inf
    pixels = np.fft.irfftn(spectrum / np.maximum(radius, 1 / MOVIE_SIZE) ** 1.5, s=shape, axes=(0, 1, 2))
    return np.asarray(np.clip(128 + 45 * pixels / pixels.std(), 0, 255), np.uint8)


def draw_law(rng: np.random.Generator, spec: SessionSpec, movie: NDArray[np.uint8]) -> Law:
    """Draw tuning and couplings; a session without a movie has units that do not care."""
    num = spec.num_units
    mean_hz = np.exp(rng.uniform(np.log(1.8), np.log(6.5), num))
    return Law(
        mean_hz=mean_hz,
        heading_UA=_draw_heading_tuning(rng, num),
        speed_UG=_draw_state_gain(rng, num, 0.5, 1.0),
        pupil_UG=_draw_state_gain(rng, num, 0.3, 0.6),
        frame_UF=_draw_frame_response(rng, num, movie),
        delay_U=rng.integers(4, 12, num),
        latent_UZ=rng.normal(0, 0.25, (num, len(LATENT_TAUS_S))),
        coupling_UU=_draw_coupling(rng, mean_hz),
    )


def _draw_heading_tuning(rng: np.random.Generator, num_units: int) -> Floats:
    """(U, A) one to four von Mises peaks on a floor: what a regression on cos and sin hardly sees."""
    out_UA = np.empty((num_units, len(ceiling.ANGLES_A)))
    for u in range(num_units):
        num_peaks = rng.choice([1, 2, 3, 4], p=[0.2, 0.35, 0.3, 0.15])
        centres = (rng.uniform() + (np.arange(num_peaks) + rng.uniform(-0.15, 0.15, num_peaks)) / num_peaks) * 2 * np.pi
        sharpness = rng.uniform(3.0, 5.0) * num_peaks
        peaks = np.exp(sharpness * (np.cos(ceiling.ANGLES_A - centres[:, None]) - 1))
        curve = rng.uniform(0.6, 1.0, num_peaks) @ peaks
        out_UA[u] = 0.15 + 0.85 * curve / curve[:-1].mean()
    return out_UA


def _draw_state_gain(rng: np.random.Generator, num_units: int, low: float, high: float) -> Floats:
    """(U, G) multiplicative gain over a behavioural state: rising, falling, or for most units a bump or a dip."""
    states = ceiling.STATES_G
    out_UG = np.empty((num_units, len(states)))
    for u in range(num_units):
        strength = rng.uniform(low, high) * rng.choice([-1.0, 1.0])
        bump = 2 * np.exp(-(((states - rng.uniform(-0.6, 0.9)) / 0.8) ** 2)) - 1
        gain = np.exp(strength * (bump if rng.uniform() < 0.6 else np.tanh(1.5 * states)))
        out_UG[u] = gain / (gain @ ceiling.WEIGHTS_G)
    return out_UG


def _draw_frame_response(rng: np.random.Generator, num_units: int, movie: NDArray[np.uint8]) -> Floats:
    """(U, F) response to each frame through Gabor fields of three sizes: half of them linear, half energy."""
    pixels = (movie.reshape(len(movie), -1) - 128.0) / 45.0
    y, x = np.mgrid[:MOVIE_SIZE, :MOVIE_SIZE].reshape(2, -1)
    out_UF = np.empty((num_units, len(movie)))
    for u in range(num_units):
        size, angle, phase = rng.choice([1.5, 2.5, 4.0]), rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
        centre = rng.uniform(4, MOVIE_SIZE - 4, 2)
        along = ((y - centre[0]) * np.sin(angle) + (x - centre[1]) * np.cos(angle)) * 1.2 / size + phase
        window = np.exp(-0.5 * ((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / size**2)
        pair = np.stack([pixels @ (window * wave(along)) for wave in (np.cos, np.sin)])
        pair = (pair - pair.mean(1, keepdims=True)) / pair.std(1, keepdims=True)
        response = np.logaddexp(0, 1.5 * pair[0]) if rng.uniform() < 0.5 else (pair**2).sum(0)
        response = np.minimum(response / response.mean(), 3.0)
        out_UF[u] = 0.2 + 0.8 * response / response.mean()
    return out_UF


def _draw_coupling(rng: np.random.Generator, mean_hz: Floats) -> Floats:
    """(U, U) four excitatory inputs per unit that bring 5 to 15 % of its spikes; rows below one keep it stable."""
    num = len(mean_hz)
    out_UU = np.zeros((num, num))
    for u in range(num):
        senders = rng.choice(np.delete(np.arange(num), u), 4, replace=False)
        out_UU[u, senders] = rng.uniform(0.05, 0.15) * rng.dirichlet(np.full(4, 2.0)) * mean_hz[u] / mean_hz[senders]
    return out_UU


def device_times(spec: SessionSpec, rate_hz: float, phase_s: float) -> Floats:
    """Timestamps on the session clock of a device that believes that it runs at `rate_hz`."""
    true_hz = rate_hz * (1 + spec.clock_ppm * 1e-6)
    num = int((spec.duration_s - phase_s) * true_hz)
    return spec.start_s + phase_s + np.arange(num) / true_hz


def _wander(rng: np.random.Generator, num: int, keep: float) -> Floats:
    """(num,) standard normal first-order autoregressive process, stationary from the first sample."""
    noise = rng.standard_normal(num) * np.sqrt(1 - keep**2)
    first = rng.standard_normal()
    return np.asarray(lfilter([1.0], [1.0, -keep], noise, zi=[keep * first])[0])


def draw_behavior(rng: np.random.Generator, spec: SessionSpec) -> dict[str, Samples]:
    """Running, pupil and head direction as recorded; the brain responds to these very samples, so they hide nothing."""
    out = {}
    for name, rate_hz in BEHAVIOR_HZ.items():
        times_s = device_times(spec, rate_hz, rng.uniform(0, 1 / rate_hz))
        if name == "head_direction":
            turn = ceiling.TURN_SD * _wander(rng, len(times_s), np.exp(-1 / rate_hz / ceiling.TURN_TAU_S))
            data = (rng.uniform(0, 2 * np.pi) + np.cumsum(turn) / rate_hz) % (2 * np.pi)
        else:
            state = _wander(rng, len(times_s), np.exp(-1 / rate_hz / ceiling.STATE_TAU_S))
            data = (ceiling.speed_cm_s if name == "running_speed" else ceiling.pupil_mm)(state)
        out[name] = Samples(times_s=times_s, data=data)
    return out


def draw_presentation(rng: np.random.Generator, spec: SessionSpec) -> Samples:
    """The frame shown at each refresh: every clip of 5 s once per pass, in a new order each time.

    It begins anywhere in a clip: the time alone then says nothing of the frame, and the stimulus averages out to one.
    """
    times_s = device_times(spec, MOVIE_HZ, 0.5)
    num_clips = spec.num_frames // CLIP_FRAMES
    begin = rng.integers(CLIP_FRAMES)
    num_passes = -(-(begin + len(times_s)) // spec.num_frames)
    clips = np.concatenate([rng.permutation(num_clips) for _ in range(num_passes)])
    frames = (clips[:, None] * CLIP_FRAMES + np.arange(CLIP_FRAMES)).ravel()
    return Samples(times_s=times_s, data=frames[begin : begin + len(times_s)].astype(np.uint32))


def draw_course(
    rng: np.random.Generator, spec: SessionSpec, law: Law, behavior: dict[str, Samples], shown: Samples
) -> Course:
    """Lay all that is recorded on steps of 10 ms, and let the brain fire."""
    start_ns = -(-round(spec.start_s * 1e9) // BIN_NS) * BIN_NS
    num_steps = BURN_STEPS + int(spec.duration_s * 1e9) // BIN_NS * BIN_NS // STEP_NS - 2
    at_T = (np.arange(num_steps) - BURN_STEPS + 0.5) * STEP_S
    since = {name: samples.times_s - start_ns / 1e9 for name, samples in behavior.items()}
    data = {name: samples.data.astype(np.float64) for name, samples in behavior.items()}
    latest_T = np.searchsorted(shown.times_s - start_ns / 1e9, at_T, side="right") - 1
    frame_T = np.where(latest_T >= 0, shown.data.astype(np.int64)[np.maximum(latest_T, 0)], -1)
    silent = Course(
        start_ns=start_ns,
        heading_T=np.interp(at_T, since["head_direction"], np.unwrap(data["head_direction"])),
        speed_T=np.interp(at_T, since["running_speed"], data["running_speed"]),
        pupil_T=np.interp(at_T, since["pupil_diameter"], data["pupil_diameter"]),
        frame_T=frame_T if spec.has_stimulus else np.full(num_steps, -1),
        latent_TZ=np.zeros((num_steps, len(LATENT_TAUS_S))),
        counts_TU=np.zeros((num_steps, spec.num_units), np.float32),
    )
    return fire(rng, law, silent)


def fire(rng: np.random.Generator, law: Law, course: Course) -> Course:
    """The course with a new latent and new spikes: a linear Hawkes process, drawn generation by generation."""
    num_steps = len(course.heading_T)
    latents = [_wander(rng, num_steps, np.exp(-STEP_S / tau_s)) for tau_s in LATENT_TAUS_S]
    course = replace(course, latent_TZ=np.stack(latents, 1))
    generation_TU = rng.poisson(ceiling.drive(law, course, ceiling.FACTORS)).astype(np.float32)
    counts_TU = generation_TU.copy()
    while generation_TU.any():
        generation_TU = rng.poisson(ceiling.coupled(law, generation_TU)).astype(np.float32)
        counts_TU += generation_TU
    return replace(course, counts_TU=counts_TU)


def draw_spike_times(rng: np.random.Generator, course: Course) -> list[Floats]:
    """Sorted spike times of each unit, uniform within their step; whole seconds are kept apart for far clocks."""
    counts_UT = course.counts_TU[BURN_STEPS:].T.astype(np.int64)
    second, rest_ns = divmod(course.start_ns + STEP_NS * np.arange(counts_UT.shape[1]), 1_000_000_000)
    out = []
    for counts_T in counts_UT:
        step = np.repeat(np.arange(len(counts_T)), counts_T)
        within_ns = rng.uniform(EDGE_NS, STEP_NS - EDGE_NS, len(step))
        out.append(np.sort(second[step] + (rest_ns[step] + within_ns) / 1e9))
    return out


def draw_imaging(rng: np.random.Generator, spec: SessionSpec, course: Course) -> Imaging:
    """Frames of the microscope, and the indicator of each ROI."""
    times_s = device_times(spec, FRAME_HZ, 0.033)
    frames_s = times_s - course.start_ns / 1e9
    return Imaging(
        frames_s=frames_s[frames_s + 1 / FRAME_HZ < (len(course.heading_T) - BURN_STEPS) * STEP_S],
        offset_U=np.sort(rng.uniform(0, 0.9 / FRAME_HZ, spec.num_units)),  # the beam passes the ROIs from top to bottom
        decay_U=rng.uniform(0.3, 0.7, spec.num_units),
        amplitude_U=rng.uniform(0.1, 0.3, spec.num_units),
    )


def draw_traces(rng: np.random.Generator, course: Course, imaging: Imaging) -> Samples:
    """dF/F with white noise, its standard deviation a fifth to the whole of the signal's."""
    signal_NU = ceiling.fluorescence(imaging, course.counts_TU)
    noise_U = signal_NU.std(0) / rng.uniform(1.0, 5.0, signal_NU.shape[1])
    data = signal_NU + noise_U * rng.standard_normal(signal_NU.shape)
    return Samples(times_s=course.start_ns / 1e9 + imaging.frames_s, data=data.astype(np.float32))


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
        _add_behavior(nwb, session.behavior)
    if spec.has_stimulus:
        _add_movie(nwb, session.movie, session.shown)
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
