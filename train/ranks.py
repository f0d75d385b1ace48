"""The ranks of this host: start them, say what becomes of them, pass signals on, end them with all their helpers.

In:  a `Task`. Out: events (train/events.py): exits with last lines, beats, what rank 0 writes, stacks that were asked
for. The launcher has one for this machine; on other hosts an agent has it.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from train import leftovers
from train.events import Event, Exit, Looked, Output, Pulse
from train.heartbeat import PULSE_S, beat_path, first_beat, read_beat
from train.rank_environment import Task, rank_environment
from train.stacks import is_stopped, stands

KILL_GRACE_S = 5.0  # between SIGTERM and SIGKILL, after a rank has failed
NUM_LAST_LINES = 25


class LaunchError(ValueError):
    """A launch that cannot start; the message says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Started:
    """A process that was started: its rank, its log, and where this run begins in the log."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int


class Ranks:
    """One host's processes, which die with the thread that started them."""

    name = ""  # of the host, in messages; this machine needs none

    def __init__(self, task: Task, env: Mapping[str, str]) -> None:
        """Start them. `env`: what they have besides the task's. Raises LaunchError; then none is left."""
        self._task, self.ranks = task, task.ranks
        self._exits = queue.SimpleQueue[tuple[Started, int]]()
        self._answers, self._pulsed_s = list[Event](), 0.0
        log_dir = Path(task.log_dir)
        log_dir.mkdir(parents=True, exist_ok=True)
        for rank in task.ranks:  # of one that was killed
            beat_path(log_dir, rank).unlink(missing_ok=True)
        self._started = list[Started]()
        try:
            for rank in task.ranks:
                rank_env = rank_environment(task, rank, {**env, **task.env})
                self._started.append(start(rank, task.command, log_dir / f"rank-{rank:05d}.log", rank_env))
        except BaseException:
            self.terminate()
            self.finish()
            raise
        # One waiting thread each: the queue then holds the exits in the order in which they happened.
        for one in self._started:
            threading.Thread(target=self._wait, args=(one,), daemon=True).start()
        self._follower = _Follower(self._started[0]) if task.first_rank == 0 else None

    def _wait(self, one: Started) -> None:
        self._exits.put((one, one.process.wait()))

    def poll(self) -> list[Event]:
        """What has happened since the last call; to be called often."""
        events, self._answers = self._answers, []
        exits = []
        while not self._exits.empty():
            one, code = self._exits.get()
            exits.append(Exit(one.rank, code, last_lines(one), str(one.log)))
        if self._follower is not None and (text := self._follower.read()):
            events.append(Output(text))
        if time.monotonic() - self._pulsed_s > PULSE_S:
            self._pulsed_s = time.monotonic()
            events.append(self._pulse())
        return [*events, *exits]

    def _pulse(self) -> Pulse:
        found = (read_beat(beat_path(Path(self._task.log_dir), rank)) for rank in self.ranks)
        beats = {beat.rank: beat for beat in found if beat is not None}
        stopped = {one.rank: one.process.pid for one in self._started if is_stopped(one.process.pid)}
        for rank, pid in stopped.items():  # also of one that does not beat yet
            beats.setdefault(rank, first_beat(rank, pid))
        return Pulse([*beats.values()], [*stopped])

    def send_signal(self, number: int) -> None:
        """To the ranks themselves; their helpers are theirs to end."""
        for one in self._started:
            one.process.send_signal(number)

    def look(self, ranks: Sequence[int]) -> None:
        """Find out where some ranks stand; `poll` has the answer."""
        logs = {one.process.pid: one.log for one in self._started}
        beats = [beat for beat in self._pulse().beats if beat.rank in ranks and beat.pid in logs]
        self._answers.append(Looked(stands(beats, logs)))

    def terminate(self) -> None:
        """SIGTERM to all that are left."""
        for one in self._started:
            one.process.terminate()
        self._deadline_s = time.monotonic() + KILL_GRACE_S

    def finish(self) -> None:
        """After `terminate`, some seconds later, SIGKILL to the whole group of each, so that helpers go as well."""
        for one in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):  # then SIGKILL
                one.process.wait(max(0.0, self._deadline_s - time.monotonic()))
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says the latter
                os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
        leftovers.clear_shared_memory(self._task.address, self._task.port)


def start(rank: int, command: list[str], log: Path, env: Mapping[str, str]) -> Started:
    """Start a rank in a group of its own, its output appended to `log`; it dies with us. Raises LaunchError."""
    # Appended: the log of the run that failed is what a restart is about to need.
    with open(log, "ab") as file:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(env),
                process_group=0,
                preexec_fn=_in_rank(),
            )
        except OSError as error:
            raise LaunchError(
                f"launch: rank {rank} cannot start {command[0]!r}: {error.strerror}; expected a program. Check the "
                "command."
            ) from None
        return Started(rank, process, log, file.tell())


def _in_rank() -> Callable[[], None]:
    """A rank that is asked to save before it can (its imports take seconds) does so as soon as it can: it unblocks."""
    die = die_with_parent()

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        if die is not None:
            die()

    return in_child


def die_with_parent() -> Callable[[], None] | None:
    """Linux: the kernel kills a process when the thread of ours that started it ends, however it ends."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded before the fork, where little is safe
    parent = os.getpid()

    def in_child() -> None:
        libc.prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)

    return in_child


class _Follower:
    """Reads what is appended to a log."""

    def __init__(self, started: Started) -> None:
        self._log = started.log
        self._offset = started.log_start
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def read(self) -> str:
        with contextlib.suppress(OSError), open(self._log, "rb") as file:  # no log any more: no reason to end a run
            file.seek(self._offset)
            new = file.read()
            self._offset += len(new)
            return self._decode(new)
        return ""


def last_lines(one: Started) -> str:
    """The last traceback in this run's part of the log, or the last lines."""
    with contextlib.suppress(OSError), open(one.log, "rb") as file:  # said below
        size = file.seek(0, os.SEEK_END)
        file.seek(max(one.log_start, size - 65536))
        lines = file.read().decode(errors="replace").rstrip().splitlines()
        tracebacks = [index for index, line in enumerate(lines) if "Traceback (most recent call last)" in line]
        return "\n".join(lines[tracebacks[-1] if tracebacks else 0 :][-NUM_LAST_LINES:])
    return "(its log cannot be read)"


def say(message: str) -> None:
    """One message of the launcher, on stderr."""
    print(message, file=sys.stderr, flush=True)
