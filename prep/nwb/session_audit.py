"""The audit across streams: who overlaps whom, spikes outside the session, missing samples, and trains of pulses.

In: the open file, and what the readers planned. Out: findings of the survey; no stream is changed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.audit import OUTSIDE_S, Span, finding, missing_finding, outside_finding, overlap_findings
from prep.nwb.chunks import read_place
from prep.nwb.clocks import read_pulses
from prep.nwb.file import get, is_dataset
from prep.nwb.inventory import COLUMN_TYPES, Draft, Survey, snake_case
from prep.nwb.spikes import SpikeReader
from prep.plan import Finding, PrepError
from prep.sync import ClockMap, is_constant, match_clocks

Seconds = npt.NDArray[np.float64]

BLOCK_ROWS = 100_000
MAX_VALUES = 2_000_000  # of one stream that are looked at
FEWEST_TOKENS = 40  # of each stretch in which signals are compared
NUM_STRETCHES = 3
MOST_CHANNELS = 64
FEWEST_VALUES = 20  # different ones: flags that agree prove nothing
SAME_SAMPLES = 1e-4  # of a standard deviation: two signals that differ by less, all along, are one
ONE_TELLS = "Where one is hidden and the other shown, one tells the other; leave one out by the recipe's `exclude`"
MIN_EVENTS = 10
MAX_EVENTS = 200_000
MAX_TRAINS = 20
MATCHED_SHARE = 0.7  # of both trains: rewards that follow some of the licks are no record of the licks
OVERLAP_SHARE = 0.5  # of the time of a train that its other record takes, too, if their clocks start alike
RESIDUAL_S = 0.002  # two records of one pulse agree better than this; an animal's reaction does not
SAME_S, SAME_PPM = 1e-4, 1.0  # two trains within this are on one clock
PULSES = re.compile(r"photodiode|(?<![a-z])(ttl|sync|pulses?|barcode|strobe)(?![a-z])", re.IGNORECASE)
SESSION_CLOCK = re.compile(r"photodiode|(?<![a-z])(ttl|sync|daq|ephys|nidq)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Events that could be pulses: where they are in the file, and when they were."""

    path: str
    time_s: Seconds  # (N,) increasing
    table: str  # the object that it was read from: its events are all on one clock

    @property
    def is_named_so(self) -> bool:
        """Whether the name says that these are pulses."""
        return PULSES.search(snake_case(self.path.rsplit("/", 1)[-1])) is not None

    @property
    def rank(self) -> tuple[bool, str]:
        """In order of how likely they are on the session's clock."""
        return SESSION_CLOCK.search(snake_case(self.path.rsplit("/", 1)[-1])) is None, self.path


def audit_session(survey: Survey, drafts: list[Draft]) -> None:
    """Add what the streams say about each other to the survey's findings."""
    spans = {draft.stream.spec.origin or draft.stream.spec.name: (draft.first_s, draft.last_s) for draft in drafts}
    survey.findings.extend(overlap_findings(spans))
    for draft in drafts:
        if draft.stream.spec.kind == "counts":
            _audit_spikes(survey, draft, spans)
        if draft.stream.spec.kind == "trace":
            _audit_samples(survey, draft)
    survey.findings.extend(_same_events(list(_trains(survey, drafts))))
    survey.findings.extend(_same_samples([draft for draft in drafts if draft.stream.spec.modality == "behavior"]))
    _audit_pulses(survey, drafts)


def _audit_spikes(survey: Survey, draft: Draft, spans: dict[str, Span]) -> None:
    """Spikes outside of all other streams and of the interval tables."""
    origin = draft.stream.spec.origin
    others = [span for path, span in spans.items() if path != origin] + list(_interval_spans(survey))
    reader = draft.stream.reader
    if not others or not isinstance(reader, SpikeReader):
        return
    first_s, last_s = min(span[0] for span in others), max(span[1] for span in others)
    if first_s - OUTSIDE_S <= draft.first_s and draft.last_s <= last_s + OUTSIDE_S:
        return
    num_spikes = num_outside = 0
    for time_s, _ in reader.times.blocks(survey.file):
        num_spikes += len(time_s)
        num_outside += int(((time_s < first_s - OUTSIDE_S) | (time_s > last_s + OUTSIDE_S)).sum())
    survey.findings.extend(outside_finding(f"{origin}/spike_times", num_spikes, num_outside, (first_s, last_s)))


def _interval_spans(survey: Survey) -> Iterator[Span]:
    """First and last time of each interval table."""
    for node in survey.nodes.values():
        if node.neurodata_type != "TimeIntervals":
            continue
        columns: list[Any] = [get(survey.file, f"{node.path}/{name}") for name in ("start_time", "stop_time")]
        if all(is_dataset(column) and column.ndim == 1 and column.dtype.kind in "fiu" for column in columns):
            times = np.concatenate([column[()] for column in columns]).astype(np.float64)
            if np.isfinite(times).any():
                yield float(np.nanmin(times)), float(np.nanmax(times))


def _audit_samples(survey: Survey, draft: Draft) -> None:
    """The share of samples that are not numbers; of long recordings it is an estimate."""
    origin = draft.stream.spec.origin
    data: Any = get(survey.file, f"{origin}/data") if origin else None
    if not is_dataset(data) or data.dtype.kind != "f" or data.ndim not in (1, 2) or data.size == 0:
        return
    num_missing = num_samples = 0
    for place in _looked_at(data):
        block = read_place(data, place)
        num_missing += int((~np.isfinite(block)).sum())
        num_samples += block.size
    survey.findings.extend(missing_finding(origin, num_missing, num_samples, num_samples == data.size))


def _looked_at(data: Any) -> Iterator[tuple[slice, ...]]:
    """All of a small dataset; of a large one whole chunks at even distances: half a chunk costs as much as a whole."""
    if data.size <= MAX_VALUES:
        yield tuple(slice(0, length) for length in data.shape)
        return
    edges = data.chunks or (BLOCK_ROWS, *data.shape[1:])
    grid = [-(-size // edge) for size, edge in zip(data.shape, edges, strict=True)]
    num_chunks = max(1, min(int(np.prod(grid)), MAX_VALUES // int(np.prod(edges))))
    for number in np.unique(np.linspace(0, np.prod(grid) - 1, num_chunks).astype(np.int64)):
        index = np.unravel_index(number, grid)
        yield tuple(slice(int(i) * edge, (int(i) + 1) * edge) for i, edge in zip(index, edges, strict=True))


# ---------------------------------------------------------------- the same numbers twice


def _same_events(trains: list[Train]) -> Iterator[Finding]:
    """Trains of events of different objects with the same times: a cue of its own, and as a column of the trials."""
    first: dict[bytes, Train] = {}
    for train in sorted(trains, key=lambda item: item.path):
        other = first.setdefault(train.time_s.tobytes(), train)
        if other.table != train.table:
            message = f"its {len(train.time_s):,} events have the times of {other.path}. {ONE_TELLS}"
            yield finding("same-data", train.path, message, num_same=float(len(train.time_s)))


def _same_samples(drafts: list[Draft]) -> Iterator[Finding]:
    """Channels of different streams on one clock that are one signal, perhaps in two units: compared in stretches."""
    on_clock: dict[tuple[int, ...], list[Draft]] = {}
    for draft in drafts:
        spec, start_ns = draft.stream.spec, draft.stream.start_ns
        if spec.kind == "trace" and spec.num_tokens >= FEWEST_TOKENS and spec.num_sources <= MOST_CHANNELS:
            clock = (spec.num_tokens, spec.samples_per_token, int(start_ns[0]), int(start_ns[-1]))
            on_clock.setdefault(clock, []).append(draft)
    for members in on_clock.values():
        if len(members) > 1:
            yield from _alike(members)


def _alike(members: list[Draft]) -> Iterator[Finding]:
    """The findings among streams on one clock, one for each stream that repeats an earlier one.

    Signals that are one are alike in their first sample, too: so only few pairs have to be compared.
    """
    channels = [(number, name, values) for number, draft in enumerate(members) for name, values in _normal(draft)]
    channels.sort(key=lambda channel: (float(np.abs(channel[2][0])), channel[0]))
    found: dict[int, tuple[int, str, str]] = {}
    for place, (number, name, values) in enumerate(channels):
        for other, other_name, theirs in channels[place + 1 :]:
            if np.abs(theirs[0]) - np.abs(values[0]) > SAME_SAMPLES:
                break
            if other != number and _is_one(values, theirs):
                pair = (number, name, other_name) if number < other else (other, other_name, name)
                later = max(number, other)
                found[later] = min(found.get(later, pair), pair)
    for later, (earlier, earlier_name, name) in sorted(found.items()):
        spec = members[earlier].stream.spec
        message = f"{name} is {earlier_name} of {spec.origin}, but for its unit. {ONE_TELLS}"
        yield finding("same-data", members[later].stream.spec.origin, message)


def _is_one(values: Seconds, theirs: Seconds) -> bool:
    """Whether two signals differ by a factor, which may be negative, and an offset alone."""
    if values.shape != theirs.shape:
        return False
    return any(bool((np.abs(values - sign * theirs) < SAME_SAMPLES).all()) for sign in (1, -1))


def _normal(draft: Draft) -> Iterator[tuple[str, Seconds]]:
    """Each channel's values in some stretches (n,), less their mean and over their deviation; constant ones aside."""
    spec = draft.stream.spec
    begins = np.linspace(0, spec.num_tokens - FEWEST_TOKENS, NUM_STRETCHES).astype(np.int64).tolist()
    parts = [draft.stream.reader.read(begin, begin + FEWEST_TOKENS) for begin in begins]
    samples = np.concatenate(parts).transpose(1, 0, 2).reshape(spec.num_sources, -1).astype(np.float64)
    for name, values in zip(spec.channels, samples, strict=True):
        given = values[np.isfinite(values)]
        if len(np.unique(given)) >= FEWEST_VALUES:
            yield name, (given - given.mean()) / given.std()


# ---------------------------------------------------------------- pulses


def _audit_pulses(survey: Survey, drafts: list[Draft]) -> None:
    """Find trains of events that are one train of pulses on two clocks.

    Each train is compared with those that were found to be no record of an earlier one; pairs of the recipe's `sync`
    are known already.
    """
    known = {frozenset((sync.reference.strip("/"), sync.pulses.strip("/"))) for sync in survey.recipe.sync}
    distinct: list[Train] = []
    for train in sorted(_trains(survey, drafts), key=lambda item: item.rank)[:MAX_TRAINS]:
        for reference in distinct:
            if reference.table == train.table:
                continue
            if frozenset((reference.path, train.path)) in known:
                break
            found = _same_pulses(reference, train)
            if found is not None:
                survey.findings.extend(_drift(reference, train, found))
                break
        else:
            distinct.append(train)


def _trains(survey: Survey, drafts: list[Draft]) -> Iterator[Train]:
    """Event streams type by type, and series that are named like pulses."""
    seen = set()
    for draft in drafts:
        spec = draft.stream.spec
        if spec.kind == "event" and draft.time_s is not None and spec.origin:
            seen.add(spec.origin)
            types = draft.stream.types if draft.stream.types is not None else np.zeros(len(draft.time_s), np.int32)
            for number in np.unique(types):
                name = spec.types[number] if spec.types and spec.types[number] != spec.name else ""
                path = f"{spec.origin}/{name}" if name else spec.origin
                table = _table(survey, spec.origin)
                yield from _long_enough(path, np.unique(draft.time_s[types == number]), table)
    for node in survey.nodes.values():
        if node.path in seen or not node.is_group or not PULSES.search(snake_case(node.name)):
            continue
        try:
            yield from _long_enough(node.path, read_pulses(survey, node.path), node.path)
        except PrepError:
            continue  # a container, or a series without pulses


def _table(survey: Survey, origin: str) -> str:
    """The table that a column of times belongs to; other objects are their own."""
    node = survey.nodes.get(origin)
    return node.parent if node is not None and node.neurodata_type in COLUMN_TYPES else origin


def _long_enough(path: str, time_s: Seconds, table: str) -> Iterator[Train]:
    if MIN_EVENTS <= len(time_s) <= MAX_EVENTS:
        yield Train(path=path, time_s=time_s, table=table)


def _same_pulses(reference: Train, other: Train) -> ClockMap | None:
    """The map between two trains, None where they are not records of the same pulses.

    Constant intervals prove nothing. Where the trains do not overlap, a stimulus may have been shown again: then only
    names tell that both are records of pulses.
    """
    if is_constant(reference.time_s) or is_constant(other.time_s):
        return None
    begin_s, end_s = max(reference.time_s[0], other.time_s[0]), min(reference.time_s[-1], other.time_s[-1])
    is_apart = end_s - begin_s < OVERLAP_SHARE * (reference.time_s[-1] - reference.time_s[0])
    if is_apart and not (reference.is_named_so and other.is_named_so):
        return None
    if min(len(reference.time_s), len(other.time_s)) < MATCHED_SHARE * max(len(reference.time_s), len(other.time_s)):
        return None
    try:
        found = match_clocks(reference.time_s, other.time_s)
    except PrepError:
        return None  # no map between them: not two records of one train
    num_matched = len(found.other_s)
    if num_matched < max(MIN_EVENTS, MATCHED_SHARE * max(len(reference.time_s), len(other.time_s))):
        return None
    return found if np.median(np.abs(found.residuals())) <= RESIDUAL_S else None


def _drift(reference: Train, other: Train, found: ClockMap) -> Iterator[Finding]:
    """The finding, unless both trains are on one clock."""
    drift_ppm, offset_s, from_line_s = found.line()
    if abs(drift_ppm) <= SAME_PPM and abs(offset_s) <= SAME_S + float(np.median(np.abs(from_line_s))):
        return
    message = (
        f"{len(found.other_s)} of its {len(other.time_s)} events have the intervals of {reference.path}, "
        f"{offset_s * 1e3:+.4g} ms later and on a clock that runs {drift_ppm:+.3g} ppm fast. If both record the same "
        "pulses, list them in the recipe's `sync`"
    )
    yield finding("clock-drift", other.path, message, **found.numbers())
