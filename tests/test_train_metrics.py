"""What a run writes about itself is whole after a resume, and the same on every board.

In: made-up rows. Out: metrics.jsonl, validation.jsonl, event files, what a stand-in of wandb was told.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_builders import tiny_run

from train.config import ConfigError, RunConfig
from train.metrics import METRICS, VALIDATION, MetricsLog, keep_rows, read_metrics, read_rows, step_row
from train.run_folder import Growing

RUN = replace(tiny_run(num_steps=8), log_every=4)


def row(step: int) -> dict[str, Any]:
    """What the loop gives for a step."""
    numbers = {"loss": 0.5 - step / 10, "tokens_per_s": 0.0, "data_wait_share": 0.0, "unit_hours": 0.25}
    return {"step": step, "family": "encoding", "nats_spikes": -0.25, **numbers}


def validation(step: int, explained: float | None = 0.125) -> dict[str, Any]:
    """What a validation gives after so many steps."""
    score = {"modality": "spikes", "task": "co_smoothing", "visible": ["spikes"], "deviance_explained": explained}
    scores = [{**score, "of": "all", "name": ""}, {**score, "of": "region", "name": "VISp"}]
    return {"step": step, "seconds": 0.5, "scores": scores}


def write(run_dir: Path, run: RunConfig, first: int, last: int) -> None:
    """Steps [first, last) of a run, each followed by a validation."""
    log = MetricsLog(run_dir, run, first)
    for step in range(first, last):
        log.write(row(step))
        log.write_validation(validation(step + 1))
    log.close()


def test_steps_that_are_repeated_are_written_once_and_unit_hours_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, RUN, 0, 6)
    write(tmp_path, RUN, 3, 8)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["unit_hours"] for row in rows] == [0.25 * (step + 1) for step in range(8)]
    assert [row["step"] for row in read_rows(tmp_path / VALIDATION)] == list(range(1, 9))
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert lines == ["step 4/8", "step 4/8", "step 8/8"]


def test_a_validation_is_one_line_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, RUN, 0)
    log.write_validation(validation(5))
    log.write_validation(validation(6, None))
    log.close()
    assert capsys.readouterr().out.splitlines()[0] == (
        "step 5: deviance explained of the valid split: spikes co-smoothing from spikes 0.125 (0.5 s)"
    )


def test_a_row_that_a_crash_cut_off_does_not_stop_a_resume(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
    MetricsLog(tmp_path, RUN, 1).close()
    assert read_metrics(tmp_path) == [{"step": 0}]


def test_what_is_not_finite_is_null_for_any_reader_of_json_and_nan_for_ours(tmp_path: Path) -> None:
    for part in (range(2), range(1, 3)):  # the second begins with what the first has kept
        log = MetricsLog(tmp_path, RUN, part[0])
        for step in part:
            log.write({**row(step), "loss": math.nan if step == 0 else math.inf})
        log.write_validation(validation(part[-1] + 1, math.nan))
        log.close()
    for line in ((tmp_path / METRICS).read_text() + (tmp_path / VALIDATION).read_text()).splitlines():
        json.loads(line, parse_constant=pytest.fail)
    rows = read_metrics(tmp_path)
    assert [each["step"] for each in rows] == [0, 1, 2] and all(math.isnan(each["loss"]) for each in rows)
    assert read_rows(tmp_path / VALIDATION)[-1]["scores"][0]["deviance_explained"] is None
    growing = Growing(tmp_path / METRICS, step_row)
    assert [math.isnan(each["loss"]) for each in growing.rows()] == [True] * 3


def test_rows_are_kept_to_the_last_digit(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text("".join(json.dumps({"step": i, "loss": 0.1 * i}) + "\n" for i in range(9)))
    before = (tmp_path / METRICS).read_text().splitlines()
    assert len(keep_rows(tmp_path / METRICS, 4)) == 5
    assert (tmp_path / METRICS).read_text().splitlines() == before[:5]
    assert keep_rows(tmp_path / "absent.jsonl", 4) == [] and not (tmp_path / "absent.jsonl").exists()


def test_tensorboard_has_the_numbers_of_the_rows(tmp_path: Path) -> None:
    write(tmp_path, RUN, 0, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([0.5, 0.4, 0.3])
    assert [event.step for event in events.Scalars("valid/spikes co-smoothing from spikes")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("unit_hours")] == [0.25, 0.5, 0.75]


class FakeWandb(SimpleNamespace):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__(begun=[], told=[], num_finished=0)

    def init(self, **settings: Any) -> "FakeWandb":
        self.begun.append(settings)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.told.append((step, numbers))

    def finish(self) -> None:
        self.num_finished += 1


def test_wandb_is_told_the_same_and_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = replace(RUN, log_to=("wandb",))
    write(tmp_path, run, 0, 2)
    write(tmp_path, run, 1, 3)
    first, second = fake.begun
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["config"]["seed"] == run.seed
    assert [step for step, numbers in fake.told if "loss" in numbers] == [0, 1, 1, 2]
    assert fake.told[0][1]["loss"] == 0.5 and fake.num_finished == 2
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log_to names wandb, and the package wandb is not installed\. Install it"):
        MetricsLog(tmp_path, replace(RUN, log_to=("tensorboard", "wandb")), 0)
