"""Helpers of the tests of spikes: counts of a planned session, and the same made from spike times one by one.

In: plans and spike times. Out: counts by bin, messages of findings.
"""

from fractions import Fraction

import numpy as np
from nwb_builders import stream, values

from prep.plan import SessionPlan

BIN_NS = 20_000_000


def message(session: SessionPlan, code: str) -> str:
    (found,) = [finding.message for finding in session.findings if finding.code == code]
    return found


def bins(session: SessionPlan, name: str = "spikes") -> tuple[np.ndarray, int]:
    """Counts (U, bins), and the number of the first bin."""
    item = stream(session, name)
    counts = values(item)
    return counts.transpose(1, 0, 2).reshape(counts.shape[1], -1), int(item.start_ns[0]) // BIN_NS


def counted(spikes: list[np.ndarray], num_bins: int, first_bin: int) -> np.ndarray:
    """Counts (U, bins) by exact arithmetic, one spike after the other."""
    counts = np.zeros((len(spikes), num_bins), np.int64)
    for unit, times_s in enumerate(spikes):
        for time_s in times_s:
            counts[unit, round(Fraction(float(time_s)) * 10**9) // BIN_NS - first_bin] += 1
    return counts
