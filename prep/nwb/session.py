"""One NWB file to one SessionPlan: what may be read at all, the readers in turn, and the splits.

In: the path of a file, a recipe, the dataset's name. Out: a SessionPlan, or a PrepError of one line.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prep.looks import FILMS, LeftToOthers, only_look
from prep.nwb.behavior import read_behavior
from prep.nwb.behavior_tables import read_behavior_tables
from prep.nwb.clocks import read_sync
from prep.nwb.events import read_events
from prep.nwb.file import as_text, holding, open_file, text_at
from prep.nwb.intervals import read_intervals
from prep.nwb.invalid import with_invalid
from prep.nwb.inventory import COLUMN_TYPES, INTRACELLULAR, UNREADABLE, Draft, Survey, one_line, survey
from prep.nwb.lfp import read_lfp
from prep.nwb.pose import read_pose
from prep.nwb.session_audit import audit_session
from prep.nwb.signals import read_fibers, read_signals
from prep.nwb.spike_features import with_spike_features
from prep.nwb.splits import cut_splits
from prep.nwb.stimulus import read_stimuli
from prep.nwb.stimulus_tables import read_stimulus_tables
from prep.nwb.traces import read_traces
from prep.nwb.trial_events import read_trial_events
from prep.nwb.units import read_units
from prep.plan import Finding, Found, PlannedStream, PrepError, SessionPlan, Units
from prep.recipe import Recipe

# In turn: who comes first has the first claim to an object, and units in this order.
READERS = (
    read_units,
    read_traces,
    read_fibers,
    read_lfp,
    read_signals,
    read_events,
    read_behavior,
    read_behavior_tables,
    read_pose,
    read_stimuli,
    read_stimulus_tables,
    read_trial_events,
)
OF_FILMS = (read_stimuli, read_stimulus_tables)


class UnusableFile(PrepError):
    """The file was read, and nothing or too little of it can be used; `coverage` says what is in it."""

    coverage: tuple[Found, ...] = ()
    findings: tuple[Finding, ...] = ()


def plan_session(path: Path, recipe: Recipe, dataset_id: str) -> SessionPlan:
    """Plan what becomes of one NWB file. Raises PrepError with one line; the caller knows which file it was.

    A file that opens and is refused raises UnusableFile, with the coverage of all that is in it.
    """
    path = Path(path)
    _refuse_by_path(path)
    try:
        with holding((path, "/")), open_file(path) as file:
            session = survey(path, file, recipe, dataset_id)
            _refuse_by_version(session)
            return _plan(session)
    except PrepError:
        raise
    except UNREADABLE as error:
        raise PrepError(f"the file is damaged or not complete ({one_line(error)}). Get it again.") from error


def _refuse_by_path(path: Path) -> None:
    if not path.exists():
        raise PrepError(f"no such file: {path}. Check the path.")
    if path.is_dir():
        if not ((path / ".zgroup").exists() or (path / "zarr.json").exists()):
            raise PrepError("a folder, not an NWB file; an NWB-Zarr folder has .zgroup or zarr.json at its top.")
        return
    if path.stat().st_size == 0:
        raise PrepError("the file has 0 bytes. Get it again.")
    if not h5py.is_hdf5(path):
        raise PrepError("not an HDF5 file, so not NWB. Is it a pointer (git-lfs, git-annex) or a broken download?")


def _refuse_by_version(session: Survey) -> None:
    file = session.file
    what = "a Zarr folder" if session.path.is_dir() else "an HDF5 file"
    version = (as_text(file.attrs.get("nwb_version", "")) or text_at(file, "nwb_version")).removeprefix("NWB-")
    if not len(file):
        raise _unusable(session, f"{what} with nothing in it.")
    if not version and "neurodata_type" not in file.attrs:
        raise _unusable(session, f"{what}, but not NWB (no nwb_version).")
    if version.startswith(("0.", "1.")):
        for path in session.nodes.keys() - session.found.keys():
            session.skip(path, "NWB 1 is not read")
        raise _unusable(session, f"NWB version {version}, which is NWB 1; only NWB 2 is read. Convert it to NWB 2.")


def _plan(session: Survey) -> SessionPlan:
    read_sync(session)
    if only_look() == FILMS:
        for read in OF_FILMS:
            read(session)
        raise LeftToOthers("another task makes the plan")
    drafts = [draft for read in READERS for draft in read(session)]
    intervals = read_intervals(session)
    audit_session(session, drafts)
    drafts = with_invalid(drafts, intervals)
    _use_session_metadata(session)
    _note_unmatched(session)
    if not drafts:
        raise _unusable(session, _nothing_to_use(session))
    try:
        splits = cut_splits(session, drafts, intervals)
    except PrepError as error:
        raise _unusable(session, str(error)) from error
    streams, units = number_units(drafts)
    units = with_spike_features(units, streams, splits)
    return SessionPlan(
        dataset_id=session.dataset_id,
        session_id=session.session_id,
        subject_id=text_at(session.file, "general/subject/subject_id"),
        source=session.path,
        licence=session.recipe.licence,
        units=units,
        streams=streams,
        stimuli=tuple({stimulus.digest: stimulus for draft in drafts for stimulus in draft.stimuli}.values()),
        intervals=intervals,
        splits=splits,
        coverage=session.coverage(),
        findings=tuple(session.findings),
    )


def number_units(drafts: list[Draft]) -> tuple[tuple[PlannedStream, ...], Units]:
    """The streams, each with the row of its first unit in the session's unit table, and that table."""
    streams: list[PlannedStream] = []
    parts: list[Units] = []
    for draft in drafts:
        if draft.units is None:
            streams.append(draft.stream)
            continue
        spec = replace(draft.stream.spec, first_unit=sum(len(part.unit_key) for part in parts))
        streams.append(replace(draft.stream, spec=spec))
        parts.append(draft.units)
    return tuple(streams), join_units(parts)


def join_units(parts: list[Units]) -> Units:
    """Rows of several unit tables, one after the other."""
    sizes = [len(part.unit_key) for part in parts]
    unknown = [np.full(size, np.nan, np.float32) for size in sizes]

    def column(name: str) -> np.ndarray[Any, Any] | None:
        given = [getattr(part, name) for part in parts]
        if all(values is None for values in given):
            return None
        width = next(values.shape[1:] for values in given if values is not None)
        blank = [np.broadcast_to(row.reshape(-1, *[1] * len(width)), (len(row), *width)) for row in unknown]
        return np.concatenate([none if values is None else values for values, none in zip(given, blank, strict=True)])

    return Units(
        unit_key=[key for part in parts for key in part.unit_key],
        kind=[kind for part in parts for kind in part.kind],
        region=[region for part in parts for region in part.region],
        quality=[quality for part in parts for quality in part.quality],
        xyz_um=np.concatenate([np.zeros((0, 3), np.float32), *(part.xyz_um for part in parts)]),
        depth_um=column("depth_um"),
        waveform_ms=column("waveform_ms"),
        spike_features=column("spike_features"),
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
        ("units", recipe.units),
        ("events", recipe.events),
        ("not_events", recipe.not_events),
        ("stimulus_tables", recipe.stimulus_tables),
        ("names", tuple(recipe.names)),
    ):
        for pattern in patterns:
            if not any(session.matches(node, (pattern,)) for node in session.nodes.values()):
                message = f"`{key}` of the recipe names it, but the file has no such object"
                session.note("recipe-unmatched", pattern, message)


def _unusable(session: Survey, message: str) -> UnusableFile:
    """The refusal of a file that opens: nothing in it is used, whatever the readers made of it before."""
    for path, (used_as, _) in list(session.found.items()):
        if used_as is not None:
            session.skip(path, "the file is refused")
    session.also.clear()
    error = UnusableFile(message)
    error.coverage = tuple(row for row in session.coverage() if row.neurodata_type)
    error.findings = tuple(session.findings)
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
    return f"nothing to use: no units, traces, behaviour, events or stimuli.{instead}"
