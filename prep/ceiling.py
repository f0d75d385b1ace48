"""What a perfect observer of a synthetic brain can predict: the reference that a model is scored against.

In: the `Law` of a brain (tuning, couplings), the `Course` of a session (what happened, on a 10 ms grid), sample times.
Out: `Reference` rows, one per (stream, task, visible set), saved as one npz per session.

An `exact` row is the conditional mean of what is recorded, given what is visible: no predictor has a smaller expected
Poisson deviance or squared error. A `bound` row sees more than its task allows (the latent, the other modalities).
The rate of unit u is  base * heading * speed * pupil * stimulus * latent + sum over units of coupling * earlier spikes,
every factor has mean one and all are independent: what is hidden drops out as a one, and the couplings, being linear,
carry the mean on. Shapes: T steps of 10 ms, M blocks of 40 ms, U units, A angles, G grid points, F frames, Z latents.
"""

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.sparse import block_array, csr_array

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
BLOCK_STEPS = 4

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


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The best prediction of one stream in one task: `values` (n, S) at `start_ns` (n,) of the session clock."""

    stream: str
    task: str  # "encoding" | "decoding" | "co_smoothing"
    visible: tuple[str, ...]  # modalities, sorted
    start_ns: Ints
    values: Steps
    sources: tuple[str, ...]

    @property
    def modality(self) -> str:
        return {"spikes": "spikes", "dff": "traces"}.get(self.stream, "behavior")

    @property
    def ceiling_kind(self) -> str:
        return "exact" if self.task == "encoding" else "bound"


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


def bin_start_ns(course: Course) -> Ints:
    """(n,) starts of the 20 ms bins of the recording."""
    num_bins = (len(course.heading_T) - BURN_STEPS) // STEPS_PER_BIN
    return course.start_ns + BIN_NS * np.arange(num_bins, dtype=np.int64)


def per_bin(steps_TU: Steps) -> Steps:
    """(n, U) sums over the bins of the recording."""
    return _sum_steps(steps_TU[BURN_STEPS:], STEPS_PER_BIN)


def encoding_references(
    law: Law, course: Course, has_stimulus: bool, has_behavior: bool, imaging: Imaging | None, start_ns: Ints
) -> list[Reference]:
    """Exact encoding rows of the session's activity, for all that is recorded and for behaviour alone."""
    recorded = tuple(name for name, has in (("behavior", has_behavior), ("stimulus", has_stimulus)) if has)
    visible_sets = {recorded, ("behavior",)} if has_behavior else {recorded} - {()}
    rows = []
    for visible in sorted(visible_sets, key=len, reverse=True):
        known = {f for v in visible for f in (BEHAVIOR if v == "behavior" else {v})}
        mean_TU = expected_counts(law, course, known)
        values = per_bin(mean_TU) if imaging is None else fluorescence(imaging, mean_TU).astype(np.float32)
        stream, names = ("spikes", _names("unit", law)) if imaging is None else ("dff", _names("roi", law))
        rows.append(
            Reference(stream=stream, task="encoding", visible=visible, start_ns=start_ns, values=values, sources=names)
        )
    return rows


def co_smoothing_reference(law: Law, course: Course) -> Reference:
    """The true rate: mean of each 20 ms count given stimulus, behaviour, latent and all spikes of earlier bins.

    A bound because nobody else sees the latent. What it leaves out is the echo of a hidden spike in the spikes that
    it causes later, in other units: those are 5 to 15 % of all spikes and hardly stand out, so the echo is worth less
    than the latent, but a reader of the future who was also told the latent would beat the bound by a little.
    """
    rate_TU = drive(law, course, FACTORS) + coupled(law, course.counts_TU)
    return Reference(
        stream="spikes",
        task="co_smoothing",
        visible=("spikes",),
        start_ns=bin_start_ns(course),
        values=per_bin(rate_TU),
        sources=_names("unit", law),
    )


def decoding_references(
    law: Law, course: Course, samples_s: dict[str, Floats], start_ns: dict[str, Ints]
) -> list[Reference]:
    """Ideal observers of head direction and running speed: they know the tuning and all but what they decode.

    `samples_s` are the sample times of each behaviour since `course.start_ns`. Hidden Markov smoothing in 40 ms
    blocks, over heading x turning speed and over the state of the speed process.
    """
    heading = _posterior_mean(
        _log_likelihood(law, course, "heading", law.heading_UA[:, :-1]),
        _turning(),
        np.stack([np.cos(ANGLES_A[:-1]), np.sin(ANGLES_A[:-1])], 1),
    )
    speed = _posterior_mean(
        _log_likelihood(law, course, "speed", law.speed_UG),
        csr_array(_drifting(STATES_G, STATE_TAU_S)),
        speed_cm_s(STATES_G)[:, None],
    )
    rows = []
    for stream, mean_M, sources in (
        ("head_direction", heading, ("cos", "sin")),
        ("running_speed", speed, ("running_speed",)),
    ):
        centres_M = (np.arange(len(mean_M)) + 0.5) * BLOCK_STEPS * STEP_S
        values = np.stack([np.interp(samples_s[stream], centres_M, column) for column in mean_M.T], 1)
        rows.append(
            Reference(
                stream=stream,
                task="decoding",
                visible=("spikes",),
                start_ns=start_ns[stream],
                values=values.astype(np.float32),
                sources=sources,
            )
        )
    return rows


def save_references(path: Path, rows: Sequence[Reference]) -> None:
    """One npz: `index`, a JSON list of the rows, and the arrays that its `start_ns` and `values` name."""
    arrays: dict[str, NDArray[np.generic]] = {}
    index = []
    for i, row in enumerate(rows):
        entry = {key: getattr(row, key) for key in ("stream", "modality", "task", "visible", "ceiling_kind", "sources")}
        index.append(entry | {"start_ns": f"row{i}_start_ns", "values": f"row{i}_values"})
        arrays[f"row{i}_start_ns"], arrays[f"row{i}_values"] = row.start_ns, row.values
    arrays["index"] = np.array(json.dumps(index))
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _names(label: str, law: Law) -> tuple[str, ...]:
    return tuple(f"{label}{u}" for u in range(len(law.mean_hz)))


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


def _sum_steps(steps_TU: Steps, num_steps: int) -> Steps:
    whole = len(steps_TU) // num_steps * num_steps
    out_MU: Steps = steps_TU[:whole].reshape(-1, num_steps, steps_TU.shape[1]).sum(1)
    return out_MU


def _log_likelihood(law: Law, course: Course, name: str, table_UG: Floats) -> Floats:
    """(M, G) of all spikes of a block, were the named factor at each place of its grid and all else as it was."""
    recording = slice(BURN_STEPS, None)
    others_MU = _sum_steps(drive(law, course, FACTORS - {name})[recording], BLOCK_STEPS)
    echoes_MU = _sum_steps(coupled(law, course.counts_TU)[recording], BLOCK_STEPS)
    counts_MU = _sum_steps(course.counts_TU[recording], BLOCK_STEPS)
    out_MG = -others_MU @ table_UG
    for u in range(len(table_UG)):
        fired = np.flatnonzero(counts_MU[:, u])
        rate_MG = others_MU[fired, u, None] * table_UG[u] + echoes_MU[fired, u, None]
        out_MG[fired] += counts_MU[fired, u, None] * np.log(rate_MG)
    return out_MG


def _drifting(grid_G: Floats, tau_s: float) -> Floats:
    """(G, G) transition over a block of a standard normal Ornstein-Uhlenbeck process, on a grid."""
    keep = np.exp(-BLOCK_STEPS * STEP_S / tau_s)
    step_GG: Floats = np.exp(-0.5 * (grid_G - keep * grid_G[:, None]) ** 2 / (1 - keep**2))
    step_GG /= step_GG.sum(1, keepdims=True)
    return step_GG


@cache
def _turning() -> csr_array:
    """Transition over a block of (turning speed, heading), the heading running fastest."""
    speeds = np.linspace(-2.5, 2.5, 9)
    angles_A = ANGLES_A[:-1]
    spacing = angles_A[1]
    blocks = []
    for speed in speeds * TURN_SD * BLOCK_STEPS * STEP_S:
        away_AA = (angles_A - angles_A[:, None] - speed + np.pi) % (2 * np.pi) - np.pi
        step_AA = np.exp(-0.5 * (away_AA / (0.6 * spacing)) ** 2)  # as narrow as the grid can carry
        step_AA[step_AA < 1e-4] = 0.0
        blocks.append(step_AA / step_AA.sum(1, keepdims=True))
    change = _drifting(speeds, TURN_TAU_S)
    moves = [[csr_array(change[i, j] * blocks[j]) for j in range(len(speeds))] for i in range(len(speeds))]
    return csr_array(block_array(moves))


def _posterior_mean(log_likelihood_MG: Floats, transition: csr_array, readout_GK: Floats) -> Floats:
    """(M, K) mean of the readout under the smoothed posterior; hidden dimensions of the state are summed out."""
    num_grid = log_likelihood_MG.shape[1]
    num_hidden = transition.shape[0] // num_grid
    likelihood_MG = np.exp(log_likelihood_MG - log_likelihood_MG.max(1, keepdims=True))
    forward = np.full((len(likelihood_MG), num_hidden, num_grid), 1.0 / transition.shape[0])
    ahead = csr_array(transition.T)
    for m, likelihood_G in enumerate(likelihood_MG):
        predicted = forward[0] if m == 0 else (ahead @ forward[m - 1].ravel()).reshape(num_hidden, num_grid)
        forward[m] = predicted * likelihood_G
        forward[m] /= forward[m].sum()
    out_MK = np.empty((len(likelihood_MG), readout_GK.shape[1]))
    backward = np.ones((num_hidden, num_grid))
    for m in range(len(likelihood_MG) - 1, -1, -1):
        posterior_G = (forward[m] * backward).sum(0)
        out_MK[m] = posterior_G @ readout_GK / posterior_G.sum()
        backward = (transition @ (backward * likelihood_MG[m]).ravel()).reshape(num_hidden, num_grid)
        backward /= backward.max()
    return out_MK
