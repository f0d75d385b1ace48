"""Sorted units: which tables and rows are read, when each unit was observed, and their stream of spike counts.

In: tables of units, wherever they stand in the file. Out: streams `spikes`, and their rows of the session's unit table.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from prep.audit import MS_RATIO, SHORTEST_S
from prep.nwb.chunks import read_rows
from prep.nwb.clocks import other_spans
from prep.nwb.file import as_text, enum_words, get, is_dataset, is_text, ragged_stops
from prep.nwb.inventory import UNREADABLE, Draft, Node, Survey, snake_case
from prep.nwb.spike_audit import Extent, audited, repaired
from prep.nwb.spikes import SpikeReader, SpikeTimes
from prep.nwb.unit_metadata import describe
from prep.plan import BrokenObject, PlannedStream, PrepError
from prep.settings import BIN_NS, TOKEN_NS, to_ns
from prep.store import StreamSpec
from prep.sync import ClockMap
from prep.tokens import BINS_PER_TOKEN, Observed, observed_stretches

Index = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

ROOT_TABLE = "units"
BLOCK_SPIKES = 4_000_000
WHOLE_SPIKES = 10_000  # that are looked at to tell samples from seconds
SPIKE_COLUMNS = ("spike_times", "spike_times_index", "id")


def read_units(survey: Survey) -> list[Draft]:
    """Plan a stream of spikes for each table of units that is read (NWB type Units); a broken table is refused.

    Raises PrepError where the recipe's `keep_units` does not fit a table.
    """
    chosen = _chosen(survey)
    drafts: list[Draft] = []
    for number, node in enumerate(chosen):
        kept = _kept_rows(survey, node)
        with survey.reading(node):
            prefix = f"{_short_name(chosen, node)}-" if len(chosen) > 1 else ""
            name = _stream_name(survey, node, number, prefix)
            drafts.append(_plan(survey, node, kept, name, prefix))
    return drafts


# ---------------------------------------------------------------- tables and rows


def _chosen(survey: Survey) -> list[Node]:
    """The tables that are read: the recipe's; else the root's, else the first by path that has spikes."""
    tables = [node for node in survey.nodes.values() if node.path not in survey.found and _is_table(survey, node)]
    tables.sort(key=lambda node: (node.path != ROOT_TABLE, node.path))
    wanted = [node for node in tables if survey.matches(node, survey.recipe.units)]
    with_spikes = [node for node in tables if _has_spikes(survey, node)]
    for node in tables:
        if node not in with_spikes:
            lacks = "spike_times_index" if f"{node.path}/spike_times" in survey.nodes else "spike times"
            survey.skip(node.path, f"the units have no {lacks}")
    chosen = [node for node in wanted if node in with_spikes] if survey.recipe.units else with_spikes[:1]
    for node in with_spikes:
        if node not in chosen:
            other = "another table of units is read" if chosen else "the recipe reads other tables"
            survey.skip(node.path, f"{other}; name it in the recipe's `units`")
    return chosen


def _is_table(survey: Survey, node: Node) -> bool:
    """Of type Units, or of another type (an extension's) but with spike times."""
    is_units = node.neurodata_type == "Units" or node.path == ROOT_TABLE
    return node.is_group and (is_units or _has_spikes(survey, node))


def _has_spikes(survey: Survey, node: Node) -> bool:
    group = survey.file[node.path] if f"{node.path}/spike_times" in survey.nodes or node.path == ROOT_TABLE else None
    return group is not None and all(is_dataset(get(group, name)) for name in ("spike_times", "spike_times_index"))


def _short_name(tables: list[Node], node: Node) -> str:
    """What tells a table from the others: its own name, or with those of its containers."""
    names = [snake_case(other.name) for other in tables]
    return snake_case(node.name if names.count(snake_case(node.name)) == 1 else node.path.removeprefix("processing/"))


def _stream_name(survey: Survey, node: Node, number: int, prefix: str) -> str:
    given = {key.strip("/") for key in survey.recipe.names}
    if node.path in given or node.name in given:
        return survey.stream_name(node)
    name = "spikes" if number == 0 else f"spikes_{prefix.removesuffix('-')}"
    survey.names.add(name)
    return name


def _kept_rows(survey: Survey, node: Node) -> Bool | None:
    """Which rows (R,) the recipe's `keep_units` keeps, None where it says nothing. Raises PrepError."""
    if not survey.recipe.keep_units:
        return None
    group = survey.file[node.path]
    num_rows = len(group["spike_times_index"])
    kept = np.ones(num_rows, np.bool_)
    for column, wanted in survey.recipe.keep_units.items():
        cells = _cells(group, column, num_rows)
        if cells is None:
            names = sorted(name for name in group if is_dataset(get(group, name)))
            raise PrepError(
                f"`keep_units` of the recipe names the column {column!r}, but {node.path} has no such column with one "
                f"value for each unit. Its columns are {', '.join(names)}."
            )
        fits = np.array([_is_same(cell, value) for cell in cells for value in wanted], np.bool_)
        fits = fits.reshape(num_rows, len(wanted))
        if not fits.any():
            values = ", ".join(sorted(set(cells))[:10])
            raise PrepError(
                f"`keep_units` of the recipe keeps units whose {column} is {' or '.join(wanted)}, but in {node.path} "
                f"none is. Found: {values}."
            )
        for value, found in zip(wanted, fits.T, strict=True):
            if not found.any():
                message = f"`keep_units` of the recipe names it for {column}, but no unit of {node.path} has it"
                survey.note("recipe-unmatched", value, message)
        kept &= fits.any(axis=1)
    if not kept.any():
        raise PrepError(f"`keep_units` of the recipe keeps none of the {num_rows} units of {node.path}. Ask for less.")
    return kept


def _cells(group: Any, name: str, num_rows: int) -> list[str] | None:
    """A column as texts, None if there is none with one value for each row."""
    column = get(group, name)
    if not is_dataset(column) or column.shape != (num_rows,) or f"{name}_index" in group:
        return None
    if is_text(column):
        return [as_text(value).strip() for value in column[()]]
    words = enum_words(column)
    return [words.get(int(value), "") if words else str(value) for value in column[()]]


def _is_same(cell: str, wanted: str) -> bool:
    """Texts alike but for capitals, numbers alike however written: 1 is 1.0."""
    if cell.lower() == wanted.strip().lower():
        return True
    try:
        return float(cell) == float(wanted)
    except ValueError:  # one of them is no number
        return False


# ---------------------------------------------------------------- the stream


def _plan(survey: Survey, node: Node, kept: Bool | None, name: str, prefix: str) -> Draft:
    group = survey.file[node.path]
    survey.kept.append(group["spike_times"])
    stops = spike_index(group)
    rows = np.arange(len(stops)) if kept is None else np.flatnonzero(kept)
    times = SpikeTimes(
        path=survey.path,
        dataset=f"{node.path}/spike_times",
        stops=stops,
        num_units=len(rows),
        source=None if kept is None else np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32),
        to_session=_map_to_session(survey, node),
    )
    if kept is not None:
        message = f"{len(stops) - len(rows)} of {len(stops)} units are left out by `keep_units` of the recipe"
        survey.note("keep-units", node.path, message, num_left_out=len(stops) - len(rows))
    _refuse_sample_numbers(survey, node)
    times = repaired(survey, times)
    observed = _observed(survey, node, rows, times)
    extent = audited(survey, times, observed)
    if observed is not None and extent.num_unobserved == extent.num_spikes:
        message = "none of the spikes lies in them, so they are on another clock; they are "
        survey.findings = [finding for finding in survey.findings if finding.code != "spikes-outside-observed"]
        survey.refuse(f"{node.path}/obs_intervals", f"{message}not applied. Write them on the session's clock.")
        observed = None
    told = "" if observed is not None else "no times of observation: every unit counts as observed throughout"
    _note_share(survey, node, observed, extent)
    survey.use(node.path, name, told)
    units, read = describe(survey, node, rows, prefix)
    _account(survey, node, name, {*SPIKE_COLUMNS, *read, *(("obs_intervals",) if observed is not None else ())})
    reader = SpikeReader(times=times, first_token=int(to_ns(extent.first_s) // TOKEN_NS), observed=observed)
    stream = _stream(reader, name, node.path, int(to_ns(extent.last_s) // TOKEN_NS) + 1)
    return Draft(stream=stream, first_s=float(extent.first_s), last_s=float(extent.last_s), units=units)


def _refuse_sample_numbers(survey: Survey, node: Node) -> None:
    """Raise BrokenObject where spike times are evidently numbers of samples: whole, and far longer than all else."""
    column: Any = survey.file[node.path]["spike_times"]
    first = read_rows(column, 0, WHOLE_SPIKES)  # keeps the chunk that is read next
    if first.dtype.kind not in "fiu" or not (first == np.rint(first)).all():
        return
    blocks = (column[begin : begin + BLOCK_SPIKES] for begin in range(0, len(column), BLOCK_SPIKES))
    last = max((float(block.max()) for block in blocks), default=0.0)
    longest_s = max((stop_s - start_s for start_s, stop_s in other_spans(survey, node.path)), default=0.0)
    if longest_s >= SHORTEST_S and last - float(first.min(initial=0.0)) > MS_RATIO[1] * longest_s:
        raise BrokenObject(
            f"its spike times are whole numbers up to {last:,.0f}, while the longest of the other clocks takes "
            f"{longest_s:.4g} s: they are numbers of samples, not seconds. Divide them by the sampling rate."
        )


def _stream(reader: SpikeReader, name: str, origin: str, stop_token: int) -> PlannedStream:
    num_tokens = stop_token - reader.first_token
    spec = StreamSpec(
        name=name,
        kind="counts",
        modality="spikes",
        num_tokens=num_tokens,
        num_sources=reader.times.num_units,
        samples_per_token=BINS_PER_TOKEN,
        duration_ns=TOKEN_NS,
        sample_ns=BIN_NS,
        unit="spikes",
        origin=origin,
    )
    start_ns = (reader.first_token + np.arange(num_tokens, dtype=np.int64)) * TOKEN_NS
    return PlannedStream(spec=spec, start_ns=start_ns, reader=reader)


def _map_to_session(survey: Survey, node: Node) -> ClockMap | None:
    """The recipe's map of another clock that this table is on, None if it is on the session's."""
    parts = node.path.split("/")
    above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    holders = [survey.nodes[path] for path in above if path in survey.nodes]
    for pattern, found in survey.clock_maps.items():
        if any(survey.matches(holder, (pattern,)) for holder in holders):
            clock_map: ClockMap = found
            return clock_map
    return None


def _account(survey: Survey, node: Node, name: str, read: set[str]) -> None:
    """Every column of the table is used, or skipped with the reason."""
    for path in survey.nodes:
        if path.startswith(f"{node.path}/") and path not in survey.found:
            column = path.removeprefix(f"{node.path}/")
            if column in read or column.removesuffix("_index") in read:
                survey.use(path, name)
            elif column.startswith("obs_intervals"):
                survey.skip(path, "its times are not applied")
            else:
                survey.skip(path, "a unit column that is not read")


def spike_index(group: Any) -> Index:
    """End of each row's spikes (R,); BrokenObject where it does not fit spike_times."""
    stops: Index = ragged_stops(group["spike_times_index"], len(group["spike_times"]), "spike")
    ids = get(group, "id")
    if is_dataset(ids) and len(ids) != len(stops):
        raise BrokenObject(f"it has {len(ids)} units, but spike_times_index has {len(stops)} rows")
    return stops


# ---------------------------------------------------------------- observed time


def _observed(survey: Survey, node: Node, rows: Index, times: SpikeTimes) -> Observed | None:
    """When each of the rows was observed, by obs_intervals; None where it says nothing. A broken one is refused."""
    group, path = survey.file[node.path], f"{node.path}/obs_intervals"
    if not is_dataset(get(group, "obs_intervals")):
        return None
    try:
        given, stops = _stretches(group, len(times.stops))
    except UNREADABLE as error:
        told = str(error) if isinstance(error, PrepError) else "it cannot be read"
        survey.refuse(path, f"{told} Until then every unit counts as observed throughout.")
        return None
    if times.divisor != 1 and np.nanmax(given, initial=0) > 100 * max(times.high_s, 0):
        given = given / times.divisor
    starts = np.concatenate([[0], stops[:-1]])
    lists: dict[bytes, int] = {}
    cleaned: list[Index] = []
    list_of = np.full(len(rows), -1, np.int32)
    for unit, row in enumerate(rows):
        own = given[starts[row] : stops[row]]
        if len(own):
            key = own.tobytes()
            if key not in lists:
                lists[key] = len(cleaned)
                cleaned.append(_forward(own, times))
            list_of[unit] = lists[key]
    _note_backward(survey, path, given)
    return observed_stretches(cleaned, list_of) if cleaned else None


def _stretches(group: Any, num_rows: int) -> tuple[npt.NDArray[np.float64], Index]:
    """Stretches (M, 2) in seconds, and the end of each row's (R,). Raises BrokenObject."""
    data, index = group["obs_intervals"], get(group, "obs_intervals_index")
    if data.ndim != 2 or data.shape[1] != 2 or data.dtype.kind not in "fiu":
        raise BrokenObject(f"obs_intervals is {data.dtype} {data.shape}, not start and stop. Write it again.")
    stops = np.arange(1, len(data) + 1) if index is None else ragged_stops(index, len(data), "stretch")
    if len(stops) != num_rows:
        raise BrokenObject(f"obs_intervals has {len(stops)} rows for {num_rows} units. Write it again.")
    return data[()].astype(np.float64), stops


def _forward(own: npt.NDArray[np.float64], times: SpikeTimes) -> Index:
    """Stretches (m, 2) in ns, without those that end before they start or have no number."""
    mapped, finite = own.copy(), np.isfinite(own)
    if times.to_session is not None:
        mapped[finite] = times.to_session.to_session(own[finite])
    limit_s = 9e9  # int64 nanoseconds hold 292 years; an open end is written as infinity
    bounded = np.clip(mapped, -limit_s, limit_s)
    return to_ns(bounded[bounded[:, 1] >= bounded[:, 0]])


def _note_share(survey: Survey, node: Node, observed: Observed | None, extent: Extent) -> None:
    """For how much of the time from the first to the last spike the units were observed."""
    length_ns = int(to_ns(extent.last_s)) - int(to_ns(extent.first_s))
    if observed is None or length_ns <= 0:
        return
    share = observed.share(int(to_ns(extent.first_s)), int(to_ns(extent.last_s)))
    if share < 1:
        message = f"units were observed for {100 * share:.4g} % of the time on average; the rest is missing, not silent"
        survey.note("obs-intervals", f"{node.path}/obs_intervals", message, observed_share=share)


def _note_backward(survey: Survey, path: str, given: npt.NDArray[np.float64]) -> None:
    num_backward = int((~(given[:, 1] >= given[:, 0])).sum())
    if num_backward:
        message = f"{num_backward} of {len(given)} stretches end before they start, or have no number; they are dropped"
        survey.note("obs-intervals-backward", path, message, "repaired", count=num_backward)
