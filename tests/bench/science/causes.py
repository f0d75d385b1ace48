"""What drives a synthetic brain, as Markov chains: paths of one cause drawn from its posterior given the others.

In: sessions of the synthetic brain, spikes in some windows of them. Out: gains of all units along a drawn path.

The law is known (prep/brain.py): headings turn, states drift, clips of the movie follow one another in any order.
Shapes: S sessions, W windows, T steps of 10 ms, U units, V visible units, M blocks of a cause, B = S * W, G places of a
cause, N states of its chain (places and hidden speeds), K states that may come before one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array, kron

from prep import brain
from prep.brain import BURN_STEPS, STEP_S, Floats, Ints, Law, Steps
from prep.brain_draw import CLIP_FRAMES, LATENT_TAUS_S
from prep.synthetic import Session

TURNS = np.linspace(-3.0, 3.0, 13)  # turning speeds, in standard deviations
LONGEST_DELAY = 12  # steps from a frame's onset to its effect
LATENTS = tuple(f"latent{z}" for z in range(len(LATENT_TAUS_S)))
CAUSES = ("heading", "stimulus", "speed", "pupil", *LATENTS)


@dataclass(frozen=True, kw_only=True)
class Moves:
    """A Markov chain: where it begins, where it goes, and from where each state is reached; a weight of 0 pads."""

    prior_N: Steps
    ahead_NN: csr_array  # [to, from]
    before_NK: Ints
    weight_NK: Steps


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One hidden cause in some windows: its chain, the gain of units at its places, and when which block acts."""

    moves: Moves
    gain_SUG: Steps
    edges: Ints  # (S, W, M + 1, U), or ones for S, W, U: steps where blocks begin
    block: Ints  # (S, W, T, U), or ones: which block acts


def moves(prior_N: Floats, step_NN: csr_array) -> Moves:
    """From [from, to] probabilities."""
    ahead = csr_array(step_NN.T)
    ahead.sum_duplicates()
    many = np.diff(ahead.indptr)
    row = np.repeat(np.arange(len(many)), many)
    place = np.arange(len(row)) - ahead.indptr[row]
    before_NK, weight_NK = np.zeros((len(many), many.max()), np.int64), np.zeros((len(many), many.max()), np.float32)
    before_NK[row, place], weight_NK[row, place] = ahead.indices, ahead.data
    prior = (prior_N / prior_N.sum()).astype(np.float32)
    return Moves(prior_N=prior, ahead_NN=ahead.astype(np.float32), before_NK=before_NK, weight_NK=weight_NK)


def ornstein(grid_G: Floats, tau_s: float, steps: int) -> csr_array:
    """(G, G) transition of a standard normal Ornstein-Uhlenbeck process over so many steps."""
    keep = np.exp(-steps * STEP_S / tau_s)
    step_GG = np.exp(-0.5 * (grid_G - keep * grid_G[:, None]) ** 2 / (1 - keep**2))
    step_GG[step_GG < 1e-5] = 0.0
    return csr_array(step_GG / step_GG.sum(1, keepdims=True))


def drifting(tau_s: float, steps: int) -> Moves:
    """States of running, of the pupil, of a latent."""
    return moves(brain.WEIGHTS_G, ornstein(brain.STATES_G, tau_s, steps))


def turning(steps: int) -> Moves:
    """(turning speed, heading), the heading running fastest; between two angles, a heading is shared out."""
    num = len(brain.ANGLES_A) - 1
    shifts = TURNS * brain.TURN_SD * steps * STEP_S / brain.ANGLES_A[1]
    turn, angle = (index.ravel() for index in np.indices((len(TURNS), num)))
    low = np.floor(shifts).astype(np.int64)
    part = (shifts - low)[turn]
    source = turn * num + angle
    ends = [turn * num + (angle + low[turn] + more) % num for more in (0, 1)]
    pair = (np.concatenate([source, source]), np.concatenate(ends))
    shift_NN = csr_array((np.concatenate([1 - part, part]), pair), shape=(len(source), len(source)))
    change_NN = kron(ornstein(TURNS, brain.TURN_TAU_S, steps), np.eye(num), format="csr")
    return moves(np.repeat(np.exp(-0.5 * TURNS**2), num), csr_array(change_NN @ shift_NN))


def playing(num_frames: int) -> tuple[Moves, Ints]:
    """The movie in clips of any order; and (N, 3) the frame of each state and the two before, which units still see.

    A state is (clip, frame of the clip) and, for a clip's first two frames, the clip before.
    """
    clips, inner = np.arange(num_frames // CLIP_FRAMES), np.arange(2, CLIP_FRAMES)
    first = np.array([(c, at, p) for at in (0, 1) for c in clips for p in clips])
    state_N3 = np.concatenate([first, np.array([(c, at, c) for c in clips for at in inner])])
    number = {tuple(state): n for n, state in enumerate(state_N3.tolist())}
    source, goal = [], []
    for n, (clip, at, last) in enumerate(state_N3.tolist()):
        following = [(clip, at + 1, last if at == 0 else clip)]
        if at == CLIP_FRAMES - 1:
            following = [(c, 0, clip) for c in range(len(clips))]
        source += [n] * len(following)
        goal += [number[state] for state in following]
    weight = 1.0 / np.bincount(source)[source]
    step_NN = csr_array((weight, (source, goal)), shape=(len(state_N3), len(state_N3)))
    clip, at, last = state_N3.T
    frames = [np.where(at >= back, clip, last + 1) * CLIP_FRAMES + at - back for back in range(len(brain.FRAME_TAPS))]
    return moves(np.where(at < 2, 1.0 / len(clips), 1.0), step_NN), np.stack(frames, 1)


def stimulus(sessions: list[Session], steps_SWT: Ints) -> Cause:
    """The movie; when frames begin is known."""
    chain, frames_N3 = playing(sessions[0].spec.num_frames)
    tables, edges, blocks = [], [], []
    num_blocks = -(-(steps_SWT.shape[2] + LONGEST_DELAY) // brain.FRAME_STEPS) + 2
    for session, steps_WT in zip(sessions, steps_SWT, strict=True):
        law, at_T = session.law, np.arange(len(session.course.heading_T)) - BURN_STEPS + 0.5
        onset = session.shown.times_s - session.course.start_ns / 1e9
        latest_T = np.searchsorted(onset, at_T * STEP_S, side="right") - 1
        first_W = latest_T[steps_WT[:, 0] - LONGEST_DELAY]
        begin_WM = np.searchsorted(latest_T, first_W[:, None] + np.arange(num_blocks + 1)) - steps_WT[:, :1]
        edges.append(begin_WM[:, :, None] + law.delay_U)
        blocks.append(latest_T[steps_WT[:, :, None] - law.delay_U] - first_W[:, None, None])
        tables.append(sum(w * law.frame_UF[:, frames_N3[:, tap]] for tap, w in enumerate(brain.FRAME_TAPS)))
    return Cause(
        moves=chain,
        gain_SUG=np.stack(tables).astype(np.float32),
        edges=np.clip(np.stack(edges), 0, steps_SWT.shape[2]),
        block=np.stack(blocks),
    )


def latent_gain(law: Law, z: int, value_T: Floats) -> Steps:
    """(..., U) gain of one latent."""
    weight_U = law.latent_UZ[:, z]
    return np.exp(value_T[..., None] * weight_U - 0.5 * weight_U**2).astype(np.float32)


def causes(sessions: list[Session], steps_SWT: Ints, block_steps: int) -> dict[str, Cause]:
    """All that drives the units; behaviour and latents stand still for `block_steps`, frames for as long as shown."""
    found = {"stimulus": stimulus(sessions, steps_SWT)}
    num_steps = steps_SWT.shape[2]
    laws = [session.law for session in sessions]
    chains: dict[str, tuple[Moves, list[Any]]] = {}
    chains["heading"] = (turning(block_steps), [law.heading_UA[:, :-1] for law in laws])
    for name in ("speed", "pupil"):
        tables = [law.speed_UG if name == "speed" else law.pupil_UG for law in laws]
        chains[name] = (drifting(brain.STATE_TAU_S, block_steps), tables)
    for z, tau_s in enumerate(LATENT_TAUS_S):
        chains[LATENTS[z]] = (drifting(tau_s, block_steps), [latent_gain(law, z, brain.STATES_G).T for law in laws])
    for name, (chain, tables) in chains.items():
        found[name] = Cause(
            moves=chain,
            gain_SUG=np.stack(tables).astype(np.float32),
            edges=np.arange(0, num_steps + 1, block_steps)[None, None, :, None],
            block=(np.arange(num_steps) // block_steps)[None, None, :, None],
        )
    return found


def draw_path(chain: Moves, log_likelihood_BMG: Steps, rng: np.random.Generator) -> Ints:
    """(B, M) places: one path of each window from its posterior."""
    num_batch, num_blocks, num_places = log_likelihood_BMG.shape
    shape = (num_batch, -1, num_places)
    likelihood_BMG = np.exp(log_likelihood_BMG - log_likelihood_BMG.max(2, keepdims=True))
    filtered_MBN = np.empty((num_blocks, num_batch, len(chain.prior_N)), np.float32)
    for m in range(num_blocks):
        ahead_BN = (chain.ahead_NN @ filtered_MBN[m - 1].T).T if m else np.tile(chain.prior_N, (num_batch, 1))
        joint = (ahead_BN.reshape(shape) * likelihood_BMG[:, m, None]).reshape(num_batch, -1)
        filtered_MBN[m] = joint / joint.sum(1, keepdims=True)
    path_BM = np.empty((num_batch, num_blocks), np.int64)
    state_B = _pick(filtered_MBN[-1], rng)
    for m in range(num_blocks - 1, -1, -1):
        path_BM[:, m] = state_B
        if m:
            before_BK = chain.before_NK[state_B]
            weight_BK = np.take_along_axis(filtered_MBN[m - 1], before_BK, 1) * chain.weight_NK[state_B]
            state_B = np.take_along_axis(before_BK, _pick(weight_BK, rng)[:, None], 1)[:, 0]
    places_BM: Ints = path_BM % num_places
    return places_BM


def _pick(weight_BK: Steps, rng: np.random.Generator) -> Ints:
    total_BK = weight_BK.cumsum(1, dtype=np.float64)
    picked: Ints = (total_BK <= rng.uniform(size=(len(total_BK), 1)) * total_BK[:, -1:]).sum(1)
    return picked


def per_block(edges: Ints, values_SWTU: Steps) -> Steps:
    """(S, W, M, U) sums over the steps that each block acts on."""
    total = np.concatenate([np.zeros_like(values_SWTU[:, :, :1]), values_SWTU.cumsum(2)], 2)
    sums: Steps = np.diff(np.take_along_axis(total, edges, 2), axis=2)
    return sums


def redraw(cause: Cause, driven_SWTV: Steps, others_SWTV: Steps, visible: Ints, rng: np.random.Generator) -> Steps:
    """(S, W, T, U) gains along a path of a cause, given the driven spikes and what else drives the visible units."""
    num_sessions, num_windows = driven_SWTV.shape[:2]
    table_SVG = cause.gain_SUG[:, visible]
    edges = cause.edges if cause.edges.shape[3] == 1 else cause.edges[..., visible]
    spikes, exposure = (
        per_block(edges, each).reshape(num_sessions, -1, len(visible)) for each in (driven_SWTV, others_SWTV)
    )
    log_likelihood = spikes @ np.log(table_SVG) - exposure @ table_SVG
    batch = log_likelihood.reshape(num_sessions * num_windows, -1, table_SVG.shape[2])
    path_SWM = draw_path(cause.moves, batch, rng).reshape(num_sessions, num_windows, -1)
    gain_SWMU = np.stack([table_UG.T[path] for table_UG, path in zip(cause.gain_SUG, path_SWM, strict=True)])
    return np.take_along_axis(gain_SWMU, cause.block, 2)
