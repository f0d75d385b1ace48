"""What lies inside the session's invalid times is missing: bins of spikes that touch them, samples inside them.

In: drafts of streams, and the interval tables. Out: the same drafts, whose readers leave out what is invalid.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.nwb.inventory import Draft
from prep.plan import IntervalTable, PlannedStream, SequentialReader, TokenReader
from prep.settings import NO_TIME
from prep.store import FILLS

Index = npt.NDArray[np.int64]
INVALID_TABLE = "invalid_times"
LAST_TIME = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class ValidTokens:
    """A TokenReader that gives another's tokens, with the fill value where they are invalid."""

    reader: TokenReader
    token: Index  # (m,) that have something invalid, in order
    start_ns: Index  # (m,) of these
    offset_ns: Index  # (S,)
    sample_ns: int
    lasts_ns: int  # what a sample covers: a bin its width, any other a moment
    spans: Index  # (M, 2) invalid [start, stop), in order, apart from each other
    fill: float

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Values of tokens [start, stop) as (stop - start, S, P)."""
        return self._valid(start, stop, self.reader.read(start, stop))

    def _valid(self, start: int, stop: int, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        begin, end = np.searchsorted(self.token, [start, stop])
        if begin == end:
            return values
        values = values.copy()
        place = np.arange(values.shape[2]) * self.sample_ns
        time_ns = self.start_ns[begin:end, None, None] + self.offset_ns[:, None] + place
        rows = self.token[begin:end] - start
        values[rows] = np.where(touches(time_ns, self.lasts_ns, self.spans), self.fill, values[rows])
        return values


@dataclass(frozen=True, kw_only=True)
class ValidSequence(ValidTokens):
    """The same of a reader that reads its recording once (SequentialReader)."""

    @property
    def is_divisible(self) -> bool:
        """As the reader's own."""
        assert isinstance(self.reader, SequentialReader)
        return self.reader.is_divisible

    def read_once(self, edges: Sequence[int], scratch: Path) -> Iterator[npt.NDArray[Any]]:
        """Values of tokens [edges[i], edges[i + 1]) in turn."""
        assert isinstance(self.reader, SequentialReader)
        pieces = zip(itertools.pairwise(edges), self.reader.read_once(edges, scratch), strict=True)
        for (start, stop), values in pieces:
            yield self._valid(start, stop, values)


def with_invalid(drafts: list[Draft], intervals: dict[str, IntervalTable]) -> list[Draft]:
    """Drafts whose `counts` and `trace` streams miss what the table `invalid_times` (NWB: /intervals) names.

    Events and frames are left alone: they happened. A row without a start or a stop is open at that side.
    """
    table = intervals.get(INVALID_TABLE)
    if table is None:
        return drafts
    spans = invalid_spans(table)
    return [replace(draft, stream=_valid(draft.stream, spans, _is_binned(draft))) for draft in drafts]


def _is_binned(draft: Draft) -> bool:
    """Whether a sample stands for a stretch of time, as counts and band power do, and not for a moment."""
    return draft.stream.spec.kind == "counts" or (draft.units is not None and "lfp" in draft.units.kind)


def invalid_spans(table: IntervalTable) -> Index:
    """Spans (M, 2) of a table in ns, in order and joined where they meet."""
    start_ns = table.start_ns
    stop_ns = np.where(table.stop_ns == NO_TIME, LAST_TIME, table.stop_ns)
    order = np.argsort(start_ns, kind="stable")
    order = order[start_ns[order] < stop_ns[order]]
    joined: list[list[int]] = []
    for begin, end in zip(start_ns[order].tolist(), stop_ns[order].tolist(), strict=True):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(end, joined[-1][1])
        else:
            joined.append([begin, end])
    return np.array(joined, np.int64).reshape(-1, 2)


def touches(time_ns: Index, lasts_ns: int, spans: Index) -> npt.NDArray[np.bool_]:
    """Whether [time, time + lasts) has a part in one of the spans (M, 2); the shape of time_ns."""
    if len(spans) == 0:
        return np.zeros(time_ns.shape, np.bool_)
    last = np.searchsorted(spans[:, 0], time_ns + lasts_ns, side="left") - 1  # the last span that starts before the end
    inside: npt.NDArray[np.bool_] = (last >= 0) & (spans[last, 1] > time_ns)
    return inside


def _valid(stream: PlannedStream, spans: Index, is_binned: bool) -> PlannedStream:
    spec = stream.spec
    if spec.kind not in ("counts", "trace"):
        return stream
    lasts_ns = spec.sample_ns if is_binned else 1
    offset_ns = np.zeros(spec.num_sources, np.int64) if stream.offset_ns is None else stream.offset_ns
    reach_ns = (spec.samples_per_token - 1) * spec.sample_ns + int(np.ptp(offset_ns)) + lasts_ns
    token = np.flatnonzero(touches(stream.start_ns + int(offset_ns.min()), reach_ns, spans))
    if len(token) == 0:
        return stream
    kind = ValidSequence if isinstance(stream.reader, SequentialReader) else ValidTokens
    reader = kind(
        reader=stream.reader,
        token=token,
        start_ns=stream.start_ns[token],
        offset_ns=offset_ns,
        sample_ns=spec.sample_ns,
        lasts_ns=lasts_ns,
        spans=spans,
        fill=FILLS[spec.kind],
    )
    return replace(stream, reader=reader)
