"""Behaviour that is kept in tables: one row per time stamp, one column per quantity, as Allen's eye tracking.

In: DynamicTables of acquisition and processing with a column of times. Out: streams of modality `behavior`; of a table
without a signal, such as one of licks and their sides, events.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from prep.nwb.behavior import unit_in_rad
from prep.nwb.clocks import read_clock
from prep.nwb.events import MAX_TYPES, TYPE_COLUMNS, Events, distinct, event_stream
from prep.nwb.file import as_text, get, is_dataset, is_text, texts
from prep.nwb.inventory import Draft, Node, Survey
from prep.nwb.series import BLOCK_SAMPLES, Series, read_block, trace_stream
from prep.plan import PrepError

TIMES = ("timestamps", "timestamp", "time", "times", "time_s", "timestamps_s")  # names of the column of times


def read_behavior_tables(survey: Survey) -> list[Draft]:
    """Plan one stream for each table of samples."""
    drafts = []
    for node in list(survey.nodes.values()):
        if not node.is_group or node.path in survey.found or not node.path.startswith(("acquisition/", "processing/")):
            continue
        group = survey.file[node.path]
        times = _times(group) if "colnames" in group.attrs else ""
        if times:
            with survey.reading(node):
                drafts.append(_plan(survey, node, times))
    return drafts


def _times(group: Any) -> str:
    """Name of a table's column of times, "" if it has none; one that is not called `timestamps` has to rise."""
    for name in TIMES:
        column: Any = get(group, name)
        if not is_dataset(column):
            continue
        if name == TIMES[0]:
            return name
        if column.ndim == 1 and column.dtype.kind == "f" and len(column) > 1 and bool((np.diff(column[()]) > 0).all()):
            return name
    return ""


def _plan(survey: Survey, node: Node, times: str) -> Draft:
    group = survey.file[node.path]
    num_rows = len(group[times])
    if num_rows < 2:
        raise PrepError("it has a single row" if num_rows else "it has no rows")
    widths: dict[str, int] = {}
    for column in _columns(group, times):
        path = f"{node.path}/{column}"
        try:
            widths[column] = _width(group, column, num_rows)
        except PrepError as error:
            survey.skip(path, str(error))
    if not widths:
        return _events(survey, node, times)
    clock, rows = read_clock(survey, node.path, num_rows, times)
    name = survey.stream_name(node)
    channels, angles_rad = _channels(survey, node, name, widths)
    series = Series(
        path=node.path,
        data=group[next(iter(widths))],
        datasets=tuple(f"{node.path}/{column}" for column in widths),
        transposed=False,
        num_columns=len(channels),
        clock=clock,
        rows=rows,
        conversion=np.ones(len(channels)),
        offset=np.zeros(len(channels)),
        unit="",
    )
    draft = trace_stream(survey, series, name, "behavior", columns=channels, angles_rad=angles_rad)
    _use(survey, node, name, (*widths, times, "id"))
    return draft


def _use(survey: Survey, node: Node, name: str, columns: Iterable[str]) -> None:
    survey.use(node.path, name)
    for column in columns:
        if f"{node.path}/{column}" in survey.nodes:
            survey.use(f"{node.path}/{column}", name)


def _events(survey: Survey, node: Node, times: str) -> Draft:
    """Events of a table whose only other columns are words: the type of each; PrepError where it is no such table."""
    group = survey.file[node.path]
    num_rows = len(group[times])
    columns = sorted(_columns(group, times), key=lambda name: name not in TYPE_COLUMNS)
    words = {name: [word.strip() for word in texts(group, name, num_rows)] for name in columns}
    chosen = next((name for name in columns if 1 < len(set(words[name])) <= MAX_TYPES), None)
    if chosen is None:
        raise PrepError("none of its columns is a signal: " + _why_not(survey, node))
    name = survey.stream_name(node)
    vocabulary, word = distinct(words[chosen])
    draft = event_stream(survey, node.path, name, Events(time_s=group[times], vocabulary=vocabulary, word=word))
    _use(survey, node, name, (chosen, times, "id"))
    return draft


def _columns(group: Any, times: str) -> list[str]:
    """Columns that may be signals, in the table's own order."""
    named = [as_text(name) for name in np.ravel(group.attrs["colnames"])]
    return [name for name in named if name != times and get(group, name) is not None]


def _width(group: Any, name: str, num_rows: int) -> int:
    """Number of values of a column in each row; PrepError where they are no signal."""
    column: Any = get(group, name)
    if get(group, f"{name}_index") is not None:
        raise PrepError("a list in each row is no signal")
    if not is_dataset(column) or column.ndim not in (1, 2) or len(column) != num_rows or not column.size:
        raise PrepError(f"not one value for each of the {num_rows} time stamps")
    if is_text(column):
        raise PrepError("text is no signal")
    if column.dtype.kind not in "fiub":
        raise PrepError("references to other objects are no signal")
    if _is_constant(column):
        raise PrepError("all its samples are the same or missing")
    return int(column.size // num_rows)


def _is_constant(column: Any) -> bool:
    """Whether a column has fewer than two different values."""
    low, high = np.inf, -np.inf
    for begin in range(0, len(column), BLOCK_SAMPLES):
        block = read_block(column, False, begin, min(begin + BLOCK_SAMPLES, len(column))).astype(np.float64)
        given = block[np.isfinite(block)]
        low, high = min(low, given.min(initial=np.inf)), max(high, given.max(initial=-np.inf))
        if low < high:
            return False
    return True


def _channels(
    survey: Survey, node: Node, stream: str, widths: dict[str, int]
) -> tuple[tuple[str, ...], np.ndarray[Any, np.dtype[np.float64]]]:
    """Names of the channels (C,), and which are angles: the unit of one in radians, else NaN, (C,).

    Only the recipe says so: phi of an ellipse is an axis without a direction, and no unit is kept with a column.
    """
    names: list[str] = []
    angles: list[float] = []
    for column, width in widths.items():
        own = f"{stream}/{column}"
        names += [own] if width == 1 else [f"{own}/{i}" for i in range(width)]
        child = Node(path=f"{node.path}/{column}", neurodata_type="", is_group=False, parent=node.path)
        is_angle = survey.matches(child, survey.recipe.angles) and not survey.matches(child, survey.recipe.not_angles)
        unit = as_text(survey.file[child.path].attrs.get("unit", ""))
        angles += [(unit_in_rad(unit) or 1.0) if is_angle else np.nan] * width
    return tuple(names), np.array(angles)


def _why_not(survey: Survey, node: Node) -> str:
    """The reasons for which columns are left out, each once."""
    columns: dict[str, list[str]] = {}
    for path, (used, reason) in survey.found.items():
        if path.startswith(f"{node.path}/") and used is None:
            columns.setdefault(reason, []).append(path.rsplit("/", 1)[-1])
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in columns.items()) or "it has time stamps only"
