"""Events: licks, rewards, pulses, annotations; series that mark moments, and tables with one row per event.

In: TimeSeries of moments, IntervalSeries, AnnotationSeries, Events and tables of events. Out: streams of kind `event`.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.clock import rate_times
from prep.nwb.clocks import one_number, read_event_times, stamps_of, start_and_rate
from prep.nwb.file import as_text, dataset, follow, get, is_dataset, is_group, is_text, numbers, ragged_stops, texts
from prep.nwb.inventory import Draft, Node, Survey, snake_case
from prep.plan import BrokenObject, PlannedStream, PrepError
from prep.settings import EVENT_FIELDS, Modality, to_ns
from prep.store import StreamSpec
from prep.tokens import HeldTokens

Array = npt.NDArray[Any]
Seconds = npt.NDArray[np.float64]

READ_UNDER = ("acquisition/", "processing/", "stimulus/presentation/")
MAX_TYPES = 1000  # more distinct texts are free text, not a vocabulary
MAX_CODES = 64  # integers with at most so many distinct values are codes of types
FIRST_SAMPLES = 1_000
BLOCK_SAMPLES = 1_000_000
IRREGULARITY = 20.0  # long steps (95 %) over short ones (5 %): 58 for random events, near 1 for a camera
CODE_IRREGULARITY = 3.0  # the same for codes: beyond dropped frames of a camera
SMOOTH = 0.2  # steps squared over the variance: 2 of values that have nothing to do with each other
REGULARITY = 1.1  # below this a clock samples; above it a series of BehavioralEvents marks moments
TYPE_COLUMNS = ("event_type", "ttl_type", "event_name", "event", "type", "label", "annotation")
NAME_COLUMNS = ("event_name", "name", "label", "type")  # of the table that names the types


@dataclass(frozen=True, kw_only=True)
class Events:
    """N events of one object, in the file's order; `word[i]` is the index of event i's type in `vocabulary`."""

    time_s: Any  # (N,) seconds, or the dataset that holds them
    vocabulary: Sequence[str]  # as the file has them; "" is the stream's own name
    word: npt.NDArray[np.int64]  # (N,)
    duration_s: Seconds | None = None  # (N,), NaN = not given
    value: Seconds | None = None  # (N,)
    columns: Sequence[str] = ()  # of a table: what was read
    others: Sequence[str] = ()  # paths of other objects that were read: tables of types


def read_events(survey: Survey) -> list[Draft]:
    """Plan one stream per object that marks moments; what samples a signal is left for the readers after this one.

    A recipe's `events` and `not_events` decide for plain TimeSeries, where the file leaves it open.
    """
    drafts = []
    for node in list(survey.of_type(*READ_AS)):
        with survey.reading(node):
            events = READ_AS[node.neurodata_type](survey, node)
            if events is not None:
                drafts.append(_plan(survey, node, events))
    return drafts


def _plan(survey: Survey, node: Node, events: Events) -> Draft:
    name = survey.stream_name(node)
    modality: Modality = "stimulus" if node.path.startswith("stimulus/") else "behavior"
    draft = event_stream(survey, node.path, name, events, modality)
    survey.use(node.path, name)
    for path in (*(f"{node.path}/{column}" for column in events.columns), *events.others):
        if path in survey.nodes:
            survey.use(path, name)
    return draft


def event_stream(survey: Survey, path: str, name: str, events: Events, modality: Modality = "behavior") -> Draft:
    """Plan a stream of kind `event` with the fields EVENT_FIELDS; events are put in order of time.

    Raises PrepError where no event has a time.
    """
    time_s, rows = read_event_times(survey, path, events.time_s)
    names = [type_name(word or name) for word in events.vocabulary]
    types = tuple(sorted({names[word] for word in np.unique(events.word[rows])}))
    place = np.array([types.index(item) if item in types else -1 for item in names], np.int32)
    fields = np.full((len(rows), 1, len(EVENT_FIELDS)), np.nan, np.float32)
    duration_s = None if events.duration_s is None else events.duration_s * _pace(events.time_s, rows, time_s)
    for field, values in enumerate((duration_s, events.value)):
        if values is not None:
            fits = np.abs(values[rows]) <= np.finfo(np.float32).max  # False for NaN; what does not fit is missing
            fields[:, 0, field] = np.where(fits, values[rows], np.nan)
    spec = StreamSpec(
        name=name,
        kind="event",
        modality=modality,
        num_tokens=len(rows),
        num_sources=1,
        samples_per_token=len(EVENT_FIELDS),
        duration_ns=1,
        sample_ns=1,
        channels=(name,),
        origin=path,
        types=types,
        fields=EVENT_FIELDS,
    )
    stream = PlannedStream(
        spec=spec, start_ns=to_ns(time_s), reader=HeldTokens(values=fields), types=place[events.word[rows]]
    )
    return Draft(stream=stream, first_s=float(time_s[0]), last_s=float(time_s[-1]), time_s=time_s)


def _pace(stamps: Any, rows: npt.NDArray[np.int64], time_s: Seconds) -> float:
    """Seconds of the session in one unit of the stamps: 1, but for milliseconds and for other clocks."""
    stamp = np.asarray(stamps, np.float64)[rows[[0, -1]]]
    return float((time_s[-1] - time_s[0]) / (stamp[1] - stamp[0])) if stamp[1] > stamp[0] else 1.0


def type_name(label: str) -> str:
    """A label of the file as a type: lower_snake_case, the same in every file; at most 60 characters.

    Labels that differ only in case and punctuation are one type; a long one is cut, and carries a digest.
    """
    name = snake_case(re.sub(r"(?<![0-9A-Za-z])-(?=[0-9.])", "minus ", label))
    if len(name) <= 60 and re.search("[0-9a-z]", label.lower()):
        return name
    digest = hashlib.sha256(label.encode()).hexdigest()[:6]
    return f"{name[:53].strip('_')}_{digest}" if len(name) > 60 else f"type_{digest}"


# ---------------------------------------------------------------- series


def _of_moments(survey: Survey, node: Node) -> Events | None:
    """A plain TimeSeries that marks moments; None leaves it for others."""
    recipe = survey.recipe
    if not node.path.startswith(READ_UNDER) or survey.matches(node, recipe.not_events):
        return None
    group = survey.file[node.path]
    data = get(group, "data")
    if is_dataset(data) and is_text(data):
        return _of_texts(survey, node)
    named = survey.matches(node, recipe.events)
    if not named and not (is_dataset(data) and _marks_moments(survey, node, data)):
        return None
    data = dataset(group, "data")
    num_times = data.size if data.shape[0] == 1 else len(data)
    time_s, stamps = _times(group, num_times), _stamps(group, num_times)
    if data.size != len(time_s):
        found = f"{data.size // max(len(data), 1)} values at each time; an event has one"
        raise PrepError(f"it has {found}. Take it out of the recipe's `events`")
    values = _physical(data, data[()].reshape(-1))
    if np.allclose(values, time_s, rtol=0, atol=1e-6, equal_nan=True):
        return Events(time_s=stamps, vocabulary=[""], word=np.zeros(len(time_s), np.int64))
    codes, word = _codes(data, values)
    if not named and _is_smooth(values):
        message = f"its clock is irregular, so its {len(values):,} values are read as events"
        survey.note("maybe-signal", node.path, f"{message}. If they sample a signal, list it in `not_events`")
    vocabulary = [f"{snake_case(node.name)}_{code}" if code else "" for code in codes]
    return Events(time_s=stamps, vocabulary=vocabulary, word=word, value=values)


def _marks_moments(survey: Survey, node: Node, data: Any) -> bool:
    """Whether one number per time marks moments: constant, its own times, in bursts, or edges of a pulse."""
    group = survey.file[node.path]
    if data.dtype.kind not in "fiub" or data.size == 0 or data.ndim == 0:
        return False
    stamps = stamps_of(group)
    if stamps is None:
        if not data.size == len(data) > 1:
            return False
        first = _physical(data, data[:FIRST_SAMPLES].reshape(-1))
        return _are_times(first, _times(group, len(first)))
    if data.size != len(stamps):
        return False
    if data.size == 1:
        return True
    time_s = np.asarray(stamps[:BLOCK_SAMPLES], np.float64)
    first = _physical(data, data[:FIRST_SAMPLES].reshape(-1))
    steps = np.diff(np.unique(time_s[np.isfinite(time_s)]))
    short, long = np.quantile(steps, [0.05, 0.95]) if len(steps) else (1.0, 1.0)
    if long > IRREGULARITY * short or _are_times(first, time_s[: len(first)]) or _alternates(first):
        return True
    if long > CODE_IRREGULARITY * short and len(_codes(data, first)[0]) > 1:
        return True
    if _is_constant(data):
        return bool(first[0] != 0)  # zeros on a regular clock are a sensor that was off
    container = survey.nodes.get(node.parent)
    is_of_events = container is not None and container.neurodata_type == "BehavioralEvents"
    return is_of_events and bool(long > REGULARITY * short)


def _are_times(values: Array, time_s: Seconds) -> bool:
    return len(values) > 1 and np.allclose(values, time_s, rtol=0, atol=1e-6, equal_nan=True)


def _alternates(values: Array) -> bool:
    """Whether values are the edges of a pulse: up, down, up, down."""
    return len(values) >= 4 and len(np.unique(values)) == 2 and bool((np.diff(values) != 0).all())


def _is_smooth(values: Seconds) -> bool:
    """Whether many values follow each other as samples of a signal do; those of events need not."""
    with np.errstate(over="ignore", invalid="ignore"):  # of values that float64 cannot square
        steps, spread = np.nanmean(np.diff(values) ** 2) if len(values) > 1 else np.inf, np.nanvar(values)
    return len(np.unique(values)) > MAX_CODES and bool(steps < SMOOTH * spread)


def _is_constant(data: Any) -> bool:
    """Whether all values are one number; a signal is told at its first change."""
    first = data[:1].reshape(-1)[0]
    blocks = (data[begin : begin + BLOCK_SAMPLES] for begin in range(0, len(data), BLOCK_SAMPLES))
    return bool(np.isfinite(first)) and all(bool((block == first).all()) for block in blocks)


def _codes(data: Any, values: Seconds) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Types by value where the values are codes: few distinct integers, or zeros and ones. Else the one type ""."""
    distinct, word = np.unique(values, return_inverse=True)
    is_coded = data.dtype.kind in "iub" or set(distinct.tolist()) == {0.0, 1.0}
    if is_coded and 2 <= len(distinct) <= MAX_CODES:
        return [f"{code:g}" for code in distinct], word.astype(np.int64)
    return [""], np.zeros(len(values), np.int64)


def _of_spans(survey: Survey, node: Node) -> Events:
    """IntervalSeries: +n starts a span of kind n, -n ends it; each start is an event, with its duration."""
    group = survey.file[node.path]
    data = dataset(group, "data")
    marks = np.asarray(data[()].reshape(-1), np.float64)
    time_s = _times(group, len(marks))
    order = np.argsort(time_s, kind="stable")
    order = order[np.isfinite(time_s[order])]
    duration_s = np.full(len(marks), np.nan)
    num_ends = 0
    for kind in np.unique(np.abs(marks[marks != 0])):
        rows = order[np.abs(marks[order]) == kind]
        is_pair = (marks[rows[:-1]] > 0) & (marks[rows[1:]] < 0)
        duration_s[rows[:-1][is_pair]] = (time_s[rows[1:]] - time_s[rows[:-1]])[is_pair]
        num_ends += int((marks[rows] < 0).sum() - is_pair.sum())
    if num_ends:
        message = f"{num_ends} ends have no start before them; they are dropped"
        survey.note("unmatched-end", node.path, message, "repaired", num_ends=num_ends)
    starts = np.flatnonzero(marks > 0)
    kinds, word = np.unique(marks[starts], return_inverse=True)
    vocabulary = [""] if len(kinds) == 1 else [f"{snake_case(node.name)}_{kind:g}" for kind in kinds]
    return Events(
        time_s=time_s[starts], vocabulary=vocabulary, word=word.astype(np.int64), duration_s=duration_s[starts]
    )


def _of_texts(survey: Survey, node: Node) -> Events:
    """AnnotationSeries: one type per distinct text."""
    group = survey.file[node.path]
    data = dataset(group, "data")
    if data.size != max(data.shape, default=0):
        raise PrepError(f"its texts are {data.shape}; an event has one")
    words = [as_text(value).strip() for value in data[()].reshape(-1)]
    vocabulary, word = distinct(words)
    if len(vocabulary) > MAX_TYPES:
        raise PrepError(f"it has {len(vocabulary):,} distinct texts; more than {MAX_TYPES:,} are no types of events")
    return Events(time_s=_stamps(group, len(words)), vocabulary=vocabulary, word=word)


def distinct(words: Sequence[str]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Distinct texts, sorted, and the place (N,) of each text among them."""
    vocabulary = sorted(set(words))
    place = {word: i for i, word in enumerate(vocabulary)}
    return vocabulary, np.array([place[word] for word in words], np.int64)


def _times(group: Any, num_samples: int) -> Seconds:
    """Times (N,) of a series' samples, as the file has them. Raises PrepError."""
    stamps = stamps_of(group)
    if stamps is None:
        return rate_times(*start_and_rate(group), num_samples)
    if len(stamps) != num_samples:
        raise PrepError(f"it has {num_samples} samples but {len(stamps)} time stamps")
    return np.asarray(stamps[()], np.float64)


def _stamps(group: Any, num_samples: int) -> Any:
    """The same, as the dataset that may say their unit, where there is one."""
    time_s = _times(group, num_samples)
    stamps = stamps_of(group)
    return time_s if stamps is None else stamps


def _physical(data: Any, values: Array) -> Seconds:
    """Values in the series' unit; a conversion of 0 or that is no number would wipe them out, and is taken as 1."""
    factor, offset = one_number(data.attrs.get("conversion", 1.0)), one_number(data.attrs.get("offset", 0.0))
    scaled: Seconds = values.astype(np.float64) * (factor if np.isfinite(factor) and factor else 1.0)
    return scaled + float(np.nan_to_num(offset))


# ---------------------------------------------------------------- ndx-events and core tables of events


def _of_stamps(survey: Survey, node: Node) -> Events:
    """Events, LabeledEvents, TTLs of ndx-events up to 0.2: time stamps, and the label's number of each."""
    group = survey.file[node.path]
    time_s = dataset(group, "timestamps")
    data = get(group, "data")
    data = get(group, "label_keys") if data is None else data
    if data is None:
        return Events(time_s=time_s, vocabulary=[""], word=np.zeros(len(time_s), np.int64))
    if data.shape != time_s.shape:
        raise PrepError(f"it has {data.size} labels but {len(time_s)} time stamps")
    listed = get(group, "labels")
    labels = data.attrs.get("labels", ()) if listed is None else listed[()]
    words = {number: as_text(label).strip() for number, label in enumerate(np.atleast_1d(labels))}
    codes, word = np.unique(data[()], return_inverse=True)
    vocabulary = [words.get(int(code)) or f"{snake_case(node.name)}_{code}" for code in codes]
    return Events(time_s=time_s, vocabulary=vocabulary, word=word.astype(np.int64))


def _of_lists(survey: Survey, node: Node) -> Events:
    """AnnotatedEventsTable: one row per type, with the list of its times."""
    group = survey.file[node.path]
    flat = dataset(group, "event_times")
    stops = ragged_stops(dataset(group, "event_times_index"), len(flat), "event time")
    labels = texts(group, "label", len(stops)) or [f"{snake_case(node.name)}_{row}" for row in range(len(stops))]
    vocabulary, place = distinct([label.strip() for label in labels])
    word = np.repeat(place, np.diff(stops, prepend=0))
    time_s = np.asarray(flat[()], np.float64)[: len(word)]
    order = np.argsort(time_s, kind="stable")  # one list after the other is no disorder
    columns = ("event_times", "event_times_index", "label", "id")
    return Events(time_s=time_s[order], vocabulary=vocabulary, word=word[order], columns=columns)


def _of_rows(survey: Survey, node: Node) -> Events:
    """EventsTable of the core schema (2.11) and of ndx-events from 0.3 on, TtlsTable: one row per event."""
    group = survey.file[node.path]
    time_s = dataset(group, "timestamp")
    num_rows = len(time_s)
    column, vocabulary, word, others = _types_of_rows(survey, node, num_rows)
    return Events(
        time_s=time_s,
        vocabulary=vocabulary,
        word=word,
        duration_s=numbers(group, "duration", num_rows),
        value=numbers(group, "value", num_rows),
        columns=("id", "timestamp", "duration", "value", column),
        others=others,
    )


def _types_of_rows(
    survey: Survey, node: Node, num_rows: int
) -> tuple[str, list[str], npt.NDArray[np.int64], tuple[str, ...]]:
    """The column that tells the types apart, the types, the type of each row (N,), and what else was read for them."""
    group = survey.file[node.path]
    certain = (*TYPE_COLUMNS, *_with_meanings(survey, node))
    for column in (*certain, *_words(survey, node)):
        item = get(group, column)
        if not is_dataset(item) or item.shape != (num_rows,):
            continue
        table = follow(survey.file, item.attrs.get("table"))
        if is_group(table):
            return _named_by_table(survey, column, item, table)
        meanings = _meanings(survey, group, column)
        if meanings is None and not is_text(item):
            continue
        words = [as_text(value).strip() for value in item[()]]
        others: tuple[str, ...] = ()
        if meanings is not None:
            others = tuple(path for path in survey.nodes if f"{path}/".startswith(f"{survey.path_of(meanings)}/"))
            words = words if is_text(item) else _explain(column, words, meanings)
        vocabulary, word = distinct(words)
        if len(vocabulary) <= (MAX_TYPES if column in certain else min(MAX_CODES, num_rows / 2)):
            return column, vocabulary, word, others
    return "", [""], np.zeros(num_rows, np.int64), ()


def _named_by_table(
    survey: Survey, column: str, item: Any, table: Any
) -> tuple[str, list[str], npt.NDArray[np.int64], tuple[str, ...]]:
    """Types by row number of an EventTypesTable."""
    num_types = len(dataset(table, "id"))
    words = next((names for key in NAME_COLUMNS if (names := texts(table, key, num_types))), None)
    word = item[()].astype(np.int64)
    if len(word) and not (word.min() >= 0 and word.max() < num_types):
        raise BrokenObject(
            f"{column} points to row {word.max():,} of a table of {num_types:,} types. Write the file again."
        )
    path = survey.path_of(table)
    others = (path, *(f"{path}/{key}" for key in ("id", *NAME_COLUMNS)))
    return column, words or [f"{column}_{row}" for row in range(num_types)], word, others


def _with_meanings(survey: Survey, node: Node) -> list[str]:
    """Columns whose values a MeaningsTable explains, in order of name."""
    group = survey.file[node.path]
    columns = [path.rsplit("/", 1)[-1] for path, other in survey.nodes.items() if other.parent == node.path]
    return [column for column in columns if _meanings(survey, group, column) is not None]


def _words(survey: Survey, node: Node) -> list[str]:
    """Columns of words, in the table's own order."""
    group = survey.file[node.path]
    columns = [as_text(name) for name in np.ravel(group.attrs.get("colnames", ()))]
    return [column for column in columns if is_dataset(get(group, column)) and is_text(group[column])]


def _meanings(survey: Survey, group: Any, column: str) -> Any:
    """The MeaningsTable of a column, None if it has none."""
    item = get(group, column)
    told = follow(survey.file, item.attrs.get("meanings")) if is_dataset(item) else None
    places = (f"meanings_tables/{column}_meanings", f"{column}_meanings")
    tables = (told, *(get(group, place) for place in places))
    return next((table for table in tables if is_group(table)), None)


def _explain(column: str, words: list[str], meanings: Any) -> list[str]:
    """Numbers by their meaning; one without a meaning keeps its number."""
    values = [as_text(value).strip() for value in dataset(meanings, "value")[()]]
    told = dict(zip(values, texts(meanings, "meaning", len(values)), strict=False))
    return [told.get(word) or f"{column}_{word}" for word in words]


READ_AS: dict[str, Callable[[Survey, Node], Events | None]] = {
    "TimeSeries": _of_moments,
    "IntervalSeries": _of_spans,
    "AnnotationSeries": _of_texts,
    "Events": _of_stamps,
    "LabeledEvents": _of_stamps,
    "TTLs": _of_stamps,
    "AnnotatedEventsTable": _of_lists,
    "AnnotatedEvents": _of_lists,
    "EventsTable": _of_rows,
    "TtlsTable": _of_rows,
}
