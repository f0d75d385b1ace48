"""The launcher's watchdog: which rank is late, in what phase, and where it stands in the code.

In: the pulses of all hosts, with the beats of their ranks. Out: the late ranks, once a phase has lasted too long or a
process has been stopped, and what to say of them.
"""

import re
import time
from dataclasses import dataclass

from train.events import Pulse
from train.heartbeat import PULSE_S, Beat
from train.stacks import Stand

SILENT_S = 5 * PULSE_S  # without a pulse a process does not run at all
NUM_NAMED = 8
# In the frames of a rank that only waits for the others.
_WAITS = re.compile(r"/torch/distributed/|/deepspeed/comm/|/zero/partition_parameters\.py|/train/self_check\.py")


@dataclass
class Seen:
    """A rank's last beat, and for how long nothing has changed in it, by our own clock."""

    beat: Beat
    is_stopped: bool = False  # by a signal: it does not go on by itself
    still_s: float = 0.0  # in the same phase
    silent_s: float = 0.0  # without a pulse


class Watchdog:
    """Follows the beats of one launch; commands that write none are never late."""

    def __init__(self) -> None:
        self._pulses, self._seen = dict[str, Pulse](), dict[int, Seen]()
        self._looked_s = time.monotonic()

    @property
    def step(self) -> int | None:
        """Of the furthest rank, as far as anything has been heard."""
        return max((beat.step for pulse in self._pulses.values() for beat in pulse.beats), default=None)

    def hear(self, host: str, pulse: Pulse) -> None:
        """A host has sent the beats of all its ranks."""
        self._pulses[host] = pulse

    def late(self) -> list[int]:
        """The late ranks once a phase has lasted too long; none until then. To be called often; looks once a second.

        Late is what was stopped by a signal and has no pulse, at once; then what has no pulse; if all have one, what
        is behind the others; if none is, all of them.
        """
        passed_s = time.monotonic() - self._looked_s
        if passed_s < PULSE_S:
            return []
        self._looked_s += passed_s
        self._look(min(passed_s, 2 * PULSE_S))  # where we were suspended ourselves, the ranks were, too
        seen = self._seen
        silent = [rank for rank, one in seen.items() if one.silent_s > SILENT_S]
        if stopped := [rank for rank in silent if seen[rank].is_stopped]:
            return stopped
        if not any(one.still_s > one.beat.patience_s for one in seen.values()):
            return []
        furthest = max(one.beat.num_phases for one in seen.values())
        behind = [rank for rank, one in seen.items() if one.beat.num_phases < furthest]
        return silent or behind or [*seen]

    def _look(self, passed_s: float) -> None:
        before = self._seen
        beats = {beat.rank: beat for pulse in self._pulses.values() for beat in pulse.beats}
        stopped = {rank for pulse in self._pulses.values() for rank in pulse.stopped}
        self._seen = {rank: Seen(beat, rank in stopped) for rank, beat in sorted(beats.items())}
        for rank, seen in self._seen.items():
            last = before.get(rank)
            if last is not None and last.beat.num_phases == seen.beat.num_phases:
                seen.still_s = last.still_s + passed_s
            if last is not None and last.beat.num_pulses == seen.beat.num_pulses:
                seen.silent_s = last.silent_s + passed_s

    def seen(self, ranks: list[int]) -> list[Seen]:
        """What is known of some ranks."""
        return [self._seen[rank] for rank in ranks]

    def silent_s(self, ranks: list[int]) -> float:
        """For how long nothing has moved in the one of them that has moved last."""
        return min((max(self._seen[rank].silent_s, self._seen[rank].still_s) for rank in ranks), default=0.0)


def explain(late: list[Seen], stands: dict[int, Stand]) -> tuple[list[int], str]:
    """Who is late, and what to say: in what phase, and where in the code each stands, as far as their hosts know.

    Where several ranks are in the same phase, those are late that were stopped, or that do not wait for others.
    """
    stopped = {rank for rank, stand in stands.items() if stand.is_stopped}
    frames = {rank: stand.frames for rank, stand in stands.items()}
    moving = [one for one in late if not _waits_for_others(frames.get(one.beat.rank, []))]
    late = [one for one in late if one.beat.rank in stopped] or moving or late
    lines = []
    for one in late[:NUM_NAMED]:
        beat, is_stopped = one.beat, one.beat.rank in stopped
        lasts = f"{beat.phase} of step {beat.step} lasts longer than {beat.patience_s:g} s"
        if is_stopped and one.still_s <= beat.patience_s:
            lasts = f"it has not moved for {one.silent_s:.0f} s, in {beat.phase} of step {beat.step}"
        lines.append(
            f"launch: watchdog: rank {beat.rank} is late: {lasts}"
            f"{', and its process is stopped (state T)' if is_stopped else ''} (process {beat.pid} on {beat.host})."
        )
        if stack := frames.get(beat.rank):
            lines += [f"It stands here ({stands[beat.rank].log}):", *(f"  | {frame}" for frame in stack)]
    if len(late) > NUM_NAMED:
        lines.append(f"{len(late) - NUM_NAMED} more ranks are late.")
    return [one.beat.rank for one in late], "\n".join(lines)


def _waits_for_others(frames: list[str]) -> bool:
    return any(_WAITS.search(frame) for frame in frames[:6])
