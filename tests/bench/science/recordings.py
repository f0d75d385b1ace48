"""A recording as the fixed protocol sees it: spike times, heading, position, traces, and the blocks of its time.

In: an NWB file in HDF5 of the two layouts that are scored. Out: Recording, all times in s on the file's own clock.
"""

from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

SPLITS = ("train", "valid", "test")
NUM_FOLDS = 5
TRAIN_STOP, VALID_STOP, VALID_OF_FOLD = 0.7, 0.8, 0.1  # fractions of the period
MARGIN_S = 1.0  # lost on each side of a border: no window of one block comes near another's
HEADING, POSITION = "acquisition/CompassDirection/ry", "acquisition/Position"
TRACES = "processing/ophys/Fluorescence/RoiResponseSeries"

Blocks = dict[str, list[tuple[float, float]]]


def _nothing() -> np.ndarray:
    return np.zeros(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """What is scored and seen of one file; an array without elements is a stream that the file does not have."""

    name: str
    spike_times: tuple[np.ndarray, ...] = ()  # s, ascending, one array per unit
    heading_time: np.ndarray = field(default_factory=_nothing)
    heading: np.ndarray = field(default_factory=_nothing)  # rad
    position_time: np.ndarray = field(default_factory=_nothing)
    position: np.ndarray = field(default_factory=_nothing)  # (samples, 2): x, z
    trace_time: np.ndarray = field(default_factory=_nothing)
    traces: np.ndarray = field(default_factory=_nothing)  # (frames, ROIs)

    @property
    def num_units(self) -> int:
        return len(self.spike_times)

    @property
    def period(self) -> tuple[float, float]:
        """Of behaviour where there is any, else from the first to the last spike, else of the frames."""
        if self.heading_time.size:
            return float(self.heading_time[0]), float(self.heading_time[-1])
        fired = [times for times in self.spike_times if times.size]
        if fired:
            return float(min(times[0] for times in fired)), float(max(times[-1] for times in fired))
        return float(self.trace_time[0]), float(self.trace_time[-1])

    def blocks(self, fold: int | None = None) -> Blocks:
        """[start, stop) in s of the parts of each split; without a fold 70 / 10 / 20 %, in the order of time."""
        start, stop = self.period
        length = stop - start
        if fold is None:
            borders = [start, start + TRAIN_STOP * length, start + VALID_STOP * length, stop]
            parts = {split: [borders[i : i + 2]] for i, split in enumerate(SPLITS)}
        else:
            parts = _fold_parts(start, length, stop, fold)
        return {split: [_apart(part, start, stop) for part in parts[split]] for split in SPLITS}

    def counts(self, time: np.ndarray, start: float, stop: float) -> np.ndarray:
        """(times, units): spikes in [time + start, time + stop)."""
        return np.stack(
            [
                np.searchsorted(spikes, time + stop) - np.searchsorted(spikes, time + start)
                for spikes in self.spike_times
            ],
            1,
        )

    def heading_at(self, time: np.ndarray) -> np.ndarray:
        """Heading in [0, 2 pi), interpolated on the unwrapped angle."""
        return np.interp(time, self.heading_time, np.unwrap(self.heading)) % (2 * np.pi)

    def position_at(self, time: np.ndarray) -> np.ndarray:
        """(times, 2): x and z."""
        return np.stack([np.interp(time, self.position_time, column) for column in self.position.T], 1)


def _fold_parts(start: float, length: float, stop: float, fold: int) -> dict[str, list[list[float]]]:
    """Test is a fifth; valid the tenth behind it, before it for the last; train what remains, in one or two parts."""
    if fold not in range(NUM_FOLDS):
        raise ValueError(f"fold {fold}: expected one of 0..{NUM_FOLDS - 1}, or None for the main split")
    test = [start + length * fold / NUM_FOLDS, start + length * (fold + 1) / NUM_FOLDS]
    tenth = VALID_OF_FOLD * length
    valid = [test[1], test[1] + tenth] if fold < NUM_FOLDS - 1 else [test[0] - tenth, test[0]]
    rest = [[start, min(test[0], valid[0])], [max(test[1], valid[1]), stop]]
    return {"train": [part for part in rest if part[1] - part[0] > 1e-6], "valid": [valid], "test": [test]}


def _apart(part: list[float], start: float, stop: float) -> tuple[float, float]:
    """The part without the margin at each border that is inside the period."""
    return part[0] + MARGIN_S * (part[0] > start), part[1] - MARGIN_S * (part[1] < stop)


def read(path: Path) -> Recording:
    """What the file has of it."""
    with h5py.File(path, "r") as file:
        found: dict[str, np.ndarray] = {}
        if HEADING in file:
            found |= {"heading_time": file[f"{HEADING}/timestamps"][()], "heading": file[f"{HEADING}/data"][()]}
            found["position_time"] = file[f"{POSITION}/x/timestamps"][()]
            found["position"] = np.stack([file[f"{POSITION}/{axis}/data"][()] for axis in "xz"], 1)
        if TRACES in file:
            found |= {"trace_time": file[f"{TRACES}/timestamps"][()], "traces": file[f"{TRACES}/data"][()]}
        return Recording(name=path.stem, spike_times=_spike_times(file), **found)


def _spike_times(file: h5py.File) -> tuple[np.ndarray, ...]:
    if "units/spike_times" not in file:
        return ()
    stops = file["units/spike_times_index"][()].astype(np.int64)
    return tuple(np.sort(times) for times in np.split(file["units/spike_times"][()], stops)[: len(stops)])
