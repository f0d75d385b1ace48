"""Draws a synthetic brain and what happens in it: law, movie, behaviour, spikes, traces.

In: a SessionSpec and a random generator; the same generator draws the same. Out: Law, Course and the recorded Samples.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from prep import brain
from prep.brain import BIN_NS, BURN_STEPS, STEP_NS, STEP_S, Course, Floats, Imaging, Ints, Law

Kind = Literal["spikes", "traces"]
MOVIE_SIZE = 24
MOVIE_HZ = 10.0
CLIP_FRAMES = 50
FRAME_HZ = 10.0  # of the microscope
BEHAVIOR_HZ = {"running_speed": 60.0, "pupil_diameter": 30.0, "head_direction": 50.0}
LATENT_TAUS_S = (0.3, 0.8, 2.0)
PULSE_EVERY_S = (0.6, 1.4)  # varied, so that every stretch of pulses is unlike every other
PULSE_S = 0.1
PULSE_JITTER_S = 1e-5
PULSES_MISSED = 0.03
PHOTODIODE_HZ = 1_000.0
PHOTODIODE_RISE_S = 0.004
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
    has_pulses: bool = False  # a line of pulses is recorded on the session's clock and on the camera's
    camera_ppm: float = 0.0  # how fast the camera's clock runs, which stamps the behaviour
    camera_late_s: float = 0.0  # how late the stamps of camera and screen are


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A recorded series: float64 seconds on the session clock, and its data."""

    times_s: Floats
    data: NDArray[np.generic]

    @property
    def start_ns(self) -> Ints:
        return np.rint(self.times_s * 1e9).astype(np.int64)


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
    out_UA = np.empty((num_units, len(brain.ANGLES_A)))
    for u in range(num_units):
        num_peaks = rng.choice([1, 2, 3, 4], p=[0.2, 0.35, 0.3, 0.15])
        centres = (rng.uniform() + (np.arange(num_peaks) + rng.uniform(-0.15, 0.15, num_peaks)) / num_peaks) * 2 * np.pi
        sharpness = rng.uniform(3.0, 5.0) * num_peaks
        peaks = np.exp(sharpness * (np.cos(brain.ANGLES_A - centres[:, None]) - 1))
        curve = rng.uniform(0.6, 1.0, num_peaks) @ peaks
        out_UA[u] = 0.15 + 0.85 * curve / curve[:-1].mean()
    return out_UA


def _draw_state_gain(rng: np.random.Generator, num_units: int, low: float, high: float) -> Floats:
    """(U, G) multiplicative gain over a behavioural state: rising, falling, or for most units a bump or a dip."""
    states = brain.STATES_G
    out_UG = np.empty((num_units, len(states)))
    for u in range(num_units):
        strength = rng.uniform(low, high) * rng.choice([-1.0, 1.0])
        bump = 2 * np.exp(-(((states - rng.uniform(-0.6, 0.9)) / 0.8) ** 2)) - 1
        gain = np.exp(strength * (bump if rng.uniform() < 0.6 else np.tanh(1.5 * states)))
        out_UG[u] = gain / (gain @ brain.WEIGHTS_G)
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
            turn = brain.TURN_SD * _wander(rng, len(times_s), np.exp(-1 / rate_hz / brain.TURN_TAU_S))
            data = (rng.uniform(0, 2 * np.pi) + np.cumsum(turn) / rate_hz) % (2 * np.pi)
        else:
            state = _wander(rng, len(times_s), np.exp(-1 / rate_hz / brain.STATE_TAU_S))
            data = (brain.speed_cm_s if name == "running_speed" else brain.pupil_mm)(state)
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
    generation_TU = rng.poisson(brain.drive(law, course, brain.FACTORS)).astype(np.float32)
    counts_TU = generation_TU.copy()
    while generation_TU.any():
        generation_TU = rng.poisson(brain.coupled(law, generation_TU)).astype(np.float32)
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
    signal_NU = brain.fluorescence(imaging, course.counts_TU)
    noise_U = signal_NU.std(0) / rng.uniform(1.0, 5.0, signal_NU.shape[1])
    data = signal_NU + noise_U * rng.standard_normal(signal_NU.shape)
    return Samples(times_s=course.start_ns / 1e9 + imaging.frames_s, data=data.astype(np.float32))


def on_camera_clock(spec: SessionSpec, times_s: Floats) -> Floats:
    """What the camera's clock shows at these times of the session's clock."""
    ahead_s = (times_s - spec.start_s) * (spec.camera_ppm * 1e-6) + spec.camera_late_s
    return np.asarray(times_s + ahead_s, np.float64)


def draw_pulses(rng: np.random.Generator, spec: SessionSpec) -> tuple[Floats, Floats]:
    """Times of the pulses on the session's clock, and what the camera recorded of them on its own: it missed some."""
    times_s = spec.start_s + np.cumsum(rng.uniform(*PULSE_EVERY_S, int(spec.duration_s)))
    times_s = times_s[times_s < spec.start_s + spec.duration_s - PULSE_S]
    recorded_s = on_camera_clock(spec, times_s) + rng.normal(0, PULSE_JITTER_S, len(times_s))
    return times_s, recorded_s[rng.uniform(size=len(times_s)) > PULSES_MISSED]


def photodiode_signal(spec: SessionSpec, pulses_s: Floats) -> NDArray[np.float32]:
    """(n,) volts at PHOTODIODE_HZ: a patch of the screen that lights up with each pulse, through a slow amplifier."""
    times_s = spec.start_s + np.arange(int(spec.duration_s * PHOTODIODE_HZ)) / PHOTODIODE_HZ
    edges_s = np.stack([pulses_s, pulses_s + PULSE_S], 1).ravel()
    knots_s = (edges_s[:, None] + np.array([-0.5, 0.5]) * PHOTODIODE_RISE_S).ravel()
    volts = np.tile([0.1, 4.9, 4.9, 0.1], len(pulses_s))
    return np.asarray(np.interp(times_s, knots_s, volts), np.float32)
