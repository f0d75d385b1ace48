"""Cuts spikes and samples into tokens; pure numpy, no files.

In: spike times in ns, samples (n, S) and token bounds. Out: token values (k, S, P), fills where nothing was recorded.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.settings import BIN_NS, COUNT_MAX, COUNT_MISSING, TOKEN_NS

BINS_PER_TOKEN = TOKEN_NS // BIN_NS
BLOCK_PLACES = 2**17  # counted at once
Index = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class HeldTokens:
    """A TokenReader of what is small enough to travel with the plan: events, one row each."""

    values: npt.NDArray[np.float32]  # (K, S, P)

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Values of tokens [start, stop)."""
        return self.values[start:stop]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """When each unit was observed: G lists of stretches, no two alike, and which is whose. Most sessions have one."""

    start_ns: Index  # (M,) of the stretches of all lists; those of one list are in order and do not touch
    stop_ns: Index  # (M,)
    bounds: Index  # (G + 1,) list g holds the stretches [bounds[g], bounds[g + 1])
    list_of: npt.NDArray[np.int32]  # (S,) list of each unit; -1: nothing is known, so it counts as always observed

    def place(self, time_ns: Index, unit: Index) -> Index:
        """For each spike (n,) of the units (n,), in order of unit: its stretch, [start, stop]; -1 = in none."""
        result = np.full(len(time_ns), -1, np.int64)
        for member, first, stop in self._by_list(unit):
            if member < 0:
                result[first:stop] = len(self.start_ns)
                continue
            low, high = self.bounds[member : member + 2]
            if high == low:
                continue
            place = np.searchsorted(self.start_ns[low:high], time_ns[first:stop], side="right") - 1 + low
            inside = (place >= low) & (time_ns[first:stop] <= self.stop_ns[np.maximum(place, 0)])
            result[first:stop] = np.where(inside, place, -1)
        return result

    def hide(self, counts: npt.NDArray[np.uint8], first_token: int) -> None:
        """Set to COUNT_MISSING what of the counts (k, S, P) from `first_token` on was not wholly observed."""
        num_tokens, _, bins = counts.shape
        for member in np.unique(self.list_of[self.list_of >= 0]):
            seen = self._bins(int(member), first_token * bins, num_tokens * bins).reshape(num_tokens, 1, bins)
            if seen.all():
                continue
            units = np.flatnonzero(self.list_of == member)
            chosen = slice(None) if len(units) == len(self.list_of) else units
            counts[:, chosen] = np.where(seen, counts[:, chosen], np.uint8(COUNT_MISSING))

    def share(self, first_ns: int, last_ns: int) -> float:
        """The part of [first, last] in which the units were observed, on average."""
        inside = np.clip(self.stop_ns, first_ns, last_ns) - np.clip(self.start_ns, first_ns, last_ns)
        total = np.diff(np.concatenate([[0], np.cumsum(inside)])[self.bounds])
        length = np.where(self.list_of < 0, last_ns - first_ns, total[np.maximum(self.list_of, 0)])
        return float(length.mean() / (last_ns - first_ns))

    def _bins(self, member: int, first_bin: int, num_bins: int) -> Bool:
        """Which bins (num_bins,) lie wholly inside a stretch of a list."""
        low, high = self.bounds[member : member + 2]
        first = np.clip(-(-self.start_ns[low:high] // BIN_NS) - first_bin, 0, num_bins)
        stop = np.clip(self.stop_ns[low:high] // BIN_NS - first_bin, 0, num_bins)
        edges = np.zeros(num_bins + 1, np.int64)
        holds = stop > first
        np.add.at(edges, first[holds], 1)
        np.add.at(edges, stop[holds], -1)
        seen: Bool = np.cumsum(edges[:-1]) > 0
        return seen

    def _by_list(self, unit: Index) -> Iterator[tuple[int, int, int]]:
        """Runs [first, stop) of spikes whose units share a list."""
        if len(unit) == 0:
            return
        member = self.list_of[unit]
        edges = np.concatenate([[0], np.flatnonzero(np.diff(member)) + 1, [len(unit)]])
        for first, stop in itertools.pairwise(edges.tolist()):
            yield int(member[first]), first, stop


def observed_stretches(stretches: list[Index], list_of: npt.NDArray[np.int32]) -> Observed:
    """From lists (m, 2) of [start, stop) in ns, in any order: those of a list that touch or overlap become one."""
    merged = [_merged(item) for item in stretches]
    joined = np.concatenate([np.zeros((0, 2), np.int64), *merged])
    bounds = np.cumsum([0, *(len(item) for item in merged)])
    return Observed(start_ns=joined[:, 0].copy(), stop_ns=joined[:, 1].copy(), bounds=bounds, list_of=list_of)


def _merged(stretches: Index) -> Index:
    ordered = stretches[np.argsort(stretches[:, 0], kind="stable")]
    latest = np.maximum.accumulate(ordered[:, 1])
    is_first = np.concatenate([[True], ordered[1:, 0] > latest[:-1]])[: len(ordered)]
    is_last = np.concatenate([is_first[1:], [True]])[: len(ordered)]
    return np.stack([ordered[is_first, 0], latest[is_last]], axis=1)


class CountTokens:
    """Counts spikes into tokens [first_token, first_token + num_tokens) of the session clock, block by block."""

    def __init__(self, first_token: int, num_tokens: int, num_units: int) -> None:
        self.first_bin = first_token * BINS_PER_TOKEN
        # Spikes come unit by unit: each unit's bins lie together, so that counting stays in the cache.
        self.counts = np.zeros((num_units, num_tokens * BINS_PER_TOKEN), np.uint8)

    def add(self, time_ns: Index, unit: Index) -> None:
        """Count spikes (n,) of units (n,), those of other tokens aside. A spike on an edge is in the later bin."""
        num_bins = self.counts.shape[1]
        place = time_ns // BIN_NS - self.first_bin
        inside = (place >= 0) & (place < num_bins)
        self.add_places(unit[inside] * num_bins + place[inside])

    def add_places(self, place: npt.NDArray[Any]) -> None:
        """Count spikes by their places (n,) in the flattened counts: unit * number of bins + bin."""
        for first in range(0, len(place), BLOCK_PLACES):
            self._add_block(place[first : first + BLOCK_PLACES])

    def _add_block(self, place: npt.NDArray[Any]) -> None:
        if (place[1:] < place[:-1]).any():
            place = np.sort(place)
        first = np.flatnonzero(np.concatenate([[True], place[1:] != place[:-1]])[: len(place)])
        number, place, counts = np.diff(first, append=len(place)), place[first], self.counts.reshape(-1)
        counts[place] = np.minimum(counts[place] + number, COUNT_MAX)

    def values(self, first_token: int, stop_token: int) -> npt.NDArray[np.uint8]:
        """Counts (k, S, P) of some of the tokens, saturated at COUNT_MAX."""
        bins = slice(first_token * BINS_PER_TOKEN - self.first_bin, stop_token * BINS_PER_TOKEN - self.first_bin)
        counts = self.counts[:, bins].reshape(len(self.counts), -1, BINS_PER_TOKEN)
        return np.ascontiguousarray(counts.transpose(1, 0, 2))


def num_saturated(time_ns: Index, unit: Index) -> int:
    """Number of spikes that do not fit their bin; spikes (n,) in order of unit and time."""
    bins = time_ns // BIN_NS
    beyond = (bins[COUNT_MAX:] == bins[:-COUNT_MAX]) & (unit[COUNT_MAX:] == unit[:-COUNT_MAX])
    return int(beyond.sum())


def cut_samples(samples: npt.NDArray[Any], bounds: Index, num_samples: int) -> npt.NDArray[np.float32]:
    """Samples (n, S) to tokens (k, S, P): token i holds rows [bounds[i], bounds[i + 1]), then NaN."""
    lengths = np.diff(bounds)
    if len(lengths) and (lengths == num_samples).all():  # the common case: whole tokens, one after the other
        whole = samples[bounds[0] : bounds[-1]].reshape(len(lengths), num_samples, -1)
        values = np.empty((len(lengths), whole.shape[2], num_samples), np.float32)
        for place in range(num_samples):  # a third quicker than all at once
            values[:, :, place] = whole[:, place]
        return values
    token = np.repeat(np.arange(len(lengths)), lengths)
    place_in = np.arange(bounds[0], bounds[-1]) - np.repeat(bounds[:-1], lengths)
    values = np.full((len(lengths), num_samples, samples.shape[1]), np.nan, np.float32)
    values[token, place_in] = samples[bounds[0] : bounds[-1]]
    return np.ascontiguousarray(values.transpose(0, 2, 1))


def cos_sin(angle_rad: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Angles (n, C) to (n, 2C): cos and sin of each column, side by side."""
    pairs = np.stack([np.cos(angle_rad), np.sin(angle_rad)], axis=2)
    return pairs.reshape(len(angle_rad), -1)
