"""What a perfect observer of a synthetic brain can predict: the reference that a model is scored against.

In: the law of a brain and the course of a session (prep/brain.py), sample times.
Out: `Reference` rows, one per (stream, task, visible set), saved as one npz per session.

An `exact` row is the conditional mean of what is recorded, given what is visible: no predictor has a smaller expected
Poisson deviance or squared error. A `bound` row sees more than its task allows (the latent, the other modalities).
Shapes: T steps of 10 ms, M blocks of 40 ms, U units, A angles, G grid points.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import block_array, csr_array

from prep.brain import (
    ANGLES_A,
    BEHAVIOR,
    BIN_NS,
    BURN_STEPS,
    FACTORS,
    STATE_TAU_S,
    STATES_G,
    STEP_S,
    STEPS_PER_BIN,
    TURN_SD,
    TURN_TAU_S,
    Course,
    Floats,
    Imaging,
    Ints,
    Law,
    Steps,
    coupled,
    drive,
    expected_counts,
    fluorescence,
    speed_cm_s,
)
from prep.disk import appears_whole

BLOCK_STEPS = 4


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
    with appears_whole(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # as in parts.py: allow_pickle


def _names(label: str, law: Law) -> tuple[str, ...]:
    return tuple(f"{label}{u}" for u in range(len(law.mean_hz)))


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
