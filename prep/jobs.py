"""One session's files, or a stimulus, on their way through an ingest; and what of it is one task.

In: a plan, files that may be in the store. Out: Job, StimulusJob; runs of shards, batches of files.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from prep.catalog import Sealed, Source
from prep.files import InputFile
from prep.flow import Task
from prep.ingest_report import Outcome
from prep.plan import PlannedStimulus, SessionPlan
from prep.tasks import CHANGED, Failed, Planned, ShardRun, Sources
from prep.write_session import Target, runs_of_shards

SMALL_BYTES = 32 * 2**20  # of a recording that one task makes into a session
LARGE_BYTES = 128 * 2**20  # of a recording whose plan takes seconds
LOOK_BYTES, LOOK_FILES = 2**30, 1000  # that one task reads to see that they are in the store


@dataclass
class Job:
    """One session's input files on their way through the store."""

    number: int
    file: InputFile
    outcome: Outcome
    started: float = 0.0
    planning: Task | None = None  # shards take its result as input, so a plan crosses the wire once
    header: Planned | None = None
    unsourced: Planned | Failed | None = None  # a plan whose sources another task tells
    told: Sources | Failed | None = None
    target: Target | None = None
    session_id: str = ""
    pending: set[Task] = field(default_factory=set)
    stimuli: set[str] = field(default_factory=set)  # not sealed yet
    is_finishing: bool = False
    num_shards: int = 0
    runs: list[ShardRun] = field(default_factory=list)  # of shards, that the task writes which finishes the session

    @property
    def is_over(self) -> bool:
        return self.outcome.state != "running"


@dataclass
class StimulusJob:
    """Pixels on their way into the store, for every session that shows them."""

    stimulus: PlannedStimulus
    pending: set[Task] = field(default_factory=set)
    failed: Failed | None = None


Look = tuple[Job, Sequence[Sealed], Callable[[], None]]  # the sessions that it may be, and what plans it if it is none


def batched(looks: Sequence[Look]) -> list[list[Look]]:
    """Looks for one task each: about a second's reading."""
    batches: list[list[Look]] = []
    num_bytes = math.inf
    for look in looks:
        more = sum(source.bytes for source in look[1][0].sources)
        if num_bytes + more > LOOK_BYTES or len(batches[-1]) == LOOK_FILES:
            batches.append([])
            num_bytes = 0
        batches[-1].append(look)
        num_bytes += more
    return batches


def named(first: int, stop: int) -> str:
    """Shards [first, stop) in words."""
    return f"shard {first}" if stop == first + 1 else f"shards {first} to {stop - 1}"


def shard_runs(plan: SessionPlan) -> list[ShardRun]:
    """What tasks may write of a session's shards, each by itself."""
    runs: list[ShardRun] = []
    for number, stream in enumerate(plan.streams):
        where = f"streams/{stream.spec.name}" + (f" ({stream.spec.origin})" if stream.spec.origin else "")
        for first, stop in runs_of_shards(stream.reader, stream.spec.num_shards):
            runs.append((f"{where}, {named(first, stop)}", number, first, stop))
    return runs


def joined(planned: Planned, told: Sources) -> Planned | Failed:
    """A plan and its sources, from two tasks that have read the same bytes."""
    sources, stamps = told
    return replace(planned, sources=sources) if stamps == planned.stamps else Failed("", CHANGED)


def is_large(file: InputFile) -> bool:
    """Whether several tasks may take the long looks at a file that its plan needs."""
    if file.remotes or len(file.paths) > 1 or not file.paths[0].is_file():
        return False
    return file.paths[0].stat().st_size > LARGE_BYTES


def is_small(plan: SessionPlan, sources: Sequence[Source]) -> bool:
    """Whether handing out a session's shards one by one would take longer than to write them."""
    return sum(source.bytes for source in sources) <= SMALL_BYTES and all(s.spec.num_shards <= 1 for s in plan.streams)
