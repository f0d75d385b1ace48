"""Where curves are shown: TensorBoard, Weights & Biases.

In: numbers of a step, by name. Out: event files in the run folder; curves on a server.
"""

import importlib
import uuid
from pathlib import Path
from typing import Any, Protocol

from prep.settings import ConfigError
from train.config import RunConfig

Numbers = dict[str, float]


class Board(Protocol):
    """Takes numbers of steps."""

    def write(self, step: int, numbers: Numbers) -> None:
        """Add the numbers of a step."""

    def close(self) -> None:
        """No more will come."""


class TensorBoard:
    """Event files in `tensorboard/`; what an interrupted run wrote after its checkpoint is hidden."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second: only for whoever writes

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, step: int, numbers: Numbers) -> None:
        """Add the numbers of a step."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, which goes on when ours is resumed; project and key come from its own environment."""

    def __init__(self, run_dir: Path, run: RunConfig) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                "log_to names wandb, and the package wandb is not installed. "
                "Install it (`.venv/bin/pip install wandb`), or take it out of log_to."
            ) from error
        path = run_dir / "wandb_id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            id=path.read_text(), name=run_dir.name, dir=str(run_dir), resume="allow", config=run.as_dict()
        )

    def write(self, step: int, numbers: Numbers) -> None:
        """Add the numbers of a step."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


def open_boards(run_dir: Path, run: RunConfig, first_step: int) -> list[Board]:
    """Those that `log_to` names."""
    boards: list[Board] = [Wandb(run_dir, run)] if "wandb" in run.log_to else []  # first: it may not be installed
    return [*boards, TensorBoard(run_dir, first_step)] if "tensorboard" in run.log_to else boards
