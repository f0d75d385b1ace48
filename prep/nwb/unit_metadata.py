"""What a file knows about its sorted units beside their spikes: region, quality, position, depth, waveform width.

In: a table of units and the electrode table that it refers to. Out: rows of the session's unit table.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.nwb.file import as_text, enum_words, follow, get, is_dataset, is_text, numbers, text_at, texts
from prep.nwb.inventory import Node, Survey, unique_names
from prep.plan import Units

Float = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

ELECTRODES = "general/extracellular_ephys/electrodes"
REGION_COLUMNS = (
    "location", "region", "brain_area", "brain_region", "area", "structure", "structure_acronym",
    "ecephys_structure_acronym", "anatomical_location", "allen_location", "acronym",
)  # fmt: skip
QUALITY_COLUMNS = (
    "quality", "kslabel", "ks_label", "cluster_group", "group", "unit_quality", "sorting_quality", "cluster_quality",
    "phy_annotations", "decoder_label", "unit_type", "label", "classification", "is_good",
)  # fmt: skip
OTHER_MEANINGS = (
    "group",
    "label",
    "unit_type",
    "classification",
)  # often of something else: taken for known words only
QUALITY_WORD = re.compile(r"good|mua|noise|unsorted|sua|single|multi|isolated|artifact", re.IGNORECASE)
PHY_GROUPS = {0: "noise", 1: "mua", 2: "good", 3: "unsorted"}  # how phy's groups are numbered
PHY_COLUMNS = ("phy_annotations", "cluster_group")
DEPTH_COLUMNS = ("depth_um", "depth", "unit_depth", "probe_vertical_position", "distance_from_probe_tip_um")
WAVEFORM_COLUMNS = (
    "waveform_duration", "trough_to_peak", "trough_to_peak_duration", "trough_to_peak_ms", "peak_to_trough",
    "peak_to_trough_duration", "peak_trough_duration", "peak_to_valley", "waveform_width", "spike_width",
    "waveform_duration_ms", "spike_duration", "duration",
)  # fmt: skip
POSITION_COLUMNS = (("unit_x", "unit_y", "unit_z"), ("x", "y", "z"))
PEAK_COLUMNS = ("peak_channel_id", "peak_channel", "peak_electrode")
LONGEST_WAVEFORM_MS = 5.0
NO_WORD = re.compile(
    r"(|-+|none|nan|null|n/?a|n\.a\.|unknown|undefined|unspecified|not (specified|available|known))", re.I
)
PAIR = re.compile(r"""\s*["']?([\w ]+?)["']?\s*[:=]\s*["']?([^"']*)""")
REGION_KEY = re.compile(r"^(brain|anatomical)?[ _]*(region|area|location|structure)s?$", re.IGNORECASE)


@dataclass(kw_only=True)
class _Table:
    """A table of units while it is read; `used` collects the columns that said something."""

    group: Any
    num_rows: int
    used: set[str] = field(default_factory=set)

    def names(self, wanted: tuple[str, ...]) -> list[str]:
        """Columns of these names, whatever their capitals, in the order of `wanted`."""
        own = {name.lower(): name for name in self.group if f"{name}_index" not in self.group}
        return [own[name] for name in wanted if name in own]

    def numbers(self, name: str) -> Float | None:
        """A column of numbers (R,)."""
        return numbers(self.group, name, self.num_rows)

    def texts(self, name: str) -> list[str]:
        """A column of words, enumerations included; [] if it is none."""
        column = get(self.group, name)
        words = enum_words(column) if is_dataset(column) and column.shape == (self.num_rows,) else {}
        if words and not set(words.values()) <= {"TRUE", "FALSE"}:
            return [words.get(int(value), "") for value in column[()]]
        return [text.strip() for text in texts(self.group, name, self.num_rows)]


@dataclass(kw_only=True)
class _Sites:
    """The electrode table, and which of its rows each unit was recorded on: its peak channel where it is known."""

    table: Any  # None: there is none
    rows: list[Index]  # (R,) of the electrode table; empty where the file does not say
    used: set[str] = field(default_factory=set)

    def column(self, name: str) -> Float | None:
        """Mean of a numeric column over each unit's electrodes (R,), NaN = unknown; None if there is no such column."""
        data = get(self.table, name) if self.table is not None else None
        values = numbers(self.table, name, len(self.table["id"])) if is_dataset(data) else None
        if values is None:
            return None
        self.used.add(name)
        mean = [values[row].mean() if len(row) else np.nan for row in self.rows]
        return np.array(mean, np.float64)

    def regions(self) -> list[str]:
        """The region that most of each unit's electrodes lie in."""
        location: Any = get(self.table, "location") if self.table is not None else None
        if not is_dataset(location) or not is_text(location):
            return [""] * len(self.rows)
        self.used.add("location")
        words = [region_word(as_text(value)) for value in location[()]]
        counts = [Counter(words[place] for place in row if words[place]) for row in self.rows]
        return [count.most_common(1)[0][0] if count else "" for count in counts]


def describe(survey: Survey, node: Node, rows: Index, prefix: str) -> tuple[Units, set[str]]:
    """What the file says about these rows of a table of units (NWB type Units), and the columns that said it.

    Positions and depths in um, waveforms in ms; NaN and "" where the file does not say. `prefix` precedes unit names.
    """
    group = survey.file[node.path]
    table = _Table(group=group, num_rows=len(group["spike_times_index"]))
    sites = _sites(survey, table)
    region, quality = _regions(survey, table, sites), _quality(table)
    units = Units(
        unit_key=[survey.unit_key(f"{prefix}{name}") for name in _names(table, rows)],
        kind=["unit"] * len(rows),
        region=[region[row] for row in rows],
        quality=[quality[row] for row in rows],
        xyz_um=_positions(table, sites)[rows],
        depth_um=_depth(table, sites)[rows],
        waveform_ms=_waveforms(table)[rows],
    )
    if sites.table is not None and sites.used:
        path = survey.path_of(sites.table)
        survey.use(path, "units", "read as unit metadata")
        for name in ("id", *sites.used):
            if f"{path}/{name}" in survey.nodes:
                survey.use(f"{path}/{name}", "units")
    return units, table.used


def region_word(text: str) -> str:
    """The region in a free text: `brain_region: Thalamus; hemisphere: left` is Thalamus; "" where it names none."""
    text = text.strip()
    for part in re.split(r"[;,{}\n]", text):
        pair = PAIR.match(part)
        if pair and REGION_KEY.match(pair[1].strip()) and not NO_WORD.fullmatch(pair[2].strip()):
            return pair[2].strip()
    return "" if NO_WORD.fullmatch(text) else text


def _names(table: _Table, rows: Index) -> list[str]:
    """Names of units, unique in the table: ids, with the row behind those that occur twice."""
    ids = get(table.group, "id")
    names = [str(value) for value in ids[()]] if is_dataset(ids) else [str(row) for row in range(table.num_rows)]
    unique = unique_names(names, range(table.num_rows))
    return [unique[row] for row in rows]


# ---------------------------------------------------------------- electrodes


def _sites(survey: Survey, table: _Table) -> _Sites:
    column = get(table.group, "electrodes")
    electrodes = follow(survey.file, column.attrs.get("table")) if is_dataset(column) else None
    electrodes = get(survey.file, ELECTRODES) if electrodes is None else electrodes
    ids: Any = get(electrodes, "id") if electrodes is not None else None
    num_electrodes = len(ids) if is_dataset(ids) else 0
    rows = _electrode_rows(table, num_electrodes)
    if is_dataset(ids):
        peaks = _peak_rows(table, ids[()])
        rows = [own if peak < 0 else np.array([peak]) for own, peak in zip(rows, peaks, strict=True)]
    is_known = any(len(row) for row in rows)
    return _Sites(table=electrodes if is_known else None, rows=rows)


def _electrode_rows(table: _Table, num_electrodes: int) -> list[Index]:
    """Rows of the electrode table of each unit; empty where the units do not say, or say nonsense."""
    nothing = [np.zeros(0, np.int64)] * table.num_rows
    rows, index = get(table.group, "electrodes"), get(table.group, "electrodes_index")
    if not is_dataset(rows) or rows.ndim != 1 or rows.dtype.kind not in "iu":
        return nothing
    if index is not None and not (is_dataset(index) and index.dtype.kind in "iu"):
        return nothing
    stops = np.arange(1, len(rows) + 1) if index is None else index[()].astype(np.int64)
    if len(stops) != table.num_rows or (np.diff(stops, prepend=0) < 0).any() or (stops > len(rows)).any():
        return nothing
    table.used.add("electrodes")
    lists = np.split(rows[()].astype(np.int64), stops[:-1]) if table.num_rows else []
    return [row[(row >= 0) & (row < num_electrodes)] for row in lists]


def _peak_rows(table: _Table, ids: Any) -> Index:
    """Row of the electrode table of each unit's peak channel (R,), by the electrode's id; -1 = unknown."""
    order = np.argsort(ids, kind="stable")
    for name in table.names(PEAK_COLUMNS):
        given = table.numbers(name)
        if given is None or not len(ids):
            continue
        place = np.clip(np.searchsorted(ids[order], given), 0, len(ids) - 1)
        is_known = ids[order][place] == given
        if is_known.any():
            table.used.add(name)
            rows: Index = np.where(is_known, order[place], -1)
            return rows
    return np.full(table.num_rows, -1)


# ---------------------------------------------------------------- words


def _regions(survey: Survey, table: _Table, sites: _Sites) -> list[str]:
    """Region of each unit: by its own column, its electrode group, its electrodes; the first that names one."""
    result = [""] * table.num_rows
    for name in table.names(REGION_COLUMNS):
        words = [region_word(text) for text in table.texts(name)]
        if any(words):
            table.used.add(name)
            result = _first_word(result, words)
    for source in (_group_regions(survey, table), sites.regions):
        if not all(result):
            result = _first_word(result, source())
    return result


def _first_word(words: list[str], others: list[str]) -> list[str]:
    return [word or other for word, other in zip(words, others, strict=True)]


def _group_regions(survey: Survey, table: _Table) -> Callable[[], list[str]]:
    """Region of each unit by its electrode group's location."""

    def read() -> list[str]:
        column = get(table.group, "electrode_group")
        if not is_dataset(column) or column.shape != (table.num_rows,):
            return [""] * table.num_rows
        known: dict[str, str] = {}
        regions = []
        for reference in column[()]:
            held = follow(survey.file, reference)
            path = str(held.name) if held is not None else ""
            if path and path not in known:
                known[path] = region_word(text_at(held, "location") or as_text(held.attrs.get("location", "")))
            regions.append(known.get(path, ""))
        table.used.add("electrode_group")
        return regions

    return read


def _quality(table: _Table) -> list[str]:
    """The sorter's or the curator's word for each unit."""
    for name in table.names(QUALITY_COLUMNS):
        words, given = table.texts(name), table.numbers(name)
        if not words and given is not None:
            words = _numbered_quality(name.lower(), given, is_flag=table.group[name].dtype.kind == "b")
        if any(words) and (name.lower() not in OTHER_MEANINGS or any(QUALITY_WORD.search(word) for word in words)):
            table.used.add(name)
            return ["" if NO_WORD.fullmatch(word) else word for word in words]
    return [""] * table.num_rows


def _numbered_quality(name: str, given: Float, *, is_flag: bool) -> list[str]:
    """Words of a column of numbers or flags, [] where they are not known to be a quality."""
    whole = [int(value) if np.isfinite(value) and value == np.rint(value) else None for value in given]
    if is_flag:
        return ["good" if value else "" for value in given] if name in ("is_good", "quality") else []
    if name in PHY_COLUMNS:
        return ["" if value is None else PHY_GROUPS.get(value, "") for value in whole]
    if name in ("quality", "unit_quality", "cluster_quality"):
        return ["" if value is None else str(value) for value in whole]
    return []


# ---------------------------------------------------------------- numbers


def _told(table: Any, name: str) -> str:
    """What a column says of itself: name, description, unit."""
    attributes = table[name].attrs
    return " ".join([name, as_text(attributes.get("description", "")), as_text(attributes.get("unit", ""))]).lower()


def _length_factor(told: str) -> float:
    """Micrometres per unit of a column; um where it does not say."""
    if re.search(r"\bmm\b|_mm\b|millimet", told):
        return 1000.0
    return 1e6 if re.search(r"\bmet(er|re)s?\b|\(m\)|\bin m\b", told) else 1.0


def _positions(table: _Table, sites: _Sites) -> npt.NDArray[np.float32]:
    """Position of each unit (R, 3) in um: its own, or the mean of its electrodes; all of them at 0 is a placeholder."""
    for names in POSITION_COLUMNS:
        columns = [table.numbers(name) for name in names]
        given = [column for column in columns if column is not None]
        if len(given) == 3:
            table.used.update(names)
            factors = [_length_factor(_told(table.group, name)) for name in names]
            return (np.stack(given, axis=1) * factors).astype(np.float32)
    axes = [sites.column(name) for name in "xyz"]
    known = [axis for axis in axes if axis is not None]
    if len(known) < 3:
        return np.full((table.num_rows, 3), np.nan, np.float32)
    placeholder = all((sites.table[name][()] == 0).all() for name in "xyz")
    factors = [_length_factor(_told(sites.table, name)) for name in "xyz"]
    xyz = np.stack(known, axis=1) * factors
    return np.where(placeholder & (len(sites.table["x"]) > 1), np.nan, xyz).astype(np.float32)


def _depth(table: _Table, sites: _Sites) -> npt.NDArray[np.float32]:
    """Depth of each unit (R,) in um, as the file measures it: along the probe, or below the surface."""
    for name in table.names(DEPTH_COLUMNS):
        given = table.numbers(name)
        if given is not None and np.isfinite(given).any():
            table.used.add(name)
            return (given * _length_factor(_told(table.group, name))).astype(np.float32)
    for name in DEPTH_COLUMNS:
        mean = sites.column(name)
        if mean is not None and np.isfinite(mean).any():
            return (mean * _length_factor(_told(sites.table, name))).astype(np.float32)
    return np.full(table.num_rows, np.nan, np.float32)


def _waveforms(table: _Table) -> npt.NDArray[np.float32]:
    """Width of each unit's waveform (R,) in ms; what cannot be one is unknown."""
    for name in table.names(WAVEFORM_COLUMNS):
        given = table.numbers(name)
        if given is None or not (np.isfinite(given) & (given > 0)).any():
            continue
        width_ms = given * _waveform_factor(_told(table.group, name), float(np.median(given[given > 0])))
        fits = np.isfinite(width_ms) & (width_ms > 0) & (width_ms <= LONGEST_WAVEFORM_MS)
        if fits.mean() > 0.5:
            table.used.add(name)
            return np.where(fits, width_ms, np.nan).astype(np.float32)
    return np.full(table.num_rows, np.nan, np.float32)


def _waveform_factor(told: str, typical: float) -> float:
    """Milliseconds per unit of a column, by what it says of itself, or by the size of its values."""
    if re.search(r"\bms\b|_ms\b|millisec|msec", told):
        return 1.0
    if re.search(r"\b[uµ]s\b|_us\b|microsec", told):
        return 1e-3
    if re.search(r"\bs\b|_s\b|\bseconds?\b|\bsec\b", told):
        return 1e3
    if typical < 0.02 or typical > 20:  # no waveform is this short in ms, or this long
        return 1e3 if typical < 0.02 else 1e-3
    return 1.0
