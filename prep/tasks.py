"""The tasks that workers run for ingest: plan a file, write a shard, finish a session.

In: small descriptors (a path, a plan, the number of a shard). Out: files in the store; errors as data.
"""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prep.catalog import Sealed, Source, is_whole
from prep.disk import StoreError, in_words, read_json
from prep.files import InputFile, RemoteFile
from prep.frames import stimulus_folder, writing_what_is_seen
from prep.looks import KINDS, Looks, knowing
from prep.mirror import Mirror
from prep.plan import Found, PlannedStimulus, PrepError, SessionPlan
from prep.staging import discard, known_source, release, stage
from prep.write_session import (
    Target,
    check,
    finish_session,
    finish_stimulus,
    renamed,
    source_of,
    write_stream_shards,
)

ShardRun = tuple[str, int, int, int]  # shards of a stream that one task writes: in words, stream, first, stop
LARGE_BYTES = 128 * 2**20  # resident
CHANGED = "the file changed while it was being read. Run the same `make prep` again."
Stamps = tuple[tuple[Path, int, int], ...]  # size and time of change of each local file, before it was read
Sources = tuple[tuple[Source, ...], Stamps]
Planner = Callable[[Sequence[Path], Any, str], SessionPlan]  # the files of one session, a recipe, a dataset_id


@dataclass(frozen=True)
class Failed:
    """A task's error, as data: it crosses processes whatever the exception was."""

    where: str
    error: str
    counts: dict[str, int] = field(default_factory=dict)  # of the file's objects, where it could be read


@dataclass(frozen=True)
class Planned:
    """What a plan task found: a plan to carry out, or a session that is there already."""

    sources: tuple[Source, ...]
    plan: SessionPlan | None = None
    sealed: Sealed | None = None
    seconds: float = 0.0
    refused: tuple[tuple[str, str], ...] = ()  # broken objects that were left out: path, message
    counts: dict[str, int] = field(default_factory=dict)  # of the files' objects: objects, used, skipped
    remotes: tuple[RemoteFile, ...] = ()  # what was staged for the plan
    stamps: Stamps = ()


def guarded(where: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run a task; its error comes back as one line that names the object."""
    try:
        return function(*args)
    except Exception as error:  # of this object alone: the others go on, and it is in the summary
        return Failed(where, one_line(error), count_objects(getattr(error, "coverage", ())))
    finally:
        _give_back_memory()


def _give_back_memory() -> None:
    """Hand back what malloc keeps of a large task, so that the next one's memory does not lie on top of it."""
    with contextlib.suppress(OSError, AttributeError):  # a system without /proc or glibc
        if int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > LARGE_BYTES:
            ctypes.CDLL(None).malloc_trim(0)


def count_objects(coverage: Sequence[Found]) -> dict[str, int]:
    """How many objects a file has, and how many of them were used and skipped; {} where it could not be read."""
    num_used = sum(row.used_as is not None for row in coverage)
    counts = {"objects": len(coverage), "used": num_used, "skipped": len(coverage) - num_used}
    return counts if coverage else {}


def one_line(error: BaseException) -> str:
    """An error as one line; ours are written for people, a disk's are put into words, others need their type."""
    text = " ".join(str(error).split())
    if isinstance(error, PrepError | StoreError) and text:
        return text
    return (isinstance(error, OSError) and in_words(error)) or f"{type(error).__name__}: {text}".rstrip(": ")


def plan_from_nwb(paths: Sequence[Path], recipe: Any, dataset_id: str) -> SessionPlan:
    """The planner of real files."""
    from prep.nwb.join import plan_sessions  # h5py and what reads with it: only workers that plan need them

    return plan_sessions(paths, recipe, dataset_id)


def look_task(files: Sequence[InputFile], sealed: Sequence[Sequence[Sealed]], root: Path) -> list[Planned | None]:
    """Which of these local files are in the store already; None where a plan has to tell what is in a file.

    `sealed`: for each file, sessions whose sources are `alike`.
    """
    return [_look(file, sessions, root) for file, sessions in zip(files, sealed, strict=True)]


def _look(file: InputFile, sealed: Sequence[Sealed], root: Path) -> Planned | None:
    try:
        return _already_there(tuple(source_of(path) for path in file.paths), sealed, root)
    except (OSError, StoreError):  # the plan will say it
        return None


def alike(file: InputFile, sources: Sequence[Source]) -> bool:
    """Whether files may be these sources, as far as can be told without reading them."""
    is_file = [path.is_file() for path in file.paths]  # an NWB-Zarr folder's size is in its files
    sizes = [path.stat().st_size if there else None for path, there in zip(file.paths, is_file, strict=True)]
    known = [source.bytes if there else None for source, there in zip(sources, is_file, strict=True)]
    return sizes == known


def plan_task(
    planner: Planner, file: InputFile, recipe: Any, sealed: Sequence[Sealed], root: Path, run: str
) -> Planned:
    """Read what is in the files of a session, unless this very content was ingested with this very recipe.

    `sealed`: the sessions that this recipe has made of files of these names. `run`: that may write what it sees; "" for
    none.
    """
    started, stamps = time.monotonic(), () if file.remotes else _stamps(file.paths)
    for find_sources in (_known_sources, _sources):
        sources = find_sources(file, sealed)
        there = _already_there(sources, sealed, root)
        if there is not None:
            release(file.remotes, root)
            return there
    try:
        with _writing(root, run):
            plan = planner(file.paths, recipe, file.dataset_id)
        check(plan)
    except PrepError:
        discard(file.remotes)
        raise
    seconds = time.monotonic() - started
    return replace(_planned(plan), sources=sources, remotes=file.remotes, stamps=stamps, seconds=seconds)


def _planned(plan: SessionPlan) -> Planned:
    refused = tuple((finding.path, finding.message) for finding in plan.refused)
    return Planned((), plan=plan, refused=refused, counts=count_objects(plan.coverage))


def _writing(root: Path, run: str) -> contextlib.AbstractContextManager[None]:
    return writing_what_is_seen(root, run) if run else contextlib.nullcontext()


# ---------------------------------------------------------------- a plan that several tasks share


def source_task(file: InputFile) -> Sources:
    """Name and content of local files, and what they looked like before they were read."""
    stamps = _stamps(file.paths)
    return _sources(file, ()), stamps


def look_ahead_task(planner: Planner, file: InputFile, recipe: Any, root: Path, run: str, kind: str) -> Looks:
    """Take the looks of one kind that the plan of a file will need. What is wrong with the file, the plan says."""
    looks = Looks(stamp=_stamps(file.paths), left=frozenset(KINDS) - {kind})
    with contextlib.suppress(PrepError), knowing(looks), _writing(root, run):  # said by the plan
        planner(file.paths, recipe, file.dataset_id)
    return looks


def plan_by_looks_task(planner: Planner, file: InputFile, recipe: Any, *ahead: Looks | Failed) -> Planned | Failed:
    """The plan of a file by what other tasks have found; its sources are for `source_task` to tell."""
    started, stamps, found = time.monotonic(), _stamps(file.paths), {}
    for looks in ahead:
        if isinstance(looks, Failed):
            return looks
        found.update(looks.found)
    with knowing(Looks(stamp=stamps, found=found)):
        plan = planner(file.paths, recipe, file.dataset_id)
    check(plan)
    return replace(_planned(plan), stamps=stamps, seconds=time.monotonic() - started)


def _already_there(sources: tuple[Source, ...], sealed: Sequence[Sealed], root: Path) -> Planned | None:
    for session in sealed:
        if sources == session.sources and is_whole(root, session):
            refused = tuple((row["path"], row["message"]) for row in session.entry.get("refused", ()))
            counts = _sealed_counts(root, session) if refused else {}
            return Planned(sources, sealed=session, refused=refused, counts=counts)
    return None


def _known_sources(file: InputFile, sealed: Sequence[Sealed]) -> tuple[Source, ...]:
    """What lies behind URLs is not brought again to see that it is there already; () where that cannot be told."""
    known = [known_source(remote) for remote in file.remotes] if sealed else []
    return tuple(source for source in known if source is not None) if None not in known else ()


def _sources(file: InputFile, sealed: Sequence[Sealed]) -> tuple[Source, ...]:
    """Name and content of the files, which are here when this returns."""
    if file.remotes:
        return tuple(stage(remote) for remote in file.remotes)
    return tuple(source_of(path) for path in file.paths)


def _sealed_counts(root: Path, session: Sealed) -> dict[str, int]:
    """What `count_objects` said when the session was written."""
    attributes = read_json(root / session.folder / "zarr.json")["attributes"]["brainloom"]
    return count_objects([Found(**row) for row in attributes["coverage"]])


def _stamps(paths: Sequence[Path]) -> Stamps:
    """Size and time of change, by which a file that somebody still writes is noticed; folders do not tell."""
    found = [(path, path.stat()) for path in paths if path.is_file()]
    return tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in found)


def plan_of(planned: Planned | Failed) -> SessionPlan:
    """The plan; a file may have changed since, where a plan was lost with its worker and made again."""
    if isinstance(planned, Failed) or planned.plan is None:
        raise PrepError(CHANGED)
    return planned.plan


def shard_task(planned: Planned, target: Target, stream: int, first: int, stop: int) -> None:
    """Write whole shards [first, stop) of a stream."""
    write_stream_shards(plan_of(planned), target, stream, first, stop)


def stimulus_task(root: Path, run: str, stimulus: PlannedStimulus, far: Mirror | None) -> None:
    """Finish a stimulus whose shards are written."""
    finish_stimulus(root, run, stimulus)
    if far is not None:
        far.send(stimulus_folder(root, stimulus.digest).relative_to(root).as_posix())


def finish_task(
    planned: Planned, target: Target, session_id: str, far: Mirror | None, runs: Sequence[ShardRun]
) -> Failed | None:
    """Finish a session under the id that it was given; `runs`: of its shards, that no other task has written."""
    plan = plan_of(planned)
    for where, *place in runs:
        failed: Failed | None = guarded(where, write_stream_shards, plan, target, *place)
        if failed is not None:
            return failed
    if planned.stamps != _stamps([path for path, _, _ in planned.stamps]):
        raise PrepError(CHANGED)
    finish_session(plan if session_id == plan.session_id else renamed(plan, target.sources), target)
    if far is not None:
        far.send(target.folder)
    release(planned.remotes, target.root)
    return None
