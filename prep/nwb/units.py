"""Sorted units: spike times to counts, and what is known about each unit.

In: the file's /units table. Out: the stream `spikes`, and its rows of the session's unit table.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from prep.nwb.inventory import Draft, Survey, as_text, get, open_file
from prep.plan import PlannedStream, PrepError, Units
from prep.settings import BIN_NS, TOKEN_NS, to_ns
from prep.store import StreamSpec
from prep.tokens import BINS_PER_TOKEN, CountTokens, num_saturated

Array = npt.NDArray[Any]
TABLE = "units"
BLOCK_SPIKES = 4_000_000
LONGEST_SESSION_S = 30 * 86_400.0
READ_COLUMNS = ("spike_times", "spike_times_index", "id", "electrodes", "electrodes_index", "electrode_group")


@dataclass(frozen=True, kw_only=True)
class SpikeReader:
    """Counts spikes of the tokens asked for; reads spike_times in bulk, never per unit."""

    path: Path
    stops: npt.NDArray[np.int64]  # (U,) end of each unit's spikes in spike_times
    first_token: int
    drop_minus_one: bool

    def read(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Counts of tokens [start, stop) as (stop - start, U, P)."""
        tokens = CountTokens(self.first_token + start, stop - start, len(self.stops))
        with open_file(self.path) as file:
            spikes = file[f"{TABLE}/spike_times"]
            for begin in range(0, len(spikes), BLOCK_SPIKES):
                time_s = spikes[begin : begin + BLOCK_SPIKES].astype(np.float64)
                row = np.arange(begin, begin + len(time_s))
                keep = valid_spikes(time_s, self.drop_minus_one) & (row < self.stops[-1])
                unit = np.searchsorted(self.stops, row[keep], side="right")
                tokens.add(to_ns(time_s[keep]), unit)
        return tokens.values()


def valid_spikes(time_s: npt.NDArray[np.float64], drop_minus_one: bool) -> npt.NDArray[np.bool_]:
    """Which spike times are times; -1 is a placeholder where all others are positive."""
    valid: npt.NDArray[np.bool_] = np.isfinite(time_s)
    return valid & (time_s != -1) if drop_minus_one else valid


def read_units(survey: Survey) -> tuple[Units | None, Draft | None]:
    """Plan the stream `spikes`. Raises PrepError where the table's index is broken."""
    node = survey.nodes.get(TABLE)
    if node is None or TABLE in survey.found:
        return None, None
    group = survey.file[TABLE]
    if get(group, "spike_times") is None or get(group, "spike_times_index") is None:
        survey.skip(TABLE, "the units have no spike times")
        return None, None
    stops = spike_index(group)
    draft = _plan_spikes(survey, group, stops)
    if draft is None:
        return None, None
    survey.use(TABLE, "spikes")
    units, columns = _describe(survey, group, len(stops))
    is_observed = _observed_throughout(survey, group, len(stops), draft.first_s, draft.last_s)
    for path in survey.nodes:
        if path.startswith(f"{TABLE}/") and path not in survey.found:
            name = path.removeprefix(f"{TABLE}/")
            if name in READ_COLUMNS or name in columns:
                survey.use(path, "spikes")
            elif name.startswith("obs_intervals") and is_observed:
                survey.use(path, "spikes", "all units were observed throughout")
            elif name.startswith("obs_intervals"):
                survey.skip(path, "times of observation are not applied yet (next release)")
            else:
                survey.skip(path, "a unit column that is not read")
    return units, draft


def spike_index(group: Any) -> npt.NDArray[np.int64]:
    """End of each unit's spikes (U,); PrepError where it does not fit spike_times."""
    stops: npt.NDArray[np.int64] = group["spike_times_index"][()].astype(np.int64)
    num_spikes, num_units = len(group["spike_times"]), len(stops)
    if "id" in group and len(group["id"]) != num_units:
        found = f"{len(group['id'])} units, but spike_times_index has {num_units} rows"
        raise PrepError(f"the units table is broken: {found}. Write the file again.")
    if num_units and (np.diff(stops, prepend=0) < 0).any():
        raise PrepError("the units table is broken: spike_times_index goes backwards. Was an index overwritten?")
    if num_units and stops[-1] > num_spikes:
        raise PrepError(
            f"the units table is broken: spike_times_index points to spike {stops[-1]:,}, but spike_times has only "
            f"{num_spikes:,}. The file is truncated or a stub; get the whole recording."
        )
    return stops


def _plan_spikes(survey: Survey, group: Any, stops: npt.NDArray[np.int64]) -> Draft | None:
    path = f"{TABLE}/spike_times"
    num_spikes = int(stops[-1]) if len(stops) else 0
    time_s = group["spike_times"][:num_spikes].astype(np.float64)
    unit = np.repeat(np.arange(len(stops)), np.diff(stops, prepend=0))
    drop_minus_one = _repairs(survey, path, time_s, len(group["spike_times"]) - num_spikes)
    keep = valid_spikes(time_s, drop_minus_one)
    time_s, unit = time_s[keep], unit[keep]
    if len(time_s) == 0:
        survey.skip(TABLE, "the units have no spikes")
        return None
    if ((np.diff(time_s) < 0) & (np.diff(unit) == 0)).any():
        survey.note("unsorted", path, "spikes of a unit are not in order of time; they are sorted", "repaired")
        order = np.lexsort((time_s, unit))
        time_s, unit = time_s[order], unit[order]
    first_s, last_s = float(time_s.min()), float(time_s.max())
    if last_s - first_s > LONGEST_SESSION_S:
        survey.skip(TABLE, f"spike times run from {first_s:.6g} s to {last_s:.6g} s, more than 30 days: not one clock")
        return None
    time_ns = to_ns(time_s)
    saturated = num_saturated(time_ns, unit)
    if saturated:
        survey.note("saturated", path, f"{saturated} spikes beyond 254 in one 20 ms bin are not counted", "repaired")
    first_token = int(time_ns.min() // TOKEN_NS)
    num_tokens = int(time_ns.max() // TOKEN_NS) - first_token + 1
    spec = StreamSpec(
        name="spikes",
        kind="counts",
        modality="spikes",
        num_tokens=num_tokens,
        num_sources=len(stops),
        samples_per_token=BINS_PER_TOKEN,
        duration_ns=TOKEN_NS,
        sample_ns=BIN_NS,
        first_unit=0,
        unit="spikes",
        origin=TABLE,
    )
    reader = SpikeReader(path=survey.path, stops=stops, first_token=first_token, drop_minus_one=drop_minus_one)
    start_ns = (first_token + np.arange(num_tokens, dtype=np.int64)) * TOKEN_NS
    return Draft(stream=PlannedStream(spec=spec, start_ns=start_ns, reader=reader), first_s=first_s, last_s=last_s)


def _repairs(survey: Survey, path: str, time_s: npt.NDArray[np.float64], num_unowned: int) -> bool:
    """Report spikes that are no spikes; returns whether -1 is a placeholder here."""
    finite = np.isfinite(time_s)
    minus_one = time_s == -1
    is_placeholder = bool(minus_one.any() and (time_s[finite & ~minus_one] >= 0).all())
    for code, count, what in (
        ("non-finite-time", int((~finite).sum()), "spike times are not numbers"),
        ("placeholder-time", int(minus_one.sum()) if is_placeholder else 0, "spike times are -1, a placeholder"),
        ("unowned", num_unowned, "spike times belong to no unit"),
    ):
        if count:
            survey.note(code, path, f"{count} {what}; they are dropped", "repaired")
    return is_placeholder


def _observed_throughout(survey: Survey, group: Any, num_units: int, first_s: float, last_s: float) -> bool:
    """Whether obs_intervals say no more than that every unit was there from first to last spike."""
    intervals = get(group, "obs_intervals")
    if not isinstance(intervals, h5py.Dataset):
        return True
    is_whole = (
        intervals.shape == (num_units, 2) and (intervals[:, 0] <= first_s).all() and (intervals[:, 1] >= last_s).all()
    )
    if not is_whole:
        message = "times of observation are not applied yet (next release); outside them units count as silent"
        survey.note("obs-intervals", intervals.name.strip("/"), message)
    return bool(is_whole)


def _describe(survey: Survey, group: Any, num_units: int) -> tuple[Units, set[str]]:
    """What the file says about each unit, and the names of the columns that said it."""
    ids = [str(value) for value in group["id"][()]] if "id" in group else [str(i) for i in range(num_units)]
    repeated = {name for name, count in Counter(ids).items() if count > 1}
    ids = [f"{name}-{row}" if name in repeated else name for row, name in enumerate(ids)]
    quality_column = next((name for name in ("quality", "KSLabel") if _texts(group, name, num_units)), "")
    region_column = "location" if _texts(group, "location", num_units) else ""
    rows = _electrode_rows(group, num_units)
    table = _electrodes(survey, group)
    region = _texts(group, region_column, num_units) or _group_regions(survey, group, num_units)
    units = Units(
        unit_key=[survey.unit_key(name) for name in ids],
        kind=["unit"] * num_units,
        region=region or _electrode_regions(table, rows) or [""] * num_units,
        quality=_texts(group, quality_column, num_units) or [""] * num_units,
        xyz_um=_positions(table, rows, num_units),
    )
    return units, {quality_column, region_column} - {""}


def _texts(group: Any, name: str, num_rows: int) -> list[str]:
    """A column of strings, [] if there is none with one string per row."""
    column = get(group, name) if name else None
    if not isinstance(column, h5py.Dataset) or column.shape != (num_rows,):
        return []
    return [as_text(value) for value in column[()]] if h5py.check_string_dtype(column.dtype) is not None else []


def _group_regions(survey: Survey, group: Any, num_units: int) -> list[str]:
    """Region of each unit by its electrode group's location."""
    column = get(group, "electrode_group")
    if not isinstance(column, h5py.Dataset) or column.shape != (num_units,):
        return []
    regions = []
    for reference in column[()]:
        location = get(survey.file[reference], "location") if reference else None
        regions.append(as_text(location[()]) if location is not None else "")
    return regions if any(regions) else []


def _electrode_rows(group: Any, num_units: int) -> list[npt.NDArray[np.int64]]:
    """Rows of the electrode table of each unit; [] where the units do not say, or say nonsense."""
    rows, index = get(group, "electrodes"), get(group, "electrodes_index")
    if rows is None or rows.ndim != 1:
        return []
    if index is None:
        return [row.astype(np.int64) for row in rows[()].reshape(-1, 1)] if len(rows) == num_units else []
    stops = index[()].astype(np.int64)
    if len(stops) != num_units or (np.diff(stops, prepend=0) < 0).any() or (num_units and stops[-1] > len(rows)):
        return []
    return np.split(rows[()].astype(np.int64), stops[:-1])


def _electrodes(survey: Survey, group: Any) -> Any:
    """The electrode table that the units refer to, or None."""
    column = get(group, "electrodes")
    reference = column.attrs.get("table") if column is not None else None
    table = survey.file[reference] if reference else None
    if table is not None:
        path = survey.path_of(table)
        survey.use(path, "units", "read as unit metadata")
        for name in ("id", "x", "y", "z", "location"):
            if f"{path}/{name}" in survey.nodes:
                survey.use(f"{path}/{name}", "units")
    return table


def _electrode_regions(table: Any, rows: list[npt.NDArray[np.int64]]) -> list[str]:
    if table is None or not rows or get(table, "location") is None:
        return []
    location = [as_text(value) for value in table["location"][()]]
    return [location[row[0]] if len(row) and 0 <= row[0] < len(location) else "" for row in rows]


def _positions(table: Any, rows: list[npt.NDArray[np.int64]], num_units: int) -> npt.NDArray[np.float32]:
    """Mean position of each unit's electrodes (U, 3), in um as the file gives it; NaN = unknown."""
    xyz = np.full((num_units, 3), np.nan, np.float32)
    if table is None or not rows or not all(get(table, axis) is not None for axis in "xyz"):
        return xyz
    electrodes = np.stack([table[axis][()].astype(np.float64) for axis in "xyz"], axis=1)
    for unit, row in enumerate(rows):
        inside = row[(row >= 0) & (row < len(electrodes))]
        if len(inside):
            xyz[unit] = electrodes[inside].mean(axis=0)
    return xyz
