"""Carries out one SessionPlan: shards, clocks, statistics, units, intervals, splits, then the seal.

In: a SessionPlan and the identity of its source. Out: `<dataset>/<session>.zarr`, written in a folder of its own, then
renamed and sealed.
"""

import hashlib
import importlib.metadata
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prep.catalog import Source, dataset_folder, has_its_files, read_manifest
from prep.disk import StoreError, files_below, locked, sha256, written_together
from prep.frames import (
    PARTIAL,
    num_stimulus_shards,
    partial_folder,
    stimulus_folder,
    stimulus_rows,
    was_seen,
    write_frames,
)
from prep.parts import Files, read_part, remove_parts, write_part
from prep.plan import (
    FrameReader,
    IntervalTable,
    PlannedStimulus,
    PlannedStream,
    PrepError,
    SequentialReader,
    SessionPlan,
    TokenReader,
)
from prep.settings import FEATURE_NAMES, FEATURES_VERSION, FORMAT_VERSION, SPLITS, STREAM_FEATURES
from prep.shards import Array, RowsSpec, create_rows, write_array, write_group, write_shard, write_text
from prep.statistics_pass import Statistics, shard_part, statistics, train_tokens
from prep.store import create_stream, manifest_files, manifest_path, sanitise, seal
from prep.unit_features import unit_features

SCRATCH = ".scratch"  # what was read and waits for its shard
RUN_SHARDS = 16  # at most, that one task writes: a chunk of the recording on the border of two is decoded for both
LONGEST_ID = 120  # characters of a folder's name that `sanitise` keeps


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where one session goes, and what its seal says of where it came from."""

    root: Path
    folder: str  # relative to root, e.g. d1/s1.zarr
    run: str  # the run that writes: part of the partial folder's name
    sources: tuple[Source, ...]
    recipe_digest: str

    @property
    def partial(self) -> Path:
        """What is written before it is renamed: no other run writes there."""
        return partial_folder(self.root / self.folder, self.run)


def software_version() -> str:
    """Brainloom's version, as the root attributes record it."""
    try:
        return importlib.metadata.version("brainloom")
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        return "unknown"


def source_of(path: Path) -> Source:
    """Size and digest of an input file, or of an NWB-Zarr folder."""
    if path.is_file():
        return Source(file=path.name, bytes=path.stat().st_size, sha256=sha256(path))
    files = manifest_files(path)
    digest = hashlib.sha256("".join(f"{name} {file['sha256']}\n" for name, file in files.items()).encode())
    return Source(file=path.name, bytes=sum(file["bytes"] for file in files.values()), sha256=digest.hexdigest())


def session_folder(dataset_id: str, session_id: str) -> str:
    """Where a session lies, relative to the store."""
    return f"{dataset_folder(dataset_id)}/{sanitise(session_id)}.zarr"


def renamed(plan: SessionPlan, sources: Sequence[Source]) -> SessionPlan:
    """The plan under a session_id of its own: a second file (or several, joined) of the same id gets a short digest."""
    content = "\n".join(f"{source.file} {source.sha256}" for source in sources)
    suffix = hashlib.sha256(content.encode()).hexdigest()[:8]
    session_id = (
        f"{plan.session_id[: LONGEST_ID - len(suffix) - 1]}-{suffix}"  # else the folder's name loses the digest
    )
    old, new = f"{plan.dataset_id}/{plan.session_id}/", f"{plan.dataset_id}/{session_id}/"
    keys = [new + key.removeprefix(old) if key.startswith(old) else key for key in plan.units.unit_key]
    return replace(plan, session_id=session_id, units=replace(plan.units, unit_key=keys))


def check(plan: SessionPlan) -> None:
    """Refuse a plan whose names are no folder names, or whose parts do not fit together."""
    names = [stream.spec.name for stream in plan.streams]
    for name in [*names, *plan.intervals, *(column for table in plan.intervals.values() for column in table.columns)]:
        if name != sanitise(name):
            raise PrepError(f"{name!r} is no safe name for a stream, a table or a column; expected {sanitise(name)!r}.")
    if len(set(names)) < len(names):
        raise PrepError(f"two streams have the same name: {sorted(names)}. Name them apart in the recipe.")
    for stimulus in plan.stimuli:
        if not re.fullmatch(r"[0-9a-f]{8,64}", stimulus.digest):
            raise PrepError(f"stimulus digest {stimulus.digest!r} is not 8 to 64 hexadecimal digits.")
        if 0 in stimulus.shape:
            raise PrepError(f"stimulus {stimulus.digest} has no pixels: its shape is {stimulus.shape}.")
    for stream in plan.streams:
        spec = stream.spec
        if len(stream.start_ns) != spec.num_tokens or (np.diff(stream.start_ns) < 0).any():
            raise PrepError(
                f"streams/{spec.name}: {len(stream.start_ns)} start times for {spec.num_tokens} tokens; "
                "expected one each, in order of time."
            )
        if spec.kind == "event" and (stream.types is None or len(stream.types) != spec.num_tokens):
            raise PrepError(f"streams/{spec.name}: expected one type for each of its {spec.num_tokens} events.")


# ---------------------------------------------------------------- shards


def train_blocks(plan: SessionPlan) -> list[tuple[int, int]]:
    """[start_ns, stop_ns) of the train split."""
    return [(start, stop) for start, stop, label in plan.splits if label == "train"]


def runs_of_shards(reader: object, num_shards: int) -> list[tuple[int, int]]:
    """[first, stop) of the shards that one task writes, for each task."""
    size = 1
    if isinstance(reader, SequentialReader):
        half = max(1, -(-num_shards // 2))  # two workers can share it
        size = min(half, RUN_SHARDS) if reader.is_divisible else max(1, num_shards)
    return [(first, min(first + size, num_shards)) for first in range(0, num_shards, size)]


def write_stream_shards(plan: SessionPlan, target: Target, number: int, first: int, stop: int) -> None:
    """One task: whole shards [first, stop) of stream `number`, with their digests and parts of the statistics."""
    spec, reader = plan.streams[number].spec, plan.streams[number].reader
    scratch = target.partial / SCRATCH / f"{spec.name}.{first}"
    with written_together():
        for shard, values in enumerate(_pieces(reader, spec.rows(), (first, stop), scratch), first):
            _write_values(plan, target, number, shard, values)
    shutil.rmtree(scratch, ignore_errors=True)


def _pieces(
    reader: TokenReader | FrameReader, rows: RowsSpec, shards: tuple[int, int], scratch: Path
) -> Iterator[Array]:
    """The rows of each shard of a run."""
    edges = [min(shard * rows.shard_rows, rows.shape[0]) for shard in range(shards[0], shards[1] + 1)]
    if isinstance(reader, SequentialReader):
        yield from reader.read_once(edges, scratch)
    else:
        yield from (reader.read(start, end) for start, end in itertools.pairwise(edges))


def _write_values(plan: SessionPlan, target: Target, number: int, shard: int, values: Array) -> None:
    stream, spec = plan.streams[number], plan.streams[number].spec
    folder = f"streams/{spec.name}/values"
    files = write_shard(target.partial / folder, spec.rows(), shard, values)
    tokens = train_tokens(spec, stream.start_ns, stream.offset_ns, train_blocks(plan))
    arrays = shard_part(spec, tokens, shard * spec.shard_tokens, values)
    write_part(target.partial, f"{spec.name}.{shard}", {f"{folder}/{name}": e for name, e in files.items()}, arrays)


def write_stimulus_shards(root: Path, run: str, stimulus: PlannedStimulus, first: int, stop: int) -> None:
    """One task: whole shards [first, stop) of frames, unless they were written while they were looked at."""
    rows = stimulus_rows(stimulus.shape)
    partial = partial_folder(stimulus_folder(root, stimulus.digest), run)
    if was_seen(partial):
        return
    with written_together():
        for shard, frames in enumerate(_pieces(stimulus.reader, rows, (first, stop), partial / SCRATCH), first):
            write_frames(partial, rows, shard, frames)


def finish_stimulus(root: Path, run: str, stimulus: PlannedStimulus) -> None:
    """Seal a stimulus whose shards are written; another run may have sealed the same one: then it stays."""
    folder = stimulus_folder(root, stimulus.digest)
    partial = partial_folder(folder, run)
    with written_together() as written:
        write_group(partial, {"brainloom": {"format": FORMAT_VERSION, "digest": stimulus.digest}})
        create_rows(partial / "frames", stimulus_rows(stimulus.shape))
    entry = {
        "digest": stimulus.digest,
        "path": folder.relative_to(root).as_posix(),
        "shape": list(stimulus.shape),
        "dtype": "uint8",
    }
    files = _below(partial, written)
    for shard in range(num_stimulus_shards(stimulus)):
        files.update(read_part(partial, str(shard)).files)
    publish(root, partial, folder, entry, "stimulus", files)


# ---------------------------------------------------------------- the rest of a session


def finish_session(plan: SessionPlan, target: Target) -> dict[str, Any]:
    """All but the shards, then the seal. Returns the manifest's entry."""
    partial = target.partial
    missing = [s.digest for s in plan.stimuli if not manifest_path(stimulus_folder(target.root, s.digest)).exists()]
    if missing:
        raise StoreError(f"stimuli {missing} are not sealed. Run the same `make prep` again.")
    files: Files = {}
    with written_together() as written:
        write_group(partial, {"brainloom": root_attributes(plan, target)})
        write_group(partial / "streams")
        measured = {
            planned.spec.name: _finish_stream(plan, planned, partial, files)
            for planned in sorted(plan.streams, key=lambda stream: stream.spec.name)
        }
        _write_units(plan, measured, partial / "units")
        write_group(partial / "intervals")
        for name, table in plan.intervals.items():
            _write_intervals(table, partial / "intervals" / name)
        _write_splits(plan, partial / "splits")
    entry = session_entry(plan, target)
    publish(target.root, partial, target.root / target.folder, entry, "session", files | _below(partial, written))
    return entry


def _below(folder: Path, written: Mapping[Path, dict[str, Any]]) -> Files:
    """What a manifest says of files, by their paths inside the folder."""
    return {path.relative_to(folder).as_posix(): entry for path, entry in written.items()}


def publish(
    root: Path,
    partial: Path,
    folder: Path,
    entry: Mapping[str, Any],
    kind: Literal["session", "stimulus"],
    files: Files,
) -> None:
    """Rename a finished folder into place and seal it: a kill at any point leaves it unsealed or sealed, never half.

    `files`: what the manifest says of all that was written; each is durable, so that no power cut leaves a seal over
    bytes that are gone: renames and the seal follow in the file system's own order.
    """
    remove_parts(partial)
    shutil.rmtree(partial / SCRATCH, ignore_errors=True)
    found = set(files_below(partial))
    for leftover in found - files.keys():  # of a task that was killed while it wrote
        (partial / leftover).unlink()
    if missing := sorted(files.keys() - found):
        raise StoreError(f"{partial / missing[0]} was written and is gone. Run the same `make prep` again.")
    with locked(root):
        manifest = manifest_path(folder)
        if has_its_files(folder) and (kind == "stimulus" or read_manifest(manifest)["files"] == files):
            shutil.rmtree(partial)  # another run has sealed the same bytes: its readers are not disturbed
            return
        manifest.unlink(missing_ok=True)
        remove_folder(folder)
        partial.rename(folder)
        seal(folder, entry, files, kind)


def remove_folder(folder: Path) -> None:
    """Remove a folder that nobody should take for data; its first rename makes sure that nobody does half-way."""
    if folder.exists():
        trash = folder.with_name(f".{folder.name}.{os.getpid()}.trash{PARTIAL}")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def root_attributes(plan: SessionPlan, target: Target) -> dict[str, Any]:
    """What a session says of itself."""
    return {
        "format": FORMAT_VERSION,
        "dataset_id": plan.dataset_id,
        "session_id": plan.session_id,
        "subject_id": plan.subject_id,
        "sources": [asdict(source) for source in target.sources],
        "licence": plan.licence,
        "recipe_digest": target.recipe_digest,
        "versions": {"brainloom": software_version(), "format": FORMAT_VERSION, "features": FEATURES_VERSION},
        "coverage": [asdict(found) for found in plan.coverage],
        "findings": [asdict(finding) for finding in plan.findings],
    }


def session_entry(plan: SessionPlan, target: Target) -> dict[str, Any]:
    """The manifest's entry, which is the catalog's but for the digest of the manifest itself."""
    return {
        "dataset_id": plan.dataset_id,
        "session_id": plan.session_id,
        "subject_id": plan.subject_id,
        "path": target.folder,
        "licence": plan.licence,
        "num_units": len(plan.units.unit_key),
        "split_labels": list(SPLITS),
        "splits": [list(block) for block in plan.splits],
        "streams": sorted((stream_entry(stream) for stream in plan.streams), key=lambda entry: str(entry["name"])),
        "intervals": sorted(plan.intervals),
        "refused": [{"path": finding.path, "message": finding.message} for finding in plan.refused],
        "recipe_digest": target.recipe_digest,
        "features_version": FEATURES_VERSION,
        "sources": [asdict(source) for source in target.sources],
    }


def stream_entry(stream: PlannedStream) -> dict[str, Any]:
    """What the catalog says of a stream; [start_ns, stop_ns) holds all its tokens, offsets included."""
    spec, offsets = stream.spec, stream.offset_ns
    early, late = (0, 0) if offsets is None or not len(offsets) else (int(offsets.min()), int(offsets.max()))
    has_tokens = spec.num_tokens > 0
    return {
        "name": spec.name,
        "kind": spec.kind,
        "modality": spec.modality,
        "num_tokens": spec.num_tokens,
        "num_sources": spec.num_sources,
        "samples_per_token": spec.samples_per_token,
        "duration_ns": spec.duration_ns,
        "sample_ns": spec.sample_ns,
        "start_ns": int(stream.start_ns[0]) + early if has_tokens else 0,
        "stop_ns": int(stream.start_ns[-1]) + late + spec.duration_ns if has_tokens else 0,
        "channels": list(spec.channels),
        "first_unit": spec.first_unit,
        "stimulus": spec.stimulus,
        "unit": spec.unit,
        "types": list(spec.types),
        "fields": list(spec.fields),
    }


def _finish_stream(
    plan: SessionPlan, planned: PlannedStream, partial: Path, known: Files
) -> tuple[int | None, Statistics]:
    spec = planned.spec
    create_stream(partial, spec, planned.start_ns, planned.offset_ns, planned.types)
    folder = partial / "streams" / spec.name
    parts = [read_part(partial, f"{spec.name}.{shard}") for shard in range(spec.num_shards)]
    for part in parts:
        known.update(part.files)
    tokens = train_tokens(spec, planned.start_ns, planned.offset_ns, train_blocks(plan))
    found = statistics(spec, tokens, [part.arrays for part in parts])
    write_array(folder / "mean", found.mean)
    write_array(folder / "scale", found.scale)
    return spec.first_unit, found


def _write_units(plan: SessionPlan, measured: Mapping[str, tuple[int | None, Statistics]], folder: Path) -> None:
    units, num_units = plan.units, len(plan.units.unit_key)
    of_streams = np.zeros((num_units, len(STREAM_FEATURES)), np.float32)
    for first_unit, result in reversed(list(measured.values())):  # a unit of two streams: the first by name counts
        if first_unit is not None:
            of_streams[first_unit : first_unit + len(result.features)] = result.features
    features = unit_features(units, of_streams)
    write_group(folder)
    for name in ("unit_key", "kind", "region", "quality"):
        write_text(folder / name, getattr(units, name))
    write_array(folder / "xyz_um", np.asarray(units.xyz_um, np.float32).reshape(num_units, 3))
    for name in ("depth_um", "waveform_ms"):
        column = getattr(units, name)
        write_array(folder / name, np.full(num_units, np.nan, np.float32) if column is None else column)
    write_array(folder / "features", features, {"names": list(FEATURE_NAMES), "version": FEATURES_VERSION})


def _write_intervals(table: IntervalTable, folder: Path) -> None:
    write_group(folder)
    times: dict[str, Array] = {"start_ns": table.start_ns.astype(np.int64), "stop_ns": table.stop_ns.astype(np.int64)}
    for name, column in {**table.columns, **times}.items():
        if isinstance(column, list):
            write_text(folder / name, column)
        else:
            write_array(folder / name, column if name in times else np.asarray(column, np.float64))


def _write_splits(plan: SessionPlan, folder: Path) -> None:
    write_group(folder)
    write_array(folder / "start_ns", np.array([start for start, _, _ in plan.splits], np.int64))
    write_array(folder / "stop_ns", np.array([stop for _, stop, _ in plan.splits], np.int64))
    write_array(folder / "label", np.array([SPLITS.index(label) for _, _, label in plan.splits], np.int8))
