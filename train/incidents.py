"""What goes wrong in a run and does not end it: windows and steps that are skipped, spikes that are undone.

In: what a step found, on every rank. Out: rows of incidents.jsonl, which nothing removes: rank 0's, and any rank's of
windows that it could not read; a TrainingError once too many steps in a row were skipped.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train import incident_log
from train.loader import Skipped, TrainingSamples
from train.loss_watch import LossWatch
from train.metrics import line_of
from train.modalities import PREDICTED


class TrainingError(ValueError):
    """A run that cannot go on; the message says since when, and where to look."""


class Incidents:
    """Every rank has one, and all of them are told the same."""

    def __init__(self, run_dir: Path, samples: TrainingSamples) -> None:
        self._path, self._samples, self._run = run_dir / incident_log.INCIDENTS, samples, samples.config
        self._num_skipped = 0  # steps, one after the other
        self._watch = LossWatch(self._run.faults)

    def note_skipped(self, step: int, skipped: list[Skipped]) -> None:
        """Say which windows of a step could not be read on this rank, and forget them."""
        for one in skipped:
            print(one, flush=True)
            self._append({"step": step, "what": "window skipped", **asdict(one)})
        skipped.clear()

    def judge(self, step: int, moved: bool, loss: float, windows: Tensor) -> int | None:
        """What became of a step: whether it moved anything, the loss of all ranks, this rank's windows (2, W, M).

        Returns the step with which a spike began that is to be undone. Raises TrainingError if too many were skipped.
        """
        if moved:
            self._num_skipped = 0
            return self._watch.spike(step, self._run.turn(step), loss)
        self._num_skipped += 1
        self._write({"step": step, "what": "skipped", "loss": loss, "windows": self._named(step, windows)})
        if self._num_skipped == self._run.faults.max_bad_steps:
            raise TrainingError(
                f"{self._num_skipped} steps in a row, up to step {step}, had a loss or a gradient that is not finite. "
                f"Their windows are in {self._path}. Look at these recordings (make report), lower train.lr, or remove "
                "the newest checkpoints to go on from an earlier one."
            )
        return None

    def _named(self, step: int, windows: Tensor) -> list[dict[str, Any]]:
        """The windows whose loss is not finite, of all ranks; all windows where each loss by itself is."""
        parts = [torch.empty_like(windows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, windows)
        nats, values = torch.cat(parts, dim=1).cpu()
        bad = ~nats.isfinite().all(1)
        first = step * self._run.train.global_batch_size
        return [self._window(first + n, nats[n], values[n]) for n in range(len(nats)) if bad[n] or not bad.any()]

    def rewound(self, step: int, begun: int, to_step: int | None) -> None:
        """A spike of steps `begun` to `step` was undone by the checkpoint of `to_step`, if there was one that old."""
        size = self._run.train.global_batch_size
        positions = [begun * size, (step + 1) * size]
        self._write({"step": step, "what": "spike", "begun": begun, "positions": positions, "back_to_step": to_step})

    def _window(self, position: int, nats: Tensor, values: Tensor) -> dict[str, Any]:
        session, start_s = self._samples.window_at(position)
        by_modality = zip(PREDICTED, (nats / values).tolist(), values.tolist(), strict=True)
        losses = {name: loss for name, loss, count in by_modality if count}
        return {"position": position, "session": session, "start_s": start_s, "nats": losses}

    def _write(self, row: dict[str, Any]) -> None:
        if dist.get_rank() != 0:
            return
        self._append(row)
        told = {name: value for name, value in row.items() if name != "windows"}
        print(f"incident: {line_of(told).rstrip()} (more in {self._path})", flush=True)

    def _append(self, row: dict[str, Any]) -> None:
        incident_log.append(self._path.parent, row)
