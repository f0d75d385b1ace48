"""Ends the worker process whose task hangs: on a disk that does not answer, in a decoder that never comes back.

In: a task, how long it may do nothing. Out: its result; or the end of its process, after a word to the scheduler.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed import Worker, get_worker

TOPIC = "brainloom-hung"  # of the scheduler's events: {key, why}
PATIENCE_S = 1800.0  # nothing that ingest does is without a tick of processor time for so long
IN_ALL = 12  # times that, for a task that works: a loop without end works, too
LOOKS = 20  # while the patience lasts
SENDING_S = 2.0  # until the word has left
NOT_TASKS = ("MainThread", "Profile", "watch of a task")  # threads of a worker that are at work while no task is


def watched(patience_s: float, key: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run a task; where it hangs, end this process: nothing less stops a thread that waits for the kernel."""
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over, patience_s, key, get_worker()), name=NOT_TASKS[-1], daemon=True)
    watch.start()
    try:
        return function(*args)
    finally:
        over.set()


def _watch(over: threading.Event, patience_s: float, key: str, worker: Worker) -> None:
    started = moved = time.monotonic()
    before = _ticks()
    why = ""
    while not over.wait(patience_s / LOOKS):
        now, ticks = time.monotonic(), _ticks()
        if ticks != before or not ticks:  # a system that does not tell is taken to work
            moved, before = now, ticks
        if now - moved >= patience_s:
            why = f"it hung: nothing happened for {_in_words(now - moved)}"
        elif now - started >= IN_ALL * patience_s:
            why = f"it came to no end in {_in_words(now - started)}"
        if why:
            worker.log_event(TOPIC, {"key": key, "why": why})
            if not over.wait(SENDING_S):
                os._exit(1)


def _ticks() -> dict[str, tuple[str, ...]]:
    """Processor time so far of each thread that may be a task's, or work for one; {} where the system does not tell."""
    found = {}
    for thread in threading.enumerate():
        stat = Path(f"/proc/self/task/{thread.native_id}/stat")
        if thread.name not in NOT_TASKS and stat.exists():
            found[stat.parent.name] = _user_and_system(stat)
    return found


def _user_and_system(stat: Path) -> tuple[str, ...]:
    try:
        text = stat.read_text()
    except OSError:  # the thread has ended meanwhile
        return ()
    return tuple(text.rpartition(")")[2].split()[11:13])


def _in_words(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"
