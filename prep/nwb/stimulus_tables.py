"""Tables of what was shown: gratings, flashes, pictures, tones, films, row by row, in one vocabulary.

In: interval tables of stimuli. Out: a stream of kind `event` for each, and of the pixels that it names one of `frames`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.nwb.clocks import read_event_times
from prep.nwb.file import as_text, enum_words, get, is_dataset, is_text, numbers
from prep.nwb.intervals import interval_tables
from prep.nwb.inventory import UNREADABLE, Draft, Node, Survey, one_line
from prep.nwb.stimulus_frames import Library, Rows, library, read_frames
from prep.nwb.stimulus_words import Column, Words, is_telling, words_of
from prep.plan import BrokenObject, PlannedStream, PrepError
from prep.settings import FARTHEST_S, STIMULUS_FIELDS, to_ns
from prep.store import StreamSpec
from prep.tokens import HeldTokens

Floats = npt.NDArray[np.float64]
TIMES = ("start_time", "stop_time", "id")
NOT_SHOWN = re.compile(r"opto", re.IGNORECASE)  # light into the brain is no stimulus that was perceived


def read_stimulus_tables(survey: Survey) -> list[Draft]:
    """Plan a stream of typed rows for each table of stimuli, and of frames where its pixels are found.

    Runs after read_stimuli; the tables stay interval tables as well: survey.also keeps what else they became.
    """
    drafts: list[Draft] = []
    names = library(survey)
    for node in [node for node in survey.nodes.values() if node.path not in survey.found]:
        if is_dataset(get(survey.file, f"{node.path}/start_time")):
            drafts += _guarded(survey, node, lambda node=node: _read(survey, node, names))  # type: ignore[misc]  # mypy has no type for a lambda with a default
    return drafts


def _guarded(survey: Survey, node: Node, read: Callable[[], list[Draft]]) -> list[Draft]:
    """What a reader makes of a table; where it fails, the audit says so, and the table is still one of intervals."""
    drafts: list[Draft] = []
    with survey.reading(node):
        drafts = read()
    used_as, reason = survey.found.get(node.path, ("", ""))
    if used_as is None:
        del survey.found[node.path]
        if not any(finding.path == node.path and finding.message == reason for finding in survey.findings):
            survey.note("stimulus-table", node.path, f"what it says was shown is not read: {reason}")
    return drafts


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A table of stimuli, its rows in order of time."""

    node: Node
    words: Words
    rows: npt.NDArray[np.int64]  # (n,) row of the file
    start_s: Floats  # (n,)
    stop_s: Floats  # (n,) NaN = not given


def _read(survey: Survey, node: Node, names: Library) -> list[Draft]:
    shown = _shown(survey, node)
    if shown is None:
        return []
    event = _event(shown, _name(survey, node))
    also = [event.stream.spec.name]
    frames: list[Draft] = []
    try:
        frames = read_frames(survey, _frame_rows(shown), names, _frames_name(survey, also[0]))
    except BrokenObject as error:
        survey.note("broken-object", node.path, str(error), "refused")
    except PrepError as error:
        survey.note("no-pixels", node.path, str(error))
    except UNREADABLE as error:
        survey.note("broken-object", node.path, f"its pixels cannot be read ({one_line(error)})", "refused")
    also += [draft.stream.spec.name for draft in frames]
    _account(survey, shown, ", ".join(also))
    return [event, *frames]


def _shown(survey: Survey, node: Node) -> _Shown | None:
    """The table, if it is one of stimuli: by name or place, by the recipe, or by what its columns say."""
    group = survey.file[node.path]
    start = group["start_time"]
    is_named = node.name.endswith("_presentations") or node.path.startswith("stimulus/")
    is_named = is_named or survey.matches(node, survey.recipe.stimulus_tables)
    is_list_of_times = start.ndim == 1 and start.dtype.kind in "fiu" and len(start) > 0
    if not is_list_of_times or (NOT_SHOWN.search(node.path) and not is_named):
        return None
    columns = _columns(survey, node, len(start))
    if not is_named and not is_telling(columns, len(start)):
        return None
    words = words_of(columns, len(start), node.name)
    for remark in words.remarks:
        survey.note("stimulus-units", node.path, remark)
    raw_s, stop_s, path = _times(group, node, words, start[()].astype(np.float64))
    start_s, rows = read_event_times(survey, path, raw_s)
    stop_s = _like_starts(raw_s[rows], start_s, stop_s[rows])
    stop_s = np.where(stop_s >= start_s, stop_s, np.nan)  # an end before the start is none
    return _Shown(node=node, words=words, rows=rows, start_s=start_s, stop_s=stop_s)


def _like_starts(raw_s: Floats, start_s: Floats, stop_s: Floats) -> Floats:
    """Stops (n,) on the clock that the starts were mapped to, from milliseconds or by `sync`."""
    if np.array_equal(raw_s, start_s):
        return stop_s
    length_s = raw_s[-1] - raw_s[0]
    pace = (start_s[-1] - start_s[0]) / length_s if length_s > 0 else 1.0
    return start_s + (stop_s - raw_s) * pace


def _columns(survey: Survey, node: Node, num_rows: int) -> dict[str, Column]:
    """Columns with one value, or one row of numbers, for each row of the table."""
    columns: dict[str, Column] = {}
    group = survey.file[node.path]
    for child in survey.nodes.values():
        if child.parent != node.path or child.name in TIMES or child.is_group:
            continue
        column = group[child.name]
        if f"{child.name}_index" in group or not is_dataset(column) or column.shape[:1] != (num_rows,):
            continue
        if is_text(column) and column.ndim == 1:
            columns[child.name] = [as_text(value) for value in column[()]]
        elif column.dtype.kind in "fiub" and column.ndim in (1, 2) and 0 not in column.shape:
            columns[child.name] = _named_numbers(column)
    return columns


def _named_numbers(column: Any) -> Column:
    words = enum_words(column)
    return [words.get(int(value), "") for value in column[()]] if words else column[()]


def _times(group: Any, node: Node, words: Words, start_s: Floats) -> tuple[Floats, Floats, str]:
    """Start and stop (N,) of what was shown, and the object they are from.

    A trial is longer than its stimulus: a column of onsets counts where its times are those of the rows.
    """
    num_rows = len(start_s)
    stop_s = numbers(group, "stop_time", num_rows)
    stop_s = np.full(num_rows, np.nan) if stop_s is None else stop_s
    on = numbers(group, words.on, num_rows) if words.on else None
    if on is None or not np.isfinite(on).any():
        return start_s, stop_s, node.path
    given = np.isfinite(on)
    if not (~(on[given] < start_s[given]) & ~(on[given] > stop_s[given])).mean() > 0.5:
        return start_s, stop_s, node.path
    off = numbers(group, words.off, num_rows) if words.off else None
    return on, stop_s if off is None else np.where(np.isfinite(off), off, np.nan), f"{node.path}/{words.on}"


# ---------------------------------------------------------------- streams


def _event(shown: _Shown, name: str) -> Draft:
    values = shown.words.values[shown.rows].astype(np.float32)
    duration_s = shown.stop_s - shown.start_s
    is_given = (duration_s >= 0) & (duration_s <= FARTHEST_S)
    values[:, STIMULUS_FIELDS.index("duration_s")] = np.where(is_given, duration_s, np.nan)
    types, index = np.unique([shown.words.types[row] for row in shown.rows], return_inverse=True)
    spec = StreamSpec(
        name=name,
        kind="event",
        modality="stimulus",
        num_tokens=len(values),
        num_sources=1,
        samples_per_token=len(STIMULUS_FIELDS),
        duration_ns=1,
        sample_ns=1,
        channels=("stimulus",),
        origin=shown.node.path,
        types=tuple(str(kind) for kind in types),
        fields=STIMULUS_FIELDS,
    )
    stream = PlannedStream(
        spec=spec,
        start_ns=to_ns(shown.start_s),
        reader=HeldTokens(values=values[:, None, :]),
        types=index.astype(np.int32),
    )
    first_s, last_s = float(shown.start_s[0]), float(shown.start_s[-1])
    return Draft(stream=stream, first_s=first_s, last_s=last_s, time_s=shown.start_s)


def _frame_rows(shown: _Shown) -> Rows:
    frame = shown.words.values[shown.rows, STIMULUS_FIELDS.index("frame")]
    names = [shown.words.names[row] for row in shown.rows]
    return Rows(path=shown.node.path, start_s=shown.start_s, stop_s=shown.stop_s, frame=frame, names=names)


def _name(survey: Survey, node: Node) -> str:
    """`gabors` of gabors_presentations; of a table of something else (trials), `trials_stimuli`."""
    if any(key.strip("/") in (node.path, node.name) for key in survey.recipe.names):
        return survey.stream_name(node)
    is_own = node.name.endswith("_presentations") or node.path.startswith("stimulus/")
    path = node.path.removesuffix("_presentations") if is_own else f"{node.path}_stimuli"
    return survey.stream_name(replace(node, path=path))


def _frames_name(survey: Survey, event: str) -> str:
    base = f"{event.removesuffix('_stimuli')}_frames"
    name = next(name for name in (base, *(f"{base}_{number}" for number in range(2, 999))) if name not in survey.names)
    survey.names.add(name)
    return name


def _account(survey: Survey, shown: _Shown, streams: str) -> None:
    """What a table became; one that is read as intervals as well is accounted for there, with all of its columns."""
    path = shown.node.path
    if path in (node.path for node in interval_tables(survey).values()):
        survey.also[path] = streams
        return
    survey.use(path, streams)
    for child in survey.nodes.values():
        if child.parent == path and (child.name in TIMES or child.name in shown.words.used):
            survey.use(child.path, streams)
