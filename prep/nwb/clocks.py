"""Times of the file's objects, on the session's clock: series with time stamps or a rate, events, tables.

In: an object of the file, and the recipe's maps between clocks. Out: a Clock, or sorted times; findings of the audit.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.audit import (
    LONGEST_SESSION_S,
    Span,
    few,
    finding,
    in_milliseconds,
    length_finding,
    may_be_milliseconds,
    rate_finding,
)
from prep.clock import Clock, clean_times, clock_findings, rate_times, regularity
from prep.nwb.file import as_text, dataset, follow, get, is_dataset, is_group
from prep.nwb.inventory import Survey
from prep.plan import BrokenObject, Finding, PrepError
from prep.sync import Block, match_clocks, rising_edges

Seconds = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

BLOCK_SAMPLES = 4_000_000
FIRST_SPIKES = 100_000
MS_UNITS = ("ms", "msec", "millisecond", "milliseconds")


def read_clock(survey: Survey, path: str, num_samples: int) -> tuple[Clock, Index | None]:
    """Clock of a series of num_samples samples, and the row of each sample (None: row i is sample i).

    The clock may have fewer samples: those without a good time stamp are left out. Raises PrepError; BrokenObject where
    data and time stamps differ in length by more than a few.
    """
    group = survey.file[path]
    stated_hz, told_by = _stated_rate(survey, group)
    if get(group, "timestamps") is not None:
        time_s, rows = _stamps(survey, path, group["timestamps"], num_samples, stated_hz)
        rate_hz = None
    else:
        start_s, rate_hz = _start_and_rate(group)
        time_s, rows = rate_times(start_s, rate_hz, num_samples), None
    if len(time_s) < 2:
        raise PrepError("only one of its time stamps is a time")
    mapped = map_times(survey, path, time_s)
    clock = regularity(mapped, rate_hz if mapped is time_s else None)
    survey.findings.extend(clock_findings(clock, path))
    survey.findings.extend(rate_finding(path, 1 / clock.period_s, stated_hz, told_by))
    return clock, rows


def _stamps(
    survey: Survey, path: str, stamps: Any, num_samples: int, stated_hz: float | None
) -> tuple[Seconds, Index | None]:
    """Increasing time stamps in s, and their rows."""
    num_stamps = len(stamps)
    if not few(num_samples, num_stamps):
        missing = f"it has {num_samples} samples but {num_stamps} time stamps"
        raise BrokenObject(f"{missing}, so which belongs to which cannot be told. Write the file again.")
    time_s, rows, findings = clean_times(stamps[: min(num_samples, num_stamps)], path)
    if num_samples != num_stamps:
        findings.insert(0, length_finding(path, num_samples, num_stamps))
    survey.findings.extend(findings)
    return _in_seconds(survey, path, time_s, stamps, stated_hz), rows


def _start_and_rate(group: Any) -> tuple[float, float]:
    start = dataset(group, "starting_time")
    rate_hz = float(start.attrs.get("rate", np.nan))
    if not (np.isfinite(rate_hz) and rate_hz > 0 and np.isfinite(start[()])):
        raise PrepError(f"its clock is start {start[()]} s at rate {rate_hz} Hz")
    return float(start[()]), rate_hz


def read_event_times(survey: Survey, path: str, stamps: Any) -> tuple[Seconds, Index]:
    """Times (N,) of events in order, and the row (N,) of the file of each; stamps that are not numbers are dropped.

    Two events may have the same time. Raises PrepError where none of the stamps is a number.
    """
    time_s = np.asarray(stamps, dtype=np.float64)
    rows = np.flatnonzero(np.isfinite(time_s)).astype(np.int64)
    if len(rows) == 0:
        found = "its only time stamp is" if len(time_s) == 1 else f"all of its {len(time_s)} time stamps are"
        raise PrepError("it has no events" if len(time_s) == 0 else f"{found} not a number")
    if len(rows) < len(time_s):
        dropped = len(time_s) - len(rows)
        message = f"{dropped} of {len(time_s)} time stamps are not numbers; those events are dropped"
        survey.findings.append(finding("non-finite-time", path, message, num_dropped=float(dropped)))
    rows = _without_far(survey, path, time_s, rows)
    if (np.diff(time_s[rows]) < 0).any():
        survey.findings.append(finding("unsorted", path, "events are not in order of time; they are sorted"))
        rows = rows[np.argsort(time_s[rows], kind="stable")]
    in_s = _in_seconds(survey, path, time_s[rows], stamps, None)
    return map_times(survey, path, in_s), rows


def _without_far(survey: Survey, path: str, time_s: Seconds, rows: Index) -> Index:
    """Rows of events within 30 days of the middle one."""
    middle_s = float(np.partition(time_s[rows], len(rows) // 2)[len(rows) // 2])
    is_near = np.abs(time_s[rows] - middle_s) <= LONGEST_SESSION_S
    num_far = int((~is_near).sum())
    if num_far:
        worst_s = float(time_s[rows][~is_near][0])
        message = f"{num_far} of {len(rows)} events are far from the others (such as {worst_s:.6g} s); they are dropped"
        survey.findings.append(finding("outlier-time", path, message, num_dropped=float(num_far), worst_s=worst_s))
    return rows[is_near]


# ---------------------------------------------------------------- rates that the file states, milliseconds


def _stated_rate(survey: Survey, group: Any) -> tuple[float | None, str]:
    """A rate that the file states beside the series' own clock, and where."""
    start = get(group, "starting_time")
    if get(group, "timestamps") is not None and start is not None and "rate" in start.attrs:
        return float(start.attrs["rate"]), "it states a rate of"
    plane = get(group, "imaging_plane")
    rois = get(group, "rois")
    if plane is None and rois is not None and "table" in rois.attrs:
        table = follow(survey.file, rois.attrs["table"])
        plane = get(table, "imaging_plane") if is_group(table) else None
    rate: Any = get(plane, "imaging_rate") if is_group(plane) else None
    if not is_dataset(rate) or rate.shape != () or rate.dtype.kind not in "fiu":
        return None, ""
    rate_hz = float(rate[()])
    return (rate_hz, "its imaging plane states") if np.isfinite(rate_hz) and rate_hz > 0 else (None, "")


def _in_seconds(survey: Survey, path: str, time_s: Seconds, stamps: Any, stated_hz: float | None) -> Seconds:
    """Times in s, divided by 1000 where they are evidently ms."""
    unit = as_text(stamps.attrs.get("unit", "")) if hasattr(stamps, "attrs") else ""
    others = list(_spans(survey, path)) if may_be_milliseconds(time_s) else []
    why = in_milliseconds(time_s, unit.strip().lower() in MS_UNITS, stated_hz, others)
    if not why:
        return time_s
    message = f"its times are milliseconds ({why}); they are divided by 1000"
    survey.findings.append(finding("milliseconds", path, message, length_s=float(time_s[-1] - time_s[0]) / 1000))
    in_s: Seconds = time_s / 1000
    return in_s


def _spans(survey: Survey, path: str) -> Iterator[Span]:
    """First and last time of the spikes and of interval tables; where there are none, of all other series."""
    tables = [span for node in survey.nodes.values() for span in _table_span(survey, node.path) if node.path != path]
    tables = [span for span in tables if span[1] > span[0]]
    if tables:
        yield from tables
        return
    for node in survey.nodes.values():
        stamps: Any = get(survey.file, f"{node.path}/timestamps") if node.is_group and node.path != "/" else None
        if node.path != path and is_dataset(stamps) and stamps.ndim == 1 and len(stamps) > 1:
            first, last = float(stamps[0]), float(stamps[-1])
            if last > first:
                yield first, last


def _table_span(survey: Survey, path: str) -> Iterator[Span]:
    """First and last time of a table of units or intervals."""
    names = {"Units": ("spike_times",), "TimeIntervals": ("start_time", "stop_time")}
    columns: list[Any] = [get(survey.file[path], name) for name in names.get(survey.nodes[path].neurodata_type, ())]
    if columns and all(is_dataset(column) and column.ndim == 1 and len(column) for column in columns):
        times = np.concatenate([column[:FIRST_SPIKES] for column in columns]).astype(np.float64)
        if np.isfinite(times).any():
            yield float(np.nanmin(times)), float(np.nanmax(times))


# ---------------------------------------------------------------- sync


def map_times(survey: Survey, path: str, time_s: Seconds) -> Seconds:
    """Times on the session's clock: mapped where the recipe's `sync` names the object or what holds it."""
    found = next((item for name, item in survey.clock_maps.items() if _names(name, path)), None)
    if found is None or len(time_s) == 0:
        return time_s
    mapped: Seconds = found.to_session(time_s)
    moved_ms = float(np.abs(mapped - time_s).max()) * 1e3
    message = f"its times are mapped to the session's clock, by up to {moved_ms:.4g} ms"
    _add_once(survey, finding("clock-mapped", path, message, moved_ms=moved_ms))
    num_outside, away_s = found.outside(time_s)
    if num_outside:
        message = f"{num_outside:,} of {len(time_s):,} times are outside of the pulses, by up to {away_s:.4g} s"
        numbers = {"num_outside": float(num_outside), "extrapolated_s": away_s}
        _add_once(survey, finding("extrapolated", path, message, **numbers))
    return mapped


def _add_once(survey: Survey, row: Finding) -> None:
    """The columns of a table are mapped one by one, and told of once."""
    if not any((known.code, known.path) == (row.code, row.path) for known in survey.findings):
        survey.findings.append(row)


def _names(pattern: str, path: str) -> bool:
    """Whether a pattern names the object or what holds it, by path or by own name."""
    parts = path.strip("/").split("/")
    above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(text, pattern.strip("/")) for text in (*above, *parts))


def read_sync(survey: Survey) -> None:
    """Fill survey.clock_maps from the recipe's `sync`: both records of the pulses are read and aligned.

    Raises PrepError where the pulses are not in the file or cannot be aligned: times on a wrong clock help nobody.
    """
    for sync in survey.recipe.sync:
        where = f"`sync` of {sync.pulses} to {sync.reference}"
        try:
            found = match_clocks(read_pulses(survey, sync.reference), read_pulses(survey, sync.pulses))
        except PrepError as error:
            if sync.streams:
                raise PrepError(f"{where}: {error}.") from error
            survey.note("recipe-unmatched", sync.pulses.strip("/"), f"{where}: {error}")
            continue
        drift_ppm, offset_s, _ = found.line()
        numbers = found.numbers()
        message = (
            f"{len(found.other_s)} pulses of {sync.reference}: this clock runs {drift_ppm:+.3g} ppm and is "
            f"{offset_s * 1e3:+.4g} ms ahead; residual {numbers['residual_ms']:.3g} ms"
        )
        survey.findings.append(finding("clock-residuals", sync.pulses.strip("/"), message, **numbers))
        for pattern in sync.streams:
            survey.clock_maps[pattern] = found
            if not any(_names(pattern, path) for path in survey.nodes if path != "/"):
                message = "`sync` of the recipe names it, but the file has no such object"
                survey.note("recipe-unmatched", pattern, message)
        if sync.streams:
            survey.clock_maps.setdefault(sync.pulses, found)


def read_pulses(survey: Survey, path: str) -> Seconds:
    """Increasing times (N,) of pulses: a column of times, a series' time stamps, or rising edges of its signal.

    A series that never changes marks pulses by its time stamps; any other is a signal. Raises PrepError.
    """
    item = get(survey.file, path.strip("/"))
    if item is None:
        raise PrepError(f"the file has no {path}. Name a series or a column of times")
    if is_dataset(item):
        return _sorted_times(item[()], path)
    stamps = get(item, "timestamps")
    data = get(item, "data")
    if not is_dataset(data) or data.ndim != 1 or data.dtype.kind not in "fiub" or len(data) < 2:
        if is_dataset(stamps):
            return _sorted_times(stamps[()], path)
        raise PrepError(f"{path} has neither time stamps nor a signal of one channel")
    low, high = _range(data)
    if not low < high:
        if not is_dataset(stamps):
            raise PrepError(f"{path} never changes, so it has no pulses")
        return _sorted_times(stamps[()], path)
    return rising_edges(_blocks(item, data), low, high, is_sampled=stamps is None)


def _sorted_times(stamps: Any, path: str) -> Seconds:
    if getattr(stamps, "ndim", 0) != 1 or stamps.dtype.kind not in "fiu":
        raise PrepError(f"{path} is not a column of times")
    time_s = stamps.astype(np.float64)
    return np.unique(time_s[np.isfinite(time_s)])


def _range(data: Any) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for begin in range(0, len(data), BLOCK_SAMPLES):
        block = data[begin : begin + BLOCK_SAMPLES].astype(np.float64)
        finite = block[np.isfinite(block)]
        low, high = min(low, finite.min(initial=np.inf)), max(high, finite.max(initial=-np.inf))
    return float(low), float(high)


def _blocks(group: Any, data: Any) -> Iterator[Block]:
    """Times and samples of a signal, block by block."""
    stamps = get(group, "timestamps")
    num_samples = len(data) if stamps is None else min(len(data), len(stamps))
    start_s, rate_hz = _start_and_rate(group) if stamps is None else (0.0, 1.0)
    for begin in range(0, num_samples, BLOCK_SAMPLES):
        end = min(num_samples, begin + BLOCK_SAMPLES)
        time_s = start_s + np.arange(begin, end) / rate_hz if stamps is None else stamps[begin:end].astype(np.float64)
        yield time_s, data[begin:end].astype(np.float64)
