"""The stretch of a session that its overview shows: which 24 seconds, and what each stream holds in them.

In: an open session. Out: a Stretch in session seconds, and the few sources of each stream that a picture has room for,
read one chunk at a time.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.settings import BIN_NS, NO_TIME, TOKEN_NS, to_ns
from prep.store import Session, Stream

STRETCH_NS = 24_000_000_000
CANDIDATES = 64  # places of each stream at which a stretch may begin
MAX_TOKENS = 50_000  # of one stream in a stretch: 2 kHz, one sample to the token
ENOUGH_EVENTS = 6

Floats = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stretch:
    """[start_ns, stop_ns) on the session's clock."""

    start_ns: int
    stop_ns: int

    @property
    def limits_s(self) -> tuple[float, float]:
        """Start and stop in session seconds."""
        return self.start_ns / 1e9, self.stop_ns / 1e9

    def tokens(self, stream: Stream) -> slice:
        """The tokens that start inside, and one before them that may reach inside; at most MAX_TOKENS."""
        inside = stream.tokens(self.start_ns, self.stop_ns)
        first = max(0, inside.start - 1) if stream.spec.kind != "event" else inside.start
        return slice(first, min(inside.stop, first + MAX_TOKENS))


def choose_stretch(streams: Sequence[Stream]) -> Stretch | None:
    """The stretch in which most streams have data; of equals the one in the middle. None where nothing has a token."""
    starts = [stream.start_ns for stream in streams if len(stream.start_ns)]
    if not starts:
        return None
    first, last = min(int(s[0]) for s in starts), max(int(s[-1]) for s in starts)
    picks = [s[np.linspace(0, len(s) - 1, min(CANDIDATES, len(s))).astype(np.int64)] for s in starts]
    anchors = np.unique(np.concatenate(picks))
    latest = max(first, last + TOKEN_NS - STRETCH_NS)
    begins = np.unique(np.clip(np.concatenate([anchors, anchors - STRETCH_NS // 2]), first, latest))
    score = sum((_fullness(stream, begins) for stream in streams), np.zeros(len(begins)))
    best = begins[score >= score.max() - 0.02 * len(streams)]
    begin = int(best[len(best) // 2])
    ends = [_end(stream, begin) for stream in streams]
    return Stretch(begin, min(begin + STRETCH_NS, max(begin + TOKEN_NS, *ends)))


def _end(stream: Stream, begin: int) -> int:
    """Where the last token ends that starts in the STRETCH_NS from `begin`; `begin` where there is none."""
    inside = stream.tokens(begin, begin + STRETCH_NS)
    is_empty = inside.stop == inside.start
    return begin if is_empty else int(stream.start_ns[inside.stop - 1]) + stream.spec.duration_ns


def _fullness(stream: Stream, begins: Index) -> Floats:
    """How much of the stretches that begin there a stream fills: 0 to 1, for each of them."""
    inside = np.searchsorted(stream.start_ns, begins + STRETCH_NS) - np.searchsorted(stream.start_ns, begins)
    if stream.spec.kind == "event":
        return np.minimum(1.0, inside / ENOUGH_EVENTS)
    enough = max(1.0, min(len(stream.start_ns), STRETCH_NS / max(1, stream.spec.duration_ns)))
    return np.minimum(1.0, inside / enough)


def read_sources(stream: Stream, tokens: slice, sources: Index) -> npt.NDArray[Any]:
    """Values (k, s, P) of some sources, one chunk of the store after the other: the others are never held at once."""
    step = stream.spec.chunk_tokens
    edges = [tokens.start, *range((tokens.start // step + 1) * step, tokens.stop, step), tokens.stop]
    parts = [stream.read(slice(a, b))[:, sources] for a, b in itertools.pairwise(edges) if a < b]
    return np.concatenate(parts) if parts else stream.read(slice(0, 0))[:, sources]


def count_image(stream: Stream, stretch: Stretch, sources: Index) -> Floats:
    """Spikes per bin as (s, bins) over the stretch; NaN where nothing was recorded."""
    tokens = stretch.tokens(stream)
    values = read_sources(stream, tokens, sources)
    num_bins = -(-(stretch.stop_ns - stretch.start_ns) // BIN_NS)
    image = np.full((len(sources), num_bins), np.nan)
    sample_ns = max(1, stream.spec.sample_ns)
    starts = stream.start_ns[tokens, None] + np.arange(values.shape[2]) * sample_ns
    place = (starts - stretch.start_ns) // BIN_NS
    inside = (place >= 0) & (place < num_bins)
    found = values.transpose(0, 2, 1)[inside].astype(np.float64)
    found[found == stream.rows.spec.fill] = np.nan
    image[:, place[inside]] = found.T
    return image


def trace_samples(stream: Stream, tokens: slice, sources: Index) -> tuple[Floats, Floats]:
    """Samples of some sources: times in session seconds (n, s), values (n, s); a gap in time is a row of NaN."""
    values = read_sources(stream, tokens, sources).astype(np.float64)
    k, s, p = values.shape
    offset_ns = np.zeros(s, np.int64) if stream.offset_ns is None else stream.offset_ns[sources]
    samples = stream.start_ns[tokens, None] + np.arange(p) * stream.spec.sample_ns
    time_s = (samples.reshape(-1, 1) + offset_ns) / 1e9
    flat = values.transpose(0, 2, 1).reshape(k * p, s)
    if k > 1:
        steps = np.diff(stream.start_ns[tokens])
        after_gap = (np.flatnonzero(steps > 3 * max(stream.spec.duration_ns, np.median(steps))) + 1) * p
        time_s = np.insert(time_s, after_gap, np.nan, axis=0)
        flat = np.insert(flat, after_gap, np.nan, axis=0)
    return time_s, flat


def trace_image(stream: Stream, stretch: Stretch, sources: Index, num_columns: int) -> Floats:
    """Traces as (s, num_columns): in each column the last sample before its middle, NaN where that is long ago."""
    time_s, values = trace_samples(stream, stretch.tokens(stream), sources)
    image = np.full((len(sources), num_columns), np.nan)
    start_s, stop_s = stretch.limits_s
    middle = start_s + (np.arange(num_columns) + 0.5) * (stop_s - start_s) / num_columns
    for row in range(len(sources)):
        is_time = np.isfinite(time_s[:, row])
        times, samples = time_s[is_time, row], values[is_time, row]
        if len(times):
            at = np.searchsorted(times, middle, side="right") - 1
            fresh = (at >= 0) & (middle - times[at] < 3 * max(stream.spec.sample_ns, stream.spec.duration_ns) / 1e9)
            image[row, fresh] = samples[at[fresh]]
    return image


def frame_at(stream: Stream, moment_s: float) -> int:
    """Index of the frame that is on the screen then; -1 where there is none."""
    moment_ns = int(to_ns(moment_s))
    token = int(np.searchsorted(stream.start_ns, moment_ns, side="right")) - 1
    if token < 0 or moment_ns >= int(stream.start_ns[token]) + 3 * max(1, stream.spec.duration_ns):
        return -1
    return int(stream.read(slice(token, token + 1))[0, 0, 0])


def bars_inside(session: Session, name: str, stretch: Stretch) -> Floats:
    """Rows (start_s, stop_s) of a table of intervals that touch the stretch; a row without a stop is a moment."""
    start, stop = (session.array(f"intervals/{name}/{edge}_ns") for edge in ("start", "stop"))
    stop = np.where(stop == NO_TIME, start, stop)
    touches = (start != NO_TIME) & (start < stretch.stop_ns) & (stop >= stretch.start_ns)
    limits = np.stack([start[touches], stop[touches]], axis=1)
    inside: Floats = np.clip(limits, stretch.start_ns, stretch.stop_ns) / 1e9
    return inside
