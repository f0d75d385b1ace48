"""Run folders as training leaves them, made by hand: rows of steps and validations, a beat, incidents.

In: a folder, numbers of steps. Out: files that `watch` and `report` read.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from train.config import RunConfig
from train.incident_log import INCIDENTS
from train.metrics import MetricsLog

HOSTILE = "<img src=x onerror=alert(1)> & Co"
TASKS = (
    ("spikes", "encoding", ["behavior", "stimulus"]),
    ("spikes", "co_smoothing", ["spikes"]),
    ("behavior", "decoding", ["spikes"]),
)
ENVIRONMENT = {"torch": "2.13.0", "world_size": 2, "num_parameters_core": 139_938, "num_parameters_units": 400}


def step_row(step: int, families: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """A step, its time split into halves of a half."""
    chance = np.random.default_rng(step)
    return {
        "step": step,
        "family": families[step % len(families)],
        "loss": float(2 / (1 + step) + 0.1 * chance.random()),
        "lr": 1e-3,
        "gradient_norm": float(1 + chance.random()),
        "tokens_per_s": 1000.0 + step,
        "unit_hours": 0.5,
        "flops": 2e9,
        "seconds": 2.0,
        **dict(zip(("data_wait_s", "forward_s", "backward_s"), (0.25, 0.5, 1.0), strict=True)),
        **dict(zip(("communication_s", "optimizer_s"), (0.125, 0.0625), strict=True)),
        "data_wait_share": 0.125,
        "peak_memory_bytes": 700_000_000 + step,
        "nats_spikes": float(-0.01 * step + 0.01 * chance.random()),
        **more,
    }


def scores(step: int, sessions: list[str], regions: list[str]) -> list[dict[str, Any]]:
    """Scores of a validation that get better with the steps; of a name, the worse the later it stands."""
    rows = []
    for modality, task, visible in TASKS:
        for of, names in (("all", [""]), ("session", sessions), ("region", regions)):
            for place, name in enumerate(names):
                explained = 0.5 - 1 / (1 + step) - 0.02 * place
                row = {"modality": modality, "task": task, "visible": visible, "of": of, "name": name}
                if of != "region" or modality != "behavior":
                    rows.append({**row, "deviance_explained": explained, "num_values": 1000 + place})
    return rows


def write_steps(run_dir: Path, run: RunConfig, num_steps: int, num_sessions: int = 3, **more: Any) -> None:
    """Steps [0, num_steps), a validation after each fifth, and what the first rank writes about its surroundings."""
    sessions = [f"d1/s{number:02}" for number in range(num_sessions)]
    log = MetricsLog(run_dir, run, 0)
    for step in range(num_steps):
        log.write(step_row(step, run.train.families, **more))
        if (step + 1) % 5 == 0:
            found = scores(step + 1, sessions, ["VISp", HOSTILE])
            log.write_validation({"step": step + 1, "num_windows": 6, "scores": found, "seconds": 0.5})
    log.close()
    (run_dir / "environment.json").write_text(json.dumps(ENVIRONMENT))


def write_incidents(run_dir: Path) -> None:
    """A step that was skipped, with a message that wants to be more than text."""
    windows = [{"position": 8, "session": "d1/full"}, {"position": 9, "session": "d1/blind"}]
    rows = [
        {"step": 3, "what": "skipped", "loss": None, "windows": windows, "unix_s": 0.0},
        {"step": 4, "what": "window skipped", "message": HOSTILE, "unix_s": 0.0},
    ]
    (run_dir / INCIDENTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
