"""What a run folder says of its run, for those who look: settings, rows, checkpoints, incidents.

In: a folder, of a run that is over, goes on, or has only begun. Out: plain data. Nothing is changed.
"""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prep.settings import ConfigError
from train import config
from train.incident_log import INCIDENTS
from train.metrics import METRICS, VALIDATION, Row, step_row, task_name

PHASES = ("data_wait", "forward", "backward", "communication", "optimizer", "other")


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it lies there; without a seal nothing loads it."""

    step: int
    num_bytes: int
    unix_s: float
    is_sealed: bool


@dataclass
class Growing:
    """The rows of a file to which a run adds; each call reads what is new."""

    path: Path
    parse: Callable[[bytes], Row] = json.loads
    _rows: list[Row] = field(default_factory=list)
    _file: int = 0  # inode: a resumed run puts another file there
    _offset: int = 0

    def rows(self) -> list[Row]:
        """All rows so far; a line that is not whole yet is none."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._file or status.st_size < self._offset:
                self._rows, self._file, self._offset = [], status.st_ino, 0
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._rows += [self.parse(line) for line in whole.splitlines()]
        return self._rows


def sealed_step(run_dir: Path) -> int:
    """The step of the newest checkpoint that has a seal; 0 where there is none."""
    seals = (run_dir / "checkpoints").glob("step-*/manifest.json")
    return max((int(seal.parent.name.split("-")[1]) for seal in seals), default=0)


class RunFolder:
    """A run, seen from outside."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where no run has been prepared."""
        self.path = path
        if not (path / "config.yaml").exists():
            raise ConfigError(f"{path} is no run folder: it has no config.yaml. Give the OUT of a `make train`.")
        self.run = config.load(path / "config.yaml")
        self._files = [Growing(path / METRICS, step_row), Growing(path / VALIDATION), Growing(path / INCIDENTS)]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def steps(self) -> list[Row]:
        """A row per step."""
        return self._files[0].rows()

    @property
    def validations(self) -> list[Row]:
        """A row per validation."""
        return self._files[1].rows()

    @property
    def incidents(self) -> list[Row]:
        """What went wrong: the step, what it was, and more."""
        return self._files[2].rows()

    def beats(self) -> list[Row]:
        """What each rank is doing, as its heart says; a beat that is being written is left out."""
        found = []
        for path in sorted((self.path / "logs").glob("rank-*.beat")):
            with contextlib.suppress(OSError, ValueError):  # being written, or its rank has ended
                found.append({**json.loads(path.read_text()), "unix_s": path.stat().st_mtime})
        return found

    @property
    def num_done(self) -> int:
        """Steps that were done."""
        steps = self.steps
        return int(steps[-1]["step"]) + 1 if steps else 0

    def environment(self) -> dict[str, Any]:
        """Versions, ranks, parameters; empty before the first rank has begun."""
        return self._json("environment.json")

    def store(self) -> str:
        """Where the store is."""
        return str(self._json("run.json").get("store", ""))

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return content

    def checkpoints(self) -> list[Saved]:
        """From the oldest to the newest; one that is pruned while we look is left out."""
        found = []
        for folder in sorted((self.path / "checkpoints").glob("step-*")):
            try:
                sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
                when = folder.stat().st_mtime
            except FileNotFoundError:  # pruned just now
                continue
            sealed = (folder / "manifest.json").exists()
            found.append(Saved(int(folder.name.split("-")[1]), sum(sizes), when, sealed))
        return found


def incident_details(incident: Row) -> str:
    """All that an incident's row says beside step and kind, in words; of many windows their number."""
    told = {name: value for name, value in incident.items() if name not in ("step", "what", "unix_s")}
    return ", ".join(
        f"{len(value)} {name}"
        if isinstance(value, list) and value and isinstance(value[0], dict)
        else f"{name} {value}"
        for name, value in told.items()
    )


def phase_shares(rows: list[Row]) -> dict[str, float]:
    """Of the time of some steps, what went into each phase, and into none."""
    total_s = sum(row["seconds"] for row in rows)
    named = [name for name in PHASES if f"{name}_s" in rows[-1]]
    shares = {name: sum(row.get(f"{name}_s", 0.0) for row in rows) / total_s for name in named}
    return {**shares, "other": max(0.0, 1 - sum(shares.values()))}


def task_curves(validations: list[Row]) -> dict[str, list[float | None]]:
    """Scores of each task as a whole, one for each validation."""
    by_task: dict[str, list[float | None]] = {}
    for row in validations:
        for score in row["scores"]:
            if score["of"] == "all":
                by_task.setdefault(task_name(score), []).append(score["deviance_explained"])
    return by_task


def duration(seconds: float) -> str:
    """`12 s`, `5 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes = int(seconds // 60)
    if minutes < 2:
        return f"{max(0.0, seconds):.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size(num_bytes: float) -> str:
    """`12.3 MB`."""
    text = short(num_bytes)
    return f"{text}B" if " " in text else f"{text} B"


def short(number: float) -> str:
    """`4.1 k`, `1.15 G`; a small number as it is."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}".rstrip()
        number /= 1000
    return f"{number:,.3g} P"


def counted(number: int, word: str) -> str:
    """`1 rank`, `64 ranks`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"
