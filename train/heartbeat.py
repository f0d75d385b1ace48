"""The heart of one rank: says every second what the rank is doing, and ends it where nothing moves any more.

In: phases of a step as they begin, from the main thread. Out: `rank-00001.beat` beside the rank's log, which the
launcher's watchdog reads; all stacks in the log when it asks, or when a phase has lasted too long and nobody ended us.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from train.exit_codes import HUNG

PULSE_S = 1.0
STACKS = signal.SIGUSR2  # writes the stacks of all threads, also of one that hangs in a collective
FIRST_STEP = 5  # times the patience, until a step of its kind has been done: files are read, ops and graphs compiled
GRACE_S = 15.0  # which the launcher has to name the late rank and end all, before a rank ends itself
_SIZE = 512  # bytes of a beat: overwritten in place, which needs no space on a full disk


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank is doing. All ranks pass the same phases, so `num_phases` says who is behind."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    num_phases: int  # that have begun
    num_pulses: int  # seconds, as long as the process runs at all
    patience_s: float  # how long this phase may last


def beat_path(log_dir: Path, rank: int) -> Path:
    """Where a rank's heart beats."""
    return log_dir / f"rank-{rank:05d}.beat"


def read_beat(path: Path) -> Beat | None:
    """The last beat, or None while there is none to be read."""
    try:
        return Beat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # being written, or of other code
        return None


def first_beat(rank: int, pid: int) -> Beat:
    """What stands for a rank of this host that has not come to its first beat, and may take any time for it."""
    return Beat(
        rank=rank,
        host=socket.gethostname(),
        pid=pid,
        step=0,
        phase="start",
        num_phases=0,
        num_pulses=0,
        patience_s=float("inf"),
    )


class Silence:
    """How long another side has not been heard, in time in which this process itself was running."""

    def __init__(self) -> None:
        self.seconds, self._looked_s = 0.0, time.monotonic()

    def tick(self, heard: bool) -> float:
        """Seconds of silence, given whether something was heard since the last call; to be called often."""
        now_s = time.monotonic()
        passed_s = min(now_s - self._looked_s, 2 * PULSE_S)  # a job that was suspended as a whole has missed nothing
        self.seconds, self._looked_s = 0.0 if heard else self.seconds + passed_s, now_s
        return self.seconds


class Heart:
    """Beats with every phase, and every second in a thread of its own, from the start of a rank to `stop`."""

    def __init__(self, log_dir: Path, rank: int, patience_s: float) -> None:
        """`patience_s`: how long a phase may last, until it is set anew."""
        log_dir.mkdir(parents=True, exist_ok=True)
        self.patience_s, self.step = patience_s, 0
        self._rank, self._host, self._path = rank, socket.gethostname(), beat_path(log_dir, rank)
        self._phase, self._num_phases, self._num_pulses, self._began_at = "start", 0, 0, 0
        self._end = threading.Event()
        faulthandler.register(STACKS)  # before the first beat: the launcher signals only what beats
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def begin(self, step: int) -> None:
        """A step begins, and waits for its data."""
        self.step = step
        self.enter("data_wait")

    def enter(self, phase: str) -> None:
        """A phase of the step begins; it lasts until the next one does."""
        self._phase, self._began_at = phase, self._num_pulses
        self._num_phases += 1
        self._write()

    def stop(self) -> None:
        """The rank is about to end by itself: no more beats, and no file."""
        self._end.set()
        self._thread.join()
        os.close(self._file)
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._end.wait(PULSE_S):
            # Counted, not measured: a job that was suspended as a whole is not late when it goes on.
            self._num_pulses += 1
            self._write()
            if (self._num_pulses - self._began_at) * PULSE_S > self.patience_s + GRACE_S:
                print(f"rank {self._rank}: {self._phase} of step {self.step} does not end", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                os._exit(HUNG)

    def _write(self) -> None:
        beat = Beat(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            step=self.step,
            phase=self._phase,
            num_phases=self._num_phases,
            num_pulses=self._num_pulses,
            patience_s=self.patience_s,
        )
        with contextlib.suppress(OSError):  # a beat that is lost is followed by another
            os.pwrite(self._file, json.dumps(asdict(beat)).encode().ljust(_SIZE), 0)
