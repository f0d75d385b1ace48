"""The processes of one launch: start them, watch them, pass signals on, name the first that fails, end all of them.

In:  a command, an environment and a log for each process.
Out: an exit code, what the first process says on our stdout, and the last lines of the one that failed on stderr.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from train.exit_codes import HUNG, STOPPED
from train.watchdog import Watchdog, explain

KILL_GRACE_S = 5.0  # between SIGTERM and SIGKILL, after a rank has failed
RUNNER_GRACE_S = 40.0  # the same for DeepSpeed's runner, which gives its ranks 30 s
STOP_GRACE_S = 120.0  # the same after a signal to the launcher: long enough to save a checkpoint
SETTLE_S = 0.5  # ranks that fail this soon after the first may be its victims or its cause
NUM_LAST_LINES = 25
# What a healthy rank says when a peer has gone: such a rank is a victim, another one the cause.
_VICTIM = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited|Connection refused|rank 0 does not answer"
)
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LaunchError(ValueError):
    """A launch that cannot start; the message says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Started:
    """A process that was started: its name in messages, its log, and where this run begins in the log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    is_runner: bool = False  # DeepSpeed's runner: it ends the ranks on other hosts if it gets SIGTERM and the time


_Exit = tuple[Started, int]  # with its return code
_Exits = queue.SimpleQueue[_Exit]


def start(name: str, command: list[str], log: Path, env: Mapping[str, str], is_runner: bool = False) -> Started:
    """Start a process in a group of its own, its output appended to `log`; it dies with us. Raises LaunchError."""
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
                preexec_fn=_die_with_parent(signal.SIGTERM if is_runner else signal.SIGKILL),
            )
        except OSError as error:
            raise LaunchError(
                f"launch: {name} cannot start {command[0]!r}: {error.strerror}; expected a program. Check the command."
            ) from None
        return Started(name, process, log, file.tell(), is_runner)


def _die_with_parent(number: int) -> Callable[[], None] | None:
    """Linux: the kernel sends `number` to a rank when the launcher's thread that started it ends, however it ends."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded before the fork, where little is safe
    parent = os.getpid()

    def in_child() -> None:
        libc.prctl(1, number)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)

    return in_child


class Signals:
    """While open, signals to this process are noted instead of acted on; the watching loop passes them on."""

    def __init__(self) -> None:
        self.stop: int | None = None
        self.num_stops = 0
        self.waiting: list[int] = []
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (*_STOP_SIGNALS, signal.SIGUSR1):
                if number is not signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # respect nohup
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave back, it takes

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.waiting.append(number)
        if number in _STOP_SIGNALS:
            self.stop = self.stop or number
            self.num_stops += 1

    def pass_on(self, started: list[Started]) -> None:
        """Send each noted signal to the ranks themselves; their helpers are theirs to end."""
        while self.waiting:
            number = self.waiting.pop(0)
            say(f"launch: {signal.Signals(number).name}, passed on to {len(started)} process(es)")
            for one in started:
                if not one.is_runner:
                    one.process.send_signal(number)
                elif number in _STOP_SIGNALS:  # others would kill the runner and leave its ranks
                    one.process.terminate()


class _Follower:
    """Copies what is appended to a log to our stdout."""

    def __init__(self, started: Started) -> None:
        self._log = started.log
        self._offset = started.log_start
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def copy(self) -> None:
        # No log any more, or nobody who reads our stdout (`| head`): no reason to end a run.
        with contextlib.suppress(OSError), open(self._log, "rb") as file:
            file.seek(self._offset)
            if new := file.read():
                self._offset += len(new)
                sys.stdout.write(self._decode(new))
                sys.stdout.flush()


def supervise(started: list[Started], signals: Signals, watchdog: Watchdog) -> int:
    """Watch until all have ended, one has failed or hangs; return the exit code of the launch."""
    exits: _Exits = queue.SimpleQueue()
    # One waiting thread each: the queue then holds the exits in the order in which they happened.
    for one in started:
        threading.Thread(target=lambda one=one: exits.put((one, one.process.wait())), daemon=True).start()
    follower = _Follower(started[0])
    codes, deadline = list[int](), float("inf")
    while len(codes) < len(started):
        signals.pass_on(started)
        if signals.stop is not None:
            deadline = min(deadline, time.monotonic() + STOP_GRACE_S)
            if signals.num_stops > 1 or time.monotonic() > deadline:
                break
        exited = _next_exit(exits, 0.1)
        follower.copy()
        if exited is None:
            if late := watchdog.late():
                say(explain(late, {one.process.pid: one.log for one in started}))
                return HUNG
            continue
        codes.append(exited[1])
        if exited[1] not in (0, STOPPED) and signals.stop is None:
            return _report(_first_failure(exited, exits), started, follower)
    follower.copy()
    if signals.stop is not None and codes != [STOPPED] * len(started):
        return 128 + signals.stop
    return max(codes)


def _next_exit(exits: _Exits, timeout_s: float) -> _Exit | None:
    try:
        return exits.get(timeout=timeout_s)
    except queue.Empty:
        return None


def _first_failure(first: _Exit, exits: _Exits) -> _Exit:
    """The first rank that failed, unless it only complains of a lost peer and another failed at the same time."""
    failures = [first]
    deadline = time.monotonic() + SETTLE_S
    while (left_s := deadline - time.monotonic()) > 0:
        if (exited := _next_exit(exits, left_s)) and exited[1] not in (0, STOPPED):
            failures.append(exited)
    causes = [failure for failure in failures if not _VICTIM.search(_last_lines(failure[0]))]
    return (causes or failures)[0]


def _report(failure: _Exit, started: list[Started], follower: _Follower) -> int:
    end(started)
    follower.copy()
    one, code = failure
    lines = _last_lines(one).replace("\n", "\n  | ")
    others = f" of {len(started)} failed first and the others were stopped" if len(started) > 1 else " failed"
    say(f"launch: {one.name}{others}: {_describe(code)}. Its last lines ({one.log}):\n  | {lines}")
    return code if code > 0 else 128 - code


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    hint = " (out of memory? see `dmesg`)" if -code == signal.SIGKILL else ""
    return f"signal {signal.Signals(-code).name}{hint}"


def _last_lines(one: Started) -> str:
    """The last traceback in this run's part of the log, or the last lines."""
    with open(one.log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(one.log_start, size - 65536))
        lines = file.read().decode(errors="replace").rstrip().splitlines()
    tracebacks = [index for index, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    return "\n".join(lines[tracebacks[-1] if tracebacks else 0 :][-NUM_LAST_LINES:])


def end(started: list[Started]) -> None:
    """SIGTERM, some seconds, then SIGKILL to the whole group of each process, so that its helpers go as well."""
    for one in started:
        one.process.terminate()
    start = time.monotonic()
    for one in started:
        deadline = start + (RUNNER_GRACE_S if one.is_runner else KILL_GRACE_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says the latter
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()


def say(message: str) -> None:
    """One message of the launcher, on stderr."""
    print(message, file=sys.stderr, flush=True)
