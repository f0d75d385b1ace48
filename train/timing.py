"""What a step's time goes into: phases that do not overlap, on this rank.

In: phases as they begin and end, one inside another. Out: seconds of each, without those of the phases inside it.

On a CPU, waiting for a collective is the phase `communication`, wherever it happens. On CUDA the phases are measured on
the device, by events in its stream; collectives run beside it there and have no time of their own: forward and backward
hold what they wait for. How long the collectives take is in a trace (`profile_steps`).
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed import Work

COMMUNICATION = "communication"


class StepTimer:
    """Seconds of each phase since the last `seconds()`; of the thread that made it."""

    def __init__(self, device: torch.device) -> None:
        self.on_phase: Callable[[str], None] = lambda name: None  # told of each phase as it begins
        self._on_device = device.type == "cuda"
        self.phases = (
            "data_wait",
            "forward",
            "backward",
            *(() if self._on_device else (COMMUNICATION,)),
            "optimizer",
        )
        self._thread = threading.get_ident()
        self._open: list[str] = []
        self._marks: list[tuple[Any, str]] = []  # when, and which phase went on from then

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside is of this phase; the phase around it stands still."""
        if threading.get_ident() != self._thread:
            yield
            return
        if name != COMMUNICATION:  # happens within all others
            self.on_phase(name)
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def time_collectives(self) -> None:
        """From now on every wait for a collective is of the phase `communication`; on a CPU, where one can tell."""
        if self._on_device:
            return
        wait = Work.wait

        def timed(work: Work, *args: Any, **kwargs: Any) -> Any:
            with self.phase(COMMUNICATION):
                return wait(work, *args, **kwargs)

        Work.wait = timed  # type: ignore[assignment, method-assign]  # all of torch.distributed and DeepSpeed waits by it

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase; the count begins anew."""
        if self._on_device:
            torch.cuda.synchronize()
        total = dict.fromkeys(self.phases, 0.0)
        for (begin, name), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                total[name] += begin.elapsed_time(end) / 1e3 if self._on_device else end - begin
        self._marks.clear()
        return total

    def _mark(self) -> None:
        now: Any = torch.cuda.Event(enable_timing=True) if self._on_device else time.perf_counter()
        if self._on_device:
            now.record()
        self._marks.append((now, self._open[-1] if self._open else ""))
