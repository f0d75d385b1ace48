"""Series of numbers on a clock: what all of them share, and the traces of imaging ROIs.

In: a series of the file (data, timestamps or rate). Out: planned streams of kind `trace`, and the ROIs' unit rows.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from prep.clock import Clock, clean_times, clock_findings, rate_times, regularity
from prep.nwb.inventory import Draft, Node, Survey, as_text, dataset, get, open_file
from prep.plan import PlannedStream, PrepError, Units
from prep.settings import Modality, to_ns
from prep.store import StreamSpec
from prep.tokens import cos_sin, cut_samples

Array = npt.NDArray[Any]
NEVER, LAST = 9, 4


@dataclass(frozen=True, kw_only=True)
class Series:
    """A series of n samples: its data as (n, C) whatever the file's axis order, and its clean clock."""

    path: str
    data: Any  # the open h5py dataset
    transposed: bool
    num_columns: int
    clock: Clock
    rows: npt.NDArray[np.int64] | None  # row of the file of each sample of the clock; None: row i
    conversion: float
    offset: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class TraceReader:
    """Reads samples of a series and cuts them into tokens."""

    path: Path
    dataset: str
    transposed: bool
    bounds: npt.NDArray[np.int64]  # (K + 1,) first sample of each token, and the end
    samples_per_token: int
    rows: npt.NDArray[np.int64] | None = None
    conversion: float = 1.0
    offset: float = 0.0
    angle_unit_rad: float | None = None  # of an angle: its unit in radians; each column becomes cos and sin

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Values of tokens [start, stop) as (stop - start, S, P); NaN where nothing was recorded."""
        bounds = self.bounds[start : stop + 1]
        with open_file(self.path) as file:
            samples = self._samples(file[self.dataset], int(bounds[0]), int(bounds[-1]))
        values = samples.astype(np.float64) * self.conversion + self.offset
        values[~np.isfinite(values)] = np.nan
        if self.angle_unit_rad is not None:
            values = cos_sin(values * self.angle_unit_rad)
        return cut_samples(values, bounds - bounds[0], self.samples_per_token)

    def _samples(self, data: Any, first: int, last: int) -> Array:
        rows = None if self.rows is None else self.rows[first:last]
        begin, end = (first, last) if rows is None else (int(rows.min()), int(rows.max()) + 1)
        block: Array = data[:, begin:end].T if self.transposed else data[begin:end]
        block = block.reshape(len(block), -1)
        return block if rows is None else block[rows - begin]


def read_series(survey: Survey, node: Node, num_columns: int | None = None) -> Series:
    """Read clock and layout of a series. Raises PrepError (the reason to skip it).

    num_columns: what the columns must be (the number of ROIs), None if the file does not say.
    """
    group = survey.file[node.path]
    data = dataset(group, "data")
    if data.dtype.kind not in "fiub" or data.ndim not in (1, 2) or data.size == 0:
        found = f"{data.dtype} {data.shape}"
        raise PrepError("its data are empty" if data.size == 0 else f"its data are {found}, not samples x columns")
    num_times = len(group["timestamps"]) if get(group, "timestamps") is not None else None
    transposed = _transposed(survey, node.path, data.shape, num_times, num_columns)
    num_samples = data.shape[-1] if transposed else data.shape[0]
    if num_samples < 2:
        raise PrepError("it has a single sample")
    clock, rows = read_clock(survey, node.path, num_samples)
    return Series(
        path=node.path,
        data=data,
        transposed=transposed,
        num_columns=data.size // num_samples,
        clock=clock,
        rows=rows,
        conversion=float(data.attrs.get("conversion", 1.0)),
        offset=float(data.attrs.get("offset", 0.0)),
        unit=as_text(data.attrs.get("unit", "")).strip(),
    )


def read_clock(survey: Survey, path: str, num_samples: int) -> tuple[Clock, npt.NDArray[np.int64] | None]:
    """Clock of a series of num_samples samples, and the row of each sample. Raises PrepError."""
    group = survey.file[path]
    if get(group, "timestamps") is not None:
        stamps = group["timestamps"]
        if len(stamps) != num_samples:
            raise PrepError(f"it has {num_samples} samples but {len(stamps)} time stamps")
        time_s, rows, findings = clean_times(stamps[()], path)
        rate_hz = None
    else:
        start = dataset(group, "starting_time")
        rate_hz = float(start.attrs.get("rate", np.nan))
        if not (np.isfinite(rate_hz) and rate_hz > 0 and np.isfinite(start[()])):
            raise PrepError(f"its clock is start {start[()]} s at rate {rate_hz} Hz")
        time_s, rows, findings = rate_times(float(start[()]), rate_hz, num_samples), None, []
    if len(time_s) < 2:
        raise PrepError("only one of its time stamps is a time")
    clock = regularity(time_s, rate_hz)
    survey.findings.extend(findings + clock_findings(clock, path))
    return clock, rows


def _transposed(
    survey: Survey, path: str, shape: tuple[int, ...], num_times: int | None, num_columns: int | None
) -> bool:
    """Whether time is the second axis of the data; the commonest mistake in NWB files."""
    if len(shape) == 1:
        return False
    by_time = num_times is not None and shape[0] != num_times == shape[1]
    by_columns = num_times is None and num_columns is not None and shape[0] == num_columns != shape[1]
    if by_time or by_columns:
        message = f"data are {shape}: time is the second axis; it is read as {shape[::-1]}"
        survey.note("wrong-axis", path, message, "repaired")
        return True
    if shape[0] == shape[1] and num_columns is not None:
        survey.note("ambiguous-axis", path, f"data are {shape}: either axis could be time; the first is taken")
    return False


def trace_stream(
    survey: Survey,
    series: Series,
    name: str,
    modality: Modality,
    *,
    channels: tuple[str, ...] = (),
    first_unit: int | None = None,
    angle_unit_rad: float | None = None,
    offset_ns: npt.NDArray[np.int64] | None = None,
) -> Draft:
    """Plan a stream of kind `trace`."""
    clock = series.clock
    spec = StreamSpec(
        name=name,
        kind="trace",
        modality=modality,
        num_tokens=clock.num_tokens,
        num_sources=series.num_columns * (1 if angle_unit_rad is None else 2),
        samples_per_token=clock.samples_per_token,
        duration_ns=clock.duration_ns,
        sample_ns=clock.sample_ns,
        channels=channels,
        first_unit=first_unit,
        unit=series.unit if angle_unit_rad is None else "",
        origin=series.path,
    )
    reader = TraceReader(
        path=survey.path,
        dataset=f"{series.path}/data",
        transposed=series.transposed,
        bounds=clock.bounds,
        samples_per_token=clock.samples_per_token,
        rows=series.rows,
        conversion=series.conversion,
        offset=series.offset,
        angle_unit_rad=angle_unit_rad,
    )
    stream = PlannedStream(spec=spec, start_ns=clock.start_ns, reader=reader, offset_ns=offset_ns)
    return Draft(stream=stream, first_s=float(clock.time_s[0]), last_s=float(clock.time_s[-1]))


# ---------------------------------------------------------------- imaging ROIs


@dataclass(frozen=True, kw_only=True)
class Rois:
    """The cells of a RoiResponseSeries."""

    table: str  # path of the PlaneSegmentation, "" if the file does not say
    rows: tuple[int, ...]  # rows of that table, () if the file does not say
    ids: tuple[str, ...]


def read_traces(survey: Survey, first_unit: int) -> tuple[Units | None, list[Draft]]:
    """Plan one stream per set of ROIs; its units start at row first_unit of the unit table."""
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[Node, Rois]]] = {}
    for node in list(survey.of_type("RoiResponseSeries")):
        rois = read_rois(survey, node)
        groups.setdefault((rois.table or node.path, rois.rows), []).append((node, rois))
    drafts: list[Draft] = []
    units: list[Units] = []
    for members in groups.values():
        planned = _first_that_reads(survey, members, first_unit + sum(len(part.unit_key) for part in units))
        if planned is not None and {key for part in units for key in part.unit_key} & set(planned[0].unit_key):
            survey.skip(planned[1].stream.spec.origin, "some of its cells are in another series that is read")
        elif planned is not None:
            units.append(planned[0])
            drafts.append(planned[1])
    return (join_units(units) if units else None), drafts


def join_units(parts: list[Units]) -> Units:
    """Rows of several unit tables, one after the other."""
    return Units(
        unit_key=[key for part in parts for key in part.unit_key],
        kind=[kind for part in parts for kind in part.kind],
        region=[region for part in parts for region in part.region],
        quality=[quality for part in parts for quality in part.quality],
        xyz_um=np.concatenate([np.zeros((0, 3), np.float32), *(part.xyz_um for part in parts)]),
    )


def read_rois(survey: Survey, node: Node) -> Rois:
    """Which cells a series was measured from."""
    region = get(survey.file, f"{node.path}/rois")
    if not isinstance(region, h5py.Dataset) or region.ndim != 1:
        return Rois(table="", rows=(), ids=())
    rows = tuple(int(row) for row in region[()])
    try:
        table = survey.file[region.attrs["table"]]
        ids = table["id"][()]
        return Rois(table=survey.path_of(table), rows=rows, ids=tuple(str(ids[row]) for row in rows))
    except (KeyError, ValueError, IndexError, OSError):  # a table that is missing or too short
        return Rois(table="", rows=rows, ids=tuple(str(row) for row in rows))


def rank(survey: Survey, node: Node) -> int:
    """Preference among series of the same cells: asked for, dF/F, fluorescence, deconvolved; neuropil is no cell."""
    if survey.matches(node, survey.recipe.series):
        return 0
    parent = survey.nodes.get(node.parent)
    own, container = node.name.lower(), f"{parent.name} {parent.neurodata_type}".lower() if parent else ""
    # The own name decides first: a DfOverF container may hold a series called Neuropil.
    for text in (own, container):
        for pattern, value in (
            (r"neuropil|background", NEVER),
            (r"deconv|event|spike|denoised", LAST),
            (r"demix|correct", 3),
            (r"dff|df_?(over|/|by)_?f|delta_?f", 1),
        ):
            if re.search(pattern, text):
                return value
    return 2


def _first_that_reads(survey: Survey, members: list[tuple[Node, Rois]], first_unit: int) -> tuple[Units, Draft] | None:
    """Plan the best series of a set of ROIs; one that cannot be read makes way for the next."""
    ordered = sorted(members, key=lambda member: (rank(survey, member[0]), member[0].path))
    planned, chosen = None, ""
    for node, rois in ordered:
        if planned is not None:
            survey.skip(node.path, f"same cells as {chosen}")
        elif rank(survey, node) == NEVER:
            survey.skip(node.path, "neuropil is not a cell")
        else:
            try:
                planned, chosen = _plan(survey, node, rois, first_unit), node.path
            except PrepError as error:
                survey.skip(node.path, str(error))
    for node, _ in ordered:
        if f"{node.path}/rois" in survey.nodes:
            survey.found[f"{node.path}/rois"] = ("units", "") if planned else (None, "no trace of these cells is read")
    return planned


def _plan(survey: Survey, node: Node, rois: Rois, first_unit: int) -> tuple[Units, Draft]:
    series = read_series(survey, node, len(rois.rows) or None)
    num_rois = series.num_columns
    if rois.rows and len(rois.rows) != num_rois:
        raise PrepError(f"it has {num_rois} columns but {len(rois.rows)} ROIs")
    name = survey.stream_name(node)
    offset_ns = _scan_offsets(survey, rois)
    draft = trace_stream(survey, series, name, "traces", first_unit=first_unit, offset_ns=offset_ns)
    survey.use(node.path, name, "time is the second axis in the file" if series.transposed else "")
    ids = rois.ids or tuple(str(row) for row in range(num_rois))
    units = Units(
        unit_key=[survey.unit_key(f"{_cell_label(survey, rois, name)}-{roi}") for roi in ids],
        kind=["roi"] * num_rois,
        region=[_region(survey, rois)] * num_rois,
        quality=[""] * num_rois,
        xyz_um=np.full((num_rois, 3), np.nan, np.float32),
    )
    return units, draft


def _cell_label(survey: Survey, rois: Rois, stream_name: str) -> str:
    """What a ROI's unit_key starts with: its segmentation table, or the stream where that is not unique."""
    label = rois.table.rsplit("/", 1)[-1]
    same = [path for path, node in survey.nodes.items() if node.name == label and node.is_group]
    return label if label and len(same) == 1 else stream_name


def _region(survey: Survey, rois: Rois) -> str:
    location = get(survey.file, f"{rois.table}/imaging_plane/location") if rois.table else None
    return as_text(location[()]).strip() if location is not None else ""


def _scan_offsets(survey: Survey, rois: Rois) -> npt.NDArray[np.int64] | None:
    """When within a frame the scan passed each ROI, (S,); None if the file does not say."""
    if rois.table:
        survey.use(rois.table, "units", "ids are read; image masks are not")
        if f"{rois.table}/id" in survey.nodes:
            survey.use(f"{rois.table}/id", "units")
        for node in survey.nodes.values():
            if node.parent == rois.table and node.path not in survey.found:
                is_mask = "mask" in node.name
                survey.skip(node.path, "image masks are not read" if is_mask else "a ROI column that is not read")
    column = get(survey.file, f"{rois.table}/scan_offset_s") if rois.table else None
    if column is None:
        return None
    offsets = column[()].astype(np.float64)[list(rois.rows)]
    if not np.isfinite(offsets).all():
        survey.note("scan-offset", f"{rois.table}/scan_offset_s", "some offsets are not numbers; all are taken as 0")
        return None
    survey.use(f"{rois.table}/scan_offset_s", "offset_ns")
    return to_ns(offsets)
