"""Several files of one session to one SessionPlan: one clock, one unit table, what stands in two files kept once.

In: the files that the recipe's `join` puts together. Out: a SessionPlan as if they had been one file, or a PrepError.
"""

import contextlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from prep.audit import finding
from prep.nwb.file import open_file, text_at
from prep.nwb.invalid import INVALID_TABLE, with_invalid
from prep.nwb.inventory import Draft, snake_case, stem
from prep.nwb.session import UnusableFile, number_units, plan_session
from prep.nwb.spike_features import with_spike_features
from prep.nwb.splits import Blocks, Timeline, cut
from prep.plan import Finding, Found, IntervalTable, PlannedStimulus, PlannedStream, PrepError, SessionPlan, Units
from prep.recipe import Recipe, Splits
from prep.settings import ACTIVITY, NO_TIME
from prep.store import sanitise

OF_ONE_FILE = ("short-session", "recipe-unmatched")  # findings that say nothing where there are several files


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the files: its plan, on its own clock and cut into no splits, or why there is none."""

    path: Path
    label: str  # what its name has that the others' names have not, e.g. image
    plan: SessionPlan | None = None
    error: str = ""
    coverage: tuple[Found, ...] = ()
    findings: tuple[Finding, ...] = ()
    shift_ns: int = 0  # to the first file's clock


@dataclass(frozen=True, kw_only=True)
class Owned:
    """A stream of the joined session, as it is called there, and where it comes from."""

    draft: Draft
    part: int
    name: str  # in its own file


def plan_sessions(paths: Sequence[Path], recipe: Recipe, dataset_id: str) -> SessionPlan:
    """Plan what becomes of the files of one session. Raises PrepError with one line."""
    if len(paths) == 1:
        return plan_session(paths[0], recipe, dataset_id)
    labels = part_labels([stem(path) for path in paths])
    parts = [_read(path, label, recipe, dataset_id) for path, label in zip(paths, labels, strict=True)]
    parts, notes = _on_one_clock(parts)
    return Joining(parts, recipe, dataset_id, notes).plan()


def part_labels(stems: Sequence[str]) -> list[str]:
    """What each name has that the others have not: sub-1_ecephys, sub-1_image -> ecephys, image; else 1, 2, ..."""
    words = [name.split("_") for name in stems]
    num_common = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False)))
    labels = [snake_case("_".join(own[num_common:])) for own in words]
    is_telling = len(set(labels)) == len(labels) and "unnamed" not in labels
    return labels if is_telling else [str(number + 1) for number in range(len(stems))]


def _read(path: Path, label: str, recipe: Recipe, dataset_id: str) -> Part:
    """One file, its whole reference stream as its only split: the joined session is cut later."""
    whole = Splits(fractions=(1.0, 0.0, 0.0), gap_s=0.0)
    error: PrepError | None = None
    for reference in dict.fromkeys((recipe.splits.reference, None)):  # the stream may be in another file
        try:
            plan = plan_session(path, replace(recipe, splits=replace(whole, reference=reference)), dataset_id)
            return Part(path=path, label=label, plan=plan, coverage=plan.coverage, findings=plan.findings)
        except PrepError as caught:
            error = caught
    coverage, findings = (error.coverage, error.findings) if isinstance(error, UnusableFile) else ((), ())
    return Part(path=path, label=label, error=str(error), coverage=coverage, findings=findings)


# ---------------------------------------------------------------- clocks


def reference_time(path: Path) -> datetime | None:
    """The moment that a file's times count from; None where it does not say."""
    # A file that cannot be read is told by its own part; without a time the finding joined-clock says so.
    with contextlib.suppress(OSError, RuntimeError, ValueError, PrepError), open_file(path) as file:
        text = text_at(file, "timestamps_reference_time") or text_at(file, "session_start_time")
        return datetime.fromisoformat(text)
    return None


def _on_one_clock(parts: Sequence[Part]) -> tuple[list[Part], list[Finding]]:
    """The parts, each with its shift to the clock of the first that has a plan."""
    zero = next((reference_time(part.path) for part in parts if part.plan is not None), None)
    shifted, notes = [], []
    for part in parts:
        own, shift_ns, message = reference_time(part.path) if part.plan is not None else zero, 0, ""
        if own is None or zero is None or (own.tzinfo is None) != (zero.tzinfo is None):
            message = "the files do not both say what their times count from; they are taken to be on one clock"
        elif own != zero:
            difference = own - zero
            whole_s = difference.days * 86_400 + difference.seconds
            shift_ns = whole_s * 1_000_000_000 + difference.microseconds * 1000
            message = f"its times count from {shift_ns / 1e9:+.6f} s on the first file's clock; they are shifted"
        if message:
            notes.append(finding("joined-clock", part.path.name, message, shift_s=shift_ns / 1e9))
        shifted.append(replace(part, shift_ns=shift_ns))
    return shifted, notes


def _shifted(stream: PlannedStream, shift_ns: int) -> PlannedStream:
    return replace(stream, start_ns=stream.start_ns + shift_ns) if shift_ns else stream


def _shifted_table(table: IntervalTable, shift_ns: int) -> IntervalTable:
    start, stop = (np.where(t == NO_TIME, NO_TIME, t + shift_ns) for t in (table.start_ns, table.stop_ns))
    return replace(table, start_ns=start, stop_ns=stop) if shift_ns else table


# ---------------------------------------------------------------- the same in two files


def is_same_stream(one: PlannedStream, other: PlannedStream) -> bool:
    """Whether two streams have the same schema, times and values, whatever the object in the file was called."""
    specs = [replace(stream.spec, name="", origin="", first_unit=None, channels=()) for stream in (one, other)]
    if specs[0] != specs[1] or not np.array_equal(one.start_ns, other.start_ns):
        return False
    if not all(_is_same_array(a, b) for a, b in ((one.offset_ns, other.offset_ns), (one.types, other.types))):
        return False
    step = one.spec.shard_tokens
    blocks = ((begin, min(begin + step, one.spec.num_tokens)) for begin in range(0, one.spec.num_tokens, step))
    return all(
        np.array_equal(one.reader.read(a, b), other.reader.read(a, b), equal_nan=one.spec.kind in ("trace", "event"))
        for a, b in blocks
    )


def is_same_table(one: IntervalTable, other: IntervalTable) -> bool:
    """Whether two tables have the same times and columns."""
    if not (_is_same_array(one.start_ns, other.start_ns) and _is_same_array(one.stop_ns, other.stop_ns)):
        return False
    if one.columns.keys() != other.columns.keys():
        return False
    return all(_is_same_array(column, other.columns[name]) for name, column in one.columns.items())


def _is_same_array(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f" and other.dtype.kind == "f")
    return type(one) is type(other) and bool(one == other)


# ---------------------------------------------------------------- one session


class Joining:
    """Puts the parts together, in order of path; what an earlier part has already is kept once."""

    def __init__(self, parts: Sequence[Part], recipe: Recipe, dataset_id: str, notes: Sequence[Finding]) -> None:
        self.parts, self.recipe, self.dataset_id = parts, recipe, dataset_id
        self.planned = [(number, part.plan) for number, part in enumerate(parts) if part.plan is not None]
        self.streams: list[Owned] = []
        self.intervals: dict[str, IntervalTable] = {}
        self.coverage: list[Found] = []
        self.findings: list[Finding] = list(notes)
        self.session_id = ""

    def plan(self) -> SessionPlan:
        """The joined session. Raises PrepError where ids contradict each other, or nothing can be used."""
        subject_id = self._one_id("subject_id", {p.path.name: p.plan.subject_id for p in self.parts if p.plan})
        given = {p.path.name: p.plan.session_id for p in self.parts if p.plan and p.plan.session_id != _own_id(p)}
        self.session_id = self._one_id("session_id", given) or sanitise(self._group())
        for number, part in enumerate(self.parts):
            self._add(number, part)
        for pattern in self._unmatched():
            self.findings.append(pattern)
        if not self.planned:
            raise self._unusable("; ".join(f"{part.path.name}: {part.error}" for part in self.parts))
        splits = self._cut(subject_id)
        drafts = self._finished(splits)
        streams, units = number_units(drafts)
        stimuli: dict[str, PlannedStimulus] = {s.digest: s for _, plan in self.planned for s in plan.stimuli}
        return SessionPlan(
            dataset_id=self.dataset_id,
            session_id=self.session_id,
            subject_id=subject_id,
            source=self.parts[0].path,
            licence=self.recipe.licence,
            units=units,
            streams=streams,
            stimuli=tuple(stimuli.values()),
            intervals=self.intervals,
            splits=splits,
            coverage=tuple(self.coverage),
            findings=tuple(self.findings),
        )

    def _group(self) -> str:
        """What the names of the files have in common, by the recipe."""
        match = re.search(self.recipe.join or "", self.parts[0].path.name)
        return (match.group(1) if match and match.re.groups else "") or _own_id(self.parts[0])

    def _one_id(self, what: str, given: dict[str, str]) -> str:
        names = {name: value for name, value in given.items() if value}
        if len(set(names.values())) > 1:
            found = " and ".join(f"{value!r} in {name}" for name, value in names.items())
            raise PrepError(f"files that the recipe joins have {what} {found}. Correct `join`, or the files.")
        return next(iter(names.values()), "")

    def _add(self, number: int, part: Part) -> None:
        file, new_names = part.path.name, {}
        if part.plan is not None:
            new_names = {**self._add_streams(number, part.plan, part), **self._add_tables(part.plan, part)}
        else:
            message = f"nothing of this file is used: {part.error}"
            self.findings.append(finding("unusable-file", file, message))
        twice = [name for name, new in new_names.items() if new is None]
        if twice:
            message = f"{', '.join(twice)}: the same times and values as in an earlier file; kept once"
            self.findings.append(finding("joined-twice", file, message))
        self.coverage += [_found_in(file, row, new_names) for row in part.coverage]
        own = (row for row in part.findings if row.code not in OF_ONE_FILE)
        self.findings += [replace(row, path=_path_in(file, row.path)) for row in own]

    def _add_streams(self, number: int, plan: SessionPlan, part: Part) -> dict[str, str | None]:
        """The name of each stream in the joined session; None for one that is there already."""
        names: dict[str, str | None] = {}
        taken = {key for owned in self.streams if owned.draft.units for key in owned.draft.units.unit_key}
        ours = [f"{self.dataset_id}/{self.session_id}/{key.split('/', 2)[-1]}" for key in plan.units.unit_key]
        if taken & set(ours):
            ours = [f"{self.dataset_id}/{self.session_id}/{part.label}-{key.split('/', 2)[-1]}" for key in ours]
        earlier = [owned for owned in self.streams if owned.part != number]
        for planned in plan.streams:
            stream, name = _shifted(planned, part.shift_ns), planned.spec.name
            alike = [owned.draft.stream for owned in earlier if owned.name == name]
            if any(is_same_stream(stream, other) for other in alike):
                names[name] = None
                continue
            new = names[name] = _free_name(name, part.label, {owned.draft.stream.spec.name for owned in self.streams})
            first_s, last_s = stream.start_ns[[0, -1]] / 1e9 if len(stream.start_ns) else (0.0, 0.0)
            rows = None if stream.spec.first_unit is None else _rows(replace(plan.units, unit_key=ours), stream)
            draft = Draft(stream=_renamed(stream, new), first_s=float(first_s), last_s=float(last_s), units=rows)
            self.streams.append(Owned(draft=draft, part=number, name=name))
        return names

    def _add_tables(self, plan: SessionPlan, part: Part) -> dict[str, str | None]:
        names: dict[str, str | None] = {}
        for name, unshifted in plan.intervals.items():
            table = _shifted_table(unshifted, part.shift_ns)
            if name in self.intervals and is_same_table(self.intervals[name], table):
                names[name] = None
                continue
            new = names[name] = _free_name(name, part.label, set(self.intervals))
            self.intervals[new] = table
        return names

    def _unmatched(self) -> list[Finding]:
        """What the recipe names and no file has; one file need not have it."""
        found = [[f for f in part.findings if f.code == "recipe-unmatched"] for part in self.parts if part.plan]
        return [one for one in found[0] if all(one in others for others in found[1:])] if found else []

    # ------------------------------------------------------------ splits

    def _cut(self, subject_id: str) -> Blocks:
        splits, owned = self.recipe.splits, self._reference()
        drafts = [owned.draft for owned in self.streams]
        if owned is not None:  # its own file's plan says exactly when it begins and ends
            part = self.parts[owned.part]
            ((start_ns, stop_ns, _),) = part.plan.splits if part.plan else ()
            first_s, last_s = (start_ns + part.shift_ns) / 1e9, (stop_ns + part.shift_ns) / 1e9
            drafts.insert(0, replace(owned.draft, first_s=first_s, last_s=last_s))
            splits = replace(splits, reference=owned.draft.stream.spec.name)
        timeline = Timeline(
            dataset_id=self.dataset_id,
            session_id=self.session_id,
            subject_id=subject_id,
            file=" + ".join(part.path.name for part in self.parts),
            drafts=drafts,
            intervals=self.intervals,
        )
        try:
            blocks, absent = cut(timeline, splits)
        except PrepError as error:
            raise self._unusable(str(error)) from error
        self.findings += [finding(code, path, message) for code, path, message in absent]
        return blocks

    def _reference(self) -> Owned | None:
        """The stream whose time is split: the recipe's, else the first activity of any file, else the first file's
        longest stream.

        None where the recipe names one that no file has, or a file whose splits are not one block.
        """
        wanted = self.recipe.splits.reference
        heads = []
        for number, plan in self.planned:
            mine = [owned for owned in self.streams if owned.part == number]
            if wanted is not None:
                named = wanted.strip("/")
                mine = [o for o in mine if named in (o.name, o.draft.stream.spec.name, o.draft.stream.spec.origin)]
            elif mine and mine[0].name != plan.streams[0].spec.name:
                mine = []  # its first stream is an earlier file's too
            elif mine and mine[0].draft.units is None:
                mine = [max(mine, key=lambda owned: owned.draft.last_s - owned.draft.first_s)]
            heads += mine[:1] if len(plan.splits) == 1 else []
        activity = [owned for owned in heads if owned.draft.stream.spec.modality in ACTIVITY]
        return next(iter([*activity, *heads] if wanted is None else heads), None)

    def _finished(self, splits: Blocks) -> list[Draft]:
        """The drafts: invalid times of any file hold for all, features of spike trains are of this train split."""
        measured = {}
        for number, plan in self.planned:  # the readers of spikes know their own file's clock
            blocks = [(a - self.parts[number].shift_ns, b - self.parts[number].shift_ns, name) for a, b, name in splits]
            measured[number] = with_spike_features(plan.units, plan.streams, blocks)
        drafts = []
        for owned in self.streams:
            draft, file = owned.draft, self.parts[owned.part].path.name
            if draft.units is not None:
                features = _rows(measured[owned.part], draft.stream).spike_features
                draft = replace(draft, units=replace(draft.units, spike_features=features))
            for number, plan in self.planned:
                if number != owned.part and INVALID_TABLE in plan.intervals:
                    table = _shifted_table(plan.intervals[INVALID_TABLE], self.parts[number].shift_ns)
                    (draft,) = with_invalid([draft], {INVALID_TABLE: table})
            spec = replace(draft.stream.spec, origin=_path_in(file, draft.stream.spec.origin))
            drafts.append(replace(draft, stream=replace(draft.stream, spec=spec)))
        return drafts

    def _unusable(self, message: str) -> UnusableFile:
        error = UnusableFile(message)
        error.coverage, error.findings = tuple(self.coverage), tuple(self.findings)
        return error


def _free_name(name: str, label: str, taken: set[str]) -> str:
    """The name itself, else with the file's label behind it, else with a number too."""
    choices = [name, f"{name}_{label}", *(f"{name}_{label}_{number}" for number in range(2, len(taken) + 3))]
    return next(choice for choice in choices if choice not in taken)


def _own_id(part: Part) -> str:
    """The session_id that a file without one goes by."""
    return sanitise(stem(part.path))


def _path_in(file: str, path: str) -> str:
    return file if path in ("", "/") else f"{file}/{path}"


def _found_in(file: str, row: Found, new_names: dict[str, str | None]) -> Found:
    """A row of the coverage table with its file's name, and the names of the joined session."""
    used = (row.used_as or "").split(", ")
    kept = [new for new in (new_names.get(name, name) for name in used) if new]
    reason = row.reason if kept or row.used_as is None else "the same as in an earlier file of the session"
    return replace(row, path=_path_in(file, row.path), used_as=", ".join(kept) or None, reason=reason)


def _renamed(stream: PlannedStream, name: str) -> PlannedStream:
    """A stream under another name, its channels too where they are named after it."""
    old = stream.spec.name
    channels = tuple(
        name + channel.removeprefix(old) if channel.split("/")[0] == old else channel
        for channel in stream.spec.channels
    )
    return replace(stream, spec=replace(stream.spec, name=name, channels=channels))


def _rows(units: Units, stream: PlannedStream) -> Units:
    """The rows of a unit table that are a stream's sources."""
    first = stream.spec.first_unit or 0
    part = slice(first, first + stream.spec.num_sources)
    columns: dict[str, Any] = {field.name: getattr(units, field.name) for field in fields(Units)}
    rows: dict[str, Any] = {name: None if column is None else column[part] for name, column in columns.items()}
    return Units(**rows)
