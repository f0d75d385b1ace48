"""How many workers a cluster should have, and what became of the jobs that should have been workers.

In: a cluster of Dask (its scheduler in this process). Out: jobs asked for, replaced or let go; why there are none.
"""

import asyncio
import getpass
import math
import subprocess
import time
from typing import Any

from distributed.core import Status
from distributed.deploy.adaptive import Adaptive
from distributed.deploy.spec import ProcessInterface

INTERVAL_S = 2
IDLE_TIMES = 30  # intervals that a worker has to be idle before it is let go: others are slow to come
ANSWER_S = 30.0
LIST_S = 15.0  # how often the batch system is asked for its jobs
HOLD_S = 5.0  # after jobs that were refused, or ended before they were workers
HOPELESS = 3  # so many times in a row, with no worker left

# What prints the numbers of all jobs of a person, one per line.
LIST_JOBS = {
    "slurm": ("squeue", "--me", "--noheader", "--format=%A"),
    "pbs": ("qselect", "-u", "{user}"),
    "lsf": ("bjobs", "-noheader", "-o", "jobid"),
}


def remembering(job_class: Any) -> Any:
    """A kind of job of dask-jobqueue whose refusal by the batch system is kept, not raised where nobody listens."""

    class Remembering(job_class):
        refusal = ""

        async def start(self) -> None:
            try:
                await super().start()
            except Exception as error:  # kept, and said by `Workforce`
                self.refusal = _said(str(error))
                await ProcessInterface.start(self)  # counts as started: `Workforce` takes it away

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed  # which dask-jobqueue leaves out, and Dask asserts

    Remembering.__name__ = job_class.__name__
    return Remembering


def _said(text: str) -> str:
    """What the batch system's command printed, out of dask-jobqueue's account of its call."""
    words = text.rsplit("stderr:", 1)[-1].strip() or text
    return " ".join(words.split())


def _job_of(worker: Any) -> str:
    """The name of a worker's job: job X runs the workers X-0, X-1 ...; takes a name, or Dask's WorkerState."""
    return str(getattr(worker, "name", worker)).rsplit("-", 1)[0]


class Workforce(Adaptive):
    """As many workers as allowed while all of them are busy; jobs that ended are replaced.

    Dask's own rule looks at how long the tasks that wait would take. Ingest keeps only as many tasks in flight as
    there are workers, so that a rule on the number that wait would never ask for another worker.
    """

    def __init__(self, cluster: Any, kind: str = "local", workers_per_job: int = 1, **bounds: Any) -> None:
        key = _job_of if workers_per_job > 1 else None  # the workers of one job leave together
        super().__init__(cluster, interval=f"{INTERVAL_S}s", wait_count=IDLE_TIMES, worker_key=key, **bounds)
        self.kind, self.workers_per_job = kind, workers_per_job
        self.seen: set[str] = set()  # jobs that have been workers
        self.listed_at = self.held_until = time.monotonic()
        self.rounds_in_vain = 0
        self.refusal = ""  # what the batch system last said
        self.problem = ""  # why there will be no worker, once that is clear

    async def adapt(self) -> None:
        """One look at the cluster, and what follows from it."""
        if self.kind in LIST_JOBS:
            await self._take_away()
        if time.monotonic() >= self.held_until:
            await super().adapt()

    async def target(self) -> int:
        """The number of workers to have now, before the bounds."""
        scheduler = self.cluster.scheduler
        num_tasks = len(scheduler.unrunnable) + len(scheduler.queued)
        num_tasks += sum(len(worker.processing) for worker in scheduler.workers.values())
        is_busy = num_tasks >= max(1, len(scheduler.workers))
        return int(self.maximum) if is_busy else math.ceil(num_tasks / self.workers_per_job) * self.workers_per_job

    async def _take_away(self) -> None:
        """Forget the jobs that are no longer in the batch system, so that others take their places."""
        jobs: dict[str, Any] = dict(self.cluster.workers)
        present = {str(worker.name) for worker in self.cluster.scheduler.workers.values()}
        at_work = {name for name in jobs if name in present or any(_job_of(worker) == name for worker in present)}
        self.seen |= at_work
        refused = {name for name, job in jobs.items() if job.job_id is None}
        gone = (refused | await self._ended(jobs)) - at_work
        for name in gone:
            self.refusal = jobs[name].refusal if name in refused else self.refusal
            self.cluster.worker_spec.pop(name, None)
            self.cluster.workers.pop(name).status = Status.closed
        if gone - self.seen:  # the next try is not made at once: batch systems have limits, and people
            self.rounds_in_vain += 1
            self.held_until = time.monotonic() + HOLD_S
        if present:
            self.rounds_in_vain = 0
        elif self.rounds_in_vain >= HOPELESS:
            self.problem = self.refusal and f"the batch system refuses the jobs ({self.refusal})"
            self.problem = self.problem or "the jobs end before they have reached the scheduler"

    async def _ended(self, jobs: dict[str, Any]) -> set[str]:
        """The jobs that the batch system no longer has; it is asked only now and then."""
        if time.monotonic() - self.listed_at < LIST_S:
            return set()
        running = await self._list()
        self.listed_at = time.monotonic()
        return set() if running is None else {name for name, job in jobs.items() if job.job_id not in running}

    async def _list(self) -> set[str] | None:
        """The numbers of all jobs in the batch system; None where it does not answer."""
        words = [word.format(user=getpass.getuser()) for word in LIST_JOBS[self.kind]]
        try:  # in a thread: a subprocess of the event loop would outlive a loop that is closed under it
            listed = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, timeout=ANSWER_S)
        except (OSError, subprocess.TimeoutExpired):
            return None  # it is asked again; jobs count as running until it answers
        return None if listed.returncode else {line.split(".")[0].strip() for line in listed.stdout.splitlines()}
