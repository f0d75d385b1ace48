"""Processes of this machine, as tests look at them; and those that stand for a rank.

In: ids, conditions, scripts. Out: who is alive, who is below whom; whether something came true in time.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether a process runs, and is no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return False


def cmdline(pid: int) -> bytes:
    """The words of a process, each with a zero after it."""
    with contextlib.suppress(OSError):  # it has ended, and has no command line
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def below(pid: int) -> Iterator[int]:
    """All processes below one."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:  # it has ended, and has no children
        return
    for thread in threads:
        with contextlib.suppress(OSError):  # this thread has ended; what it had started is another one's now
            for child in map(int, (thread / "children").read_text().split()):
                yield child
                yield from below(child)


def kill(pid: int) -> None:
    """At once, if it has not ended by itself."""
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(pid, signal.SIGKILL)


def comes_true(condition: Callable[[], object], patience_s: float = 30.0) -> bool:
    """Wait until something is true; whether it became so."""
    deadline_s = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def wait_for(condition: Callable[[], object], what: str, patience_s: float = 20.0) -> None:
    """Wait until something is true; a failure says what was waited for."""
    assert comes_true(condition, patience_s), f"waited {patience_s:g} s for {what}"


def rank_script(code: str, *arguments: str) -> list[str]:
    """A command that stands for a rank: a few lines of Python, quickly started."""
    return [sys.executable, "-S", "-c", "import json, os, sys, time, signal\n" + code, *arguments]


def rank_log(folder: Path, rank: int) -> str:
    """What a rank has said so far, in the logs of a run."""
    path = folder / "logs" / f"rank-{rank:05d}.log"
    return path.read_text(encoding="utf-8") if path.exists() else ""
