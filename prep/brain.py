"""What a synthetic brain is: the law by which units fire, and the mean of what they do in a given course of events.

In: the `Law` of a brain (tuning, couplings), the `Course` of a session (what happened, on a 10 ms grid).
Out: expected spikes per step of 10 ms, and the fluorescence that spikes make.

The rate of unit u is  base * heading * speed * pupil * stimulus * latent + sum over units of coupling * earlier spikes,
every factor has mean one and all are independent: what is hidden drops out as a one, and the couplings, being linear,
carry the mean on. Shapes: T steps of 10 ms, N frames, U units, A angles, G grid points, F movie frames, Z latents.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

Floats = NDArray[np.float64]
Steps = NDArray[np.float32]  # what is large: a value per step and unit
Ints = NDArray[np.int64]

STEP_S = 0.01
STEP_NS = 10_000_000
STEPS_PER_BIN = 2
BIN_NS = STEPS_PER_BIN * STEP_NS
BURN_STEPS = 500  # before the recording the brain fires at its mean: couplings and indicators start stationary

ANGLES_A = np.linspace(0.0, 2 * np.pi, 121)  # closed: the last is the first
STATES_G = np.linspace(-4.0, 4.0, 81)  # of a standard normal Ornstein-Uhlenbeck process
WEIGHTS_G = np.exp(-0.5 * STATES_G**2) / np.exp(-0.5 * STATES_G**2).sum()

STATE_TAU_S = 4.0
TURN_TAU_S = 0.5
TURN_SD = 1.3  # rad/s
FRAME_STEPS = 10  # of a 10 Hz movie
FRAME_TAPS = (0.5, 0.3, 0.2)
# Not before 20 ms: a spike never changes the rate inside its own bin, so a bin's mean follows from earlier bins.
COUPLING_TAPS = {2: 0.3, 3: 0.4, 4: 0.3}

BEHAVIOR = frozenset({"heading", "speed", "pupil"})
FACTORS = BEHAVIOR | {"stimulus", "latent"}


@dataclass(frozen=True, kw_only=True)
class Law:
    """The fixed properties of a brain; every table has mean one over what it is a function of."""

    mean_hz: Floats  # (U,)
    heading_UA: Floats
    speed_UG: Floats
    pupil_UG: Floats
    frame_UF: Floats
    delay_U: Ints  # steps from a frame's onset to its effect
    latent_UZ: Floats
    coupling_UU: Floats  # [receiver, sender]: spikes caused per spike


@dataclass(frozen=True, kw_only=True)
class Course:
    """What happened in a session at every step of 10 ms, the burn-in included."""

    start_ns: int  # of the first step after the burn-in, a whole number of bins
    heading_T: Floats  # rad, any turn
    speed_T: Floats  # cm/s
    pupil_T: Floats  # mm
    frame_T: Ints  # -1: nothing is shown
    latent_TZ: Floats
    counts_TU: Steps


@dataclass(frozen=True, kw_only=True)
class Imaging:
    """How spikes become fluorescence: a rise and a decay per unit, seen once per frame at the unit's own phase."""

    frames_s: Floats  # (N,) since `Course.start_ns`
    offset_U: Floats  # s
    decay_U: Floats  # s
    amplitude_U: Floats


def speed_cm_s(state: Floats) -> Floats:
    """Running speed for a state of the speed process: mostly slow, in bouts up to 45 cm/s; strictly monotone."""
    return 45.0 / (1.0 + np.exp(1.6 - 1.6 * state))


def pupil_mm(state: Floats) -> Floats:
    """Pupil diameter for a state of the pupil process."""
    return 3.0 + 0.6 * state


def factor(law: Law, course: Course, name: str) -> Steps:
    """(T, U) gain of one factor of the rate, mean one."""
    if name == "heading":
        return _lookup(law.heading_UA, ANGLES_A, course.heading_T % (2 * np.pi))
    if name == "speed":
        return _lookup(law.speed_UG, speed_cm_s(STATES_G), course.speed_T)
    if name == "pupil":
        return _lookup(law.pupil_UG, pupil_mm(STATES_G), course.pupil_T)
    if name == "stimulus":
        return _stimulus(law, course.frame_T)
    if name == "latent":
        log_gain_TU: Floats = course.latent_TZ @ law.latent_UZ.T - 0.5 * (law.latent_UZ**2).sum(1)
        return np.exp(log_gain_TU.astype(np.float32))
    raise ValueError(f"unknown factor {name!r}; the rate has {sorted(FACTORS)}")


def drive(law: Law, course: Course, known: Collection[str]) -> Steps:
    """(T, U) spikes per step before couplings, with every factor that is not `known` averaged out."""
    base_U = (law.mean_hz - law.coupling_UU @ law.mean_hz) * STEP_S
    drive_TU = np.tile(base_U.astype(np.float32), (len(course.heading_T), 1))
    for name in sorted(known):
        drive_TU[BURN_STEPS:] *= factor(law, course, name)[BURN_STEPS:]
    return drive_TU


def coupled(law: Law, counts_TU: Steps) -> Steps:
    """(T, U) spikes that the given spikes (or their mean) cause on average, in their first generation."""
    echo_TU = np.zeros_like(counts_TU)
    for lag, weight in COUPLING_TAPS.items():
        echo_TU[lag:] += np.float32(weight) * counts_TU[:-lag]
    return echo_TU @ law.coupling_UU.T.astype(np.float32)


def expected_counts(law: Law, course: Course, known: Collection[str]) -> Steps:
    """(T, U) mean of the spikes per step given the known factors: the drive and all its generations of echoes."""
    generation_TU = drive(law, course, known)
    total_TU = generation_TU.copy()
    while generation_TU.max() > 1e-6:
        generation_TU = coupled(law, generation_TU)
        total_TU += generation_TU
    return total_TU


def fluorescence(imaging: Imaging, counts_TU: Steps) -> Floats:
    """(N, U) dF/F of spikes per step: linear, so that the fluorescence of a mean is the mean of the fluorescence."""
    ends_T = (np.arange(len(counts_TU)) + 1 - BURN_STEPS) * STEP_S
    out_NU = np.empty((len(imaging.frames_s), counts_TU.shape[1]))
    for u, decay_s in enumerate(imaging.decay_U):
        rise, decay = np.exp(-STEP_S / 0.05), np.exp(-STEP_S / decay_s)
        trace_T = lfilter([1.0, 0.0], [1.0, -decay], counts_TU[:, u]) - lfilter([1.0], [1.0, -rise], counts_TU[:, u])
        out_NU[:, u] = imaging.amplitude_U[u] * np.interp(imaging.frames_s + imaging.offset_U[u], ends_T, trace_T)
    return out_NU


def _lookup(table_UG: Floats, grid_G: Floats, at_T: Floats) -> Steps:
    """(T, U) linear interpolation of every unit's table at the same places; flat outside the grid."""
    position_T = np.interp(at_T, grid_G, np.arange(len(grid_G)))
    left_T = np.minimum(position_T.astype(np.int64), len(grid_G) - 2)
    part_T = (position_T - left_T).astype(np.float32)[:, None]
    table_GU = np.ascontiguousarray(table_UG.T, dtype=np.float32)
    out_TU: Steps = table_GU[left_T] * (1 - part_T) + table_GU[left_T + 1] * part_T
    return out_TU


def _stimulus(law: Law, frame_T: Ints) -> Steps:
    """(T, U) response to the frames of the last 300 ms, later by each unit's delay; one where nothing is shown."""
    table_FU = np.vstack([law.frame_UF.T, np.ones(len(law.mean_hz))])  # row -1: no frame
    padded = np.concatenate([np.full(64, -1, np.int64), frame_T])
    out_TU = np.zeros((len(frame_T), len(law.mean_hz)), np.float32)
    for delay in np.unique(law.delay_U):
        units = np.flatnonzero(law.delay_U == delay)
        columns = np.ascontiguousarray(table_FU[:, units], dtype=np.float32)
        for tap, weight in enumerate(FRAME_TAPS):
            begin = 64 - int(delay) - tap * FRAME_STEPS
            out_TU[:, units] += np.float32(weight) * columns[padded[begin : begin + len(frame_T)]]
    return out_TU
