"""The tasks that workers run for ingest: plan a file, write a shard, finish a session.

In: small descriptors (a path, a plan, the number of a shard). Out: files in the store; errors as data.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.catalog import Sealed, Source, is_whole
from prep.disk import StoreError
from prep.plan import PrepError, SessionPlan
from prep.write_session import (
    Target,
    check,
    finish_session,
    is_current,
    renamed,
    source_of,
    write_stream_shard,
)

Planner = Callable[[Path, Any, str], SessionPlan]


@dataclass(frozen=True)
class Failed:
    """A task's error, as data: it crosses processes whatever the exception was."""

    where: str
    error: str


@dataclass(frozen=True)
class Planned:
    """What a plan task found: a plan to carry out, or a session that is there already."""

    source: Source
    plan: SessionPlan | None = None
    sealed: Sealed | None = None
    seconds: float = 0.0


def guarded(where: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run a task; its error comes back as one line that names the object."""
    try:
        return function(*args)
    except Exception as error:
        return Failed(where, one_line(error))


def one_line(error: BaseException) -> str:
    """An error as one line; ours are written for people, others need their type."""
    text = " ".join(str(error).split())
    return (
        text if isinstance(error, PrepError | StoreError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
    )


def plan_from_nwb(path: Path, recipe: Any, dataset_id: str) -> SessionPlan:
    """The planner of real files."""
    from prep.nwb.session import plan_session  # pynwb takes a second to import: only workers that plan need it

    return plan_session(path, recipe, dataset_id)


def plan_task(
    planner: Planner,
    path: Path,
    recipe: Any,
    recipe_digest: str,
    dataset_id: str,
    root: Path,
    sealed: Sequence[Sealed],
) -> Planned:
    """Read what is in a file, unless this very content was ingested with this very recipe."""
    started = time.monotonic()
    source = source_of(path)
    for session in sealed:
        if is_current(session, source, dataset_id, recipe_digest) and is_whole(root, session):
            return Planned(source, sealed=session)
    plan = planner(path, recipe, dataset_id)
    check(plan)
    return Planned(source, plan=plan, seconds=time.monotonic() - started)


def plan_of(planned: Planned | Failed) -> SessionPlan:
    """The plan; a file may have changed since, where a plan was lost with its worker and made again."""
    if isinstance(planned, Failed) or planned.plan is None:
        raise PrepError("the file changed while it was being read. Run the same `make prep` again.")
    return planned.plan


def shard_task(planned: Planned, target: Target, stream: int, shard: int) -> None:
    """Write one whole shard of a stream."""
    write_stream_shard(target, plan_of(planned).streams[stream], shard)


def finish_task(planned: Planned, target: Target, session_id: str) -> dict[str, Any]:
    """Finish a session under the id that it was given."""
    plan = plan_of(planned)
    return finish_session(plan if session_id == plan.session_id else renamed(plan, planned.source), target)
