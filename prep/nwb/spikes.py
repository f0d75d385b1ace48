"""Spike times of a table of units: read in bulk and in blocks, counted into tokens.

In: the datasets spike_times and spike_times_index. Out: SpikeTimes, SpikeReader.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from prep.nwb.chunks import read_rows
from prep.nwb.file import holding, open_file
from prep.settings import BIN_NS, COUNT_MAX, to_ns
from prep.sync import ClockMap
from prep.tokens import BINS_PER_TOKEN, CountTokens, Observed

Seconds = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

COUNTED_BYTES = 64 * 2**20  # of counts that are held at once
BLOCK_SPIKES = 2**17  # held at once: 1 MiB of times, so that a dozen temporaries stay in the cache


@dataclass(frozen=True, kw_only=True)
class SpikeTimes:
    """Where the spikes of R rows of a table lie in the file, which rows are read, and how their times are repaired."""

    path: Path
    dataset: str  # path of spike_times in the file
    stops: Index  # (R,) end of each row's spikes
    num_units: int  # U, rows that are read
    in_order: Bool | None = None  # (U,) whether a unit's spikes stand in order of time; None: nothing is known yet
    source: npt.NDArray[np.int32] | None = None  # (R,) unit of each row, -1 = left out; None: all are read
    divisor: float = 1.0  # 1000 where the file has milliseconds
    drop_minus_one: bool = False  # -1 is a placeholder
    low_s: float = -np.inf  # spikes before or after are of no session
    high_s: float = np.inf
    to_session: ClockMap | None = None  # map of times of another clock to the session's; None: the same clock

    def blocks(self, file: Any) -> Iterator[tuple[Seconds, Index]]:
        """Times (n,) and units (n,) of the spikes, block by block, in order of unit."""
        for time_s, unit in self.recorded(file):
            yield self._spikes(time_s, unit)

    def blocks_in_order(self, file: Any) -> Iterator[tuple[Seconds, Index, int]]:
        """Times (n,) and units (n,) in order of unit, and how many of the first were given before.

        Units that are `in_order` may be cut: their next part begins with their last spikes, COUNT_MAX at most. Others
        come whole.
        """
        time_s, unit = np.zeros(0), np.zeros(0, np.int64)
        for begin, end in self._slices():
            is_cut = begin > 0 and begin not in self.stops
            old = slice(-COUNT_MAX, None) if is_cut and len(unit) else slice(0)
            old_s, old_unit = time_s[old], unit[old]
            time_s, unit = self._spikes(*self._recorded(file[self.dataset], begin, end))
            is_more = old_unit == unit[0] if len(unit) else np.zeros(len(old_unit), np.bool_)
            time_s, unit = np.concatenate([old_s[is_more], time_s]), np.concatenate([old_unit[is_more], unit])
            yield time_s, unit, int(is_more.sum())

    def recorded(self, file: Any) -> Iterator[tuple[Seconds, Index]]:
        """Times (n,) and units (n,) with what is no spike, block by block."""
        num_spikes = int(self.stops[-1]) if len(self.stops) else 0
        for begin in range(0, num_spikes, BLOCK_SPIKES):
            yield self._recorded(file[self.dataset], begin, min(begin + BLOCK_SPIKES, num_spikes))

    def _recorded(self, data: Any, begin: int, end: int) -> tuple[Seconds, Index]:
        edges = np.clip(self.stops, begin, end) - begin
        unit = np.repeat(np.arange(len(self.stops)), np.diff(edges, prepend=0))
        time_s = read_rows(data, begin, end).astype(np.float64, copy=False)
        if self.source is not None:
            unit = self.source[unit].astype(np.int64)
            time_s, unit = time_s[unit >= 0], unit[unit >= 0]
        if self.drop_minus_one:
            time_s = np.where(time_s == -1, np.nan, time_s)
        if self.divisor != 1:
            time_s = time_s / self.divisor
        return time_s if self.to_session is None else self.to_session.to_session(time_s), unit

    def _slices(self) -> Iterator[tuple[int, int]]:
        """Stretches of spike_times that cut no row but those in order."""
        num_spikes = int(self.stops[-1]) if len(self.stops) else 0
        begin = 0
        while begin < num_spikes:
            end = min(begin + BLOCK_SPIKES, num_spikes)
            row = int(np.searchsorted(self.stops, end, side="right"))  # where `end` lies
            row_begin = int(self.stops[row - 1]) if row else 0
            if end < num_spikes and row_begin < end and not self._is_in_order(row):
                end = row_begin if row_begin > begin else int(self.stops[row])
            yield begin, end
            begin = end

    def _is_in_order(self, row: int) -> bool:
        unit = row if self.source is None else int(self.source[row])
        return self.in_order is not None and (unit < 0 or bool(self.in_order[unit]))

    def _spikes(self, time_s: Seconds, unit: Index) -> tuple[Seconds, Index]:
        if len(time_s) and self.is_spike(np.array([time_s.min(), time_s.max()])).all():  # as in most blocks
            return time_s, unit
        keep = self.is_spike(time_s)
        return (time_s, unit) if keep.all() else (time_s[keep], unit[keep])

    def is_spike(self, time_s: Seconds) -> Bool:
        """Which recorded times (n,) are spikes."""
        valid: Bool = np.isfinite(time_s) & (time_s >= self.low_s) & (time_s <= self.high_s)
        return valid


@dataclass(frozen=True, kw_only=True)
class SpikeReader:
    """Counts spikes of the tokens asked for; what was not observed is missing."""

    times: SpikeTimes
    first_token: int
    observed: Observed | None = None  # None: all units throughout

    def read(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Counts of tokens [start, stop) as (stop - start, U, P)."""
        return self._seen(self._count(start, stop), start, stop)

    def _count(self, start: int, stop: int) -> CountTokens:
        tokens = CountTokens(self.first_token + start, stop - start, self.times.num_units)
        with holding((self.times.path, self.times.dataset)), open_file(self.times.path) as file:
            for time_s, unit in self.times.blocks(file):
                tokens.add(to_ns(time_s), unit)
        return tokens

    @property
    def is_divisible(self) -> bool:
        """Spikes lie unit by unit: any piece needs all of them."""
        return False

    def read_once(self, edges: Sequence[int], scratch: Path) -> Iterator[npt.NDArray[np.uint8]]:
        """Counts of tokens [edges[i], edges[i + 1]) in turn; of many the spikes wait in files, 4 bytes each."""
        pieces = list(itertools.pairwise(edges))
        if (edges[-1] - edges[0]) * BINS_PER_TOKEN * self.times.num_units <= COUNTED_BYTES:
            tokens = self._count(edges[0], edges[-1])
            for start, stop in pieces:
                yield self._seen(tokens, start, stop)
            return
        scratch.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(scratch / str(number), "wb")) for number in range(len(pieces))]
            stack.enter_context(holding((self.times.path, self.times.dataset)))
            recording = stack.enter_context(open_file(self.times.path))
            for time_s, unit in self.times.blocks(recording):
                self._spill(to_ns(time_s), unit, np.asarray(edges), files)
        for number, (start, stop) in enumerate(pieces):
            tokens = CountTokens(self.first_token + start, stop - start, self.times.num_units)
            tokens.add_places(np.fromfile(scratch / str(number), np.uint32))
            (scratch / str(number)).unlink()
            yield self._seen(tokens, start, stop)

    def _spill(self, time_ns: Index, unit: Index, edges: Index, files: Sequence[BinaryIO]) -> None:
        """Append the places of spikes (n,) of units (n,) in their pieces to the files of these."""
        bins = time_ns // BIN_NS - self.first_token * BINS_PER_TOKEN
        borders = edges * BINS_PER_TOKEN
        piece = np.searchsorted(borders, bins, side="right") - 1
        inside = (piece >= 0) & (piece < len(files))
        own = np.where(inside, piece, 0)
        place = unit * np.diff(borders)[own] + bins - borders[own]
        order = np.argsort(np.where(inside, piece, len(files)).astype(np.uint16), kind="stable")  # a radix sort
        bounds = np.searchsorted(piece[order][: int(inside.sum())], np.arange(len(files) + 1))
        ordered = place[order].astype(np.uint32)
        for file, (first, stop) in zip(files, itertools.pairwise(bounds.tolist()), strict=True):
            file.write(ordered[first:stop].tobytes())

    def _seen(self, tokens: CountTokens, start: int, stop: int) -> npt.NDArray[np.uint8]:
        values = tokens.values(self.first_token + start, self.first_token + stop)
        if self.observed is not None:
            self.observed.hide(values, self.first_token + start)
        return values
