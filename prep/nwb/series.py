"""Series of numbers on a clock: data as (samples, columns) whatever the file's axis order, cut into tokens.

In: a series of the file (data, timestamps or rate). Out: a Series; planned streams of kind `trace`.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.clock import Clock
from prep.nwb.chunks import read_place
from prep.nwb.chunks import read_rows as rows_of
from prep.nwb.clocks import read_clock
from prep.nwb.file import as_text, dataset, get, holding, is_dataset, is_text
from prep.nwb.inventory import Draft, Node, Survey
from prep.plan import PlannedStream, PrepError, Units
from prep.settings import Modality
from prep.store import StreamSpec
from prep.tokens import cos_sin, cut_samples

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
BLOCK_SAMPLES = 1_000_000
NEAR_ROWS = 4_096  # rows that are closer than this are read in one slice


@dataclass(frozen=True, kw_only=True)
class Series:
    """A series of n samples: its data as (n, C) whatever the file's axis order, and its clean clock."""

    path: str
    data: Any  # the open dataset; of a series made of several datasets the first
    datasets: tuple[str, ...]  # paths of the datasets whose columns, side by side, are the C columns
    transposed: bool
    num_columns: int
    clock: Clock
    rows: Index | None  # row of the file of each sample of the clock; None: row i
    conversion: Float64  # (C,) factor to `unit`
    offset: Float64  # (C,) added after that
    unit: str


@dataclass(frozen=True, kw_only=True)
class TraceReader:
    """Reads samples of a series and cuts them into tokens."""

    path: Path
    datasets: tuple[str, ...]
    transposed: bool
    bounds: Index | None  # (K + 1,) first sample of each token, and the end; None: token i is sample i
    samples_per_token: int
    conversion: Float64  # (C,)
    offset: Float64  # (C,)
    rows: Index | None = None
    angles_rad: Float64 | None = None  # (C,) a column's unit in radians where it is an angle, else NaN

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Values of tokens [start, stop) as (stop - start, S, P); NaN where nothing was recorded."""
        bounds = np.arange(start, stop + 1) if self.bounds is None else self.bounds[start : stop + 1]
        first, last = int(bounds[0]), int(bounds[-1])
        with holding(*((self.path, name) for name in self.datasets)) as datasets:
            parts = [self._samples(data, first, last) for data in datasets]
        samples = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        if samples.dtype in (np.float32, np.float16) and self._is_plain:
            with np.errstate(over="ignore", invalid="ignore"):  # a sum says it cheaper than a look at each sample
                is_whole = bool(np.isfinite(samples.sum()))
            if not is_whole:
                samples = np.where(np.isfinite(samples), samples, np.nan)
            return cut_samples(samples, bounds - bounds[0], self.samples_per_token)
        with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold is missing, as infinity is
            values = samples.astype(np.float64) * self.conversion + self.offset
        values[~(np.abs(values) <= np.finfo(np.float32).max)] = np.nan
        if self.angles_rad is not None:
            values = turn_angles(values, self.angles_rad)
        return cut_samples(values, bounds - bounds[0], self.samples_per_token)

    @property
    def is_divisible(self) -> bool:
        """Samples lie in order of time."""
        return True

    def read_once(self, edges: Sequence[int], scratch: Path) -> Iterator[npt.NDArray[np.float32]]:
        """Values of tokens [edges[i], edges[i + 1]) in turn; chunks that two of them share are decoded once."""
        with holding(*((self.path, name) for name in self.datasets), scratch=scratch):
            for start, stop in itertools.pairwise(edges):
                yield self.read(start, stop)

    @property
    def _is_plain(self) -> bool:
        """Whether samples are taken as they stand."""
        return self.angles_rad is None and bool((self.conversion == 1).all() and (self.offset == 0).all())

    def _samples(self, data: Any, first: int, last: int) -> Array:
        if self.rows is None:
            return read_block(data, self.transposed, first, last)
        return read_rows(data, self.transposed, self.rows[first:last])


def read_block(data: Any, transposed: bool, first: int, last: int) -> Array:
    """Rows [first, last) of a dataset as (last - first, C); `transposed`: time is its second axis."""
    block: Array = data[:, first:last].T if transposed and data.ndim == 2 else rows_of(data, first, last)
    return block.reshape(last - first, -1)


def read_rows(data: Any, transposed: bool, rows: Index) -> Array:
    """Rows (n,) of a dataset in any order as (n, C), in slices of rows that lie near each other."""
    order = np.argsort(rows, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(rows[order]) > NEAR_ROWS) + 1)
    blocks = []
    for part in parts:
        begin, end = int(rows[part[0]]), int(rows[part[-1]]) + 1
        blocks.append(read_block(data, transposed, begin, end)[rows[part] - begin])
    return np.concatenate(blocks)[np.argsort(order)]


def turn_angles(values: Float64, angles_rad: Float64) -> Float64:
    """Columns (n, C) with each angle replaced by its cos and sin, side by side: (n, C + number of angles)."""
    columns = [
        values[:, [i]] if np.isnan(unit_rad) else cos_sin(values[:, [i]] * unit_rad)
        for i, unit_rad in enumerate(angles_rad)
    ]
    return np.concatenate(columns, axis=1)


def read_series(survey: Survey, node: Node, num_columns: int | None = None) -> Series:
    """Read clock and layout of a series. Raises PrepError (the reason to skip it).

    num_columns: what the columns must be (the number of ROIs), None if the file does not say.
    """
    group = survey.file[node.path]
    data = dataset(group, "data")
    refuse_layout(data)
    stamps = get(group, "timestamps")
    num_times = max(stamps.shape, default=None) if is_dataset(stamps) else None
    transposed = is_transposed(survey, node.path, data.shape, num_times, num_columns)
    num_samples = data.shape[-1] if transposed else data.shape[0]
    if num_samples < 2:
        raise PrepError("it has a single sample")
    clock, rows = read_clock(survey, node.path, num_samples)
    for row in (0, num_samples - 1):  # data that cannot be read is told now, not when the session is written
        read_place(data, (row,) if data.ndim == 1 else (0, row) if transposed else (row, 0))
    conversion, offset = scaling(survey, node.path, data.size // num_samples)
    return Series(
        path=node.path,
        data=data,
        datasets=(f"{node.path}/data",),
        transposed=transposed,
        num_columns=data.size // num_samples,
        clock=clock,
        rows=rows,
        conversion=conversion,
        offset=offset,
        unit=as_text(data.attrs.get("unit", "")).strip(),
    )


def refuse_layout(data: Any) -> None:
    """Raise PrepError where a dataset is not numbers as (n,) or (n, C)."""
    if data.ndim and data.size == 0:
        raise PrepError("its data are empty")
    if is_text(data):
        raise PrepError("its data are text, not numbers")
    if data.dtype.kind not in "fiub" or data.ndim not in (1, 2):
        raise PrepError(f"its data are {data.dtype} {data.shape}, not samples x columns")


def is_transposed(
    survey: Survey, path: str, shape: tuple[int, ...], num_times: int | None, num_columns: int | None
) -> bool:
    """Whether time is the second axis of the data; the commonest mistake in NWB files."""
    if len(shape) == 1:
        return False
    num_rows, width = shape
    by_time = num_rows != num_times == width and num_columns != width
    by_columns = num_rows == num_columns != width and num_rows != num_times
    is_one_row = num_rows == 1 < width and num_times is None and num_columns is None
    if by_time or by_columns or is_one_row:
        message = f"data are {shape}: time is the second axis; it is read as {shape[::-1]}"
        survey.note("wrong-axis", path, message, "repaired")
        return True
    is_unsaid = num_times is None and num_columns is None and num_rows < width
    if num_rows == width or is_unsaid:
        survey.note("ambiguous-axis", path, f"data are {shape}: either axis could be time; the first is taken")
    return False


def scaling(survey: Survey, path: str, num_columns: int) -> tuple[Float64, Float64]:
    """Factor and offset of each column (C,) of a series, of all its attributes and its channel_conversion.

    A factor of zero or not a number would wipe the data out: it is taken as 1, and noted.
    """
    group = survey.file[path]
    attributes = group["data"].attrs
    factor = _for_columns(attributes.get("conversion", 1.0), num_columns)
    channels = get(group, "channel_conversion")
    if is_dataset(channels) and channels.shape == (num_columns,):
        factor = factor * channels[()].astype(np.float64)
    valid = np.isfinite(factor) & (factor != 0)
    if not valid.all():
        message = f"the conversion of {int((~valid).sum())} of {num_columns} columns is 0 or not a number; 1 is taken"
        survey.note("conversion", path, message, "repaired")
    return np.where(valid, factor, 1.0), np.nan_to_num(_for_columns(attributes.get("offset", 0.0), num_columns))


def _for_columns(value: Any, num_columns: int) -> Float64:
    """An attribute as (C,): one number for all columns, or one for each."""
    numbers: Float64 = np.ravel(np.asarray(value, dtype=np.float64))
    if len(numbers) not in (1, num_columns):
        raise PrepError(f"its conversion or offset has {len(numbers)} numbers for {num_columns} columns")
    return np.broadcast_to(numbers, num_columns).copy()


def scan(series: Series) -> tuple[float, float, bool]:
    """Lowest and highest value in the series' unit, and whether every column is constant or missing.

    Both are NaN where there is no value at all.
    """
    low, high = np.full(series.num_columns, np.inf), np.full(series.num_columns, -np.inf)
    num_samples = series.data.shape[-1] if series.transposed else series.data.shape[0]
    for begin in range(0, num_samples, BLOCK_SAMPLES):
        block = read_block(series.data, series.transposed, begin, min(begin + BLOCK_SAMPLES, num_samples))
        values = block.astype(np.float64)
        finite = np.isfinite(values)
        low = np.minimum(low, np.where(finite, values, np.inf).min(axis=0))
        high = np.maximum(high, np.where(finite, values, -np.inf).max(axis=0))
    is_constant = bool((high <= low).all())
    given = np.isfinite(low)
    if not given.any():
        return np.nan, np.nan, True
    ends = np.stack([low, high])[:, given] * series.conversion[given] + series.offset[given]
    return float(ends.min()), float(ends.max()), is_constant


def trace_stream(
    survey: Survey,
    series: Series,
    name: str,
    modality: Modality,
    *,
    columns: tuple[str, ...] = (),
    units: Units | None = None,
    angles_rad: Float64 | None = None,
    offset_ns: Index | None = None,
) -> Draft:
    """Plan a stream of kind `trace`, whose sources are the series' `columns` or, where given, `units`.

    angles_rad (C,): what one unit of a column is in radians where the column is an angle, else NaN; an angle becomes
    two sources, its cos and its sin.
    """
    clock = series.clock
    channels: list[str] = []
    for i, column in enumerate(columns):
        is_angle = angles_rad is not None and not np.isnan(angles_rad[i])
        channels += [f"{column}/cos", f"{column}/sin"] if is_angle else [column]
    num_angles = 0 if angles_rad is None else int((~np.isnan(angles_rad)).sum())
    spec = StreamSpec(
        name=name,
        kind="trace",
        modality=modality,
        num_tokens=clock.num_tokens,
        num_sources=series.num_columns + num_angles,
        samples_per_token=clock.samples_per_token,
        duration_ns=clock.duration_ns,
        sample_ns=clock.sample_ns,
        channels=tuple(channels),
        unit="" if num_angles else series.unit,
        origin=series.path,
    )
    reader = TraceReader(
        path=survey.path,
        datasets=series.datasets,
        transposed=series.transposed,
        bounds=None if clock.samples_per_token == 1 else clock.bounds,
        samples_per_token=clock.samples_per_token,
        rows=series.rows,
        conversion=series.conversion,
        offset=series.offset,
        angles_rad=angles_rad if num_angles else None,
    )
    stream = PlannedStream(spec=spec, start_ns=clock.start_ns, reader=reader, offset_ns=offset_ns)
    first_s, last_s = float(clock.time_s[0]), float(clock.time_s[-1])
    return Draft(stream=stream, first_s=first_s, last_s=last_s, time_s=clock.time_s, units=units)
