"""One NWB file to one SessionPlan: what may be read at all, the readers in turn, and the splits.

In: the path of a file, a recipe, the dataset's name. Out: a SessionPlan, or a PrepError of one line.
"""

from collections import Counter
from pathlib import Path

import h5py
import numpy as np

from prep.nwb.behavior import read_behavior, read_intervals
from prep.nwb.inventory import COLUMN_TYPES, INTRACELLULAR, Draft, Survey, as_text, open_file, survey, text_at
from prep.nwb.stimulus import read_stimuli
from prep.nwb.traces import join_units, read_traces
from prep.nwb.units import read_units
from prep.plan import Finding, Found, PrepError, SessionPlan
from prep.recipe import Recipe, Splits
from prep.settings import SPLITS, to_ns


class UnusableFile(PrepError):
    """The file was read, and nothing or too little of it can be used; `coverage` says what is in it."""

    coverage: tuple[Found, ...] = ()
    findings: tuple[Finding, ...] = ()


def plan_session(path: Path, recipe: Recipe, dataset_id: str) -> SessionPlan:
    """Plan what becomes of one NWB file. Raises PrepError with one line; the caller knows which file it was."""
    path = Path(path)
    _refuse_by_path(path)
    try:
        with open_file(path) as file:
            _refuse_by_version(file)
            return _plan(survey(path, file, recipe, dataset_id))
    except (OSError, RuntimeError) as error:  # h5py's errors of a damaged file
        raise PrepError(f"the file is damaged or not complete ({_one_line(error)}). Get it again.") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _refuse_by_path(path: Path) -> None:
    if not path.exists():
        raise PrepError(f"no such file: {path}. Check the path.")
    if path.is_dir():
        is_zarr = (path / ".zgroup").exists() or (path / "zarr.json").exists()
        what = "NWB-Zarr folders are not read yet (next release)" if is_zarr else "a folder, not an NWB file"
        raise PrepError(f"{what}.")
    if path.stat().st_size == 0:
        raise PrepError("the file has 0 bytes. Get it again.")
    if not h5py.is_hdf5(path):
        raise PrepError("not an HDF5 file, so not NWB. Is it a pointer (git-lfs, git-annex) or a broken download?")


def _refuse_by_version(file: h5py.File) -> None:
    version = (as_text(file.attrs.get("nwb_version", "")) or text_at(file, "nwb_version")).removeprefix("NWB-")
    if not len(file):
        raise PrepError("an HDF5 file with nothing in it.")
    if not version and "neurodata_type" not in file.attrs:
        raise PrepError("an HDF5 file, but not NWB (no nwb_version).")
    if version.startswith(("0.", "1.")):
        raise PrepError(f"NWB version {version}, which is NWB 1; only NWB 2 is read. Convert it to NWB 2.")


def _plan(session: Survey) -> SessionPlan:
    drafts: list[Draft] = []
    unit_tables = []
    units, spikes = read_units(session)
    if units is not None and spikes is not None:
        unit_tables.append(units)
        drafts.append(spikes)
    rois, traces = read_traces(session, len(units.unit_key) if units else 0)
    unit_tables += [rois] if rois is not None else []
    drafts += traces + read_behavior(session)
    shown, stimuli = read_stimuli(session)
    drafts += shown
    intervals = read_intervals(session)
    _use_session_metadata(session)
    _note_unmatched(session)
    if not drafts:
        raise _unusable(session, _nothing_to_use(session))
    splits = cut_splits(session, drafts)
    return SessionPlan(
        dataset_id=session.dataset_id,
        session_id=session.session_id,
        subject_id=text_at(session.file, "general/subject/subject_id"),
        source=session.path,
        licence=session.recipe.licence,
        units=join_units(unit_tables),
        streams=tuple(draft.stream for draft in drafts),
        stimuli=stimuli,
        intervals=intervals,
        splits=splits,
        coverage=session.coverage(),
        findings=tuple(session.findings),
    )


def _use_session_metadata(session: Survey) -> None:
    session.use("/", "session")
    if "general/subject" in session.nodes and text_at(session.file, "general/subject/subject_id"):
        session.use("general/subject", "session", "subject_id is read")


def _note_unmatched(session: Survey) -> None:
    """A recipe may serve many files, so a name that matches nothing is no error; but it may be a slip."""
    recipe = session.recipe
    for key, patterns in (
        ("angles", recipe.angles),
        ("not_angles", recipe.not_angles),
        ("series", recipe.series),
        ("names", tuple(recipe.names)),
    ):
        for pattern in patterns:
            if not any(session.matches(node, (pattern,)) for node in session.nodes.values()):
                message = f"`{key}` of the recipe names it, but the file has no such object"
                session.note("recipe-unmatched", pattern, message)


def _unusable(session: Survey, message: str) -> UnusableFile:
    error = UnusableFile(message)
    error.coverage, error.findings = session.coverage(), tuple(session.findings)
    return error


def _nothing_to_use(session: Survey) -> str:
    """Why a readable file gives no stream: what it holds instead."""
    rows = [row for row in session.coverage() if row.used_as is None and row.neurodata_type not in COLUMN_TYPES]
    if any(INTRACELLULAR.match(row.neurodata_type) for row in rows):
        return "intracellular recordings only; they are out of scope."
    reasons = Counter((row.neurodata_type, row.reason) for row in rows if "metadata" not in row.reason)
    told = [
        f"{count} {kind} ({reason.removeprefix(f'{kind} is ')})"
        for (kind, reason), count in reasons.most_common(3)
        if kind != "ProcessingModule"
    ]
    instead = f" It holds {', '.join(told)}." if told else ""
    return f"nothing to use: no units, ROI traces, behaviour or stimulus pixels.{instead}"


# ---------------------------------------------------------------- splits


def cut_splits(session: Survey, drafts: list[Draft]) -> tuple[tuple[int, int, str], ...]:
    """Train, valid and test as [start_ns, stop_ns), label, in order of time."""
    splits = session.recipe.splits
    if splits.explicit:
        spans = [(span.start_s, span.stop_s, span.label) for span in splits.explicit]
    else:
        reference = _reference(session, splits, drafts)
        spans = fraction_spans(reference.first_s, reference.last_s, splits)
        wanted = {label for label, part in zip(SPLITS, splits.fractions, strict=True) if part > 0}
        for label in sorted(wanted - {label for _, _, label in spans}):
            message = f"the session is too short for a {label} split with gaps of {splits.gap_s} s; it has none"
            session.note("short-session", reference.stream.spec.name, message)
    return tuple(sorted((int(to_ns(start)), int(to_ns(stop)), label) for start, stop, label in spans))


def _reference(session: Survey, splits: Splits, drafts: list[Draft]) -> Draft:
    """The stream whose time is split: the recipe's, else spikes, else the first traces, else the first stream."""
    if splits.reference is None:
        return drafts[0]
    wanted = splits.reference.strip("/")
    for draft in drafts:
        if wanted in (draft.stream.spec.name, draft.stream.spec.origin):
            return draft
    names = ", ".join(draft.stream.spec.name for draft in drafts)
    found = f"the recipe's `splits.reference` is {splits.reference!r}, but the session's streams are {names}"
    raise _unusable(session, f"{found}. Name one of them.")


def fraction_spans(first_s: float, last_s: float, splits: Splits) -> list[tuple[float, float, str]]:
    """Contiguous pieces of [first, last], each shrunk by half the gap at inner borders; too short ones are left out."""
    borders = [first_s + round(float(part), 12) * (last_s - first_s) for part in np.cumsum((0.0, *splits.fractions))]
    borders[0], borders[-1] = first_s, last_s
    half = splits.gap_s / 2
    spans = []
    for label, start, stop in zip(SPLITS, borders, borders[1:], strict=False):
        begin, end = start + half * (start > first_s), stop - half * (stop < last_s)
        if end > begin:
            spans.append((begin, end, label))
    return spans
