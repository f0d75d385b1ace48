"""Behaviour and tables of time: running, pupil, position, heading; trials and epochs.

In: SpatialSeries, TimeSeries and TimeIntervals of the file. Out: streams of modality `behavior`, interval tables.
"""

from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from prep.nwb.inventory import EVENTS_LATER, Draft, Node, Survey, as_text, get, snake_case
from prep.nwb.traces import Series, read_series, trace_stream
from prep.plan import IntervalTable, PrepError
from prep.settings import NO_TIME, to_ns
from prep.store import sanitise

Array = npt.NDArray[Any]
BLOCK_SAMPLES = 1_000_000
FIRST_SAMPLES = 1_000
EVENT_IRREGULARITY = 20.0  # long steps (95 %) over short ones (5 %): 58 for random events, near 1 for a camera
TURN_USED = 0.9  # an angle is certain where its values fill the turn


def read_behavior(survey: Survey) -> list[Draft]:
    """Plan one stream per behaviour series of acquisition and processing."""
    drafts = []
    for node in list(survey.of_type("SpatialSeries", "TimeSeries")):
        if not node.path.startswith(("acquisition/", "processing/")):
            survey.skip(node.path, "only series of acquisition and processing are read")
            continue
        num_findings = len(survey.findings)
        try:
            drafts.append(_plan(survey, node))
        except PrepError as error:
            del survey.findings[num_findings:]
            survey.skip(node.path, str(error))
    return drafts


def _plan(survey: Survey, node: Node) -> Draft:
    series = read_series(survey, node)
    low, high, is_constant = scan(series)
    if node.neurodata_type == "TimeSeries" and is_event_like(series, is_constant):
        raise PrepError(EVENTS_LATER)
    if is_constant:
        raise PrepError("all its samples are the same or missing")
    angle_unit_rad = _angle_unit(survey, node, series, low, high)
    name = survey.stream_name(node)
    columns = [name] if series.num_columns == 1 else [f"{name}/{i}" for i in range(series.num_columns)]
    if angle_unit_rad is not None:
        columns = [f"{column}/{part}" for column in columns for part in ("cos", "sin")]
    draft = trace_stream(survey, series, name, "behavior", channels=tuple(columns), angle_unit_rad=angle_unit_rad)
    survey.use(node.path, name, "an angle: cos and sin" if angle_unit_rad is not None else "")
    return draft


def scan(series: Series) -> tuple[float, float, bool]:
    """Lowest and highest value in the file's own unit, and whether every column is constant or missing."""
    low, high = np.full(series.num_columns, np.inf), np.full(series.num_columns, -np.inf)
    num_samples = series.data.shape[-1] if series.transposed else series.data.shape[0]
    for begin in range(0, num_samples, BLOCK_SAMPLES):
        part = slice(begin, begin + BLOCK_SAMPLES)
        block = series.data[:, part].T if series.transposed else series.data[part]
        values = block.reshape(len(block), -1).astype(np.float64)
        finite = np.isfinite(values)
        low = np.minimum(low, np.where(finite, values, np.inf).min(axis=0))
        high = np.maximum(high, np.where(finite, values, -np.inf).max(axis=0))
    values = np.array([low.min(), high.max()]) * series.conversion + series.offset
    return float(values.min()), float(values.max()), bool((high <= low).all())


def is_event_like(series: Series, is_constant: bool) -> bool:
    """A TimeSeries that marks moments: constant, or its own time stamps, or in bursts."""
    if is_constant:
        return True
    clock = series.clock
    short, long = np.quantile(np.diff(clock.time_s), [0.05, 0.95])
    if long > EVENT_IRREGULARITY * short:
        return True
    if series.num_columns > 1 or series.rows is not None:
        return False
    values = series.data[:FIRST_SAMPLES].reshape(-1)[:FIRST_SAMPLES].astype(np.float64)
    time_s = clock.time_s[: len(values)]
    return bool(np.allclose(values * series.conversion + series.offset, time_s, rtol=0, atol=1e-6))


def _angle_unit(survey: Survey, node: Node, series: Series, low: float, high: float) -> float | None:
    """Radians per unit if the series is an angle, else None.

    Certain is: a unit of angle, and values that fill one turn, [0, 2 pi] or [-pi, pi]. The recipe decides the rest.
    """
    unit_rad = _unit_rad(series.unit)
    if survey.matches(node, survey.recipe.not_angles):
        return None
    if survey.matches(node, survey.recipe.angles):
        return unit_rad or 1.0
    if unit_rad is None:
        return None
    low_rad, high_rad = low * unit_rad, high * unit_rad
    tolerance = 1e-3
    within = any(start - tolerance <= low_rad and high_rad <= start + 2 * np.pi + tolerance for start in (0.0, -np.pi))
    if within and high_rad - low_rad >= TURN_USED * 2 * np.pi:
        return unit_rad
    message = f"unit is {series.unit}, values {low:.4g} to {high:.4g}: not taken as an angle"
    survey.note("maybe-angle", node.path, f"{message}. If it is one, list it in the recipe's `angles`")
    return None


def _unit_rad(unit: str) -> float | None:
    """Radians per unit for rad, radian(s), deg, degree(s); None for anything else, such as degrees C or rad/s."""
    word = unit.lower().rstrip("s.")
    return {"rad": 1.0, "radian": 1.0, "deg": np.pi / 180, "degree": np.pi / 180, "°": np.pi / 180}.get(word)


# ---------------------------------------------------------------- trials, epochs


def read_intervals(survey: Survey) -> dict[str, IntervalTable]:
    """Every table of intervals, by a name that is unique in the session."""
    tables: dict[str, IntervalTable] = {}
    for node in list(survey.nodes.values()):
        is_table = node.neurodata_type == "TimeIntervals" or (node.is_group and node.path.startswith("intervals/"))
        if not is_table or node.path in survey.found:
            continue
        group = survey.file[node.path]
        container = node.path.split("/")[-2] if "/" in node.path else ""
        name = snake_case(node.name)
        name = snake_case(f"{container}_{node.name}") if name in tables else name
        try:
            table = _table(survey, node, group, name)
        except PrepError as error:
            survey.skip(node.path, str(error))
            continue
        tables[name] = table
        survey.use(node.path, name)
    return tables


def _table(survey: Survey, node: Node, group: Any, name: str) -> IntervalTable:
    start, stop = get(group, "start_time"), get(group, "stop_time")
    if start is None or stop is None or start.shape != stop.shape or start.ndim != 1:
        raise PrepError("it has no start_time and stop_time for each row")
    if len(start) == 0:
        raise PrepError("it has no rows")
    columns: dict[str, Array | list[str]] = {}
    for path, child in survey.nodes.items():
        if child.parent != node.path or path in survey.found:
            continue
        column = path.rsplit("/", 1)[-1]
        if column in ("start_time", "stop_time", "id"):
            survey.use(path, name)
            continue
        values, reason = _column(group, column, len(start))
        if values is None:
            survey.skip(path, reason)
        else:
            safe = sanitise(column)
            columns[safe if safe not in columns else f"{safe}_{len(columns)}"] = values
            survey.use(path, name)
    return IntervalTable(start_ns=_times(start[()]), stop_ns=_times(stop[()]), columns=columns)


def _times(time_s: Array) -> npt.NDArray[np.int64]:
    """Nanoseconds (N,); NO_TIME where the file gives none."""
    given = np.isfinite(time_s)
    result = np.full(len(time_s), NO_TIME, np.int64)
    result[given] = to_ns(time_s[given])
    return result


def _column(group: Any, name: str, num_rows: int) -> tuple[Array | list[str] | None, str]:
    """Values of a column, float64 (N,) or N strings; or None and the reason."""
    column = group[name]
    if name.endswith("_index") or f"{name}_index" in group:
        return None, "a list in each row: not read yet"
    if not isinstance(column, h5py.Dataset) or column.shape != (num_rows,):
        return None, f"not one value for each of the {num_rows} rows"
    if column.dtype.kind in "fiub":
        names = h5py.check_enum_dtype(column.dtype)
        if names:
            words = {number: word for word, number in names.items()}
            return [words.get(int(value), str(value)) for value in column[()]], ""
        return column[()].astype(np.float64), ""
    if h5py.check_string_dtype(column.dtype) is not None:
        return [as_text(value) for value in column[()]], ""
    return None, "references to other objects are not read"
