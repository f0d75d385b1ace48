"""Measures a piece of work in a process of its own: CPU seconds, wall seconds, peak memory.

In: a command, or the body of a `with`. Out: Cost. Imports are outside of what is measured, unless a whole command is.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MARK = "COST "
ONE_THREAD = dict.fromkeys(
    (
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"),
        *("BLOSC_NTHREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"),
    ),
    "1",
)
POLL_S = 0.1


@dataclass(frozen=True)
class Cost:
    """What a piece of work took; `parts` are CPU seconds by phase."""

    cpu_s: float
    wall_s: float
    peak_mb: float  # VmHWM of the process; of a command with children the largest of a child
    parts: dict[str, float] = field(default_factory=dict)


class Parts(dict[str, float]):
    """CPU seconds by phase, added up."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what the block takes under `name`."""
        begin = time.process_time()
        yield
        self[name] = self.get(name, 0.0) + time.process_time() - begin


@contextlib.contextmanager
def measured() -> Iterator[Parts]:
    """Print the cost of the block, as `run` reads it."""
    parts, cpu, wall = Parts(), time.process_time(), time.perf_counter()
    yield parts
    cost = Cost(time.process_time() - cpu, time.perf_counter() - wall, peak_mb(os.getpid()), dict(parts))
    print(MARK + json.dumps(asdict(cost)), flush=True)


def peak_mb(pid: int) -> float:
    """Largest resident memory so far (VmHWM; mapped files count) in MB; 0 where the process is gone."""
    with contextlib.suppress(OSError):  # it has ended
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def run(script: Path, *args: Any, python: Path | str = sys.executable, **environment: str) -> Cost:
    """The cost that a script prints of itself, run by itself on one thread."""
    command = [str(python), str(script), *map(str, args)]
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD, **environment}, text=True, capture_output=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return Cost(**json.loads(lines[-1].removeprefix(MARK)))


def run_command(command: Sequence[Any]) -> Cost:
    """Cost of a whole command with all its children: CPU of all, wall, the largest child's peak memory."""
    began, before = time.perf_counter(), os.times()
    process = subprocess.Popen([str(part) for part in command], env={**os.environ, **ONE_THREAD}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    peaks: dict[int, float] = {}
    watch = threading.Thread(target=_watch, args=(process, peaks))
    watch.start()
    output, _ = process.communicate()
    watch.join()
    if process.returncode:
        raise SystemExit(f"{command} failed ({process.returncode}):\n{output[-4000:]}")
    after = os.times()
    cpu_s = after.children_user - before.children_user + after.children_system - before.children_system
    return Cost(cpu_s, time.perf_counter() - began, max([*peaks.values(), 0.0]))


def _watch(process: "subprocess.Popen[str]", peaks: dict[int, float]) -> None:
    while process.poll() is None:
        for pid in descendants(process.pid):
            peaks[pid] = max(peaks.get(pid, 0.0), peak_mb(pid))
        time.sleep(POLL_S)


def descendants(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the process has ended since
            found += [int(child) for child in path.read_text().split()]
    return found + [below for child in found for below in descendants(child)]
