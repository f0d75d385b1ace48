"""Splits of a session: which of its time is train, valid and test.

In: the recipe's `splits`, the planned streams, the tables of intervals. Out: blocks [start_ns, stop_ns), label, in
order of time; they never overlap.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.nwb.file import text_at
from prep.nwb.inventory import Draft, Survey, snake_case
from prep.plan import IntervalTable, PrepError
from prep.recipe import Splits
from prep.settings import NO_TIME, SPLITS, to_ns
from prep.store import sanitise

Blocks = tuple[tuple[int, int, str], ...]
Spans = list[tuple[float, float, str]]
Index = npt.NDArray[np.int64]

CONTESTED = len(SPLITS)  # time that rows of two labels claim: it belongs to neither


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What splits are cut from: the names and the times of one session, of one file or of several."""

    dataset_id: str
    session_id: str
    subject_id: str  # "" = the file does not say
    file: str  # its name, for messages
    drafts: Sequence[Draft]
    intervals: Mapping[str, IntervalTable]


def cut_splits(survey: Survey, drafts: list[Draft], intervals: Mapping[str, IntervalTable]) -> Blocks:
    """Train, valid and test of one file as [start_ns, stop_ns), label, in order of time.

    Raises PrepError where the recipe's `splits` ask for what the file does not have.
    """
    timeline = Timeline(
        dataset_id=survey.dataset_id,
        session_id=survey.session_id,
        subject_id=text_at(survey.file, "general/subject/subject_id"),
        file=survey.path.name,
        drafts=drafts,
        intervals=intervals,
    )
    blocks, absent = cut(timeline, survey.recipe.splits)
    for code, path, message in absent:
        survey.note(code, path, message)
    return blocks


def cut(timeline: Timeline, splits: Splits) -> tuple[Blocks, list[tuple[str, str, str]]]:
    """The blocks, and (code, path, message) of each label that a session should have and does not. Raises PrepError."""
    if splits.explicit:
        return _in_ns([(span.start_s, span.stop_s, span.label) for span in splits.explicit]), []
    if splits.by == "session":
        return _whole(timeline, _label_of(timeline.session_id, _sanitised(splits.assign), splits)), []
    if splits.by == "subject":
        if not timeline.subject_id:
            found = f"{timeline.file} has no subject_id, and the recipe splits by subject"
            raise PrepError(f"{found}. Exclude the file, write the subject_id into it, or use splits.by: session.")
        return _whole(timeline, _label_of(timeline.subject_id, splits.assign, splits)), []
    if splits.by in ("trial", "stimulus"):
        return _by_rows(timeline, splits)
    reference = _reference(timeline.drafts, splits)
    spans = fraction_spans(reference.first_s, reference.last_s, splits)
    why = f"the session is too short for a {{}} split with gaps of {splits.gap_s} s; it has none"
    return _in_ns(spans), _absent({label for *_, label in spans}, splits, reference.stream.spec.name, why)


# ---------------------------------------------------------------- time


def _reference(drafts: Sequence[Draft], splits: Splits) -> Draft:
    """The stream whose time is split: the recipe's, else spikes, else the first traces, else the longest stream."""
    if splits.reference is None:
        return drafts[0] if drafts[0].units is not None else max(drafts, key=lambda draft: draft.last_s - draft.first_s)
    wanted = splits.reference.strip("/")
    for draft in drafts:
        if wanted in (draft.stream.spec.name, draft.stream.spec.origin):
            return draft
    names = ", ".join(draft.stream.spec.name for draft in drafts)
    found = f"the recipe's `splits.reference` is {splits.reference!r}, but the session's streams are {names}"
    raise PrepError(f"{found}. Name one of them.")


def fraction_spans(first_s: float, last_s: float, splits: Splits) -> Spans:
    """Contiguous pieces of [first, last], each shrunk by half the gap at inner borders; too short ones are left out."""
    borders = [first_s + round(float(part), 12) * (last_s - first_s) for part in np.cumsum((0.0, *splits.fractions))]
    borders[0], borders[-1] = first_s, last_s
    half = splits.gap_s / 2
    spans = []
    for label, start, stop in zip(SPLITS, borders, borders[1:], strict=False):
        begin, end = start + half * (start > first_s), stop - half * (stop < last_s)
        if end > begin:
            spans.append((begin, end, label))
    return spans


def _in_ns(spans: Spans) -> Blocks:
    return tuple(sorted((int(to_ns(start)), int(to_ns(stop)), label) for start, stop, label in spans))


def _absent(present: set[str], splits: Splits, path: str, why: str) -> list[tuple[str, str, str]]:
    wanted = {label for label, part in zip(SPLITS, splits.fractions, strict=True) if part > 0}
    return [("short-session", path, why.format(label)) for label in sorted(wanted - present)]


# ---------------------------------------------------------------- names


def draw_label(name: str, fractions: Sequence[float]) -> str:
    """The label that a name draws: sha256(name) as a number in [0, 1) against the fractions; the same everywhere."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48  # exact in float64
    place = int(np.searchsorted(np.cumsum(fractions).round(12), number, side="right"))
    return SPLITS[min(place, max(i for i, part in enumerate(fractions) if part > 0))]


def _label_of(name: str, assign: Mapping[str, str], splits: Splits) -> str:
    return assign.get(name) or draw_label(name, splits.fractions)


def _sanitised(assign: Mapping[str, str]) -> dict[str, str]:
    """A person names a session as the file does; the session goes by its name on disk."""
    return {sanitise(name): label for name, label in assign.items()}


def _whole(timeline: Timeline, label: str) -> Blocks:
    """One block that holds every token of the session."""
    starts, stops = [], []
    for stream in (draft.stream for draft in timeline.drafts if len(draft.stream.start_ns)):
        offsets = np.zeros(1, np.int64) if stream.offset_ns is None or not len(stream.offset_ns) else stream.offset_ns
        starts.append(int(stream.start_ns[0] + offsets.min()))
        stops.append(int(stream.start_ns[-1] + offsets.max()) + stream.spec.duration_ns)
    return ((min(starts), max(stops), label),) if starts else ()


# ---------------------------------------------------------------- rows of a table


def _by_rows(timeline: Timeline, splits: Splits) -> tuple[Blocks, list[tuple[str, str, str]]]:
    """Rows of a table, each by the label that its number (trial) or its stimulus draws."""
    name, table = _table(timeline, splits)
    is_trial = splits.by == "trial"
    if is_trial:
        session = f"{timeline.dataset_id}/{timeline.session_id}"
        names = [draw_label(f"{session}/{row}", splits.fractions) for row in range(len(table.start_ns))]
    else:
        identities = stimulus_names(_column(table, name, splits))
        label_of = {key: _label_of(key, splits.assign, splits) for key in set(identities) if key}
        names = [label_of.get(key, "") for key in identities]
    labels = np.array([SPLITS.index(label) if label else -1 for label in names], np.int64)
    has_time = (table.start_ns != NO_TIME) & (table.stop_ns != NO_TIME) & (table.stop_ns > table.start_ns)
    keep = has_time & (labels >= 0)
    blocks = row_blocks(
        table.start_ns[keep], table.stop_ns[keep], labels[keep], int(to_ns(splits.gap_s)), is_bridged=is_trial
    )
    if not blocks:
        found = f"no row of the table {name!r} is left of {len(names)} after gaps of {splits.gap_s} s between labels"
        raise PrepError(f"{found}. Lower splits.gap_s, or split by time.")
    why = f"no row of the table {name!r} is {{}} (after gaps of {splits.gap_s} s between labels)"
    return blocks, _absent({label for *_, label in blocks}, splits, name, why)


def _table(timeline: Timeline, splits: Splits) -> tuple[str, IntervalTable]:
    wanted = splits.table or "trials"
    for name in (wanted.strip("/"), snake_case(wanted.rsplit("/", 1)[-1])):
        if name in timeline.intervals:
            return name, timeline.intervals[name]
    has = ", ".join(sorted(timeline.intervals)) or "none"
    found = f"{timeline.file} has no table {wanted!r} to split by {splits.by}; its tables of intervals: {has}"
    raise PrepError(f"{found}. Name one of them as splits.table.")


def _column(table: IntervalTable, name: str, splits: Splits) -> Sequence[Any]:
    if splits.column in table.columns:
        return list(table.columns[splits.column])
    has = ", ".join(table.columns) or "none"
    found = f"splits.column is {splits.column!r}, but the columns of the table {name!r} are: {has}"
    raise PrepError(f"{found}. Name the one that says which stimulus a row shows.")


def stimulus_names(column: Sequence[Any]) -> list[str]:
    """A stimulus' name for each row; 45.0 is `45`; "" where the column gives none (a blank)."""
    return [
        value.strip() if isinstance(value, str) else "" if not np.isfinite(value) else f"{value:.12g}"
        for value in column
    ]


def row_blocks(start_ns: Index, stop_ns: Index, labels: Index, gap_ns: int, is_bridged: bool) -> Blocks:
    """Rows [start, stop) of labels (N,) as blocks in order of time, at least gap_ns between any two labels.

    Time that rows of two labels claim belongs to none. Where pieces of two labels are nearer than the gap, both give
    way by the same amount. Neighbours of one label become one block where they touch; is_bridged: always, so that
    the time between two train trials is train.
    """
    starts, stops, owner = _pieces(start_ns, stop_ns, labels)
    if is_bridged and len(owner):
        first = np.concatenate([[True], owner[1:] != owner[:-1]])
        last = np.concatenate([first[1:], [True]])
        starts, stops, owner = starts[first], stops[last], owner[first]
    if len(owner) == 0:
        return ()
    # Where two labels are near, nothing is kept within half a gap of the middle between them, of any piece: a short
    # piece that vanishes may not leave its neighbour nearer than the gap.
    is_near = (owner[1:] != owner[:-1]) & (starts[1:] - stops[:-1] < gap_ns)
    middle = stops[:-1] + (starts[1:] - stops[:-1]) // 2
    far = np.iinfo(np.int64).max // 2
    after = np.where(is_near, middle + gap_ns - gap_ns // 2, -far)
    before = np.where(is_near, middle - gap_ns // 2, far)
    begin = np.maximum(starts, np.maximum.accumulate(np.concatenate([[-far], after])))
    end = np.minimum(stops, np.minimum.accumulate(np.concatenate([before, [far]])[::-1])[::-1])
    keep = (end > begin) & (owner != CONTESTED)
    return tuple(
        (int(a), int(b), SPLITS[label]) for a, b, label in zip(begin[keep], end[keep], owner[keep], strict=True)
    )


def _pieces(start_ns: Index, stop_ns: Index, labels: Index) -> tuple[Index, Index, Index]:
    """Disjoint pieces of time in order: start (M,), stop (M,), and the one label that claims it, or CONTESTED."""
    edges = np.unique(np.concatenate([start_ns, stop_ns]))
    if len(edges) < 2:
        return edges[:0], edges[:0], edges[:0]
    claims = np.zeros((len(SPLITS), len(edges)), np.int64)
    np.add.at(claims, (labels, np.searchsorted(edges, start_ns)), 1)
    np.add.at(claims, (labels, np.searchsorted(edges, stop_ns)), -1)
    is_claimed = claims.cumsum(axis=1)[:, :-1] > 0  # of the time between two edges
    num_claims = is_claimed.sum(axis=0)
    owner = np.where(num_claims > 1, CONTESTED, is_claimed.argmax(axis=0))
    starts, stops, owner = (part[num_claims > 0] for part in (edges[:-1], edges[1:], owner))
    begins = np.concatenate([[True], (owner[1:] != owner[:-1]) | (starts[1:] != stops[:-1])])
    ends = np.concatenate([begins[1:], [True]])
    return starts[begins], stops[ends], owner[begins]
