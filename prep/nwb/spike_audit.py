"""The audit of a table's spike times: placeholders, milliseconds, outliers, other clocks, clocks that start over.

In: SpikeTimes as recorded. Out: how they have to be read, their extent, findings.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.looks import SPIKES, look
from prep.nwb.file import get, is_dataset, open_file
from prep.nwb.inventory import UNREADABLE, Survey
from prep.nwb.spikes import Bool, Index, Seconds, SpikeTimes
from prep.plan import BrokenObject, PrepError
from prep.settings import to_ns
from prep.tokens import Observed, num_saturated

SAMPLE_SPIKES = 1_000_000  # looked at to tell where the session is
LONGEST_SESSION_S = 30 * 86_400.0
DAY_S = 86_400.0
TRIMS = (0.001, 0.01, 0.05, 0.2)  # share of spikes at either end that may be no spikes
FEW_SPIKES = 20  # of so few none is called an outlier
NEARLY_ALL = 0.9  # of the units
ENOUGH_SPIKES = 10  # of a unit, to tell whether its clock starts over


def repaired(survey: Survey, times: SpikeTimes) -> SpikeTimes:
    """How the times have to be read: placeholders, milliseconds and outliers found, and recorded as findings."""
    tally = look(SPIKES, _tallied, times)
    path = times.dataset
    is_placeholder = tally.num_minus_one > 0 and tally.lowest >= 0
    num_placeholders = tally.num_minus_one if is_placeholder else 0
    for code, count, what in (
        ("non-finite-time", tally.num_not_finite, "spike times are not numbers"),
        ("placeholder-time", num_placeholders, "spike times are -1, a placeholder"),
        ("unowned", len(survey.file[path]) - int(times.stops[-1]), "spike times belong to no unit"),
    ):
        if count:
            survey.note(code, path, f"{count} {what}; they are dropped", "repaired", num_spikes=count)
    if tally.count.sum() == num_placeholders:
        raise PrepError("the units have no spikes")
    times = replace(times, drop_minus_one=is_placeholder, in_order=tally.in_order)
    _note_map(survey, times)
    sample = np.sort(np.concatenate(tally.sample))
    sample = sample[sample != -1] if is_placeholder else sample
    if not len(sample):
        return times
    times = _in_seconds(survey, times, tally, sample)
    return _in_session(survey, times, tally, sample / times.divisor)


def _tallied(times: SpikeTimes) -> "_Tally":
    tally = _Tally(times.num_units)
    with open_file(times.path) as file:
        for time_s, unit in times.recorded(file):
            tally.add(time_s, unit, max(1, -(-int(times.stops[-1]) // SAMPLE_SPIKES)))
    return tally


def _note_map(survey: Survey, times: SpikeTimes) -> None:
    """Say that times are on another clock, and how many of them lie outside of its pulses."""
    if times.to_session is None:
        return
    moved_ms, num_outside, away_s = 0.0, 0, 0.0
    for time_s, _ in replace(times, to_session=None).blocks(survey.file):
        moved_ms = max(moved_ms, float(np.abs(times.to_session.to_session(time_s) - time_s).max(initial=0)) * 1e3)
        beyond, by_s = times.to_session.outside(time_s)
        num_outside, away_s = num_outside + beyond, max(away_s, by_s)
    message = f"its times are mapped to the session's clock, by up to {moved_ms:.4g} ms"
    survey.note("clock-mapped", times.dataset, message, "repaired", moved_ms=moved_ms)
    if num_outside:
        message = f"{num_outside:,} spikes are outside of the pulses, by up to {away_s:.4g} s"
        survey.note("extrapolated", times.dataset, message, num_outside=num_outside, extrapolated_s=away_s)


class _Tally:
    """What is counted of the times as recorded, (U,) each."""

    def __init__(self, num_units: int) -> None:
        self.num_not_finite = self.num_minus_one = 0
        self.lowest = np.inf  # but for -1
        self.count = np.zeros(num_units, np.int64)
        self.first: Seconds = np.full(num_units, np.inf)
        self.last: Seconds = np.full(num_units, -np.inf)
        self.in_order: Bool = np.ones(num_units, np.bool_)
        self.sample: list[Seconds] = []

    def add(self, time_s: Seconds, unit: Index, stride: int) -> None:
        """Add times (n,) of units (n,), in order of unit; each `stride`-th goes into the sample."""
        finite = np.isfinite(time_s)
        if not finite.all():
            self.num_not_finite += int((~finite).sum())
            time_s, unit = time_s[finite], unit[finite]
        if not len(time_s):
            return
        is_minus_one = time_s == -1
        num_minus_one = int(np.count_nonzero(is_minus_one))
        self.num_minus_one += num_minus_one
        others = time_s[~is_minus_one] if num_minus_one else time_s
        self.lowest = min(self.lowest, float(others.min(initial=np.inf)))
        is_next = np.diff(unit) != 0
        starts = np.append(0, np.flatnonzero(is_next) + 1)
        units = unit[starts]
        self.in_order[unit[1:][(np.diff(time_s) < 0) & ~is_next]] = False
        self.in_order[units] &= time_s[starts] >= self.last[units]
        self.count[units] += np.diff(np.append(starts, len(unit)))
        self.first[units] = np.minimum(self.first[units], np.minimum.reduceat(time_s, starts))
        self.last[units] = np.maximum(self.last[units], np.maximum.reduceat(time_s, starts))
        self.sample.append(time_s[::stride].copy())  # a view would keep the whole block

    @property
    def intervals_s(self) -> Seconds:
        """Mean interval between spikes, of the units that have two or more."""
        many = self.count > 1
        mean: Seconds = (self.last[many] - self.first[many]) / (self.count[many] - 1)
        return mean


def other_clocks(survey: Survey, not_in: str) -> npt.NDArray[np.float64]:
    """First and last time (C, 2) of the file's other series and tables of intervals, as recorded."""
    spans = []
    for node in survey.nodes.values():
        if not node.is_group or node.path == "/" or f"{node.path}/".startswith(f"{not_in}/"):
            continue
        try:
            span = _span(survey.file[node.path])
        except UNREADABLE:
            continue  # its own reader will say so
        if span is not None and np.isfinite(span).all() and span[1] - span[0] <= LONGEST_SESSION_S:
            spans.append(span)
    return np.array(spans, np.float64).reshape(-1, 2)


def _span(group: Any) -> tuple[float, float] | None:
    names = ("timestamps", "timestamps") if "timestamps" in group else ("start_time", "stop_time")
    first, last = get(group, names[0]), get(group, names[1])
    if is_dataset(first) and is_dataset(last) and first.ndim == last.ndim == 1 and len(first) and len(last):
        return float(first[0]), float(last[len(last) - 1])
    start, data = get(group, "starting_time"), get(group, "data")
    if is_dataset(start) and is_dataset(data) and data.ndim:
        begin = float(start[()])
        return begin, begin + max(data.shape[:2]) / float(start.attrs.get("rate", np.nan))
    return None


def _in_seconds(survey: Survey, times: SpikeTimes, tally: _Tally, sample: Seconds) -> SpikeTimes:
    """Milliseconds have two signs: next to no unit fires once a second, and other clocks of the file end early."""
    interval_s = tally.intervals_s
    slow = len(interval_s) > 0 and float((interval_s > 1).mean()) >= NEARLY_ALL
    if not slow or times.to_session is not None:
        return times
    low, high = _trimmed(sample, TRIMS[0])
    clocks = other_clocks(survey, times.dataset.rsplit("/", 1)[0])
    told = f"most units have {float(np.median(interval_s)):.4g} s between spikes, and the last is at {high:.7g} s"
    if len(clocks):
        end_s = float(np.median(clocks[:, 1]))
        if end_s > 0 and 100 < high / end_s < 10_000 and low / 1000 < end_s:
            message = f"{told}, but the file's other clocks end at {end_s:.7g} s: read as milliseconds"
            numbers = {"median_interval_s": float(np.median(interval_s)), "other_clocks_end_s": end_s}
            survey.note("spike-times-ms", times.dataset, message, "repaired", **numbers)
            return replace(times, divisor=1000.0)
    elif high - low > DAY_S and float(np.median(interval_s)) > 10:
        message = f"{told}: are they milliseconds? No other clock of the file tells; they are read as seconds"
        survey.note("maybe-milliseconds", times.dataset, message)
    return times


def _trimmed(sample: Seconds, share: float) -> tuple[float, float]:
    """First and last time of a sorted sample, but for a share at either end."""
    aside = int(np.ceil(share * len(sample))) if len(sample) >= FEW_SPIKES else 0
    return float(sample[aside]), float(sample[len(sample) - 1 - aside])


def _in_session(survey: Survey, times: SpikeTimes, tally: _Tally, sample: Seconds) -> SpikeTimes:
    """Bounds on spike times: what is further off than the session is long belongs to no session."""
    first_s, last_s = float(tally.first.min()) / times.divisor, float(tally.last.max()) / times.divisor
    spans = [_trimmed(sample, share) for share in TRIMS]
    low, high = next((span for span in spans if span[1] - span[0] <= LONGEST_SESSION_S), spans[-1])
    whole = replace(times, low_s=first_s, high_s=last_s)
    if first_s >= 2 * low - high and last_s <= 2 * high - low:
        return whole
    clocks = other_clocks(survey, times.dataset.rsplit("/", 1)[0])
    if high - low > LONGEST_SESSION_S and len(clocks):
        low, high = float(np.median(clocks[:, 0])), float(np.median(clocks[:, 1]))
    near = clocks[(clocks[:, 1] >= 2 * low - high) & (clocks[:, 0] <= 2 * high - low)]
    low, high = min([low, *near[:, 0]]), max([high, *near[:, 1]])
    length_s = high - low
    if not 0 < length_s <= LONGEST_SESSION_S:
        return whole
    bounded = replace(times, low_s=low - length_s, high_s=high + length_s)
    unbounded = (times.is_spike(time_s) & ~bounded.is_spike(time_s) for time_s, _ in times.recorded(survey.file))
    count = sum(int(outside.sum()) for outside in unbounded)
    if count == 0:
        return whole
    message = f"{count} spike times lie further outside the session ({low:.7g} s to {high:.7g} s) than it is long; "
    message += "they are dropped"
    numbers = {"num_spikes": float(count), "first_s": first_s, "last_s": last_s}
    survey.note("spikes-outside-session", times.dataset, message, "repaired", **numbers)
    return bounded


@dataclass(kw_only=True)
class Extent:
    """What the audit finds in times that are repaired."""

    first_s: float = np.inf
    last_s: float = -np.inf
    num_unsorted: int = 0  # units
    num_duplicates: int = 0
    num_saturated: int = 0
    num_unobserved: int = 0
    num_spikes: int = 0
    resets: list[bool] = field(default_factory=list)  # of each unit with enough spikes: whether its clock starts over

    def add(self, time_s: Seconds, unit: Index, num_old: int, observed: Observed | None) -> None:
        """Add times (n,) of units (n,), whole or in order; the first `num_old` were added before."""
        if len(time_s) == num_old:
            return
        step_s, is_same_unit = np.diff(time_s), np.diff(unit) == 0
        back = np.flatnonzero((step_s < 0) & is_same_unit)
        self.num_unsorted += len(np.unique(unit[back]))
        self._add_resets(time_s, unit, back, num_old)
        if len(back):
            order = np.lexsort((time_s, unit))
            time_s, unit = time_s[order], unit[order]
            step_s, is_same_unit = np.diff(time_s), np.diff(unit) == 0
        self.first_s, self.last_s = min(self.first_s, time_s.min()), max(self.last_s, time_s.max())
        self.num_spikes += len(time_s) - num_old
        is_same = (step_s == 0) & is_same_unit
        self.num_duplicates += int(is_same[max(0, num_old - 1) :].sum())
        time_ns = to_ns(time_s)
        self.num_saturated += num_saturated(time_ns, unit)  # looks back as far as old spikes are given
        if observed is not None:
            self.num_unobserved += int((observed.place(time_ns[num_old:], unit[num_old:]) < 0).sum())

    def _add_resets(self, time_s: Seconds, unit: Index, back: Index, num_old: int) -> None:
        """A clock starts over where times go back once, far, and what follows lies over what came before."""
        starts = np.flatnonzero(np.diff(unit, prepend=-1))
        stops = np.append(starts[1:], len(unit))
        asked = stops - starts >= ENOUGH_SPIKES
        asked[0] &= num_old < ENOUGH_SPIKES  # else its first part was asked
        for start, stop in zip(starts[asked], stops[asked], strict=True):
            inside = back[np.searchsorted(back, start) : np.searchsorted(back, stop)]
            if len(inside) != 1:
                self.resets.append(False)
                continue
            part, rest = time_s[start : inside[0] + 1], time_s[inside[0] + 1 : stop]
            far = part[-1] - rest[0] > 0.1 * (max(part[-1], rest[-1]) - min(part[0], rest[0]))
            self.resets.append(bool(far and rest[-1] > part[0]))


def _extent(times: SpikeTimes, observed: Observed | None) -> Extent:
    extent = Extent()
    with open_file(times.path) as file:
        for time_s, unit, num_old in times.blocks_in_order(file):
            extent.add(time_s, unit, num_old, observed)
    return extent


def audited(survey: Survey, times: SpikeTimes, observed: Observed | None) -> Extent:
    """Extent of the spikes, with the findings of the audit. Raises PrepError and BrokenObject."""
    extent, path = look(SPIKES, _extent, times, observed), times.dataset
    if extent.num_spikes == 0:
        raise PrepError("the units have no spikes")
    first_s, last_s = extent.first_s, extent.last_s
    if last_s - first_s > LONGEST_SESSION_S:
        raise PrepError(f"spike times run from {first_s:.6g} s to {last_s:.6g} s, more than 30 days: not one clock")
    if len(extent.resets) >= 3 and np.mean(extent.resets) >= NEARLY_ALL:
        raise BrokenObject(
            f"spike times of {sum(extent.resets)} of {len(extent.resets)} units start over half-way: two recordings "
            "on one clock, which nothing tells apart. Write the file again with one clock."
        )
    for code, count, message, action in (
        ("unsorted", extent.num_unsorted, "spikes of {} units are not in order of time; they are sorted", "repaired"),
        ("duplicate-spikes", extent.num_duplicates, "{} spikes are at the time of another of the same unit", "noted"),
        ("saturated", extent.num_saturated, "{} spikes beyond 254 in one 20 ms bin are not counted", "repaired"),
        (
            "spikes-outside-observed",
            extent.num_unobserved,
            "{} spikes are outside the observed time of their unit; they are not counted",
            "repaired",
        ),
    ):
        if count:
            survey.note(code, path, message.format(count), action, count=count)
    return extent
