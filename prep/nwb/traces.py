"""Traces of imaging ROIs: one series of the same cells, chosen by rule.

In: RoiResponseSeries of the file. Out: planned streams of kind `trace`, and the ROIs' unit rows.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.nwb.chunks import read_place
from prep.nwb.file import as_text, dataset, follow, get, is_dataset, is_group, numbers, texts
from prep.nwb.inventory import Draft, Node, Survey, unique_names
from prep.nwb.series import Series, read_block, read_series, trace_stream
from prep.plan import PrepError, Units
from prep.settings import to_ns

BLOCK_VALUES = 1_000_000
ASKED_FOR, RAW, NEVER = 0, 4, 9
RANKS = (  # the first pattern that a name has decides
    (r"(neuropil|background).?(correct|subtract)", 3),
    (r"neuropil|background", NEVER),
    (r"deconv|event|spike", 2),
    (r"demix|denois|correct", 3),
    (r"dff|df_?(over|/|by)_?f|delta_?f", 1),
)
CELL_COLUMNS = ("iscell", "is_cell", "Accepted", "accepted", "valid_roi")  # 1: a cell, 0: not
REGION_COLUMNS = ("location", "region", "brain_area", "area")
MICROMETRES = re.compile(r"\b([uµμ]m|microns?|micromet(er|re)s?)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Rois:
    """The cells of a RoiResponseSeries."""

    table: str  # path of the PlaneSegmentation, "" if the file does not say
    rows: tuple[int, ...]  # rows of that table, () if the file does not say
    ids: tuple[str, ...]


def read_traces(survey: Survey) -> list[Draft]:
    """Plan one stream per set of ROIs; of sets that share cells the one with the better series."""
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[Node, Rois]]] = {}
    for node in list(survey.of_type("RoiResponseSeries")):
        with survey.reading(node):
            rois = read_rois(survey, node)
            groups.setdefault((rois.table or node.path, rois.rows), []).append((node, rois))
    drafts: list[Draft] = []
    keys: dict[str, str] = {}  # unit_key: the series that it is read from
    for members in sorted(groups.values(), key=lambda members: min(rank(survey, node) for node, _ in members)):
        planned = _first_that_reads(survey, members, keys)
        if planned is not None and planned.units is not None:
            keys |= dict.fromkeys(planned.units.unit_key, planned.stream.spec.origin)
            drafts.append(planned)
    return sorted(drafts, key=lambda draft: draft.stream.spec.origin)


def read_rois(survey: Survey, node: Node) -> Rois:
    """Which cells a series was measured from."""
    region = get(survey.file, f"{node.path}/rois")
    if not is_dataset(region) or region.ndim != 1:
        return Rois(table="", rows=(), ids=())
    rows = tuple(int(row) for row in region[()])
    table = follow(survey.file, region.attrs.get("table"))
    ids: Any = get(table, "id") if is_group(table) else None
    if not is_dataset(ids):
        return Rois(table="", rows=rows, ids=tuple(str(row) for row in rows))
    if rows and not 0 <= min(rows) <= max(rows) < len(ids):
        message = f"rois points to rows {min(rows)} to {max(rows)} of {len(ids)} ROIs; only their numbers are used"
        survey.note("roi-reference", node.path, message)
        return Rois(table="", rows=rows, ids=tuple(str(row) for row in rows))
    known = ids[()]
    return Rois(table=survey.path_of(table), rows=rows, ids=tuple(str(known[row]) for row in rows))


def rank(survey: Survey, node: Node) -> int:
    """Preference among series of the same cells, the lowest first; neuropil is no cell.

    Asked for by the recipe, dF/F, deconvolved, demixed or corrected for neuropil, fluorescence as measured.
    """
    if survey.matches(node, survey.recipe.series):
        return ASKED_FOR
    parent = survey.nodes.get(node.parent)
    own, container = node.name.lower(), f"{parent.name} {parent.neurodata_type}".lower() if parent else ""
    # The own name decides first: a DfOverF container may hold a series called Neuropil.
    for text in (own, container):
        for pattern, value in RANKS:
            if re.search(pattern, text):
                return value
    return RAW


def _first_that_reads(survey: Survey, members: list[tuple[Node, Rois]], taken: dict[str, str]) -> Draft | None:
    """Plan the best series of a set of ROIs; one that cannot be read makes way for the next."""
    ordered = sorted(members, key=lambda member: (rank(survey, member[0]), member[0].path))
    planned: Draft | None = None
    for node, rois in ordered:
        if planned is not None:
            survey.skip(node.path, f"same cells as {planned.stream.spec.origin}")
        elif rank(survey, node) == NEVER:
            survey.skip(node.path, "neuropil is not a cell")
        else:
            with survey.reading(node):
                planned = _plan(survey, node, rois, taken)
    for node, _ in ordered:
        if f"{node.path}/rois" in survey.nodes:
            survey.found[f"{node.path}/rois"] = ("units", "") if planned else (None, "no trace of these cells is read")
    return planned


def _plan(survey: Survey, node: Node, rois: Rois, taken: dict[str, str]) -> Draft:
    series = read_series(survey, node, len(rois.rows) or None)
    num_rois = series.num_columns
    if rois.rows and len(rois.rows) != num_rois:
        raise PrepError(f"it has {num_rois} columns but {len(rois.rows)} ROIs")
    if _is_missing(series):
        raise PrepError("all its samples are missing")
    name = survey.stream_name(node)
    ids = unique_names(rois.ids, rois.rows) or [str(row) for row in range(num_rois)]
    label = _cell_label(survey, rois, name)
    keys = [survey.unit_key(f"{label}-{roi}") for roi in ids]
    shared = next((taken[key] for key in keys if key in taken), None)
    if shared is not None:
        raise PrepError(f"some of its cells are in {shared}, which is read")
    units = _describe(survey, rois, keys)
    offset_ns = _scan_offsets(survey, rois)
    draft = trace_stream(survey, series, name, "traces", units=units, offset_ns=offset_ns)
    _account_for_table(survey, rois)
    survey.use(node.path, name, "time is the second axis in the file" if series.transposed else "")
    return draft


def _is_missing(series: Series) -> bool:
    """Whether no sample is a number; ends at the first that is."""
    num_samples = series.data.shape[-1] if series.transposed else len(series.data)
    step = max(1, BLOCK_VALUES // series.num_columns)
    blocks = (
        read_block(series.data, series.transposed, begin, min(begin + step, num_samples))
        for begin in range(0, num_samples, step)
    )
    if np.isfinite(read_place(series.data, (0,) * series.data.ndim)):  # of most: no need to decode whole rows
        return False
    return not any(np.isfinite(block).any() for block in blocks)


def _cell_label(survey: Survey, rois: Rois, stream_name: str) -> str:
    """What a ROI's unit_key starts with: its segmentation table, its container where that is not unique."""
    names = rois.table.split("/")
    for label in (names[-1:], names[-2:]) if rois.table else ():
        tables = [
            path for path, node in survey.nodes.items() if node.is_group and path.split("/")[-len(label) :] == label
        ]
        if len(tables) == 1:
            return "-".join(label)
    return stream_name


# ---------------------------------------------------------------- what the file says about the cells


def _describe(survey: Survey, rois: Rois, keys: list[str]) -> Units:
    """Rows of the unit table (U,): region of the plane or of the ROI, whether it is a cell, its centre."""
    num_rois = len(keys)
    region, quality = [_plane_text(survey, rois, "location")] * num_rois, [""] * num_rois
    xyz_um = np.full((num_rois, 3), np.nan, np.float32)
    if rois.table:
        table, rows = survey.file[rois.table], np.array(rois.rows, dtype=np.int64)
        num_rows = len(table["id"])
        column = next((name for name in REGION_COLUMNS if any(texts(table, name, num_rows))), "")
        if column:
            named = texts(table, column, num_rows)
            region = [named[row] or plane for row, plane in zip(rows, region, strict=True)]
            survey.use(f"{rois.table}/{column}", "units")
        quality = _cell_quality(survey, rois.table, num_rows, rows) or quality
        xyz_um = _centres(survey, rois.table, num_rows)[rows]
    return Units(unit_key=keys, kind=["roi"] * num_rois, region=region, quality=quality, xyz_um=xyz_um)


def _cell_quality(survey: Survey, path: str, num_rows: int, rows: npt.NDArray[np.int64]) -> list[str]:
    """good or noise of each ROI (U,) by the segmentation's own verdict; [] where it gives none."""
    table = survey.file[path]
    for name in CELL_COLUMNS:
        column: Any = get(table, name)
        if is_dataset(column) and column.dtype.kind in "fiub" and column.shape in ((num_rows,), (num_rows, 2)):
            # Suite2p's iscell is (N, 2): the verdict, and the classifier's probability of it.
            verdict = column[()].reshape(num_rows, -1)[rows, 0].astype(np.float64)
            survey.use(f"{path}/{name}", "units", "the segmentation's verdict: good or noise")
            return ["" if np.isnan(value) else "good" if value > 0 else "noise" for value in verdict]
    return []


def _centres(survey: Survey, path: str, num_rows: int) -> npt.NDArray[np.float32]:
    """Centre of each ROI of the table (N, 3) where a column gives it in um, else NaN; pixels are no position."""
    table = survey.file[path]
    xyz = np.full((num_rows, 3), np.nan, np.float32)
    for i, axis in enumerate("xyz"):
        values = numbers(table, f"{axis}_um", num_rows)
        if values is not None:
            xyz[:, i] = values
            survey.use(f"{path}/{axis}_um", "units")
    for node in list(survey.nodes.values()):
        if node.parent != path or "centroid" not in node.name.lower() or np.isfinite(xyz).any():
            continue
        column = survey.file[node.path]
        words = f"{node.name.replace('_', ' ')} {as_text(column.attrs.get('unit', ''))}"
        words += f" {as_text(column.attrs.get('description', ''))}"
        if column.shape in ((num_rows, 2), (num_rows, 3)) and MICROMETRES.search(words):
            xyz[:, : column.shape[1]] = column[()]
            survey.use(node.path, "units")
    return xyz


def _plane_text(survey: Survey, rois: Rois, name: str) -> str:
    text: Any = get(survey.file, f"{rois.table}/imaging_plane/{name}") if rois.table else None
    word = as_text(text[()]).strip() if is_dataset(text) else ""
    return "" if word.lower() == "unknown" else word


def _account_for_table(survey: Survey, rois: Rois) -> None:
    """Say of the segmentation table and its columns what was read of them."""
    if not rois.table:
        return
    survey.use(rois.table, "units", "ids are read; image masks are not")
    if f"{rois.table}/id" in survey.nodes:
        survey.use(f"{rois.table}/id", "units")
    for node in survey.nodes.values():
        if node.parent == rois.table and node.path not in survey.found:
            is_mask = "mask" in node.name
            survey.skip(node.path, "image masks are not read" if is_mask else "a ROI column that is not read")


def _scan_offsets(survey: Survey, rois: Rois) -> npt.NDArray[np.int64] | None:
    """When within a frame the scan passed each ROI, (S,); None if the file does not say."""
    path = f"{rois.table}/scan_offset_s"
    if not rois.table or get(survey.file, path) is None:
        return None
    column: Any = dataset(survey.file, path)
    if column.shape != (len(survey.file[rois.table]["id"]),):
        survey.note("scan-offset", path, f"it is {column.shape}, not one offset for each ROI; all are taken as 0")
        return None
    offsets = column[()].astype(np.float64)[list(rois.rows)]
    if not np.isfinite(offsets).all():
        survey.note("scan-offset", path, "some offsets are not numbers; all are taken as 0")
        return None
    survey.use(path, "offset_ns")
    return to_ns(offsets)
