"""Drives ingest by Dask: one task plans a file, one task writes one whole shard, one task finishes a session.

In: NWB files or folders, a recipe, a store. Out: sealed sessions, catalog.json, a table of what became of each file.
"""

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dask.system import CPU_COUNT
from distributed import Client

import prep.catalog
import prep.cluster_config
from prep.catalog import Sealed, Source, sealed_sessions
from prep.cluster import connect, job_script
from prep.disk import StoreError, locked
from prep.files import STAGE, InputFile, Staging, find_files
from prep.flow import Flow, Task
from prep.frames import num_stimulus_shards, stimulus_folder
from prep.ingest_report import Outcome, print_table, write_failures
from prep.jobs import Job, Look, StimulusJob, batched, is_large, is_small, joined, named, shard_runs
from prep.looks import KINDS
from prep.mirror import Mirror, destination
from prep.patience import PATIENCE_S
from prep.plan import PlannedStimulus, SessionPlan
from prep.progress import State, shown
from prep.runs import check_is_store, run_of_its_own, tidy
from prep.store import manifest_path
from prep.tasks import (
    Failed,
    Planned,
    Planner,
    alike,
    finish_task,
    look_ahead_task,
    look_task,
    plan_by_looks_task,
    plan_from_nwb,
    plan_task,
    shard_task,
    source_task,
    stimulus_task,
)
from prep.write_session import (
    Target,
    renamed,
    runs_of_shards,
    session_folder,
    write_stimulus_shards,
)

MAX_WORKERS = 8
INTERRUPTED = 130  # what a shell expects of a program that SIGINT stopped


class Run:
    """One ingest: hands tasks to the cluster, and advances each session when its tasks come back."""

    def __init__(
        self,
        flow: Flow,
        root: Path,
        run: str,
        recipe_digest: str,
        is_dry: bool,
        far: Mirror | None = None,
        is_shared: bool = False,
    ) -> None:
        """`is_shared`: there are more workers than files, so that several may work at the plan of one."""
        self.root, self.run, self.recipe_digest, self.is_dry, self.far = root, run, recipe_digest, is_dry, far
        self.flow, self.is_shared = flow, is_shared
        self.jobs: list[Job] = []
        self.next_to_name = 0
        self.claimed: set[str] = set()  # folders
        self.done: dict[tuple[Source, ...], str] = {}  # where what this run has seen lies
        self.stimuli: dict[str, StimulusJob] = {}
        self.sealed = [] if is_dry and not root.is_dir() else sealed_sessions(root)
        self.owner = {sealed.folder: sealed for sealed in self.sealed}

    def submit(self, on_done: Callable[[Any], None], where: str, function: Callable[..., Any], *args: Any) -> Task:
        """Queue a task; `on_done` gets its result, or a Failed."""
        task = Task(where, on_done, function, args, is_fetched=function is not look_ahead_task)
        if function in (plan_task, look_task, look_ahead_task, source_task):
            self.flow.later.append(task)
        elif function in (finish_task, stimulus_task):  # what is whole is sealed before anything new is begun
            self.flow.urgent.appendleft(task)
        else:
            self.flow.urgent.append(task)
        return task

    def start(self, files: Sequence[InputFile], planner: Planner, recipe: Any) -> None:
        """Submit the planning of every session's files, but for those that are there already."""
        known: dict[tuple[str, ...], list[Sealed]] = {}
        for session in self.sealed:
            known.setdefault(tuple(source.file for source in session.sources), []).append(session)
        looks: list[Look] = []
        for number, file in enumerate(files):
            job = Job(number, file, Outcome(file.label))
            self.jobs.append(job)
            same_names = known.get(tuple(path.name for path in file.paths), ())
            mine = [s for s in same_names if s.is_made_with(file.dataset_id, self.recipe_digest)]
            plan = partial(self._plan, job, planner, recipe, mine)
            candidates = [] if file.remotes else [s for s in mine if alike(file, s.sources)]
            looks.append((job, candidates, plan)) if candidates else plan()
        self._look(looks)

    def _plan(self, job: Job, planner: Planner, recipe: Any, mine: Sequence[Sealed]) -> None:
        run = "" if self.is_dry else self.run
        if self.is_shared and not mine and is_large(job.file):
            self._share_plan(job, planner, recipe, run)
        else:
            args = (planner, job.file, recipe, mine, self.root, run)
            job.planning = self.submit(partial(self._planned, job), "", plan_task, *args)

    def _share_plan(self, job: Job, planner: Planner, recipe: Any, run: str) -> None:
        """Have several tasks work at a plan: one for each kind of long look, one for the sources, one for the rest."""
        looks: dict[str, Task] = {}
        waiting = set(KINDS)

        def looked(kind: str, result: Failed | None) -> None:
            waiting.discard(kind)
            if result is not None:  # nobody has found anything: workers died of it
                self._planned(job, result)
            elif not waiting and not job.is_over:
                args = (plan_by_looks_task, planner, job.file, recipe, *looks.values())
                job.planning = self.submit(partial(self._join, job, "unsourced"), "", *args)

        for kind in KINDS:
            args = (look_ahead_task, planner, job.file, recipe, self.root, run, kind)
            looks[kind] = self.submit(partial(looked, kind), "", *args)
        self.submit(partial(self._join, job, "told"), "", source_task, job.file)

    def _join(self, job: Job, name: Literal["unsourced", "told"], result: Any) -> None:
        """Keep a plan or its sources until both are there."""
        setattr(job, name, result)
        if isinstance(result, Failed):
            self._planned(job, result)
        elif isinstance(job.unsourced, Planned) and isinstance(job.told, tuple):
            self._planned(job, joined(job.unsourced, job.told))

    def _look(self, looks: Sequence[Look]) -> None:
        """Find out what is there already: here where that takes about a second, else the workers do it."""
        batches = batched(looks)
        for batch in batches:
            args = ([job.file for job, _, _ in batch], [sealed for _, sealed, _ in batch], self.root)
            if len(batches) == 1:
                self._looked(batch, look_task(*args))
            else:
                self.submit(partial(self._looked, batch), "", look_task, *args)

    def _looked(self, batch: Sequence[Look], result: Sequence[Planned | None] | Failed) -> None:
        found = [None] * len(batch) if isinstance(result, Failed) else result
        for (job, _, plan), planned in zip(batch, found, strict=True):
            plan() if planned is None else self._planned(job, planned)

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
        if sealed is not None or sources in self.done:
            folder = self.done.setdefault(sources, sealed.folder if sealed else "")
            self.claimed.add(folder)
            self._end(job, "already there", f"as {folder}")
            if sealed is not None:
                job.outcome.count(sealed.entry["streams"])
            return
        assert plan is not None
        folder = session_folder(plan.dataset_id, plan.session_id)
        if folder in self.claimed or self._is_of_another_file(folder, sources):
            plan = renamed(plan, sources)
            folder = session_folder(plan.dataset_id, plan.session_id)
        self.claimed.add(folder)
        self.done[sources] = folder
        job.session_id = plan.session_id
        job.target = Target(
            root=self.root, folder=folder, run=self.run, sources=sources, recipe_digest=self.recipe_digest
        )
        self._write(job, plan, sources)

    def _is_of_another_file(self, folder: str, sources: Sequence[Source]) -> bool:
        owner = self.owner.get(folder)
        return owner is not None and not {known.file for known in owner.sources} & {source.file for source in sources}

    def _write(self, job: Job, plan: SessionPlan, sources: Sequence[Source]) -> None:
        job.outcome.count([{"num_tokens": stream.spec.num_tokens} for stream in plan.streams])
        job.header = job.unsourced = None  # the client keeps no clocks: the plan stays with the workers
        if self.is_dry:
            shards = sum(stream.spec.num_shards for stream in plan.streams)
            self._end(
                job, "would be ingested", f"as {session_folder(plan.dataset_id, job.session_id)}, {shards} shards"
            )
            return
        for stimulus in plan.stimuli:
            self._want_stimulus(job, stimulus)
        if job.is_over:  # an earlier session has shown that the stimulus cannot be written
            return
        if is_small(plan, sources):
            job.runs = shard_runs(plan)
        else:
            for run in shard_runs(plan):
                self._submit_shards(job, *run)
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

        def done(result: Failed | None) -> None:
            if isinstance(result, Failed):
                self._fail(job, result)
            else:
                state = "partly" if job.outcome.refused else "ok"
                self._end(job, state, f"as {job.target.folder}" if job.target else "")

        self.submit(done, "finish", finish_task, job.planning, job.target, job.session_id, self.far, job.runs)

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
                args = (stimulus_task, self.root, self.run, shared.stimulus, self.far)
                self.submit(partial(self._stimulus_done, shared), where, *args)

        where = f"stimuli/{shared.stimulus.digest}, {named(first, stop)}"
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
        job.planning = job.header = job.unsourced = None  # lets the workers forget the plan


# ---------------------------------------------------------------- the command


def run_ingest(
    files: Sequence[InputFile],
    root: Path,
    recipe: Any,
    workers: Callable[[], Client],
    *,
    planner: Planner,
    is_dry: bool = False,
    far: Mirror | None = None,
    patience_s: float = PATIENCE_S,
    num_workers: int = 1,
) -> list[Outcome]:
    """Ingest `files` into the store at `root` with `workers`; one outcome per session, in order.

    `workers` gives their client; it is not asked where there is nothing for them to do.
    `far`: the bucket to which the store goes; `root` is then where it is built. `num_workers`: as far as is known; it
    changes who does what, and no byte of the store.
    """
    root = root.resolve()
    flow, is_shared = Flow(workers, patience_s), len(files) < num_workers
    if far is not None:
        far.gather(is_dry=is_dry)
    check_is_store(root)
    if is_dry:
        return _drive(Run(flow, root, "dry", recipe.digest(), True, None, is_shared), files, planner, recipe)
    root.mkdir(parents=True, exist_ok=True)
    (root / "failed.jsonl").unlink(missing_ok=True)
    with run_of_its_own(root) as name:
        outcomes = _drive(Run(flow, root, name, recipe.digest(), False, far, is_shared), files, planner, recipe)
        with locked(root):
            write_failures(root, outcomes)
        if far is None:
            prep.catalog.write(root)
        else:
            far.publish_failures()
            far.publish()
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
    parser.add_argument("--out", required=True, metavar="STORE", help="the token store to add to: a folder, s3://…")
    parser.add_argument("--build", type=Path, metavar="DIR", help="where a store at s3:// is built, for all workers")
    parser.add_argument("--recipe", type=Path, metavar="R.yaml", help="what to make of ambiguous files")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--scheduler", metavar="ADDR", help="a Dask scheduler, e.g. tcp://10.0.0.1:8786")
    who.add_argument("--cluster", type=Path, metavar="C.yaml", help="SLURM, PBS, LSF …: see prep/clusters/*.yaml")
    who.add_argument("--workers", type=int, default=min(CPU_COUNT, MAX_WORKERS), help="worker processes (%(default)s)")
    parser.add_argument("--dataset", metavar="NAME", help="dataset_id; else the recipe's, else the folder's name")
    parser.add_argument("--stage", type=Path, metavar="DIR", help="where files behind URLs lie meanwhile (OUT/.stage)")
    parser.add_argument("--keep-staged", action="store_true", help="keep them when their sessions are sealed")
    hung = "a task that does nothing for so long has its worker ended, and its session fails (%(default)g)"
    parser.add_argument("--patience", type=float, default=PATIENCE_S / 60, metavar="MINUTES", help=hung)
    parser.add_argument("--dry-run", action="store_true", help="write nothing: plan, print the cluster's job script")


def main(args: argparse.Namespace) -> int:
    """Exit code: 0 all files are in the store whole, 1 some are not (named), 2 usage, 130 interrupted."""
    import prep.recipe

    cluster = None if args.cluster is None else prep.cluster_config.load(args.cluster)
    if args.workers < 1:
        raise StoreError(f"--workers {args.workers}: at least one worker is needed.")
    if not args.patience > 0:
        raise StoreError(f"--patience {args.patience:g}: expected minutes, more than 0.")
    recipe = prep.recipe.load(args.recipe)
    root, far = destination(args.out, args.build)
    staging = Staging(folder=(args.stage or root / STAGE).resolve(), is_kept=args.keep_staged)
    files = find_files(args.sources, args.dataset or recipe.dataset_id, root, recipe.join, staging)
    if cluster is not None and args.dry_run:
        print(job_script(cluster))
        cluster = None  # plans are made here: nothing is submitted
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop is as clean as Ctrl-C
    try:
        with contextlib.ExitStack() as stack:
            num_workers = min(args.workers, MAX_WORKERS * len(files))
            how = {"is_dry": args.dry_run, "far": far, "patience_s": 60 * args.patience}
            how["num_workers"] = args.workers if cluster is None else cluster.bounds[1]

            def workers() -> Client:
                return stack.enter_context(connect(args.scheduler, num_workers, cluster))

            outcomes = run_ingest(files, root, recipe, workers, planner=plan_from_nwb, **how)
    except KeyboardInterrupt:
        print("Interrupted: what is sealed stays. Run the same command again to go on.", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    if not args.dry_run:
        tidy(root)
    print_table(outcomes, "would be ingested" if args.dry_run else "are in the store")
    return 1 if any(outcome.is_failure for outcome in outcomes) else 0
