"""What a run writes about itself: metrics.jsonl, validation.jsonl, boards, a line on the terminal; and scores.

In: numbers of a step; recorded and predicted values. Out: rows that anyone can read again.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from train.boards import open_boards
from train.config import RunConfig
from train.modalities import COUNTED

Array = npt.NDArray[Any]
Row = dict[str, Any]
METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"


class MetricsLog:
    """One row per step, and one per validation; only rank 0 has one."""

    def __init__(self, run_dir: Path, run: RunConfig, first_step: int) -> None:
        """A resumed run repeats the steps after its checkpoint: their old rows go."""
        self._first, self._num_steps, self._log_every = first_step, run.train.num_steps, run.log_every
        self._boards = open_boards(run_dir, run, first_step)
        kept = keep_rows(run_dir / METRICS, first_step - 1)
        keep_rows(run_dir / VALIDATION, first_step)  # after that many steps
        self._unit_hours = float(kept[-1].get("unit_hours", 0.0)) if kept else 0.0  # older runs did not count
        self._steps = open(run_dir / METRICS, "a")  # noqa: SIM115  open as long as the run
        self._validations = open(run_dir / VALIDATION, "a")  # noqa: SIM115  likewise
        self._began_s = time.perf_counter()

    def write(self, row: Row) -> None:
        """Add a step's row, its unit-hours to those before; a line on the terminal every `log_every` steps."""
        self._unit_hours += row["unit_hours"]
        row = {**row, "unit_hours": self._unit_hours, "unix_s": time.time()}
        _append(self._steps, row)
        numbers = {name: value for name, value in row.items() if name not in ("step", "family", "unix_s")}
        for board in self._boards:
            board.write(row["step"], numbers)
        done = row["step"] + 1
        if done % self._log_every == 0 or done == self._num_steps:
            left_s = (time.perf_counter() - self._began_s) / (done - self._first) * (self._num_steps - done)
            nats = " ".join(f"{k[5:]} {v:+.4f}" for k, v in row.items() if k.startswith("nats_"))
            print(
                f"step {done}/{self._num_steps}  {row['family']:<12} loss {row['loss']:+.4f}  {nats}  "
                f"{row['tokens_per_s']:,.0f} tokens/s  wait {row['data_wait_share']:.1%}  {left_s:.0f} s left",
                flush=True,
            )

    def write_validation(self, row: Row) -> None:
        """Add the scores of a validation; one number per task on the terminal."""
        _append(self._validations, row)
        whole = {task_name(score): score["deviance_explained"] for score in row["scores"] if score["of"] == "all"}
        for board in self._boards:
            board.write(row["step"], {f"valid/{name}": value for name, value in whole.items() if value is not None})
        told = ", ".join(f"{name} {value:.3f}" for name, value in whole.items() if value is not None)
        print(f"step {row['step']}: deviance explained of the valid split: {told} ({row['seconds']:.1f} s)", flush=True)

    def close(self) -> None:
        """Flush and close."""
        self._steps.close()
        self._validations.close()
        for board in self._boards:
            board.close()


def _append(file: Any, row: Row) -> None:
    file.write(line_of(row))
    file.flush()


def line_of(row: Row) -> str:
    """A row as a line of JSON, which has no NaN and no infinity: null."""
    return json.dumps(_finite(row)) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def step_row(line: str | bytes) -> Row:
    """The row of a step that a line tells; null is a number that was not finite."""
    return {name: math.nan if value is None else value for name, value in json.loads(line).items()}


def task_name(score: Row) -> str:
    """A task in words: `spikes encoding from behavior + stimulus`."""
    return f"{score['modality']} {score['task'].replace('_', '-')} from {' + '.join(score['visible'])}"


def keep_rows(path: Path, last_step: int) -> list[Row]:
    """Take the rows after a step out of a file; those that are left."""
    rows = [row for row in read_rows(path) if row["step"] <= last_step]
    if path.exists():
        whole = path.with_suffix(".partial")
        whole.write_text("".join(map(line_of, rows)))
        whole.replace(path)
    return rows


def read_rows(path: Path, parse: Callable[[str], Row] = json.loads) -> list[Row]:
    """The rows of a file that may be growing; a last line without its end is not one yet. None where no file is."""
    text = path.read_text() if path.exists() else ""
    return [parse(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_metrics(run_dir: Path) -> list[Row]:
    """A row per step."""
    return read_rows(run_dir / METRICS, step_row)


def deviances(modality: str, truth: Array, expected: Array) -> npt.NDArray[np.float64]:
    """What each value (n,) adds to the deviance.

    Counts: 2 (k log(k / rate) - (k - rate)) of Poisson (McCullagh & Nelder 1989). Others: the squared error.
    """
    truth, expected = truth.astype(np.float64), expected.astype(np.float64)
    if modality not in COUNTED:
        squares: npt.NDArray[np.float64] = (truth - expected) ** 2
        return squares
    expected = np.maximum(expected, 1e-9)
    ratio = np.where(truth > 0, truth / expected, 1.0)
    return np.asarray(2 * (truth * np.log(ratio) - (truth - expected)))


def share_explained(deviance: float, null_deviance: float) -> float:
    """1 - deviance / null deviance; NaN where the null has none."""
    return 1 - deviance / null_deviance if null_deviance > 0 else float("nan")


def deviance_explained(modality: str, truth: Array, prediction: Array, null: Array) -> float:
    """Of values (n,): D2 for counts, R2 over the train mean for others; NaN where the null has no deviance."""
    return share_explained(
        float(deviances(modality, truth, prediction).sum()), float(deviances(modality, truth, null).sum())
    )
