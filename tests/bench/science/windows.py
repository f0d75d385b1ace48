"""What a baseline sees of each window and what it has to say, in arrays; nothing that the protocol does not admit.

In: a Recording, a task, a fold. Out: Problem: inputs and targets of train, valid and test, by lag; inputs reshaped.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from bench.science import protocol
from bench.science.recordings import SPLITS, Recording

DENSE_STEP_S = 0.06  # between forecasts to learn from; those that are scored stand 0.5 s apart
DENSE_STEP_FRAMES = 1
SEEN_S = {"hd_acausal": (-0.5, 0.5), "hd_causal": (-1.0, 0.0), "cosmooth": (-0.5, 0.5), "forecast": (-1.5, 0.0)}


Arrays = dict[str, np.ndarray]  # by split


@dataclass(frozen=True, kw_only=True)
class Problem:
    """By split (n, lags, sources) what is seen, (n, ...) what is asked; train and valid may be denser than queries."""

    task: str
    time: Arrays
    seen: Arrays
    asked: Arrays

    def inputs(self, reshape: Callable[[np.ndarray], np.ndarray]) -> Arrays:
        """(n, features, sources) by split: what is seen, reshaped, in units of train's mean and sd of each source."""
        found = {split: reshape(seen) for split, seen in self.seen.items()}
        mean, sd = found["train"].mean((0, 1)), found["train"].std((0, 1)) + 1e-6
        return {split: ((array - mean) / sd).astype(np.float32) for split, array in found.items()}


def problem(recording: Recording, task: str, fold: int | None, bin_s: float = protocol.BIN_S) -> Problem:
    """Windows of every split; `bin_s` is the width of the lags of spikes."""
    time = {split: times(recording, task, split, fold) for split in SPLITS}
    seen = {split: see(recording, task, time[split], bin_s).astype(np.float32) for split in SPLITS}
    asked = {split: ask(recording, task, time[split]).astype(np.float32) for split in SPLITS}
    return Problem(task=task, time=time, seen=seen, asked=asked)


def times(recording: Recording, task: str, split: str, fold: int | None) -> np.ndarray:
    """The queries; of a forecast in train and valid one every DENSE_STEP: there is no reason to learn from fewer."""
    if split == "test" or not task.startswith("forecast"):
        return protocol.queries(recording, task, split, fold)
    parts = recording.blocks(fold)[split]
    if task == "forecast":
        past, future = protocol.FORECAST_PAST_S, protocol.FORECAST_S
        return np.concatenate([np.arange(start + past, stop - future, DENSE_STEP_S) for start, stop in parts])
    found = []
    for part in parts:
        first, stop = np.searchsorted(recording.trace_time, part)
        found.append(np.arange(first + protocol.PAST_FRAMES - 1, stop - protocol.NUM_FRAMES, DENSE_STEP_FRAMES))
    return recording.trace_time[np.concatenate(found)]


def see(recording: Recording, task: str, time: np.ndarray, bin_s: float) -> np.ndarray:
    """(n, lags, sources), the oldest lag first: spikes per bin, or the last 45 frames."""
    if task == "forecast_ca":
        index = np.searchsorted(recording.trace_time, time)
        return recording.traces[index[:, None] + np.arange(1 - protocol.PAST_FRAMES, 1)]
    start, stop = SEEN_S[task]
    edges = start + bin_s * np.arange(round((stop - start) / bin_s) + 1)
    hidden = set(protocol.held_out(recording)) if task == "cosmooth" else set()
    units = [spikes for unit, spikes in enumerate(recording.spike_times) if unit not in hidden]
    return np.stack([np.diff(np.searchsorted(spikes, time[:, None] + edges), axis=1) for spikes in units], 2)


def ask(recording: Recording, task: str, time: np.ndarray) -> np.ndarray:
    """cos and sin; spikes of the held-out units; (25, units) spikes to come; (15, ROIs) frames to come."""
    if task.startswith("hd"):
        heading = recording.heading_at(time)
        return np.stack([np.cos(heading), np.sin(heading)], 1)
    if task == "cosmooth":
        return protocol.bin_counts(recording, time)[:, protocol.held_out(recording)]
    return protocol.future_counts(recording, time) if task == "forecast" else protocol.future_frames(recording, time)


def answer(recording: Recording, task: str, time: np.ndarray, said: np.ndarray) -> protocol.Prediction:
    """The prediction file's arrays from what a baseline says of the query times."""
    if task.startswith("hd"):
        return {"t": time, "angle": np.arctan2(said[:, 1], said[:, 0])}
    if task == "cosmooth":
        units = np.array(protocol.held_out(recording))
        return {"t": time, "rate": said, "unit": units, "bin_s": np.array(protocol.BIN_S)}
    return {"t0": time, ("rate" if task == "forecast" else "pred"): said}


# ---------------------------------------------------------------- spikes as features; (n, lags, sources) in and out


def root(seen: np.ndarray) -> np.ndarray:
    """The variance of a Poisson count's root does not depend on its mean."""
    return np.sqrt(seen)


def binned(num: int) -> Callable[[np.ndarray], np.ndarray]:
    """Roots of the sums of `num` lags each."""
    return lambda seen: np.sqrt(seen.reshape(len(seen), -1, num, seen.shape[2]).sum(2))


REACH_LAGS = np.array([1, 2, 3, 5, 7, 10, 14, 19, 25, 36, 51, 75])


def recent(seen: np.ndarray) -> np.ndarray:
    """Logs of one plus the spikes of the last 1, 2, 3, 5, … lags: a neuron's rate is near a power of another's."""
    sums = np.cumsum(seen[:, ::-1], 1)
    return np.log1p(sums[:, REACH_LAGS[seen.shape[1] >= REACH_LAGS] - 1])


def around(seen: np.ndarray) -> np.ndarray:
    """The same to both sides of the middle, and of both together."""
    middle = seen.shape[1] // 2
    past, future = np.expm1(recent(seen[:, :middle])), np.expm1(recent(seen[:, : middle - 1 : -1]))
    return np.log1p(np.concatenate([past, future, past + future], 1))
