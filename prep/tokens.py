"""Cuts spikes and samples into tokens; pure numpy, no files.

In: spike times in ns, samples (n, S) and token bounds. Out: token values (k, S, P), fills where nothing was recorded.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from prep.settings import BIN_NS, COUNT_MAX, TOKEN_NS

BINS_PER_TOKEN = TOKEN_NS // BIN_NS
Index = npt.NDArray[np.int64]


class CountTokens:
    """Counts spikes into tokens [first_token, first_token + num_tokens) of the session clock, block by block."""

    def __init__(self, first_token: int, num_tokens: int, num_units: int) -> None:
        self.first_bin = first_token * BINS_PER_TOKEN
        self.counts = np.zeros((num_tokens, num_units, BINS_PER_TOKEN), np.uint16)

    def add(self, time_ns: Index, unit: Index) -> None:
        """Count spikes (n,) of units (n,), those of other tokens aside. A spike on an edge is in the later bin."""
        num_tokens, num_units, bins = self.counts.shape
        place = time_ns // BIN_NS - self.first_bin
        inside = (place >= 0) & (place < num_tokens * bins)
        token, bin_in_token = np.divmod(place[inside], bins)
        np.add.at(self.counts.reshape(-1), (token * num_units + unit[inside]) * bins + bin_in_token, 1)

    def values(self) -> npt.NDArray[np.uint8]:
        """Counts (k, S, P), saturated at COUNT_MAX."""
        return np.minimum(self.counts, COUNT_MAX).astype(np.uint8)


def num_saturated(time_ns: Index, unit: Index) -> int:
    """Number of spikes that do not fit their bin; spikes (n,) in order of unit and time."""
    bins = time_ns // BIN_NS
    beyond = (bins[COUNT_MAX:] == bins[:-COUNT_MAX]) & (unit[COUNT_MAX:] == unit[:-COUNT_MAX])
    return int(beyond.sum())


def cut_samples(samples: npt.NDArray[Any], bounds: Index, num_samples: int) -> npt.NDArray[np.float32]:
    """Samples (n, S) to tokens (k, S, P): token i holds rows [bounds[i], bounds[i + 1]), then NaN."""
    lengths = np.diff(bounds)
    token = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(bounds[0], bounds[-1]) - np.repeat(bounds[:-1], lengths)
    values = np.full((len(lengths), num_samples, samples.shape[1]), np.nan, np.float32)
    values[token, place] = samples[bounds[0] : bounds[-1]]
    return np.ascontiguousarray(values.transpose(0, 2, 1))


def cos_sin(angle_rad: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Angles (n, C) to (n, 2C): cos and sin of each column, side by side."""
    pairs = np.stack([np.cos(angle_rad), np.sin(angle_rad)], axis=2)
    return pairs.reshape(len(angle_rad), -1)
