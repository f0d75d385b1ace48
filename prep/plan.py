"""What becomes of one NWB file: the plan that reading makes and that ingest carries out.

In: nothing (types only). Out: SessionPlan, small and picklable: clocks and paths, never the recording's samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from prep.store import StreamSpec

Array = npt.NDArray[Any]


class PrepError(ValueError):
    """A file cannot be used; the message is one line that a physiologist understands."""


class BrokenObject(PrepError):
    """An object contradicts itself or cannot be read: it is refused by name, the rest of the file goes on."""


class TokenReader(Protocol):
    """Reads tokens from the recording; picklable, holds a path and never an open file."""

    def read(self, start: int, stop: int) -> Array:
        """Values of tokens [start, stop) as (stop - start, S, P) in the stream's dtype, fill where missing."""
        ...


@runtime_checkable
class SequentialReader(Protocol):
    """A TokenReader that reads the pieces of a run cheaper than one by one.

    `is_divisible`: whether runs of pieces can be read apart; false where each would read the whole recording.
    """

    @property
    def is_divisible(self) -> bool:
        """Whether several tasks may share the stream."""
        ...

    def read_once(self, edges: Sequence[int], scratch: Path) -> Iterator[Array]:
        """Values of tokens [edges[i], edges[i + 1]) in turn, as `read` gives them.

        What was read and does not fit in memory waits in files in the folder `scratch`.
        """
        ...


class FrameReader(Protocol):
    """Reads stimulus pixels; picklable, holds a path and never an open file."""

    def read(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Frames [start, stop) as (stop - start, H, W[, C])."""
        ...


@dataclass(frozen=True, kw_only=True)
class Found:
    """One row of the coverage table: an object of the file, and what became of it."""

    path: str
    neurodata_type: str
    used_as: str | None  # the stream or table that it became; None: skipped
    reason: str = ""  # why it was skipped, or what was repaired


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the clock audit."""

    code: str  # e.g. wrong-axis, unsorted, gaps
    path: str
    action: str  # repaired | noted | refused
    message: str
    numbers: dict[str, float | list[float]] = field(default_factory=dict)  # measured; keys carry units: drift_ppm


@dataclass(frozen=True, kw_only=True)
class PlannedStream:
    """A stream to be written: its schema, clock and reader."""

    spec: StreamSpec
    start_ns: npt.NDArray[np.int64]  # (K,)
    reader: TokenReader
    offset_ns: npt.NDArray[np.int64] | None = None  # (S,)
    types: npt.NDArray[np.int32] | None = None  # (K,) of an event stream: index into spec.types


@dataclass(frozen=True, kw_only=True)
class PlannedStimulus:
    """Pixels to be written once per store; `digest` is of their content, and names them."""

    digest: str
    shape: tuple[int, ...]  # (F, H, W[, C])
    reader: FrameReader


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units of a session, in the order of their streams: U rows."""

    unit_key: Sequence[str]  # dataset/session/unit
    kind: Sequence[str]  # one of settings.UNIT_KINDS
    region: Sequence[str]  # "" = unknown
    quality: Sequence[str]
    xyz_um: npt.NDArray[np.float32]  # (U, 3), NaN = unknown
    depth_um: npt.NDArray[np.float32] | None = None  # (U,), NaN = unknown; None: unknown for all
    waveform_ms: npt.NDArray[np.float32] | None = None  # (U,) trough to peak
    spike_features: npt.NDArray[np.float32] | None = None  # (U, 2) settings.SPIKE_FEATURES of the train split


@dataclass(frozen=True, kw_only=True)
class IntervalTable:
    """Trials, epochs, presentations: N rows."""

    start_ns: npt.NDArray[np.int64]  # (N,), NO_TIME = not given
    stop_ns: npt.NDArray[np.int64]  # (N,)
    columns: dict[str, Array | list[str]] = field(default_factory=dict)  # float64 (N,) or N strings


@dataclass(frozen=True, kw_only=True)
class SessionPlan:
    """Everything about one session but its samples."""

    dataset_id: str
    session_id: str
    subject_id: str
    source: Path  # the file; of joined files the first
    licence: str
    units: Units
    streams: tuple[PlannedStream, ...]
    stimuli: tuple[PlannedStimulus, ...]
    intervals: dict[str, IntervalTable]
    splits: tuple[tuple[int, int, str], ...]  # [start_ns, stop_ns), label; in order of time
    coverage: tuple[Found, ...]
    findings: tuple[Finding, ...]

    @property
    def refused(self) -> tuple[Finding, ...]:
        """Objects that are broken and were left out, though the file is in the store."""
        return tuple(finding for finding in self.findings if finding.action == "refused")
