"""What a run writes about itself: metrics.jsonl, TensorBoard, a line on the terminal; and scores of predictions.

In: numbers of a step; recorded and predicted values. Out: rows that anyone can read again.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.tensorboard import SummaryWriter

Array = npt.NDArray[Any]


class MetricsLog:
    """One row per step; only rank 0 has one."""

    def __init__(self, run_dir: Path, first_step: int, num_steps: int, log_every: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._keep_before(first_step)
        self._file = open(self._path, "a")  # noqa: SIM115  open as long as the run
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
        self._first, self._num_steps, self._log_every = first_step, num_steps, log_every
        self._began_s = time.perf_counter()

    def _keep_before(self, step: int) -> None:
        """A resumed run repeats the steps after its checkpoint: their old rows go."""
        if self._path.exists():
            text = self._path.read_text()
            whole = text[: text.rfind("\n") + 1]  # a row that a crash cut off is repeated anyway
            rows = [line for line in whole.splitlines() if json.loads(line)["step"] < step]
            self._path.write_text("".join(line + "\n" for line in rows))

    def write(self, row: dict[str, Any]) -> None:
        """Add a step's row; a line on the terminal every `log_every` steps."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for key, value in row.items():
            if isinstance(value, float):
                self._board.add_scalar(key, value, row["step"])
        done = row["step"] + 1
        if done % self._log_every == 0 or done == self._num_steps:
            left_s = (time.perf_counter() - self._began_s) / (done - self._first) * (self._num_steps - done)
            nats = " ".join(f"{k[5:]} {v:+.4f}" for k, v in row.items() if k.startswith("nats_"))
            print(
                f"step {done}/{self._num_steps}  {row['family']:<12} loss {row['loss']:+.4f}  {nats}  "
                f"{row['tokens_per_s']:,.0f} tokens/s  wait {row['data_wait_share']:.1%}  {left_s:.0f} s left",
                flush=True,
            )

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def poisson_deviance(counts: Array, rates: Array) -> float:
    """2 sum k log(k / rate) - (k - rate) over (n,) counts and expected counts (McCullagh & Nelder 1989)."""
    counts, rates = counts.astype(np.float64), np.maximum(rates.astype(np.float64), 1e-9)
    ratio = np.where(counts > 0, counts / rates, 1.0)
    return float(2 * (counts * np.log(ratio) - (counts - rates)).sum())


def squared_error(values: Array, means: Array) -> float:
    """Sum of squares over (n,)."""
    return float(((values.astype(np.float64) - means.astype(np.float64)) ** 2).sum())


def deviance_explained(modality: str, truth: Array, prediction: Array, null: Array) -> float:
    """1 - deviance / null deviance: D2 for counts, R2 over the train mean for values; NaN where the null has none."""
    deviance = poisson_deviance if modality == "spikes" else squared_error
    null_deviance = deviance(truth, null)
    return 1 - deviance(truth, prediction) / null_deviance if null_deviance > 0 else float("nan")
