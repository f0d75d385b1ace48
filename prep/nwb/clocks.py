"""Times of the file's objects, on the session's clock: series with time stamps or a rate, events, tables.

In: an object of the file, and the recipe's maps between clocks. Out: a Clock, or sorted times; findings of the audit.
"""

import contextlib
from collections.abc import Iterator
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
from prep.nwb.chunks import read_rows
from prep.nwb.file import as_text, dataset, follow, get, is_dataset, is_group
from prep.nwb.inventory import UNREADABLE, Node, Survey, is_named
from prep.plan import BrokenObject, Finding, PrepError
from prep.sync import Block, match_clocks, rising_edges

Seconds = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

BLOCK_SAMPLES = 4_000_000
FIRST_SPIKES = 100_000
COARSE = 0.05  # of a step: what the type of the time stamps may round away
MS_UNITS = ("ms", "msec", "millisecond", "milliseconds")


def read_clock(
    survey: Survey, path: str, num_samples: int, stamps_name: str = "timestamps"
) -> tuple[Clock, Index | None]:
    """Clock of a series of num_samples samples, and the row of each sample (None: row i is sample i).

    stamps_name: what its time stamps are called, where it has them. The clock may have fewer samples: those without a
    good time stamp are left out. Raises PrepError; BrokenObject where data and time stamps differ in length by more
    than a few.
    """
    group = survey.file[path]
    stated_hz, told_by = _stated_rate(survey, group)
    stamps = stamps_of(group, stamps_name)
    if stamps is not None:
        time_s, rows = _stamps(survey, path, stamps, num_samples, stated_hz)
        rate_hz = None
    else:
        start_s, rate_hz = start_and_rate(group)
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
    step_s = float(np.median(np.diff(time_s))) if len(time_s) > 1 else np.inf
    coarse_s = float(np.spacing(np.float32(np.abs(time_s).max()))) if stamps.dtype == np.float32 else 0.0
    if coarse_s > COARSE * step_s:
        message = f"its time stamps are float32, which at {time_s[-1]:.6g} s are {coarse_s * 1e3:.3g} ms apart"
        survey.findings.append(finding("coarse-time", path, message, resolution_s=coarse_s))
    return _in_seconds(survey, path, time_s, stamps, stated_hz), rows


def stamps_of(group: Any, name: str = "timestamps") -> Any:
    """The time stamps (n,) of a series, None where it has a rate; MATLAB's rows and columns are read as lists.

    Raises PrepError where they are no numbers.
    """
    stamps: Any = get(group, name)
    if stamps is None:
        if any(member == name for member in group):
            raise PrepError(f"its `{name}` is a link that leads nowhere. Get the file or the object that it names")
        return None
    if not is_dataset(stamps) or stamps.ndim not in (1, 2) or stamps.dtype.kind not in "fiu":
        found = f"{stamps.dtype} {stamps.shape}" if is_dataset(stamps) else "a group"
        raise PrepError(f"its `{name}` is {found}, expected seconds as numbers, one for each sample")
    if stamps.ndim == 2 and 1 not in stamps.shape:
        raise PrepError(f"its `{name}` is {stamps.dtype} {stamps.shape}, expected one number for each sample")
    return stamps if stamps.ndim == 1 else stamps[()].reshape(-1)


def start_and_rate(group: Any) -> tuple[float, float]:
    """Time of the first sample in s, and samples a second, of a series without time stamps. Raises PrepError."""
    if get(group, "starting_time") is None:
        raise PrepError("it has neither `timestamps` nor `starting_time`, so when its samples were cannot be told")
    start = dataset(group, "starting_time")
    start_s, rate_hz = one_number(start[()]), one_number(start.attrs.get("rate", np.nan))
    if not (np.isfinite(rate_hz) and rate_hz > 0 and np.isfinite(start_s)):
        raise PrepError(
            f"it starts at {start_s:g} s with a rate of {rate_hz:g} Hz; expected a time, and more than 0 Hz"
        )
    return start_s, rate_hz


def one_number(value: Any) -> float:
    """A number, whether it is written as such, as a list of one, or as text; NaN for anything else."""
    array = np.ravel(np.asarray(value))
    try:
        return float(as_text(array[0])) if len(array) == 1 else np.nan
    except ValueError:  # a text that is no number
        return np.nan


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
    others = other_spans(survey, path) if may_be_milliseconds(time_s) else []
    why = in_milliseconds(time_s, unit.strip().lower() in MS_UNITS, stated_hz, others)
    if not why:
        return time_s
    message = f"its times are milliseconds ({why}); they are divided by 1000"
    _add_once(survey, finding("milliseconds", path, message, length_s=float(time_s[-1] - time_s[0]) / 1000))
    in_s: Seconds = time_s / 1000
    return in_s


def table_in_seconds(survey: Survey, path: str, start_s: Seconds, starts: Any) -> float:
    """What the times of a table (N,), NaN = not given, are divided by to be seconds: 1, or 1000 of milliseconds."""
    given = np.sort(start_s[np.isfinite(start_s)])
    return 1.0 if np.array_equal(_in_seconds(survey, path, given, starts, None), given) else 1000.0


def other_spans(survey: Survey, path: str) -> list[Span]:
    """First and last time of what is in seconds for certain: spikes (audited on their own) and series with a rate.

    Where there is none, of interval tables and of series with time stamps.
    """
    if survey.spans is None:
        survey.spans = []
        for node in survey.nodes.values():
            with contextlib.suppress(*UNREADABLE):  # its own reader says what is wrong with it
                survey.spans += [(node.path, *span) for span in _clock_span(survey, node)]
    others = [(is_certain, span) for own, is_certain, span in survey.spans if own != path and span[1] > span[0]]
    certain = [span for is_certain, span in others if is_certain]
    return certain or [span for _, span in others]


def _clock_span(survey: Survey, node: Node) -> Iterator[tuple[bool, Span]]:
    """First and last time of a series or a table, and whether it is in seconds for certain."""
    if not node.is_group or node.path == "/":
        return
    group = survey.file[node.path]
    names = {"Units": ("spike_times",), "TimeIntervals": ("start_time", "stop_time")}
    columns: list[Any] = [get(group, name) for name in names.get(node.neurodata_type, ("timestamps",))]
    if all(is_dataset(column) and column.ndim == 1 and column.dtype.kind in "fiu" for column in columns):
        if len(columns) == 1 and node.neurodata_type != "Units":
            parts = [columns[0][:1], columns[0][max(0, len(columns[0]) - 1) :]]
        else:
            parts = [read_rows(column, 0, FIRST_SPIKES) for column in columns]
        times = np.concatenate(parts).astype(np.float64)
        if np.isfinite(times).any():
            yield node.neurodata_type == "Units", (float(np.nanmin(times)), float(np.nanmax(times)))
    data: Any = get(group, "data")
    if "starting_time" in group and is_dataset(data) and data.ndim and columns[0] is None:
        start_s, rate_hz = start_and_rate(group)
        yield True, (start_s, start_s + max(data.shape[:2]) / rate_hz)


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
    return any(is_named(text, pattern.strip("/")) for text in (*above, *parts))


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
    stamps = stamps_of(item)
    data = get(item, "data")
    if not is_dataset(data) or data.ndim != 1 or data.dtype.kind not in "fiub" or len(data) < 2:
        if stamps is not None:
            return _sorted_times(stamps[()], path)
        raise PrepError(f"{path} has neither time stamps nor a signal of one channel")
    low, high = _range(data)
    if not low < high:
        if stamps is None:
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
    stamps = stamps_of(group)
    num_samples = len(data) if stamps is None else min(len(data), len(stamps))
    start_s, rate_hz = start_and_rate(group) if stamps is None else (0.0, 1.0)
    for begin in range(0, num_samples, BLOCK_SAMPLES):
        end = min(num_samples, begin + BLOCK_SAMPLES)
        time_s = start_s + np.arange(begin, end) / rate_hz if stamps is None else stamps[begin:end].astype(np.float64)
        yield time_s, data[begin:end].astype(np.float64)
