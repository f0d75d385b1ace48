"""Columns of interval tables that are times: the go cue, the reward, the licks of each trial become events.

In: tables of intervals. Out: one stream of kind `event` per table, with one type per such column.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from prep.nwb.events import Events, event_stream
from prep.nwb.file import get, is_dataset, ragged_stops
from prep.nwb.intervals import OWN_COLUMNS, columns_of, interval_tables, table_times
from prep.nwb.inventory import UNREADABLE, Draft, Node, Survey, snake_case

Seconds = npt.NDArray[np.float64]

TIME_WORDS = {"time", "times", "timestamp", "timestamps", "onset", "onsets", "offset", "offsets"}
TIME_ENDINGS = {"on", "off"}
SLACK_S = 60.0  # an event of a trial is not further from it than this
FOLLOWS = 0.5  # of the time from the first row to the last: what times on the clock take, too, at least
INSIDE = 0.9  # of a column of times, near their rows and in their order


def read_trial_events(survey: Survey) -> list[Draft]:
    """Plan one stream `<table>_events` per table of intervals that has columns of times on the session's clock."""
    drafts = []
    for table, node in interval_tables(survey).items():
        name = f"{table}_events"
        if name in survey.names:
            name = f"{name}_of_columns"
        with survey.reading(node):
            found = dict(_columns_of_times(survey, node))
            if not found:
                continue
            drafts.append(event_stream(survey, node.path, name, _join(found)))
            survey.names.add(name)
            for column in found:
                for path in (f"{node.path}/{column}", f"{node.path}/{column}_index"):
                    if path in survey.nodes:
                        before = survey.also.get(path)
                        survey.also[path] = f"{before}, {name}" if before else name
    return drafts


def _join(found: dict[str, Seconds]) -> Events:
    """Times by column to events in order of time, the types named like the columns."""
    time_s = np.concatenate(list(found.values()))
    word = np.repeat(np.arange(len(found)), [len(times) for times in found.values()])
    order = np.argsort(time_s, kind="stable")
    return Events(time_s=time_s[order], vocabulary=list(found), word=word[order])


def _columns_of_times(survey: Survey, node: Node) -> list[tuple[str, Seconds]]:
    """(column, its times) of the columns whose name says time and whose times lie near their rows."""
    group = survey.file[node.path]
    try:
        start_s, stop_s = table_times(group)
    except UNREADABLE:
        return []  # the reader of tables says what is wrong
    found = []
    for child in columns_of(survey, node):
        if child.path in survey.found or child.name in OWN_COLUMNS or not _says_time(child.name):
            continue
        try:
            time_s, row = _values(group, child.name, len(start_s))
        except UNREADABLE:
            continue  # the reader of tables refuses the column by name
        if len(time_s) == 0:
            continue
        if _on_the_clock(time_s, start_s[row], stop_s[row]):
            found.append((child.name, time_s))
        else:
            message = (
                f"its values, {time_s.min():.6g} to {time_s.max():.6g}, do not follow the rows on the session's clock; "
                "it is no stream of events"
            )
            survey.note("relative-times", child.path, message)
    return found


def _says_time(column: str) -> bool:
    """Whether a column's name says that it holds times: goCue_start_time, stimOn_times, cue_on, tone_onset_s."""
    words = snake_case(column).split("_")
    words = words[:-1] if words[-1] in ("s", "sec", "seconds") and len(words) > 1 else words
    return bool(TIME_WORDS.intersection(words)) or (len(words) > 1 and words[-1] in TIME_ENDINGS)


def _values(group: Any, name: str, num_rows: int) -> tuple[Seconds, npt.NDArray[np.int64]]:
    """Times (n,) of a float column and the row of the table (n,) of each; empty if it is no such column."""
    column, index = group[name], get(group, f"{name}_index")
    none = np.zeros(0), np.zeros(0, np.int64)
    if not is_dataset(column) or column.dtype.kind != "f" or column.ndim != 1:
        return none
    row = np.arange(len(column))
    if index is not None:
        row = np.repeat(np.arange(len(index)), np.diff(ragged_stops(index, len(column), "value"), prepend=0))
    if (len(column) if index is None else len(index)) != num_rows or get(group, f"{name}_index_index") is not None:
        return none
    time_s = np.asarray(column[: len(row)], np.float64)
    given = np.isfinite(time_s)
    return time_s[given], row[given]


def _on_the_clock(time_s: Seconds, start_s: Seconds, stop_s: Seconds) -> bool:
    """Whether times (n,) lie near their rows [start_s, stop_s] and grow as they do; durations and delays do not."""
    starts, row = np.unique(start_s, return_inverse=True)
    first_s = np.full(len(starts), np.inf)
    np.minimum.at(first_s, row, time_s)
    grows = np.diff(first_s) > 0
    slack_s = SLACK_S if len(grows) else 0.0  # a single row does not show whether they grow
    end_s = np.where(np.isfinite(stop_s), stop_s, start_s)
    inside = (start_s - slack_s <= time_s) & (time_s <= end_s + slack_s)
    follows = first_s[-1] - first_s[0] >= FOLLOWS * (starts[-1] - starts[0])
    return bool(inside.mean() >= INSIDE and follows and (len(grows) == 0 or grows.mean() >= INSIDE))
