"""Traces of cells and tissue that are no imaging ROIs: fibre photometry, and plain TimeSeries that a recipe groups.

In: FiberPhotometryResponseSeries; TimeSeries that the recipe's `signals` name. Out: streams of kind `trace`, unit rows.
"""

import hashlib
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from prep.nwb.file import dataset, follow, get, is_dataset, texts
from prep.nwb.inventory import Draft, Node, Survey
from prep.nwb.series import read_series, refuse_layout, scaling, scan, trace_stream
from prep.nwb.traces import rank
from prep.plan import PrepError, Units
from prep.recipe import Signals
from prep.store import sanitise

FIBER_REGION = "fiber_photometry_table_region"
NUMBER = re.compile(r"\d+")


# ---------------------------------------------------------------- fibre photometry


def read_fibers(survey: Survey) -> list[Draft]:
    """Plan one stream for each response series of optical fibres (ndx-fiber-photometry).

    Of several series of one fibre (as measured, dF/F) one is read, by the rule for imaging ROIs: else a fibre that is
    hidden would be seen in the other.
    """
    drafts = []
    taken: dict[int, str] = {}  # row of the photometry table: the series that it is read from
    nodes = list(survey.of_type("FiberPhotometryResponseSeries"))
    for node in sorted(nodes, key=lambda node: (rank(survey, node), node.path)):
        with survey.reading(node):
            drafts.append(_plan_fibers(survey, node, taken))
    return sorted(drafts, key=lambda draft: draft.stream.spec.origin)


def _plan_fibers(survey: Survey, node: Node, taken: dict[int, str]) -> Draft:
    rows, regions = _fibers(survey, node)
    shared = next((taken[row] for row in rows if row in taken), None)
    if shared is not None:
        raise PrepError(f"some of its fibres are in {shared}, which is read")
    series = read_series(survey, node, len(rows) or None)
    if rows and len(rows) != series.num_columns:
        raise PrepError(f"it has {series.num_columns} columns but {len(rows)} rows of the photometry table")
    if scan(series)[2]:
        raise PrepError("all its samples are the same or missing")
    num_fibers = series.num_columns
    name = survey.stream_name(node)
    units = Units(
        unit_key=[survey.unit_key(f"{name}-{row}") for row in rows or range(num_fibers)],
        kind=["fiber"] * num_fibers,
        region=regions or [""] * num_fibers,
        quality=[""] * num_fibers,
        xyz_um=np.full((num_fibers, 3), np.nan, np.float32),
    )
    draft = trace_stream(survey, series, name, "traces", units=units)
    survey.use(node.path, name, "time is the second axis in the file" if series.transposed else "")
    taken |= dict.fromkeys(rows, node.path)
    return draft


def _fibers(survey: Survey, node: Node) -> tuple[list[int], list[str]]:
    """Rows of the photometry table that the columns are, and where each fibre ends; [] where the file does not say."""
    region = get(survey.file, f"{node.path}/{FIBER_REGION}")
    if not is_dataset(region) or region.ndim != 1:
        return [], []
    rows = [int(row) for row in region[()]]
    table = follow(survey.file, region.attrs.get("table"))
    ids: Any = get(table, "id") if table is not None else None
    if len(set(rows)) < len(rows) or not is_dataset(ids) or not all(0 <= row < len(ids) for row in rows):
        return [], []
    path = survey.path_of(table)
    places = texts(table, "location", len(ids))
    for used in (f"{node.path}/{FIBER_REGION}", path, *([f"{path}/location"] if places else [])):
        if used in survey.nodes:
            survey.use(used, "units")
    return rows, [places[row] for row in rows] if places else []


# ---------------------------------------------------------------- TimeSeries, one per unit


def read_signals(survey: Survey) -> list[Draft]:
    """Plan one stream for each group of TimeSeries that the recipe's `signals` name."""
    drafts = []
    for group in survey.recipe.signals:
        nodes = [node for node in survey.of_type("TimeSeries") if survey.matches(node, (group.pattern,))]
        if nodes:
            drafts += _plan_group(survey, group, sorted(nodes, key=lambda node: _natural(node.path)))
        else:
            message = "`signals` of the recipe names it, but the file has no such TimeSeries that is not read already"
            survey.note("recipe-unmatched", group.pattern, message)
    return drafts


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts Activity_2 before Activity_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _plan_group(survey: Survey, group: Signals, nodes: list[Node]) -> list[Draft]:
    """The stream of a group; [] where its members do not share a clock: the odd one is refused by name."""
    clocks: dict[str, tuple[object, ...]] = {}
    told = f"it belongs to the recipe's signals {group.name!r}, which need one clock"
    for node in nodes:
        with survey.reading(node):
            clocks[node.path] = _clock(survey, node)
    nodes = [node for node in nodes if node.path in clocks]  # the others were refused or skipped by name
    if not nodes:
        return []
    common = Counter(clocks.values()).most_common(1)[0][0]
    odd = next((node for node in nodes if clocks[node.path] != common), None)
    if odd is not None:
        for node in nodes:
            survey.skip(node.path, f"{told}; {odd.path} has another")
        most = next(path for path, clock in clocks.items() if clock == common)
        survey.refuse(
            odd.path,
            f"{told}: it has {_in_words(clocks[odd.path])}, {most} has {_in_words(common)}. "
            "Leave it out by `exclude`, or narrow the pattern",
        )
        return []
    drafts = []
    with survey.reading(nodes[0]):
        drafts.append(_join(survey, group, nodes))
    if not drafts:
        for node in nodes[1:]:
            survey.skip(node.path, f"it belongs to the recipe's signals {group.name!r}, which could not be read")
    return drafts


def _clock(survey: Survey, node: Node) -> tuple[object, ...]:
    """What two series on one clock have in common: number of samples, and rate and start or the time stamps."""
    group = survey.file[node.path]
    data: Any = dataset(group, "data")
    refuse_layout(data)
    if data.size != len(data):
        raise PrepError(f"its data are {data.shape}; a signal of one unit is one column")
    stamps = get(group, "timestamps")
    if is_dataset(stamps):
        digest = hashlib.sha256(np.asarray(stamps[()], np.float64).tobytes()).hexdigest()
        return (len(data), "time stamps", digest)
    start: Any = dataset(group, "starting_time")
    return (len(data), "rate", float(start.attrs.get("rate", np.nan)), float(start[()]))


def _in_words(clock: tuple[object, ...]) -> str:
    if clock[1] == "rate":
        return f"{clock[0]} samples at {clock[2]:g} Hz from {clock[3]:g} s"
    return f"{clock[0]} samples with time stamps {str(clock[2])[:8]}"


def _join(survey: Survey, group: Signals, nodes: list[Node]) -> Draft:
    first = read_series(survey, nodes[0])
    scales = [scaling(survey, node.path, 1) for node in nodes]
    series = replace(
        first,
        datasets=tuple(f"{node.path}/data" for node in nodes),
        num_columns=len(nodes),
        conversion=np.concatenate([factor for factor, _ in scales]),
        offset=np.concatenate([offset for _, offset in scales]),
    )
    name = sanitise(group.name)
    if name in survey.names:
        raise PrepError(f"the stream {name!r} is there already. Give the recipe's signals another name")
    survey.names.add(name)
    units = Units(
        unit_key=[survey.unit_key(key) for key in _keys(name, nodes)],
        kind=["roi"] * len(nodes),
        region=[group.region] * len(nodes),
        quality=[""] * len(nodes),
        xyz_um=np.full((len(nodes), 3), np.nan, np.float32),
    )
    draft = trace_stream(survey, series, name, "traces", units=units)
    for node in nodes:
        survey.use(node.path, name)
    return draft


def _keys(name: str, nodes: list[Node]) -> list[str]:
    """<name>-<number> where every series has a number of its own at the end, else <name>-<own name>."""
    numbers = [NUMBER.findall(node.name)[-1:] for node in nodes]
    plain = [str(int(found[0])) for found in numbers if found]
    if len(set(plain)) == len(nodes):
        return [f"{name}-{number}" for number in plain]
    own = [node.name for node in nodes]
    repeated = {key for key, count in Counter(own).items() if count > 1}
    return [f"{name}-{node.path.replace('/', '-') if node.name in repeated else node.name}" for node in nodes]
