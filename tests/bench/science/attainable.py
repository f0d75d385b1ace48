"""Co-smoothing on the synthetic brain: how much of it can be known by one who need not learn.

In: nothing; the sessions and windows are those that the model is scored on (synthetic.py, train/evaluate.py).
Out: a table on stdout: the deviance of the hidden units that observers explain who know the law of the brain.

The true rate, the ceiling of `make bench-science`, knows behaviour, movie and latents. These observers see the visible
units' spikes and infer the rest: Gibbs sampling of the joint posterior, each cause drawn as a whole path given the
others (causes.py). A spike is first told to be driven or an echo of an earlier one, so that causes multiply. The mean
of the sampled rates tends to the conditional mean, and no prediction has a smaller expected deviance than that.
What is simpler here than there (causes stand still for 40 ms, unseen spikes echo by their mean, a pass of the movie may
repeat a clip, few sweeps) costs an observer a little. Two things are given: when frames begin, and the echoes of
visible spikes from before the window. All lines take some ten minutes of one core.
Shapes: S sessions, W windows, T steps of 10 ms, U units, H of them asked for.
"""

import argparse
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from bench.science import synthetic
from bench.science.causes import CAUSES, LATENTS, Cause, causes, latent_gain, redraw
from bench.science.linear import HIDDEN_EVERY

from prep import brain
from prep.brain import BURN_STEPS, STEP_NS, STEP_S, STEPS_PER_BIN, Floats, Ints, Steps
from prep.nwb.splits import fraction_spans
from prep.recipe import Splits
from prep.settings import TOKEN_NS, to_ns
from prep.synthetic import Session, synthesize
from train.metrics import deviance_explained, deviances

CONTEXT_STEPS = 100  # of the model: windows of 1 s
BURN_SWEEPS = 5
BEHAVIOR = ("heading", "speed", "pupil")
UNITS = np.arange(synthetic.NUM_SEEN)
ASKED = UNITS[::HIDDEN_EVERY]
VISIBLE = np.setdiff1d(UNITS, ASKED)
UNSEEN = np.setdiff1d(np.arange(100), VISIBLE)  # those asked for, and those that no electrode reached


@dataclass(frozen=True, kw_only=True)
class View:
    """The windows: what fired in them, what drove it, and what of it is asked for."""

    base_SU: Steps  # spikes per step that are no echo
    mean_SU: Steps  # all of them
    coupling_SUU: Steps
    counts_SWTU: Steps
    heard_SWTU: Steps  # echo of the visible units' spikes
    rate_SWTU: Steps  # the true one
    gains: dict[str, Steps]  # true gains (S, W, T, U)
    causes: dict[str, Cause]
    asked_SWT: Ints  # the steps of the model's window
    null_SU: Floats  # mean count per bin of the train split


def window_starts(session: Session) -> tuple[Ints, Floats]:
    """First steps (W,) of the windows that the model is scored on; and (U,) the mean count per bin in train."""
    times = np.concatenate(synthetic.without_last(session).recorded)
    spans = {name: (to_ns(a), to_ns(b)) for a, b, name in fraction_spans(times.min(), times.max(), Splits())}
    start, stop = spans["test"]
    first, width = -(-start // TOKEN_NS) * TOKEN_NS, CONTEXT_STEPS * STEP_NS
    number = np.linspace(0, (stop - first - width) // width, synthetic.NUM_WINDOWS).round().astype(np.int64)
    begin, end = ((int(ns) - session.course.start_ns) // STEP_NS + BURN_STEPS for ns in spans["train"])
    null_U = session.course.counts_TU[max(begin, BURN_STEPS) : end].mean(0, dtype=np.float64) * STEPS_PER_BIN
    return (first + number * width - session.course.start_ns) // STEP_NS + BURN_STEPS, null_U


def look(sessions: list[Session], margin_s: float, block_steps: int, coupled: bool) -> View:
    """The model's windows, and so much more on either side of them; or as if no unit heard another."""
    margin = round(margin_s / STEP_S)
    num_steps = CONTEXT_STEPS + 2 * margin
    columns: dict[str, list[Any]] = {}
    gains: dict[str, list[Steps]] = {name: [] for name in CAUSES}
    for session in sessions:
        law, course = session.law, session.course
        start_W, null_U = window_starts(session)
        first_W = np.minimum(start_W - margin, len(course.heading_T) - num_steps)
        steps_WT = first_W[:, None] + np.arange(num_steps)
        seen_TU = course.counts_TU.copy()
        seen_TU[:, UNSEEN] = 0
        coupling_UU = law.coupling_UU * coupled
        rate_TU = brain.drive(law, course, brain.FACTORS) + brain.coupled(law, course.counts_TU)
        part: dict[str, Any] = {
            "base_SU": (law.mean_hz - coupling_UU @ law.mean_hz) * STEP_S,
            "mean_SU": law.mean_hz * STEP_S,
            "coupling_SUU": coupling_UU,
            "counts_SWTU": course.counts_TU[steps_WT],
            "heard_SWTU": brain.coupled(law, seen_TU)[steps_WT] * coupled,
            "rate_SWTU": rate_TU[steps_WT],
            "asked_SWT": (start_W - first_W)[:, None] + np.arange(CONTEXT_STEPS),
            "null_SU": null_U,
            "steps": steps_WT,
        }
        for name, column in part.items():
            columns.setdefault(name, []).append(column if column.dtype.kind == "i" else column.astype(np.float32))
        for name in (*BEHAVIOR, "stimulus"):
            gains[name].append(brain.factor(law, course, name)[steps_WT])
        for z, name in enumerate(LATENTS):
            gains[name].append(latent_gain(law, z, course.latent_TZ[steps_WT, z]))
    stacked = {name: np.stack(column) for name, column in columns.items()}
    return View(
        gains={name: np.stack(each) for name, each in gains.items()},
        causes=causes(sessions, stacked.pop("steps"), block_steps),
        **stacked,
    )


def echoes(view: View, drive_SWTU: Steps, mean_SWTU: Steps) -> tuple[Steps, Steps]:
    """(S, W, T, U) echoes of seen spikes and of the mean of unseen ones; and the mean of all, made better.

    What comes later tells about an unseen spike: in first order, by how far its receivers fire above their rates.
    """
    most = max(brain.COUPLING_TAPS)
    sent = np.zeros_like(np.pad(mean_SWTU, ((0, 0), (0, 0), (most, 0), (0, 0))))
    sent[:, :, :most, UNSEEN] = view.mean_SU[:, None, None, UNSEEN]
    sent[:, :, most:, UNSEEN] = mean_SWTU[..., UNSEEN]
    surprise = np.zeros_like(sent)
    heard, num_steps = np.zeros_like(mean_SWTU), mean_SWTU.shape[2]
    for lag, weight in brain.COUPLING_TAPS.items():
        heard += np.float32(weight) * sent[:, :, most - lag : most - lag + num_steps]
    echo = view.heard_SWTU + heard @ view.coupling_SUU.transpose(0, 2, 1)[:, None]
    rate = drive_SWTU + echo
    surprise[:, :, :num_steps, VISIBLE] = view.counts_SWTU[..., VISIBLE] / rate[..., VISIBLE] - 1
    told = sum(np.float32(w) * surprise[:, :, lag : lag + num_steps] for lag, w in brain.COUPLING_TAPS.items())
    return echo, rate * np.maximum(1 + told @ view.coupling_SUU[:, None], 0.1)


def observe(view: View, known: Collection[str], num_sweeps: int, rng: np.random.Generator, from_truth: bool) -> Steps:
    """(S, W, bins, H) mean count of the units asked for, given the visible units' spikes and the true `known` causes.

    The other causes begin at their truth or at their mean: when it matters no more, the sampling has forgotten it.
    """
    gains = {name: gain if from_truth or name in known else np.ones_like(gain) for name, gain in view.gains.items()}
    seen = view.counts_SWTU[..., VISIBLE]
    fired = np.nonzero(seen)
    drive = view.base_SU[:, None, None] * np.prod(list(gains.values()), axis=0)
    echo, mean = echoes(view, drive, np.broadcast_to(view.mean_SU[:, None, None], drive.shape))
    total: Steps = np.zeros_like(mean[..., ASKED])
    num_added = 0
    hidden = [name for name in CAUSES if name not in known]
    for sweep in range(num_sweeps if hidden else 1):
        for name in hidden:
            driven = np.zeros_like(seen)
            chance = 1 / (1 + echo[..., VISIBLE][fired] / drive[..., VISIBLE][fired])
            driven[fired] = rng.binomial(seen[fired].astype(np.int64), chance)
            others = drive / gains[name]
            gains[name] = redraw(view.causes[name], driven, others[..., VISIBLE], VISIBLE, rng)
            drive = others * gains[name]
        echo, mean = echoes(view, drive, mean)
        if sweep >= BURN_SWEEPS or not hidden:
            total += mean[..., ASKED]
            num_added += 1
    return asked_bins(view, total / np.float32(num_added))


def asked_bins(view: View, steps_SWTH: Steps) -> Steps:
    """(S, W, bins, H) sums over the bins of the model's windows."""
    own = np.take_along_axis(steps_SWTH, view.asked_SWT[..., None], 2)
    bins: Steps = own.reshape(*own.shape[:2], -1, STEPS_PER_BIN, own.shape[3]).sum(3)
    return bins


def explained(view: View, predicted: Steps, session: int | None = None) -> float:
    """D2 over all samples, as the evaluation has it, or over those of a session."""
    own = slice(None) if session is None else slice(session, session + 1)
    truth, null = asked_bins(view, view.counts_SWTU[..., ASKED]), view.null_SU[:, None, None, ASKED]
    columns = (each[own].ravel() for each in np.broadcast_arrays(truth, predicted, null))
    return deviance_explained("spikes", *columns)


def spread(view: View, predicted: Steps) -> float:
    """Standard error of D2 over the draw of windows, to first order."""
    truth, null = asked_bins(view, view.counts_SWTU[..., ASKED]), view.null_SU[:, None, None, ASKED]
    truth, predicted, null = np.broadcast_arrays(truth, predicted, null)
    left, whole = (deviances("spikes", truth, each).sum((2, 3)).ravel() for each in (predicted, null))
    return float(np.sqrt(((left - left.sum() / whole.sum() * whole) ** 2).sum()) / whole.sum())


# who: what they know of the causes, what they take to be one, seconds seen on either side, do they mind couplings
OBSERVERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], float, bool]] = {
    "knows all causes": (CAUSES, (), 0.0, True),
    "knows behaviour and movie": ((*BEHAVIOR, "stimulus"), (), 0.0, True),
    "knows behaviour": (BEHAVIOR, (), 0.0, True),
    "knows the movie": (("stimulus",), (), 0.0, True),
    "knows the latents": (LATENTS, (), 0.0, True),
    "sees spikes alone": ((), (), 0.0, True),
    "sees spikes, minds no latent": ((), LATENTS, 0.0, True),
    "sees spikes, minds no movie": ((), ("stimulus",), 0.0, True),
    "sees spikes, minds heading alone": ((), CAUSES[1:], 0.0, True),
    "sees spikes, minds no coupling": ((), (), 0.0, False),
    "sees spikes, 2 s more on either side": ((), (), 2.0, True),
}


def main() -> None:
    """Print a line for every observer as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=25, help="per chain, of which there are two (default: 25)")
    parser.add_argument("--block-steps", type=int, choices=(2, 4), default=4, help="10 ms each (default: 4)")
    parser.add_argument("--only", nargs="+", choices=OBSERVERS, default=list(OBSERVERS), help="some observers")
    args = parser.parse_args()
    numbers = [number for number, kind in synthetic.TRAINED if kind == "spikes"]
    specs = [synthetic.spec(n, f"loom{n:02d}", "spikes", synthetic.LONG_S) for n in numbers]
    sessions = [synthesize(spec, synthetic.TRAIN_SEED) for spec in specs]
    print(f"{'who':<40} {'D2':<5}  {'+-':<5}  limit  blank  truth  session by session", flush=True)
    views: dict[tuple[float, bool], View] = {}
    for name in args.only:
        known, ignored, margin_s, coupled = OBSERVERS[name]
        if (margin_s, coupled) not in views:  # one at a time: they are big
            views = {(margin_s, coupled): look(sessions, margin_s, args.block_steps, coupled)}
        view = views[margin_s, coupled]
        if name == args.only[0]:
            rate = asked_bins(view, view.rate_SWTU[..., ASKED])
            print(line("true rate (the ceiling)", view, [rate, rate]), flush=True)
        view = replace(view, gains=view.gains | {each: np.ones_like(view.gains[each]) for each in ignored})
        rng = np.random.default_rng(0)
        chains = [observe(view, {*known, *ignored}, args.sweeps, rng, from_truth) for from_truth in (False, True)]
        print(line(name, view, chains), flush=True)


def line(name: str, view: View, chains: list[Steps]) -> str:
    """D2 of the mean of two chains, its standard error over windows, and where more sweeps would lead.

    What sampling costs goes with one over the number of samples: the mean of both loses half of what each loses.
    """
    mean = np.mean(chains, axis=0)
    both, each = explained(view, mean), [explained(view, chain) for chain in chains]
    numbers = [both, spread(view, mean), 2 * both - float(np.mean(each)), *each]
    sessions = [explained(view, mean, s) for s in range(len(mean))]
    return f"{name:<40} " + "  ".join(f"{x:.3f}" for x in numbers) + "  " + " ".join(f"{x:.3f}" for x in sessions)


if __name__ == "__main__":
    main()
