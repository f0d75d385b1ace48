"""The launcher's watchdog: which rank is late, in what phase, and where it stands in the code.

In: the beats in the folder of logs. Out: the late ranks, once a phase has lasted too long, and what to say of them.
"""

import contextlib
import os
import re
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from train.heartbeat import PULSE_S, STACKS, Beat, read_beat

SILENT_S = 5 * PULSE_S  # without a pulse a process does not run at all
STACKS_S = 3.0  # that ranks may take to write their stacks
NUM_FRAMES = 12
NUM_NAMED = 8
# In the frames of a rank that only waits for the others.
_WAITS = re.compile(r"/torch/distributed/|/deepspeed/comm/|/zero/partition_parameters\.py|/train/self_check\.py")


@dataclass
class _Seen:
    """A rank's last beat, and for how long nothing has changed in it, by our own clock."""

    beat: Beat
    still_s: float = 0.0  # in the same phase
    silent_s: float = 0.0  # without a pulse


class Watchdog:
    """Follows the beats of one launch; commands that write none are never late."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir, self._seen = log_dir, dict[Path, _Seen]()
        self._looked_s = time.monotonic()
        for path in log_dir.glob("rank-*.beat"):  # of a launch that was killed
            path.unlink(missing_ok=True)

    def late(self) -> list[Beat]:
        """The late ranks once a phase has lasted too long; none until then. To be called often; looks once a second.

        Late is what has no pulse; if all have one, what is behind the others; if none is, all of them.
        """
        passed_s = time.monotonic() - self._looked_s
        if passed_s < PULSE_S:
            return []
        self._looked_s += passed_s
        self._look(min(passed_s, 2 * PULSE_S))  # where we were suspended ourselves, the ranks were, too
        seen = self._seen.values()
        if not any(one.still_s > one.beat.patience_s for one in seen):
            return []
        silent = [one.beat for one in seen if one.silent_s > SILENT_S]
        furthest = max(one.beat.num_phases for one in seen)
        behind = [one.beat for one in seen if one.beat.num_phases < furthest]
        return silent or behind or [one.beat for one in seen]

    def _look(self, passed_s: float) -> None:
        paths = sorted(self._log_dir.glob("rank-*.beat"))
        self._seen = {path: seen for path, seen in self._seen.items() if path in paths}
        for path in paths:
            beat, before = read_beat(path), self._seen.get(path)
            if beat is None:
                continue
            seen = self._seen[path] = _Seen(beat)
            if before is not None and before.beat.num_phases == beat.num_phases:
                seen.still_s = before.still_s + passed_s
            if before is not None and before.beat.num_pulses == beat.num_pulses:
                seen.silent_s = before.silent_s + passed_s


def explain(late: list[Beat], logs: dict[int, Path]) -> str:
    """Who is late, in what phase, and where in the code. `logs`: of the processes of this machine, by their id.

    Where several ranks are in the same phase, those are late that were stopped, or that do not wait for others.
    """
    here = [beat for beat in late if beat.host == socket.gethostname() and beat.pid in logs]
    stopped = {beat.pid for beat in here if _state(beat.pid) == "T"}  # before a signal changes it
    stacks = _stacks(here, logs)
    moving = [beat for beat in late if not _waits_for_others(stacks.get(beat.rank, []))]
    late = [beat for beat in here if beat.pid in stopped] or moving or late
    lines = []
    for beat in late[:NUM_NAMED]:
        is_stopped = ", and its process is stopped (state T)" if beat.pid in stopped else ""
        lines.append(
            f"launch: watchdog: rank {beat.rank} is late: {beat.phase} of step {beat.step} lasts longer than "
            f"{beat.patience_s:g} s{is_stopped} (process {beat.pid} on {beat.host})."
        )
        if frames := stacks.get(beat.rank):
            lines += [f"It stands here ({logs[beat.pid]}):", *(f"  | {frame}" for frame in frames)]
    if len(late) > NUM_NAMED:
        lines.append(f"{len(late) - NUM_NAMED} more ranks are late.")
    return "\n".join(lines)


def _state(pid: int) -> str:
    """`T` of a process that was stopped, `S` of one that waits, and so on (proc(5)); empty where it cannot be seen."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _stacks(beats: list[Beat], logs: dict[int, Path]) -> dict[int, list[str]]:
    """Let ranks write their stacks into their logs; what was stopped goes on for it. Main threads' frames, by rank."""
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
    return stacks


def _main_stack(log: Path, begin: int) -> list[str]:
    """The innermost frames of the thread that got the signal, as faulthandler wrote them."""
    with open(log, "rb") as file:
        file.seek(begin)
        stack = file.read().decode(errors="replace").rpartition("Current thread")[2]
    return [line.strip() for line in stack.splitlines() if line.startswith("  File ")][:NUM_FRAMES]


def _waits_for_others(frames: list[str]) -> bool:
    return any(_WAITS.search(frame) for frame in frames[:6])
