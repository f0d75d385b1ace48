"""A close look at a few steps: a trace by torch.profiler, and operations counted beside the formula.

In: `profile_steps` of a run. Out: `profile/` in the run folder, of rank 0: trace.json (open it at ui.perfetto.dev),
operators.txt (where the time went), and flops.json (the step after those that are traced).
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from train.flops import Shape, training_flops
from train.loader import TrainingSamples

NUM_OPERATORS = 40


class Profiler:
    """Watches the steps that the run names, on rank 0; the others go by."""

    def __init__(self, samples: TrainingSamples, run_dir: Path, rank: int, world_size: int) -> None:
        self._samples, self._folder = samples, run_dir / "profile"
        self._steps = samples.config.profiled if rank == 0 else range(0)
        self._num_windows = samples.config.train.global_batch_size // world_size
        self._trace: profile | None = None

    @contextlib.contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Around a step."""
        if self._steps and step == self._steps.stop:
            with FlopCounterMode(display=False) as counter:
                yield
            self._write_flops(step, counter.get_total_flops())
            return
        if step in self._steps and self._trace is None:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._trace = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._trace.start()
        yield
        if self._trace is not None and step + 1 == self._steps.stop:
            self._write_trace(self._trace)
            self._trace = None

    def _write_trace(self, trace: profile) -> None:
        trace.stop()
        self._folder.mkdir(exist_ok=True)
        trace.export_chrome_trace(str(self._folder / "trace.json"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = trace.key_averages().table(sort_by=order, row_limit=NUM_OPERATORS)
        (self._folder / "operators.txt").write_text(table)
        print(f"steps {self._steps.start} to {self._steps.stop - 1} are traced: {self._folder}", flush=True)

    def _write_flops(self, step: int, counted: int) -> None:
        turn = self._samples.config.turn(step)
        size = self._samples.budgets[turn]
        shape = Shape(
            batch=self._num_windows,
            sources=size.num_sources,
            tokens=size.num_inputs,
            frames=size.num_frames,
            context_s=turn.context_s,
        )
        formula = sum(training_flops(self._samples.model, shape).values())
        self._folder.mkdir(exist_ok=True)
        found = {"step": step, "counted": counted, "formula": formula, "share": counted / formula}
        (self._folder / "flops.json").write_text(json.dumps(found, indent=1))
        print(
            f"step {step}: {counted / 1e9:,.2f} GFLOP counted on this rank, {formula / 1e9:,.2f} by formula", flush=True
        )
