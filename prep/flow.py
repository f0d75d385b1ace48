"""Hands tasks to the workers of a Dask cluster, one per thread, and knows which worker died, or hung, of which task.

In: tasks, a client. Out: each task's result, or a Failed, given to whom it concerns.
"""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dask
from distributed import Client, Future, KilledWorker, as_completed

from prep.patience import PATIENCE_S, TOPIC, watched
from prep.tasks import Failed, guarded, one_line

LOOK_S = 1.0  # how often the workers are counted: clusters grow and shrink, workers die, also while a result is due
# A worker that dies in its first moments is not started again: its nanny has not yet noticed that it lived.
NEW_S = 1.0
MAX_DEATHS = "brainloom.max-deaths"  # the setting: how many workers may die of a task, the last of them included


@dataclass(eq=False)
class Task:
    """One call for a worker; arguments that are Tasks stand for their results."""

    where: str
    on_done: Callable[[Any], None]  # gets the result, or a Failed
    function: Callable[..., Any]
    args: tuple[Any, ...]
    future: Future | None = None
    worker: str = ""  # which was given it last
    homes: set[str] = field(default_factory=set)  # workers that have its result, or need it
    num_deaths: int = 0  # of workers that had it
    is_dropped: bool = False
    is_fetched: bool = True  # else its result goes to other tasks only, and `on_done` gets None


class Flow:
    """Keeps as many tasks in flight as there are worker threads, those that finish a session first, plans last.

    Dask itself would hand out all tasks at once, two of them to one worker while another starts again, and blame all
    those of a worker that dies for its death. Here a task of which a worker has died is alone on its next one.
    """

    def __init__(self, workers: Callable[[], Client], patience_s: float = PATIENCE_S) -> None:
        """`workers` gives their client; it is not asked where there is no task for them."""
        self.workers, self.patience_s = workers, patience_s
        self.urgent: deque[Task] = deque()
        self.later: deque[Task] = deque()
        self.flying: dict[Future, Task] = {}
        self.since: dict[str, float] = {}  # when each worker that is there was first seen
        self.threads: dict[str, int] = {}  # of the workers that may be given tasks
        self.call: Future | None = None
        self.looked = -float("inf")

    def run(self, show: Callable[[], None]) -> None:
        """Work until nothing is left, which tasks may add to when they are done."""
        if not self.urgent and not self.later:
            return
        self.client = self.workers()
        self.max_deaths = int(dask.config.get(MAX_DEATHS))
        self.landed = as_completed()
        while self.flying or self.urgent or self.later:
            self._look()
            self._launch()
            if self._has_landed():
                self._take(next(self.landed))
            show()

    def _has_landed(self) -> bool:
        """Whether a task came back within a second; else there may be new workers, which wait for theirs."""
        with self.landed.thread_condition:
            return bool(self.landed.has_ready() or self.landed.thread_condition.wait(LOOK_S))

    def _take(self, future: Future) -> None:
        task = self.flying.get(future)
        if task is None:
            return  # its worker had gone, and another has it
        if future.cancelled():
            raise RuntimeError("the scheduler is lost")  # `connect` says it in words
        if future.status in ("lost", "pending"):  # its result died with its worker: it is being computed again
            self.landed.add(future)
            return
        try:
            is_wanted = task.is_fetched and not task.is_dropped and future.status != "error"
            result = self._fetched(task) if is_wanted else None
        except TimeoutError:  # its worker died before the result had left it: `_look` will see that
            self.landed.add(future)
            return
        del self.flying[future]
        if future.status == "error":
            self.threads.pop(task.worker, None)  # until the next look tells whether it is there
            self._try_again(task, future, future.exception())
        elif not task.is_dropped:
            task.on_done(result)

    def _fetched(self, task: Task) -> Any:
        """What a task has returned. Raises TimeoutError where it died with its worker: Dask would wait for ever."""
        coming = asyncio.run_coroutine_threadsafe(self._gather(task.future), self.client.loop.asyncio_loop)
        while True:
            try:
                return coming.result(LOOK_S)
            except TimeoutError:
                if task.worker not in self.client.nthreads():
                    raise  # the call ends when the future is let go; cancelled, asyncio would print its errors

    async def _gather(self, future: Future | None) -> Any:
        return await self.client.gather(future, asynchronous=True)

    def _try_again(self, task: Task, future: Future, error: BaseException | None = None) -> None:
        """After a worker's death, or an error beside the task: unless it hung, or it was not the first time."""
        task.num_deaths += 1
        if task.is_dropped:
            return
        why = self._hung(future.key)
        if not why and task.num_deaths < self.max_deaths:
            self.urgent.appendleft(task)
        elif why or error is None or isinstance(error, KilledWorker):
            died = "worker processes died of it, perhaps for want of memory; try fewer --workers."
            task.on_done(Failed(task.where, why or died))
        else:
            task.on_done(Failed(task.where, one_line(error)))

    def _hung(self, key: Any) -> str:
        """Why the worker of a task ended itself; "" where it did not."""
        told = [event["why"] for _, event in self.client.get_events(TOPIC) or () if event["key"] == key]
        what = "Is the disk or the server that holds the file there? Copy it elsewhere, or give more --patience."
        return f"{told[0]}, and its worker was ended. {what}" if told else ""

    # ------------------------------------------------------------ workers

    def _look(self) -> None:
        """Count the workers; what was given to one that is gone is given to another."""
        now = time.monotonic()
        if now - self.looked < LOOK_S:
            return
        present, is_first = self.client.nthreads(), self.looked < 0
        self.looked = now
        self.since = {worker: self.since.get(worker, 0.0 if is_first else now) for worker in present}
        self.threads = {worker: num for worker, num in present.items() if now - self.since[worker] >= NEW_S}
        for future, task in [(future, task) for future, task in self.flying.items() if not future.done()]:
            if task.worker not in present:
                self._take_back(future)
                self._try_again(task, future)
            elif any(self._is_lost(arg) for arg in task.args if isinstance(arg, Task)):
                self._take_back(future)
                self.urgent.appendleft(task)
        # One that waits makes clusters grow from nothing; it does nothing, so that it cannot kill who is just born.
        self.call = None if self.threads else self.call or self.client.submit(int, pure=False)

    def _launch(self) -> None:
        load: dict[str, list[Task]] = {worker: [] for worker in self.threads}
        for task in self.flying.values():
            load.get(task.worker, []).append(task)
        while queue := self.urgent or self.later:
            task = queue[0]
            free = [] if task.is_dropped else [worker for worker in load if self._has_room(worker, load[worker], task)]
            if not free and not task.is_dropped:
                return
            queue.popleft()
            if not task.is_dropped:
                homes = set().union(*(arg.homes for arg in task.args if isinstance(arg, Task)))
                worker = next((worker for worker in free if worker in homes), free[0])
                self._send(task, worker)
                load[worker].append(task)

    def _has_room(self, worker: str, has: list[Task], task: Task) -> bool:
        is_suspect = task.num_deaths > 0 or any(other.num_deaths for other in has)
        return not has if is_suspect else len(has) < self.threads[worker]

    def _send(self, task: Task, worker: str) -> None:
        self._submit(task, worker)
        assert task.future is not None
        self.flying[task.future] = task
        self.landed.add(task.future)

    def _submit(self, task: Task, worker: str) -> None:
        args = [self._result_of(arg, worker) if isinstance(arg, Task) else arg for arg in task.args]
        key = f"{task.function.__name__}-{uuid.uuid4().hex}"
        call = (watched, self.patience_s, key, guarded, task.where, task.function)
        # No other worker: Dask would try it where it kills whoever is beside it. If this one goes, `_look` sees it.
        task.future = self.client.submit(*call, *args, key=key, workers=[worker], pure=False)
        task.worker, task.homes = worker, {worker}

    def _result_of(self, task: Task, worker: str) -> Future:
        """What another task needs; made once more where nobody has it."""
        if task.future is None or task.future.status in ("error", "cancelled") or self._is_lost(task):
            self._submit(task, worker)
        task.homes.add(worker)
        assert task.future is not None
        return task.future

    def _is_lost(self, task: Task) -> bool:
        """Whether a result died with its worker; Dask would wait for that very worker to make it again."""
        return task.future is None or (not task.future.done() and task.worker not in self.since)

    def _take_back(self, future: Future) -> None:
        del self.flying[future]
        future.release()
