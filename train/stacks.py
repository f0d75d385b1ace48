"""Where processes of this host stand in their code, and whether they have been stopped.

In: beats of ranks, and their logs. Out: the innermost frames of each, which faulthandler writes into its log.
"""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from train.heartbeat import STACKS, Beat

STACKS_S = 3.0  # that ranks may take to write their stacks
NUM_FRAMES = 12


@dataclass(frozen=True)
class Stand:
    """Where a rank stands: whether its process is stopped, its innermost frames, its log."""

    rank: int
    is_stopped: bool
    frames: list[str]
    log: str


def stands(beats: list[Beat], logs: dict[int, Path]) -> list[Stand]:
    """Let ranks write their stacks into their logs (by process id); what was stopped goes on for it."""
    stopped = {beat.rank for beat in beats if is_stopped(beat.pid)}  # before a signal changes it
    begins = {beat.rank: logs[beat.pid].stat().st_size for beat in beats}
    for number in (STACKS, signal.SIGCONT):
        for beat in beats:
            with contextlib.suppress(ProcessLookupError):  # it has ended since its last beat
                os.kill(beat.pid, number)
    deadline_s, stacks = time.monotonic() + STACKS_S, dict[int, list[str]]()
    while beats and time.monotonic() < deadline_s:
        time.sleep(0.2)
        before = stacks
        stacks = {beat.rank: _main_stack(logs[beat.pid], begins[beat.rank]) for beat in beats}
        if all(stacks.values()) and stacks == before:  # written to the end
            break
    return [Stand(beat.rank, beat.rank in stopped, stacks[beat.rank], str(logs[beat.pid])) for beat in beats]


def is_stopped(pid: int) -> bool:
    """Has a process been stopped by a signal (state T, proc(5))? A debugger's (t) has not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended
        return False


def _main_stack(log: Path, begin: int) -> list[str]:
    """The innermost frames of the thread that got the signal, as faulthandler wrote them."""
    with open(log, "rb") as file:
        file.seek(begin)
        stack = file.read().decode(errors="replace").rpartition("Current thread")[2]
    return [line.strip() for line in stack.splitlines() if line.startswith("  File ")][:NUM_FRAMES]
