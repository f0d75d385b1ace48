"""Local field potentials, where the recipe asks for them: band-limited power of each electrode.

In: ElectricalSeries that `lfp.series` names. Out: streams of kind `trace`, and a unit row per electrode and band.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.band_power import UNIT, Band, band_power, design
from prep.nwb.clocks import map_times, read_clock
from prep.nwb.file import dataset, follow, get, holding, is_dataset, numbers, texts
from prep.nwb.inventory import Draft, Node, Survey
from prep.nwb.series import is_transposed, read_block, refuse_layout, scaling
from prep.plan import PlannedStream, PrepError, Units
from prep.settings import TOKEN_NS, to_ns
from prep.store import StreamSpec

Float64 = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

SEGMENT_NS = 20_000_000_000  # filtered at a time, beside the onset: long enough that the onset costs little
SEGMENT_BYTES = 32 * 2**20  # of the file's samples, at most
CHANNELS = 16  # filtered side by side
STEP_TOLERANCE = 0.2  # steps between samples, but for 2 %, are within this of their median
CONTAINERS = ("LFP", "FilteredEphys")
GAP_PERIODS = 1.5  # a longer step ends a run, and the filter starts anew


@dataclass(frozen=True, kw_only=True)
class Voltages:
    """The layout of an ElectricalSeries."""

    data: Any  # the open dataset
    transposed: bool
    num_samples: int
    table: Any  # the open electrode table, None if the file does not say
    rows: list[int]  # (C,) row of that table of each column; the column's number if the file does not say


@dataclass(frozen=True, kw_only=True)
class Bins:
    """T bins of a series in K tokens of P; bin i of a token that is not full has no rows."""

    starts: Index  # (K, P) first row of each bin
    stops: Index  # (K, P)
    run_start: Index  # (K,) first row of the run of samples without a gap that the token is in
    time_s: Float64  # (K,) start of each token


@dataclass(frozen=True, kw_only=True)
class BandReader:
    """Reads voltages in fixed segments and filters each with what comes before it, so that parts equal the whole."""

    path: Path
    dataset: str
    transposed: bool
    bands: tuple[Band, ...]
    bins: Bins
    segments: Index  # (G + 1,) first token of each segment, and the end
    conversion: Float64  # (C,) to volts
    offset: Float64  # (C,)

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Values of tokens [start, stop) as (stop - start, C * bands, P), band by band of each channel."""
        first = int(np.searchsorted(self.segments, start, side="right")) - 1
        parts = []
        with holding((self.path, self.dataset)) as (data,):
            while self.segments[first] < stop:
                begin, end = int(self.segments[first]), int(self.segments[first + 1])
                parts.append(self._segment(data, begin, end)[max(start - begin, 0) : stop - begin])
                first += 1
        return np.concatenate(parts)

    def _segment(self, data: Any, begin: int, end: int) -> npt.NDArray[np.float32]:
        starts, stops = self.bins.starts[begin:end].ravel(), self.bins.stops[begin:end].ravel()
        run_start, first = int(self.bins.run_start[begin]), int(starts[0])
        warm = max(run_start, first - max(band.warm_samples for band in self.bands))
        block = read_block(data, self.transposed, warm, int(stops.max()))
        power = np.concatenate(
            [
                band_power(
                    block[:, part].astype(np.float64) * self.conversion[part] + self.offset[part],
                    self.bands,
                    starts - warm,
                    stops - warm,
                    warm - run_start,
                )
                for part in (slice(i, i + CHANNELS) for i in range(0, block.shape[1], CHANNELS))
            ],
            axis=1,
        )
        num_tokens, bins_per_token = end - begin, self.bins.starts.shape[1]
        return np.ascontiguousarray(power.reshape(num_tokens, bins_per_token, -1).transpose(0, 2, 1))


def read_lfp(survey: Survey) -> list[Draft]:
    """Plan one stream for each ElectricalSeries that the recipe's `lfp.series` names."""
    drafts: list[Draft] = []
    taken: dict[str, str] = {}  # unit_key: the series that it is read from
    for node in list(survey.of_type("ElectricalSeries")):
        if _is_named(survey, node, survey.recipe.lfp.series):
            with survey.reading(node):
                drafts.append(_plan(survey, node, taken))
    _note_unmatched(survey)
    return drafts


def _is_named(survey: Survey, node: Node, patterns: tuple[str, ...]) -> bool:
    """Whether the recipe names the series, or the LFP container that holds it."""
    holder = survey.nodes.get(node.parent)
    is_held = holder is not None and holder.neurodata_type in CONTAINERS and survey.matches(holder, patterns)
    return is_held or survey.matches(node, patterns)


def _note_unmatched(survey: Survey) -> None:
    series = [node for node in survey.nodes.values() if node.neurodata_type == "ElectricalSeries"]
    for pattern in survey.recipe.lfp.series:
        if not any(_is_named(survey, node, (pattern,)) for node in series):
            message = "`lfp.series` of the recipe names it, but the file has no such ElectricalSeries"
            survey.note("recipe-unmatched", pattern, message)


def _plan(survey: Survey, node: Node, taken: dict[str, str]) -> Draft:
    recipe = survey.recipe.lfp
    volts = read_voltages(survey, node)
    runs, rate_hz = _runs(survey, node, volts.num_samples)
    bands = _bands(survey, rate_hz, max(stop - start for start, stop, _ in runs))
    num_bins = max(1, round(TOKEN_NS * recipe.rate_hz / 1e9))
    bins = cut_bins(runs, rate_hz, recipe.rate_hz, num_bins)
    units = _units(survey, node, bands, volts)
    shared = next((taken[key] for key in units.unit_key if key in taken), None)
    if shared is not None:
        raise PrepError(f"some of its electrodes are in {shared}, which is read")
    name = survey.stream_name(node)
    spec = StreamSpec(
        name=name,
        kind="trace",
        modality="traces",
        num_tokens=len(bins.starts),
        num_sources=len(units.unit_key),
        samples_per_token=num_bins,
        duration_ns=round(num_bins * 1e9 / recipe.rate_hz),
        sample_ns=round(1e9 / recipe.rate_hz),
        unit=UNIT,
        origin=node.path,
    )
    conversion, offset = scaling(survey, node.path, len(volts.rows))
    reader = BandReader(
        path=survey.path,
        dataset=f"{node.path}/data",
        transposed=volts.transposed,
        bands=bands,
        bins=bins,
        segments=cut_segments(bins, spec.duration_ns, rate_hz, len(volts.rows) * volts.data.dtype.itemsize),
        conversion=conversion,
        offset=offset,
    )
    taken |= dict.fromkeys(units.unit_key, node.path)
    survey.use(node.path, name, f"power in {len(bands)} bands")
    _account_for_electrodes(survey, node, volts.table)
    stream = PlannedStream(spec=spec, start_ns=to_ns(bins.time_s), reader=reader)
    last_s = float(bins.time_s[-1]) + num_bins / recipe.rate_hz
    return Draft(stream=stream, first_s=float(bins.time_s[0]), last_s=last_s, time_s=bins.time_s, units=units)


def read_voltages(survey: Survey, node: Node) -> Voltages:
    """Layout and electrodes of an ElectricalSeries. Raises PrepError."""
    group = survey.file[node.path]
    data = dataset(group, "data")
    refuse_layout(data)
    table, rows = _electrodes(survey, node)
    stamps = get(group, "timestamps")
    num_times = len(stamps) if is_dataset(stamps) else None
    transposed = is_transposed(survey, node.path, data.shape, num_times, len(rows) or None)
    num_samples = data.shape[-1] if transposed else data.shape[0]
    num_channels = data.size // num_samples
    if rows and len(rows) != num_channels:
        raise PrepError(f"it has {num_channels} columns but {len(rows)} electrodes")
    read_block(data, transposed, num_samples - 1, num_samples)  # what cannot be read is told now
    rows = rows or list(range(num_channels))
    return Voltages(data=data, transposed=transposed, num_samples=num_samples, table=table, rows=rows)


# ---------------------------------------------------------------- clock and bins


def _runs(survey: Survey, node: Node, num_samples: int) -> tuple[list[tuple[int, int, Float64]], float]:
    """Runs of samples without a gap: first row, end row, times (n,) or only the first (1,); and the rate in Hz."""
    group = survey.file[node.path]
    if get(group, "timestamps") is None:
        # Hours at 30 kHz: the times of a steady rate need not be held.
        start: Any = dataset(group, "starting_time")
        rate_hz, start_s = float(start.attrs.get("rate", np.nan)), float(start[()])
        if not (np.isfinite(start_s) and np.isfinite(rate_hz) and rate_hz > 0):
            raise PrepError(f"its clock is start {start_s} s at rate {rate_hz} Hz")
        num_findings, ends_s = len(survey.findings), start_s + np.array([0, num_samples]) / rate_hz
        if map_times(survey, node.path, ends_s) is ends_s:
            return [(0, num_samples, ends_s[:1])], rate_hz
        del survey.findings[num_findings:]  # on another clock: read_clock maps every time, and says so
    clock, rows = read_clock(survey, node.path, num_samples)
    time_s = clock.time_s
    steps = np.diff(time_s)
    median_s = float(np.median(steps))
    short, long = np.quantile(steps, [0.01, 0.99]) / median_s
    if short < 1 - STEP_TOLERANCE or long > 1 + STEP_TOLERANCE:
        raise PrepError("steps between its samples differ by more than 20 %, so it cannot be filtered")
    breaks = steps > GAP_PERIODS * median_s
    rate_hz = 1 / float(steps[~breaks].mean())
    if rows is not None:
        breaks |= np.diff(rows) != 1
    ends = np.append(np.flatnonzero(breaks) + 1, len(time_s))
    begins = np.append(0, ends[:-1])
    first_row = begins if rows is None else rows[begins]
    return [
        (int(row), int(row + end - begin), time_s[begin:end])
        for row, begin, end in zip(first_row, begins, ends, strict=True)
    ], rate_hz


def _bands(survey: Survey, rate_hz: float, longest_run: int) -> tuple[Band, ...]:
    """The recipe's filters at this sampling rate; PrepError where there is not one bin of each."""
    recipe = survey.recipe.lfp
    if rate_hz < recipe.rate_hz:
        raise PrepError(
            f"it is sampled at {rate_hz:.6g} Hz, less than `lfp.rate_hz` {recipe.rate_hz:g}. Lower `lfp.rate_hz`"
        )
    bands = tuple(design(low, high, rate_hz) for low, high in recipe.bands_hz)
    slowest = max(bands, key=lambda band: band.settle_samples)
    needed = slowest.settle_samples + 2 * rate_hz / recipe.rate_hz
    if longest_run < needed:
        raise PrepError(
            f"its longest stretch without a gap is {longest_run / rate_hz:.3g} s, and power from {slowest.low_hz:g} to "
            f"{slowest.high_hz:g} Hz needs {needed / rate_hz:.3g} s. Take the band out of `lfp.bands_hz`, or leave "
            "the series out"
        )
    return bands


def cut_bins(runs: list[tuple[int, int, Float64]], rate_hz: float, bin_hz: float, num_bins: int) -> Bins:
    """Bins of 1 / bin_hz from the first sample of each run; a bin that is not wholly inside its run has no rows.

    runs: first row, end row, and the times (n,) of the rows, or only the first row's (1,) where the rate is steady.
    """
    starts, stops, run_starts, times = [], [], [], []
    for first, end, time_s in runs:
        whole = int(np.floor((end - first) / rate_hz * bin_hz + 1e-6))
        if len(time_s) > 1:
            whole = int(np.floor((time_s[-1] - time_s[0] + 1 / rate_hz) * bin_hz + 1e-6))
        if whole < 1:
            continue
        edges = np.arange(whole + 1) / bin_hz
        # A sample on an edge, within the rounding of the file's seconds, belongs to the later bin.
        if len(time_s) > 1:
            rows = np.searchsorted(time_s, time_s[0] + edges - 1e-3 / rate_hz).astype(np.int64)
        else:
            rows = np.minimum(np.ceil(edges * rate_hz - 1e-3), end - first).astype(np.int64)
        num_tokens = -(-whole // num_bins)
        padded = np.full(num_tokens * num_bins + 1, rows[-1])
        padded[: whole + 1] = rows
        starts.append(first + padded[:-1].reshape(num_tokens, num_bins))
        stops.append(first + padded[1:].reshape(num_tokens, num_bins))
        run_starts.append(np.full(num_tokens, first, np.int64))
        times.append(time_s[0] + np.arange(num_tokens) * (num_bins / bin_hz))
    if not starts:
        raise PrepError("no stretch without a gap is as long as a bin")
    join = np.concatenate
    return Bins(starts=join(starts), stops=join(stops), run_start=join(run_starts), time_s=join(times))


def cut_segments(bins: Bins, duration_ns: int, rate_hz: float, row_bytes: int) -> Index:
    """First token of each segment (G + 1,): cut at runs, and of a length that is bounded in time and bytes."""
    token_bytes = row_bytes * rate_hz * duration_ns / 1e9
    length = max(1, min(SEGMENT_NS // duration_ns, int(SEGMENT_BYTES / token_bytes)))
    begins = np.flatnonzero(np.diff(bins.run_start, prepend=-1))
    ends = np.append(begins[1:], len(bins.run_start))
    cuts = [np.arange(begin, end, length) for begin, end in zip(begins, ends, strict=True)]
    return np.append(np.concatenate(cuts), len(bins.run_start)).astype(np.int64)


# ---------------------------------------------------------------- electrodes


def _electrodes(survey: Survey, node: Node) -> tuple[Any, list[int]]:
    """The electrode table and the rows of it that the columns are; (None, []) where the file does not say."""
    region = get(survey.file, f"{node.path}/electrodes")
    if not is_dataset(region) or region.ndim != 1:
        return None, []
    rows = [int(row) for row in region[()]]
    table = follow(survey.file, region.attrs.get("table"))
    if table is None or not is_dataset(get(table, "id")) or not all(0 <= row < len(table["id"]) for row in rows):
        return None, rows
    return table, rows


def _units(survey: Survey, node: Node, bands: tuple[Band, ...], volts: Voltages) -> Units:
    """A row for each electrode and band; unit_key lfp-<electrode>-<low>-<high>hz."""
    table, rows = volts.table, volts.rows
    names, region = [str(row) for row in rows], [""] * len(rows)
    xyz = np.full((len(rows), 3), np.nan, np.float32)
    if table is not None:
        num_rows = len(table["id"])
        names = [str(table["id"][()][row]) for row in rows]
        places = texts(table, "location", num_rows)
        region = [places[row] for row in rows] if places else region
        axes = [numbers(table, axis, num_rows) for axis in "xyz"]
        for i, values in enumerate(axes):
            if values is not None:
                xyz[:, i] = values[rows]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    names = [f"{name}-{column}" if name in repeated else name for column, name in enumerate(names)]
    if table is None:  # numbers of columns are unique in their series alone
        names = [f"{node.name}-{name}" for name in names]
    words = [f"{band.low_hz:g}-{band.high_hz:g}hz" for band in bands]
    return Units(
        unit_key=[survey.unit_key(f"lfp-{name}-{word}") for name in names for word in words],
        kind=["lfp"] * (len(rows) * len(bands)),
        region=[place for place in region for _ in bands],
        quality=[""] * (len(rows) * len(bands)),
        xyz_um=np.repeat(xyz, len(bands), axis=0),
    )


def _account_for_electrodes(survey: Survey, node: Node, table: Any) -> None:
    paths = [f"{node.path}/electrodes"]
    if table is not None:
        path = survey.path_of(table)
        paths += [path, *(f"{path}/{name}" for name in ("id", "x", "y", "z", "location"))]
    for path in paths:
        if path in survey.nodes:
            survey.use(path, "units", "read as unit metadata" if path == paths[0] else "")
