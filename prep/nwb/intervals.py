"""Tables of time: trials, epochs, presentations, invalid times, with their typed columns.

In: TimeIntervals and other tables of the file with a start in each row. Out: interval tables, by unique name.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.nwb.clocks import map_times, table_in_seconds
from prep.nwb.file import as_text, enum_words, follow, get, is_dataset, is_text, neurodata_type, ragged_stops
from prep.nwb.inventory import Node, Survey, snake_case
from prep.plan import BrokenObject, IntervalTable, PrepError
from prep.settings import FARTHEST_S, NO_TIME, to_ns
from prep.store import sanitise

Array = npt.NDArray[Any]
OWN_COLUMNS = ("start_time", "stop_time", "id")


def interval_tables(survey: Survey) -> dict[str, Node]:
    """Tables with a start in each row, by a name that is unique in the session; without those left out before.

    A table is one by its type (TimeIntervals), by its place (intervals/), or by its columns start_time and stop_time.
    """
    tables: dict[str, Node] = {}
    for node in survey.nodes.values():
        if not _is_table(survey, node) or survey.found.get(node.path, ("", ""))[0] is None:
            continue
        container = node.path.split("/")[-2] if "/" in node.path else ""
        long_name = snake_case(f"{container}_{node.name}")
        digest = hashlib.sha256(node.path.encode()).hexdigest()[:6]
        choices = (snake_case(node.name), long_name, f"{long_name}_{digest}")
        tables[next(name for name in choices if name not in tables)] = node
    return tables


def _is_table(survey: Survey, node: Node) -> bool:
    if not node.is_group or node.path.startswith(("general/", "specifications/")):
        return False
    if node.neurodata_type == "TimeIntervals" or node.path.startswith("intervals/"):
        return node.path.count("/") < 2 or not node.path.startswith("intervals/")
    group = survey.file[node.path]
    columns = [get(group, name) for name in ("start_time", "stop_time")]
    return all(is_dataset(column) and neurodata_type(column) == "VectorData" for column in columns)


def read_intervals(survey: Survey) -> dict[str, IntervalTable]:
    """Every table of intervals, by a name that is unique in the session; a broken column is refused alone."""
    tables: dict[str, IntervalTable] = {}
    for name, node in interval_tables(survey).items():
        with survey.reading(node):
            used_before, reason = survey.found.get(node.path, (None, ""))
            tables[name] = _table(survey, node, name)
            survey.use(node.path, f"{used_before}, {name}" if used_before else name, reason)
    return tables


def table_times(group: Any) -> tuple[Array, Array]:
    """Start and stop (N,) of each row in seconds, NaN = not given. Raises PrepError."""
    start, stop = get(group, "start_time"), get(group, "stop_time")
    if not is_dataset(start) or start.ndim != 1 or (stop is not None and stop.shape != start.shape):
        raise PrepError("it has no start_time and stop_time for each row")
    if len(start) == 0:
        raise PrepError("it has no rows")
    for name, column in (("start_time", start), ("stop_time", stop)):
        if column is not None and column.dtype.kind not in "fiu":
            raise BrokenObject(f"its {name} is {column.dtype}, expected seconds as numbers. Write it again.")
    start_s = np.asarray(start[()], np.float64)
    return start_s, np.full_like(start_s, np.nan) if stop is None else np.asarray(stop[()], np.float64)


def columns_of(survey: Survey, node: Node) -> Iterator[Node]:
    """The table's columns, and the indexes of its ragged columns."""
    return (child for child in survey.nodes.values() if child.parent == node.path and not child.is_group)


def _table(survey: Survey, node: Node, name: str) -> IntervalTable:
    group = survey.file[node.path]
    start_s, stop_s = table_times(group)
    divisor = table_in_seconds(survey, node.path, start_s, group["start_time"])
    columns: dict[str, Array | list[str]] = {}
    for child in columns_of(survey, node):
        used_before, reason = survey.found.get(child.path, ("", ""))
        if used_before is None:
            continue  # excluded
        used_as = f"{used_before}, {name}" if used_before else name
        if child.name in OWN_COLUMNS:
            survey.use(child.path, used_as, reason)
            continue
        with survey.reading(child):
            values = _column(survey, child, group, len(start_s))
            if isinstance(values, np.ndarray) and child.path in survey.also:
                values = values / divisor  # times, like the rows' own
            if values is not None:
                safe = sanitise(child.name)
                columns[safe if safe not in columns else f"{safe}_{len(columns)}"] = values
            survey.use(child.path, used_as, reason)
    return IntervalTable(
        start_ns=_nanoseconds(survey, node, start_s / divisor),
        stop_ns=_nanoseconds(survey, node, stop_s / divisor),
        columns=columns,
    )


def _nanoseconds(survey: Survey, node: Node, time_s: Array) -> npt.NDArray[np.int64]:
    """Nanoseconds (N,) on the session's clock; NO_TIME where the file gives none."""
    given = np.abs(time_s) < FARTHEST_S  # False for NaN
    result = np.full(len(time_s), NO_TIME, np.int64)
    result[given] = to_ns(map_times(survey, node.path, time_s[given]))
    return result


def _column(survey: Survey, node: Node, group: Any, num_rows: int) -> Array | list[str] | None:
    """Values of a column, float64 (N,) or N strings; None if it serves another. Raises PrepError to leave it out."""
    column = group[node.name]
    index = get(group, f"{node.name}_index")
    if index is not None:
        return _lists(survey, node, column, index, num_rows)
    for ending in ("_index", "_elements"):
        if node.name.endswith(ending) and get(group, node.name.removesuffix(ending)) is not None:
            _serves(survey, node, ending)
            return None
    if not is_dataset(column) or column.shape != (num_rows,):
        raise PrepError(f"not one value for each of the {num_rows} rows")
    if is_text(column):
        return [as_text(value) for value in column[()]]
    if column.dtype.kind not in "fiub":
        raise PrepError("references to other objects are not read")
    elements = follow(survey.file, column.attrs.get("elements"))  # of EnumData: the words that its numbers stand for
    words = enum_words(column) if elements is None else dict(enumerate(as_text(word) for word in elements[()]))
    if words:
        return [words.get(int(value), str(value)) for value in column[()]]
    values: Array = column[()].astype(np.float64)
    return values


def _serves(survey: Survey, node: Node, ending: str) -> None:
    """An index is read if its column is; the words of an EnumData column always are."""
    parent, _, name = node.path.removesuffix(ending).rpartition("/")
    if ending == "_index" and survey.found.get(f"{parent}/{name}", ("", ""))[0] is None:
        told = "" if node.path in survey.also else "the index of a column that is not read"
        raise PrepError(told)


def _lists(survey: Survey, node: Node, column: Any, index: Any, num_rows: int) -> list[str]:
    """A list in each row: texts (tags) are joined; times are events of their own; other numbers are left out."""
    is_words = is_dataset(column) and is_text(column) and column.ndim == 1
    if not is_words and node.path in survey.also:
        raise PrepError("")  # events: the ledger names their stream
    if not is_words and column.dtype.kind not in "fiub":
        raise PrepError("references to other objects are not read")
    if get(survey.file[node.parent], f"{node.name}_index_index") is not None or index.shape != (num_rows,):
        raise PrepError("lists of lists in each row")
    stops = ragged_stops(index, len(column), "value")
    if not is_words:
        raise PrepError(f"a list in each row ({len(column):,} values)")
    words = [as_text(value) for value in column[()]]
    return [", ".join(words[begin:end]) for begin, end in zip([0, *stops[:-1]], stops, strict=True)]
