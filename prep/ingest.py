"""Drives ingest by Dask: one task plans a file, one task writes one whole shard, one task finishes a session.

In: NWB files or folders, a recipe, a store. Out: sealed sessions, catalog.json, a table of what became of each file.
"""

import argparse
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dask.system import CPU_COUNT
from distributed import Client, Future, KilledWorker, as_completed

import prep.catalog
import prep.cluster_config
from prep.catalog import Source, sealed_sessions
from prep.cluster import connect, job_script
from prep.disk import StoreError, locked
from prep.files import STAGE, InputFile, Staging, find_files
from prep.ingest_report import Outcome, print_table, write_failures
from prep.plan import PlannedStimulus, SessionPlan
from prep.progress import State, shown
from prep.runs import check_is_store, run_of_its_own, tidy
from prep.store import manifest_path
from prep.tasks import (
    Failed,
    Planned,
    Planner,
    finish_task,
    guarded,
    one_line,
    plan_from_nwb,
    plan_task,
    shard_task,
)
from prep.write_session import (
    Target,
    finish_stimulus,
    num_stimulus_shards,
    renamed,
    runs_of_shards,
    session_folder,
    stimulus_folder,
    write_stimulus_shards,
)

MAX_WORKERS = 8
INTERRUPTED = 130  # what a shell expects of a program that SIGINT stopped
LANES_S = 2.0  # how often the number of workers is asked for: clusters grow and shrink


# ---------------------------------------------------------------- tasks in flight


@dataclass(eq=False)
class Task:
    """One call for a worker; arguments that are Tasks stand for their results."""

    where: str
    on_done: Callable[[Any], None]  # gets the result, or a Failed
    function: Callable[..., Any]
    args: tuple[Any, ...]
    future: Future | None = None
    is_second_try: bool = False
    is_dropped: bool = False


class Flow:
    """Keeps as many tasks in flight as there are worker threads, those that finish a session first, plans last.

    Dask itself would hand out all tasks at once, and blame all those of a worker that dies for its death.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.urgent: deque[Task] = deque()
        self.later: deque[Task] = deque()
        self.flying: dict[Future, Task] = {}
        self.landed = as_completed()
        self.lanes, self.asked = 1, -math.inf

    def run(self, show: Callable[[], None]) -> None:
        """Work until nothing is left, which tasks may add to when they are done."""
        while self._launch():
            if not self._has_landed():
                show()
                continue
            future = next(self.landed)
            if future.cancelled():
                raise RuntimeError("the scheduler is lost")  # `connect` says it in words
            if future.status in ("lost", "pending"):  # its result died with its worker: it is being computed again
                self.landed.add(future)
                continue
            task = self.flying.pop(future)
            if future.status == "error" and not task.is_second_try:  # it may only have been beside the one to blame
                task.is_second_try = True
                self.urgent.appendleft(task)
            elif not task.is_dropped:
                task.on_done(self._result(future, task.where))
            show()

    def _has_landed(self) -> bool:
        """Whether a task came back within a second; else there may be new workers, which wait for theirs."""
        with self.landed.thread_condition:
            return bool(self.landed.has_ready() or self.landed.thread_condition.wait(1.0))

    def _launch(self) -> bool:
        if time.monotonic() - self.asked > LANES_S:
            self.lanes, self.asked = max(1, sum(self.client.nthreads().values())), time.monotonic()
        while len(self.flying) < self.lanes and (self.urgent or self.later):
            task = (self.urgent or self.later).popleft()
            if not task.is_dropped:
                args = [arg.future if isinstance(arg, Task) else arg for arg in task.args]
                # Not `workers=`: where such a worker dies, Dask 2026.8 leaves the task waiting for it for ever.
                task.future = self.client.submit(guarded, task.where, task.function, *args, pure=False)
                self.flying[task.future] = task
                self.landed.add(task.future)
        return bool(self.flying)

    def _result(self, future: Future, where: str) -> Any:
        if future.status == "finished":
            return future.result()
        if isinstance(future.exception(), KilledWorker):
            return Failed(where, "worker processes died of it, perhaps for want of memory; try fewer --workers.")
        return Failed(where, one_line(future.exception()))


# ---------------------------------------------------------------- the state of one run


@dataclass
class Job:
    """One session's input files on their way through the store."""

    number: int
    file: InputFile
    outcome: Outcome
    started: float = 0.0
    planning: Task | None = None  # shards take its result as input, so a plan crosses the wire once
    header: Planned | None = None
    target: Target | None = None
    session_id: str = ""
    pending: set[Task] = field(default_factory=set)
    stimuli: set[str] = field(default_factory=set)  # not sealed yet
    is_finishing: bool = False
    num_shards: int = 0

    @property
    def is_over(self) -> bool:
        return self.outcome.state != "running"


@dataclass
class StimulusJob:
    """Pixels on their way into the store, for every session that shows them."""

    stimulus: PlannedStimulus
    pending: set[Task] = field(default_factory=set)
    failed: Failed | None = None


def _named(first: int, stop: int) -> str:
    """Shards [first, stop) in words."""
    return f"shard {first}" if stop == first + 1 else f"shards {first} to {stop - 1}"


class Run:
    """One ingest: hands tasks to the cluster, and advances each session when its tasks come back."""

    def __init__(self, client: Client, root: Path, run: str, recipe_digest: str, is_dry: bool) -> None:
        self.root, self.run, self.recipe_digest, self.is_dry = root, run, recipe_digest, is_dry
        self.flow = Flow(client)
        self.jobs: list[Job] = []
        self.next_to_name = 0
        self.claimed: dict[str, tuple[Source, ...]] = {}  # by folder
        self.stimuli: dict[str, StimulusJob] = {}
        self.sealed = [] if is_dry and not root.is_dir() else sealed_sessions(root)
        self.owner = {sealed.folder: sealed for sealed in self.sealed}

    def submit(self, on_done: Callable[[Any], None], where: str, function: Callable[..., Any], *args: Any) -> Task:
        """Queue a task; `on_done` gets its result, or a Failed."""
        task = Task(where, on_done, function, args)
        if function is plan_task:
            self.flow.later.append(task)
        elif function in (finish_task, finish_stimulus):  # what is whole is sealed before anything new is begun
            self.flow.urgent.appendleft(task)
        else:
            self.flow.urgent.append(task)
        return task

    def start(self, files: Sequence[InputFile], planner: Planner, recipe: Any) -> None:
        """Submit the planning of every session's files."""
        for number, file in enumerate(files):
            job = Job(number, file, Outcome(file.label))
            self.jobs.append(job)
            names = {path.name for path in file.paths}
            mine = [s for s in self.sealed if any(source.file in names for source in s.sources)]
            args = (planner, file, recipe, self.recipe_digest, self.root, mine)
            job.planning = self.submit(partial(self._planned, job), "", plan_task, *args)

    def _planned(self, job: Job, result: Planned | Failed) -> None:
        if isinstance(result, Failed):
            self._fail(job, result, "refused")
        else:
            job.header = result
            job.started = time.monotonic() - result.seconds
        # Ids are given in order of path, so that the order in which plans come back leaves no trace in the store.
        while self.next_to_name < len(self.jobs):
            following = self.jobs[self.next_to_name]
            if following.header is None and not following.is_over:
                return
            self.next_to_name += 1
            if not following.is_over:
                self._name(following)

    def _name(self, job: Job) -> None:
        assert job.header is not None
        sources, plan, sealed = job.header.sources, job.header.plan, job.header.sealed
        job.outcome.refused, job.outcome.coverage = job.header.refused, job.header.counts
        if sealed is not None or sources in self.claimed.values():
            folder = next((f for f, claim in self.claimed.items() if claim == sources), sealed.folder if sealed else "")
            self.claimed[folder] = sources
            self._end(job, "already there", f"as {folder}")
            if sealed is not None:
                job.outcome.count(sealed.entry["streams"])
            return
        assert plan is not None
        folder = session_folder(plan.dataset_id, plan.session_id)
        if folder in self.claimed or self._is_of_another_file(folder, sources):
            plan = renamed(plan, sources)
            folder = session_folder(plan.dataset_id, plan.session_id)
        self.claimed[folder] = sources
        job.session_id = plan.session_id
        job.target = Target(
            root=self.root, folder=folder, run=self.run, sources=sources, recipe_digest=self.recipe_digest
        )
        self._write(job, plan)

    def _is_of_another_file(self, folder: str, sources: Sequence[Source]) -> bool:
        owner = self.owner.get(folder)
        return owner is not None and not {known.file for known in owner.sources} & {source.file for source in sources}

    def _write(self, job: Job, plan: SessionPlan) -> None:
        job.outcome.count([{"num_tokens": stream.spec.num_tokens} for stream in plan.streams])
        job.header = None  # the client keeps no clocks: the plan stays with the workers
        if self.is_dry:
            shards = sum(stream.spec.num_shards for stream in plan.streams)
            self._end(
                job, "would be ingested", f"as {session_folder(plan.dataset_id, job.session_id)}, {shards} shards"
            )
            return
        for number, stream in enumerate(plan.streams):
            where = f"streams/{stream.spec.name}" + (f" ({stream.spec.origin})" if stream.spec.origin else "")
            for first, stop in runs_of_shards(stream.reader, stream.spec.num_shards):
                self._submit_shards(job, f"{where}, {_named(first, stop)}", number, first, stop)
        for stimulus in plan.stimuli:
            self._want_stimulus(job, stimulus)
        job.num_shards = len(job.pending)
        self._advance(job)

    def _submit_shards(self, job: Job, where: str, *place: int) -> None:
        def done(result: Failed | None) -> None:
            job.pending.discard(task)
            self._fail(job, result) if isinstance(result, Failed) else self._advance(job)

        task = self.submit(done, where, shard_task, job.planning, job.target, *place)
        job.pending.add(task)

    def _advance(self, job: Job) -> None:
        if job.pending or job.stimuli or job.is_over or job.is_finishing:
            return
        job.is_finishing = True

        def done(result: dict[str, Any] | Failed) -> None:
            if isinstance(result, Failed):
                self._fail(job, result)
            else:
                state = "partly" if job.outcome.refused else "ok"
                self._end(job, state, f"as {job.target.folder}" if job.target else "")

        self.submit(done, "finish", finish_task, job.planning, job.target, job.session_id)

    # ------------------------------------------------------------ stimuli

    def _want_stimulus(self, job: Job, stimulus: PlannedStimulus) -> None:
        shared = self.stimuli.get(stimulus.digest)
        folder = stimulus_folder(self.root, stimulus.digest)
        if shared is not None and shared.failed is not None:
            self._fail(job, shared.failed)
        if folder.is_dir() and manifest_path(folder).exists():
            return
        job.stimuli.add(stimulus.digest)
        if shared is not None:
            return
        shared = self.stimuli[stimulus.digest] = StimulusJob(stimulus)
        for first, stop in runs_of_shards(stimulus.reader, num_stimulus_shards(stimulus)):
            self._submit_frames(shared, first, stop)

    def _submit_frames(self, shared: StimulusJob, first: int, stop: int) -> None:
        def done(result: Failed | None) -> None:
            shared.pending.discard(task)
            if isinstance(result, Failed):
                self._stimulus_done(shared, result)
            elif not shared.pending and shared.failed is None:
                args = (finish_stimulus, self.root, self.run, shared.stimulus)
                self.submit(partial(self._stimulus_done, shared), where, *args)

        where = f"stimuli/{shared.stimulus.digest}, {_named(first, stop)}"
        task = self.submit(done, where, write_stimulus_shards, self.root, self.run, shared.stimulus, first, stop)
        shared.pending.add(task)

    def _stimulus_done(self, shared: StimulusJob, result: Failed | None) -> None:
        shared.failed = shared.failed or result
        for job in self.jobs:
            if shared.stimulus.digest in job.stimuli:
                job.stimuli.discard(shared.stimulus.digest)
                self._fail(job, result) if result is not None else self._advance(job)

    # ------------------------------------------------------------ ends

    def _fail(self, job: Job, failed: Failed, state: str = "failed") -> None:
        if job.is_over:
            return
        job.outcome.object, job.outcome.refused = failed.where, ()
        job.outcome.coverage = failed.counts or job.outcome.coverage
        self._end(job, state, failed.error)
        for task in job.pending:
            task.is_dropped = True

    def _end(self, job: Job, state: str, reason: str) -> None:
        job.outcome.state, job.outcome.reason = state, reason
        job.outcome.seconds = time.monotonic() - job.started if job.started else 0.0
        job.planning = job.header = None  # lets the workers forget the plan


# ---------------------------------------------------------------- the command


def run_ingest(
    files: Sequence[InputFile],
    root: Path,
    recipe: Any,
    client: Client,
    *,
    planner: Planner,
    is_dry: bool = False,
) -> list[Outcome]:
    """Ingest `files` into the store at `root` with the workers of `client`; one outcome per session, in order."""
    root = root.resolve()
    check_is_store(root)
    if is_dry:
        return _drive(Run(client, root, "dry", recipe.digest(), True), files, planner, recipe)
    root.mkdir(parents=True, exist_ok=True)
    (root / "failed.jsonl").unlink(missing_ok=True)
    with run_of_its_own(root) as name:
        outcomes = _drive(Run(client, root, name, recipe.digest(), False), files, planner, recipe)
        with locked(root):
            write_failures(root, outcomes)
        prep.catalog.write(root)
    return outcomes


def _drive(run: Run, files: Sequence[InputFile], planner: Planner, recipe: Any) -> list[Outcome]:
    def state() -> State:
        in_hand = [job for job in run.jobs if job.num_shards and not job.is_over]
        shards = [(job.file.label, job.num_shards - len(job.pending), job.num_shards) for job in in_hand]
        return sum(job.is_over for job in run.jobs), shards

    with shown(len(files), state) as show:
        run.start(files, planner, recipe)
        run.flow.run(show)
    return [job.outcome for job in run.jobs]


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m prep ingest`."""
    what = "NWB files, folders searched for them, https:// and s3:// URLs, @list.txt with one of these per line"
    parser.add_argument("sources", nargs="+", metavar="SRC", help=what)
    parser.add_argument("--out", required=True, type=Path, metavar="STORE", help="the token store to add to")
    parser.add_argument("--recipe", type=Path, metavar="R.yaml", help="what to make of ambiguous files")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--scheduler", metavar="ADDR", help="a Dask scheduler, e.g. tcp://10.0.0.1:8786")
    who.add_argument("--cluster", type=Path, metavar="C.yaml", help="SLURM, PBS, LSF …: see prep/clusters/*.yaml")
    who.add_argument("--workers", type=int, default=min(CPU_COUNT, MAX_WORKERS), help="worker processes (%(default)s)")
    parser.add_argument("--dataset", metavar="NAME", help="dataset_id; else the recipe's, else the folder's name")
    parser.add_argument("--stage", type=Path, metavar="DIR", help="where files behind URLs lie meanwhile (OUT/.stage)")
    parser.add_argument("--keep-staged", action="store_true", help="keep them when their sessions are sealed")
    parser.add_argument("--dry-run", action="store_true", help="write nothing: plan, print the cluster's job script")


def main(args: argparse.Namespace) -> int:
    """Exit code: 0 all files are in the store whole, 1 some are not (named), 2 usage, 130 interrupted."""
    import prep.recipe

    cluster = None if args.cluster is None else prep.cluster_config.load(args.cluster)
    if args.workers < 1:
        raise StoreError(f"--workers {args.workers}: at least one worker is needed.")
    recipe = prep.recipe.load(args.recipe)
    staging = Staging(folder=(args.stage or args.out / STAGE).resolve(), is_kept=args.keep_staged)
    files = find_files(args.sources, args.dataset or recipe.dataset_id, args.out, recipe.join, staging)
    if cluster is not None and args.dry_run:
        print(job_script(cluster))
        cluster = None  # plans are made here: nothing is submitted
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop is as clean as Ctrl-C
    try:
        with connect(args.scheduler, min(args.workers, MAX_WORKERS * len(files)), cluster) as client:
            outcomes = run_ingest(files, args.out, recipe, client, planner=plan_from_nwb, is_dry=args.dry_run)
    except KeyboardInterrupt:
        print("Interrupted: what is sealed stays. Run the same command again to go on.", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    if not args.dry_run:
        tidy(args.out)
    print_table(outcomes, "would be ingested" if args.dry_run else "are in the store")
    return 1 if any(outcome.is_failure for outcome in outcomes) else 0
