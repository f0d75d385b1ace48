"""Two records of one train of pulses to a piecewise-linear map between their clocks; and pulses from a signal.

In: times of the pulses on each clock (float64 s, increasing), some dropped, some extra. Out: a ClockMap, and how well
it holds. Trains are aligned by the intervals between pulses, so their clocks may start anywhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prep.plan import PrepError

Seconds = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Block = tuple[Seconds, npt.NDArray[np.float64]]  # times and samples, both (n,)

MIN_PULSES = 3
MAX_DRIFT = 1e-3  # 1000 ppm; quartz is within 100
VOTE_S = 0.02  # what candidates may differ by and still agree on an offset
SLACK_S = 0.002  # how far two records of one interval may differ, beside the drift
NEAR_S = 0.05  # a pulse is looked for this near to where it is expected
NOISE_S = 0.001  # residuals within this are never outliers
MAX_SCATTER_S = 0.005  # pairs that scatter more are neighbours by chance
MAX_VOTERS = 2_000
NEIGHBOURS = 4
CONSTANT_SHARE = 0.9  # of the intervals are alike in a train without marks
RIVAL_SHARE = 0.8  # a second alignment with as many votes makes the first a guess
MATCHED_SHARE = 0.5  # of the shorter train
ALIKE_SHARE = 0.1  # of the stretches of three pulses have a like in the other train, though many pulses are lost
AROUND = 11  # pulses that a pulse's residual is compared with
END_PIECES = 10  # mean slope beyond the last pulse
MAX_KNOTS = 200  # that a finding carries for the report
HYSTERESIS = 0.1  # of the range, around mid-range: noise on an edge is no second pulse


@dataclass(frozen=True, kw_only=True)
class ClockMap:
    """Times on another clock to the session's: linear between pulses, and on at the end pieces' mean slope."""

    other_s: Seconds  # (N,) pulses on the other clock, strictly increasing
    session_s: Seconds  # (N,) the same pulses on the session's clock, strictly increasing
    num_unmatched: tuple[int, int] = (0, 0)  # pulses without a partner: of the session's clock, of the other

    def to_session(self, time_s: Seconds) -> Seconds:
        """Times (T,) of the other clock on the session's; the correction is interpolated, so far clocks stay exact."""
        knots, shift_s = self.other_s, self.session_s - self.other_s
        last = min(END_PIECES, len(knots) - 1)
        before = (shift_s[last] - shift_s[0]) / (knots[last] - knots[0])
        after = (shift_s[-1] - shift_s[-1 - last]) / (knots[-1] - knots[-1 - last])
        beyond = np.minimum(time_s - knots[0], 0) * before + np.maximum(time_s - knots[-1], 0) * after
        mapped: Seconds = time_s + (np.interp(time_s, knots, shift_s) + beyond)
        return mapped

    def outside(self, time_s: Seconds) -> tuple[int, float]:
        """Number of times outside of the pulses, and how far the farthest is, in s."""
        away = np.maximum(self.other_s[0] - time_s, time_s - self.other_s[-1])
        return int((away > 0).sum()), max(0.0, float(away.max(initial=0.0)))

    def line(self) -> tuple[float, float, Seconds]:
        """(drift_ppm, offset_s, residuals (N,) in s) of the straight line through all pulses.

        drift_ppm: how fast the other clock runs; offset_s: how far it is ahead in the middle of the pulses.
        """
        middle_s = self.session_s.mean()
        since_s, ahead_s = self.session_s - middle_s, self.other_s - self.session_s
        drift = float(since_s @ ahead_s / (since_s @ since_s))
        offset_s = float(ahead_s.mean())
        return drift * 1e6, offset_s, ahead_s - offset_s - drift * since_s

    def residuals(self) -> Seconds:
        """How far each inner pulse (N - 2,) is from where its two neighbours put it, in s."""
        before, at, after = self.other_s[:-2], self.other_s[1:-1], self.other_s[2:]
        shift_s = self.session_s - self.other_s
        expected = shift_s[:-2] + (shift_s[2:] - shift_s[:-2]) * (at - before) / (after - before)
        result: Seconds = shift_s[1:-1] - expected
        return result

    def numbers(self) -> dict[str, float | list[float]]:
        """What a finding says of the map; knot_s and knot_residual_ms are at most 200 points for a picture."""
        drift_ppm, offset_s, from_line_s = self.line()
        local_s = np.abs(self.residuals())
        knots = np.unique(np.linspace(0, len(self.session_s) - 1, MAX_KNOTS).astype(np.int64))
        return {
            "drift_ppm": drift_ppm,
            "offset_ms": offset_s * 1e3,
            "residual_ms": float(np.median(local_s)) * 1e3,
            "residual_max_ms": float(local_s.max()) * 1e3,
            "num_pulses": float(len(self.session_s)),
            "num_unmatched_reference": float(self.num_unmatched[0]),
            "num_unmatched_pulses": float(self.num_unmatched[1]),
            "knot_s": [round(float(value), 6) for value in self.session_s[knots]],
            "knot_residual_ms": [round(float(value) * 1e3, 6) for value in from_line_s[knots]],
        }


# ---------------------------------------------------------------- alignment


def match_clocks(reference_s: Seconds, other_s: Seconds) -> ClockMap:
    """Find the pulses (increasing times, s) that both trains have, and map the other clock to the reference's.

    Raises PrepError where the trains are too short, do not match, or could be matched in more than one way.
    """
    for what, train in (("reference", reference_s), ("pulses", other_s)):
        if len(train) < MIN_PULSES:
            raise PrepError(f"`{what}` has {len(train)} pulses; at least {MIN_PULSES} are needed")
    if is_constant(reference_s) and is_constant(other_s):
        pairs = _pairs_by_count(reference_s, other_s)
    else:
        pairs = _pairs_by_intervals(reference_s, other_s)
    reference, other = pairs
    keep = np.concatenate([[True], (np.diff(reference_s[reference]) > 0) & (np.diff(other_s[other]) > 0)])
    reference, other = reference[keep], other[keep]
    return ClockMap(
        other_s=other_s[other],
        session_s=reference_s[reference],
        num_unmatched=(len(reference_s) - len(reference), len(other_s) - len(other)),
    )


def is_constant(train_s: Seconds) -> bool:
    """Whether pulses (N >= 2,) come at one interval, so that they carry no marks."""
    steps = np.diff(train_s)
    median_s = float(np.median(steps))
    return bool((np.abs(steps - median_s) <= max(SLACK_S, 0.01 * median_s)).mean() >= CONSTANT_SHARE)


def _pairs_by_count(reference_s: Seconds, other_s: Seconds) -> tuple[Index, Index]:
    """Pulses at one constant interval carry no marks: the n-th is the n-th, if none is lost."""
    every_s = float(np.median(np.diff(reference_s)))
    if len(reference_s) != len(other_s):
        raise PrepError(
            f"pulses come every {every_s:.4g} s, {len(reference_s)} of `reference` and {len(other_s)} of `pulses`: "
            "which is which cannot be told. Give records of the same number of pulses, or pulses at varied intervals"
        )
    steps = np.diff(other_s) / np.diff(reference_s)
    if np.abs(steps / np.median(steps) - 1).max() > 0.5:
        raise PrepError(
            f"pulses come every {every_s:.4g} s, and one of {len(reference_s)} was lost or doubled: "
            "which is which cannot be told. Give pulses at varied intervals"
        )
    pulses = np.arange(len(reference_s), dtype=np.int64)
    return pulses, pulses


def _pairs_by_intervals(reference_s: Seconds, other_s: Seconds) -> tuple[Index, Index]:
    """Pulses (M,) of either train that belong together, in order."""
    from scipy.ndimage import median_filter  # slow to import: workers that match no pulses do without

    a, b = reference_s - reference_s[0], other_s - other_s[0]
    offset_s, drift = _vote(a, b, *_candidates(a, b))
    expected = a + offset_s + drift * a
    near_s, scatter_s = NEAR_S, 0.0
    for _ in range(4):
        first, second = _nearest(expected, b, near_s)
        if len(first) < MIN_PULSES:
            break
        residual_s = b[second] - expected[first]
        around = median_filter(residual_s, min(AROUND, len(residual_s)), mode="nearest")
        scatter_s = 1.4826 * float(np.median(np.abs(residual_s - around)))
        is_near = np.abs(residual_s - around) <= max(NOISE_S, 5 * scatter_s)
        first, second = first[is_near], second[is_near]
        expected = expected + np.interp(a, a[first], around[is_near])
        near_s = max(4 * NOISE_S, 8 * scatter_s)
    shorter = min(len(a), len(b))
    if len(first) < max(MIN_PULSES, MATCHED_SHARE * shorter) or scatter_s > MAX_SCATTER_S:
        raise PrepError(
            f"their intervals do not match: only {len(first)} of {len(a)} pulses of `reference` have a partner among "
            f"the {len(b)} of `pulses`, and these scatter by {scatter_s * 1e3:.2g} ms. "
            "Are these two records of the same pulses?"
        )
    return first, second


def _candidates(a: Seconds, b: Seconds) -> tuple[Index, Index]:
    """Pulses of both trains whose intervals to the next two pulses are alike: (n,), (n,)."""
    from scipy.spatial import cKDTree  # as above

    steps_a, steps_b = np.diff(a), np.diff(b)
    if min(len(steps_a), len(steps_b)) < 2:
        nothing = np.zeros(0, np.int64)
        return nothing, nothing
    keys_a, keys_b = (np.stack([steps[:-1], steps[1:]], axis=1) for steps in (steps_a, steps_b))
    asked = np.unique(np.linspace(0, len(keys_a) - 1, MAX_VOTERS).astype(np.int64))
    reach_s = SLACK_S + MAX_DRIFT * float(np.median(steps_a))
    count = min(NEIGHBOURS, len(keys_b))
    away, found = cKDTree(keys_b).query(keys_a[asked], k=[*range(1, count + 1)], p=np.inf, distance_upper_bound=reach_s)
    row, column = np.nonzero(np.isfinite(away))
    if len(np.unique(row)) < ALIKE_SHARE * len(asked):
        row, column = row[:0], column[:0]
    return asked[row], np.asarray(found[row, column], np.int64)


def _vote(a: Seconds, b: Seconds, first: Index, second: Index) -> tuple[float, float]:
    """The offset (s) and drift that most candidates agree on. Raises PrepError where none or two stand out."""
    if len(first) == 0:
        raise PrepError("their intervals do not match at all. Are these two records of the same pulses?")
    at, ahead = a[first], b[second] - a[first]
    span_s = max(float(a[-1]), VOTE_S)
    num_drifts = int(np.ceil(MAX_DRIFT * span_s / VOTE_S))
    best, offset_s, drift, ranked = 0, 0.0, 0.0, ahead
    for each in sorted(range(-num_drifts, num_drifts + 1), key=abs):
        sorted_s = np.sort(ahead - each * VOTE_S / span_s * at)
        votes = np.searchsorted(sorted_s, sorted_s + 2 * VOTE_S, side="right") - np.arange(len(sorted_s))
        top = int(votes.argmax())
        if votes[top] > best:
            best, ranked, drift = int(votes[top]), sorted_s, each * VOTE_S / span_s
            offset_s = float(np.median(sorted_s[top : top + best]))
    rest = ranked[np.abs(ranked - offset_s) > 5 * VOTE_S]
    rival = np.searchsorted(rest, rest + 2 * VOTE_S, side="right") - np.arange(len(rest))
    if rival.max(initial=0) > max(1, RIVAL_SHARE * best):
        raise PrepError(
            "their intervals match in more than one way, so which pulse is which cannot be told. "
            "Give pulses at varied intervals, or records of the same number of pulses"
        )
    return offset_s, drift


def _nearest(expected: Seconds, b: Seconds, near_s: float) -> tuple[Index, Index]:
    """Pairs of expected and found pulses, each the other's nearest and no farther than near_s, in order."""
    forth, back = _closest(expected, b), _closest(b, expected)
    first = np.arange(len(expected), dtype=np.int64)
    keep = (back[forth] == first) & (np.abs(b[forth] - expected) <= near_s)
    return first[keep], forth[keep]


def _closest(wanted: Seconds, among: Seconds) -> Index:
    after = np.clip(np.searchsorted(among, wanted), 1, len(among) - 1)
    is_before = wanted - among[after - 1] <= among[after] - wanted
    return np.where(is_before, after - 1, after).astype(np.int64)


# ---------------------------------------------------------------- pulses of a signal


def rising_edges(blocks: Iterable[Block], low: float, high: float, is_sampled: bool) -> Seconds:
    """Times at which a signal with the range [low, high] rises through the middle of it.

    blocks: consecutive times and samples, both (n,). is_sampled: the signal is sampled at a rate, so that the crossing
    is interpolated between two samples; otherwise each sample is a change of state, and its own time counts.
    """
    middle, margin = (low + high) / 2, HYSTERESIS * (high - low)
    is_up, before = True, (0.0, high)  # up at the start: a signal that begins high has not risen
    edges: list[Seconds] = []
    for time_s, samples in blocks:
        times = np.concatenate([[before[0]], time_s])
        values = np.concatenate([[before[1]], np.where(np.isfinite(samples), samples, low)])
        states = _schmitt(values, middle - margin, middle + margin, is_up)
        (rise,) = np.nonzero(np.diff(states.astype(np.int8)) > 0)
        at = times[rise + 1]
        if is_sampled:
            at = _crossing(times, values, rise, middle)
        edges.append(at)
        is_up, before = bool(states[-1]), (float(times[-1]), float(values[-1]))
    return np.concatenate(edges) if edges else np.zeros(0)


def _schmitt(values: Seconds, low: float, high: float, is_up: bool) -> npt.NDArray[np.bool_]:
    """Whether the signal is up at each sample: from above `high` until below `low`; the first sample is `is_up`."""
    decided = (values > high) | (values < low)
    decided[0] = True
    state = values > high
    state[0] = is_up
    last = np.maximum.accumulate(np.where(decided, np.arange(len(values)), 0))
    return np.asarray(state[last], np.bool_)


def _crossing(times: Seconds, values: Seconds, rise: Index, middle: float) -> Seconds:
    """Time at which the signal last passed the middle before it was up at rise + 1."""
    passed = np.concatenate([[False], (values[:-1] < middle) & (values[1:] >= middle)])
    last = np.maximum.accumulate(np.where(passed, np.arange(len(values)), 0))[rise + 1]
    last = np.where(last == 0, rise + 1, last)  # it passed in the block before: the edge is within a sample of here
    part = (middle - values[last - 1]) / np.where(values[last] == values[last - 1], 1, values[last] - values[last - 1])
    crossing: Seconds = times[last - 1] + np.clip(part, 0, 1) * (times[last] - times[last - 1])
    return crossing
