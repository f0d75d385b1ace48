"""Drives ingest by Dask: one task plans a file, one task writes one whole shard, one task finishes a session.

In: NWB files or folders, a recipe, a store. Out: sealed sessions, catalog.json, a table of what became of each file.
"""

import argparse
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import Client, Future, LocalCluster, as_completed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import prep.catalog
from prep.catalog import Sealed, Source, sealed_sessions
from prep.files import InputFile, find_files
from prep.ingest_report import Outcome, print_table, write_failures
from prep.plan import PlannedStimulus, PrepError, SessionPlan
from prep.runs import check_is_store, run_of_its_own, tidy
from prep.store import StoreError, manifest_path
from prep.write_session import (
    Target,
    check,
    finish_session,
    finish_stimulus,
    is_current,
    num_stimulus_shards,
    renamed,
    session_folder,
    source_of,
    stimulus_folder,
    write_stimulus_shard,
    write_stream_shard,
)

MAX_WORKERS = 8
CONNECT_S = 20
INTERRUPTED = 130  # what a shell expects of a program that SIGINT stopped
SHARD_FIRST = 10  # sessions in hand go before files that are not planned yet

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


# ---------------------------------------------------------------- tasks (run by workers)


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
    planner: Planner, path: Path, recipe: Any, recipe_digest: str, dataset_id: str, sealed: Sequence[Sealed]
) -> Planned:
    """Read what is in a file, unless this very content was ingested with this very recipe."""
    started = time.monotonic()
    source = source_of(path)
    for session in sealed:
        if is_current(session, source, dataset_id, recipe_digest):
            return Planned(source, sealed=session)
    plan = planner(path, recipe, dataset_id)
    check(plan)
    return Planned(source, plan=plan, seconds=time.monotonic() - started)


def shard_task(planned: Planned, target: Target, stream: int, shard: int) -> None:
    """Write one whole shard of a stream."""
    assert planned.plan is not None
    write_stream_shard(target, planned.plan.streams[stream], shard)


def finish_task(planned: Planned, target: Target, session_id: str) -> dict[str, Any]:
    """Finish a session under the id that it was given."""
    assert planned.plan is not None
    is_same = session_id == planned.plan.session_id
    return finish_session(planned.plan if is_same else renamed(planned.plan, planned.source), target)


# ---------------------------------------------------------------- the state of one run


@dataclass
class Job:
    """One input file on its way through the store."""

    number: int
    file: InputFile
    outcome: Outcome
    started: float = 0.0
    future: Future | None = None  # of the Planned: shards take it as input, so a plan crosses the wire once
    header: Planned | None = None
    target: Target | None = None
    session_id: str = ""
    pending: set[Future] = field(default_factory=set)
    stimuli: set[str] = field(default_factory=set)  # not sealed yet
    is_finishing: bool = False

    @property
    def is_over(self) -> bool:
        return self.outcome.state != "running"


@dataclass
class StimulusJob:
    """Pixels on their way into the store, for every session that shows them."""

    stimulus: PlannedStimulus
    pending: set[Future] = field(default_factory=set)
    failed: Failed | None = None


class Run:
    """One ingest: hands tasks to the cluster, and advances each session when its tasks come back."""

    def __init__(self, client: Client, root: Path, run: str, recipe_digest: str, is_dry: bool) -> None:
        self.client, self.root, self.run, self.recipe_digest, self.is_dry = client, root, run, recipe_digest, is_dry
        self.queue = as_completed()
        self.on_done: dict[Future, tuple[str, Callable[[Any], None]]] = {}
        self.jobs: list[Job] = []
        self.next_to_name = 0
        self.claimed: dict[str, tuple[str, str]] = {}  # folder -> (file name, sha256)
        self.stimuli: dict[str, StimulusJob] = {}
        self.sealed = [] if is_dry and not root.is_dir() else sealed_sessions(root)
        self.owner = {sealed.folder: sealed for sealed in self.sealed}

    def submit(self, on_done: Callable[[Any], None], where: str, function: Callable[..., Any], *args: Any) -> Future:
        """Submit a guarded task; `on_done` gets its result, or a Failed."""
        priority = 0 if function is plan_task else SHARD_FIRST
        future = self.client.submit(guarded, where, function, *args, pure=False, priority=priority)
        self.on_done[future] = where, on_done
        self.queue.add(future)
        return future

    def start(self, files: Sequence[InputFile], planner: Planner, recipe: Any) -> None:
        """Submit the planning of every file."""
        for number, file in enumerate(files):
            job = Job(number, file, Outcome(file.label))
            self.jobs.append(job)
            mine = [s for s in self.sealed if any(source.file == file.path.name for source in s.sources)]
            args = (planner, file.path, recipe, self.recipe_digest, file.dataset_id, mine)
            job.future = self.submit(partial(self._planned, job), "", plan_task, *args)

    def drive(self, show: Callable[["Run"], None]) -> None:
        """Advance until every task has come back."""
        for future in self.queue:
            where, on_done = self.on_done.pop(future)
            on_done(self._result(future, where))
            show(self)

    def _result(self, future: Future, where: str) -> Any:
        if future.status == "finished":
            return future.result()
        if future.status == "cancelled":
            return Failed(where, "cancelled")
        return Failed(where, f"a worker was lost, perhaps for want of memory ({one_line(future.exception())})")

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
        source, plan, sealed = job.header.source, job.header.plan, job.header.sealed
        key = (source.file, source.sha256)
        if sealed is not None or key in self.claimed.values():
            folder = next((f for f, k in self.claimed.items() if k == key), sealed.folder if sealed else "")
            self.claimed[folder] = key
            self._end(job, "already there", f"as {folder}")
            if sealed is not None:
                job.outcome.count(sealed.entry["streams"])
            return
        assert plan is not None
        folder = session_folder(plan.dataset_id, plan.session_id)
        if folder in self.claimed or self._is_of_another_file(folder, source):
            plan = renamed(plan, source)
            folder = session_folder(plan.dataset_id, plan.session_id)
        self.claimed[folder] = key
        job.session_id = plan.session_id
        job.target = Target(
            root=self.root, folder=folder, run=self.run, sources=(source,), recipe_digest=self.recipe_digest
        )
        self._write(job, plan)

    def _is_of_another_file(self, folder: str, source: Source) -> bool:
        owner = self.owner.get(folder)
        return owner is not None and all(known.file != source.file for known in owner.sources)

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
            for shard in range(stream.spec.num_shards):
                self._submit_shard(job, f"{where}, shard {shard}", number, shard)
        for stimulus in plan.stimuli:
            self._want_stimulus(job, stimulus)
        self._advance(job)

    def _submit_shard(self, job: Job, where: str, stream: int, shard: int) -> None:
        def done(result: Failed | None) -> None:
            job.pending.discard(future)
            self._fail(job, result) if isinstance(result, Failed) else self._advance(job)

        future = self.submit(done, where, shard_task, job.future, job.target, stream, shard)
        job.pending.add(future)

    def _advance(self, job: Job) -> None:
        if job.pending or job.stimuli or job.is_over or job.is_finishing:
            return
        job.is_finishing = True

        def done(result: dict[str, Any] | Failed) -> None:
            if isinstance(result, Failed):
                self._fail(job, result)
            else:
                self._end(job, "ok", f"as {job.target.folder}" if job.target else "")

        self.submit(done, "finish", finish_task, job.future, job.target, job.session_id)

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
        for shard in range(num_stimulus_shards(stimulus)):
            self._submit_frames(shared, shard)

    def _submit_frames(self, shared: StimulusJob, shard: int) -> None:
        def done(result: Failed | None) -> None:
            shared.pending.discard(future)
            if isinstance(result, Failed):
                self._stimulus_done(shared, result)
            elif not shared.pending and shared.failed is None:
                args = (finish_stimulus, self.root, self.run, shared.stimulus)
                self.submit(partial(self._stimulus_done, shared), where, *args)

        where = f"stimuli/{shared.stimulus.digest}, shard {shard}"
        future = self.submit(done, where, write_stimulus_shard, self.root, self.run, shared.stimulus, shard)
        shared.pending.add(future)

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
        job.outcome.object = failed.where
        self._end(job, state, failed.error)
        for future in job.pending:
            future.cancel()

    def _end(self, job: Job, state: str, reason: str) -> None:
        job.outcome.state, job.outcome.reason = state, reason
        job.outcome.seconds = time.monotonic() - job.started if job.started else 0.0
        job.future = job.header = None  # lets the workers forget the plan


# ---------------------------------------------------------------- the command


@contextlib.contextmanager
def connect(scheduler: str | None, workers: int) -> Iterator[Client]:
    """A client of `scheduler`, or of worker processes of our own that die with this process."""
    quiet = {"distributed": "critical", "distributed.nanny": "critical", "distributed.worker": "critical"}
    with dask.config.set({"logging": quiet, "distributed.admin.tick.limit": "60s"}):
        if scheduler is not None:
            try:
                client = Client(scheduler, timeout=CONNECT_S)
            except (OSError, ValueError) as error:
                raise StoreError(
                    f"no Dask scheduler answers at {scheduler} ({error}). Check --scheduler, or leave it out."
                ) from error
            with client:
                yield client
            return
        with (
            LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                silence_logs=logging.CRITICAL,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client


def run_ingest(
    files: Sequence[InputFile],
    root: Path,
    recipe: Any,
    client: Client,
    *,
    planner: Planner = plan_from_nwb,
    is_dry: bool = False,
) -> list[Outcome]:
    """Ingest `files` into the store at `root` with the workers of `client`; one outcome per file, in order."""
    root = root.resolve()
    check_is_store(root)
    if is_dry:
        return _drive(Run(client, root, "dry", recipe.digest(), True), files, planner, recipe)
    root.mkdir(parents=True, exist_ok=True)
    (root / "failed.jsonl").unlink(missing_ok=True)
    with run_of_its_own(root) as name:
        outcomes = _drive(Run(client, root, name, recipe.digest(), False), files, planner, recipe)
        write_failures(root, outcomes)
        prep.catalog.write(root)
    return outcomes


def _drive(run: Run, files: Sequence[InputFile], planner: Planner, recipe: Any) -> list[Outcome]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("sessions", total=len(files))

        def show(state: Run) -> None:
            waiting = sum(len(job.pending) for job in state.jobs if not job.is_over)
            done = sum(job.is_over for job in state.jobs)
            progress.update(bar, completed=done, description=f"sessions ({waiting} shards in hand)")

        run.start(files, planner, recipe)
        run.drive(show)
    return [job.outcome for job in run.jobs]


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m prep ingest`."""
    parser.add_argument("sources", nargs="+", type=Path, metavar="SRC", help="NWB files, or folders searched for them")
    parser.add_argument("--out", required=True, type=Path, metavar="STORE", help="the token store to add to")
    parser.add_argument("--recipe", type=Path, metavar="R.yaml", help="what to make of ambiguous files")
    parser.add_argument("--scheduler", metavar="ADDR", help="a Dask scheduler, e.g. tcp://10.0.0.1:8786")
    parser.add_argument(
        "--workers", type=int, default=min(CPU_COUNT, MAX_WORKERS), help="worker processes (%(default)s)"
    )
    parser.add_argument("--dataset", metavar="NAME", help="dataset_id; else the recipe's, else the folder's name")
    parser.add_argument("--dry-run", action="store_true", help="plan only, write nothing")


def main(args: argparse.Namespace) -> int:
    """Exit code: 0 all files are in the store, 1 some are not (named), 2 usage, 130 interrupted."""
    import prep.recipe

    if args.workers < 1:
        raise StoreError(f"--workers {args.workers}: at least one worker is needed.")
    recipe = prep.recipe.load(args.recipe)
    files = find_files(args.sources, args.dataset or recipe.dataset_id, args.out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop is as clean as Ctrl-C
    try:
        with connect(args.scheduler, min(args.workers, MAX_WORKERS * len(files))) as client:
            outcomes = run_ingest(files, args.out, recipe, client, is_dry=args.dry_run)
    except KeyboardInterrupt:
        print("Interrupted: what is sealed stays. Run the same command again to go on.", file=sys.stderr)
        return INTERRUPTED
    if not args.dry_run:
        tidy(args.out)
    print_table(outcomes)
    return 1 if any(outcome.is_failure for outcome in outcomes) else 0
