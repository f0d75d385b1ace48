"""Saving beside the training, which waits only while the state is copied to the host's memory.

In: an engine at a step, on every rank. Out: a sealed checkpoint, written by a thread of each rank.

The threads meet in the folder and not in a collective, which would run into those of the training: each rank leaves
`rank-00003.done` with sizes and digests once its files are on disk, and rank 0 seals when all have.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from train import checkpoint, table_files
from train.checkpoint import CheckpointError, Files
from train.config import RunConfig
from train.engine import Engine

LOOK_EVERY_S = 0.02


class Saver:
    """Checkpoints of one run, one at a time; every rank has one."""

    def __init__(self, root: Path, config: RunConfig) -> None:
        self.root, self._config = root, config
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self._host: dict[str, Tensor] = {}  # one copy of this rank's state, used again by every save
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        if self._rank == 0:
            clear_unsealed(root)

    def save(self, engine: Engine, step: int, state: dict[str, Any]) -> None:
        """Begin a checkpoint of what is there now; the one before is finished first."""
        began_s = time.perf_counter()
        self.wait()
        full_step, saved_in = table_files.full_save(engine.table), engine.table.saved_in
        files = checkpoint.files_of(engine, {**state, "step": step}, full_step, self._to_host)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stalled_s = time.perf_counter() - began_s
        link = partial(table_files.link_full_save, saved_in and saved_in[0], full_step)
        self._writer = threading.Thread(target=self._write, args=(files, step, link, stalled_s), daemon=True)
        self._writer.start()
        engine.table.saved_in = self.root / f"step-{step:08d}", step  # by the time of the next save

    def check(self) -> None:
        """Raise what went wrong in the background; between steps.

        Raises:
            CheckpointError: a file could not be written.
        """
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Until the last checkpoint is written; on rank 0, until it is sealed."""
        if self._writer is not None:
            self._writer.join()
        self.check()

    def _to_host(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._host or self._host[name].shape != tensor.shape:
            self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self._host[name].copy_(tensor, non_blocking=True)

    def _write(self, files: Files, step: int, link: Callable[[Path], dict[str, Any]], stalled_s: float) -> None:
        began_s = time.perf_counter()
        folder = self.root / f".step-{step:08d}.partial"
        try:
            write_files(folder, files, f"rank-{self._rank:05d}.done")
            if self._rank == 0:
                publish(folder, step, collect(folder, self._num_ranks) | link(folder))
                checkpoint.prune(self.root, self._config.keep_checkpoints, self._config.keep_every)
                seconds = time.perf_counter() - began_s
                print(f"saved step {step}: training waited {stalled_s:.3f} s, written in {seconds:.1f} s", flush=True)
        except BaseException as error:  # raised again in the training's own thread
            self._error = error


def clear_unsealed(root: Path) -> None:
    """Remove what earlier runs began to write and never sealed."""
    for folder in root.glob(".step-*.partial"):
        shutil.rmtree(folder)


def write_files(folder: Path, files: Files, done: str) -> None:
    """Write a rank's files, have them on disk for good, then say so in the file `done`.

    Raises:
        CheckpointError: the disk is full or gone; the message names the file.
    """
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = {}
        for name, content in files.items():
            path = folder / name
            path.write_text(content) if isinstance(content, str) else save_file(content, path)
            entries[name] = checkpoint.entry_of(path)
        path = folder / done
        temporary = path.with_suffix(".writing")
        temporary.write_text(json.dumps(entries))
        checkpoint.sync(temporary)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}. Nothing of this checkpoint is used. Make room, or mend the disk; "
            "then the same command goes on from the newest sealed one."
        ) from error


def collect(folder: Path, num_ranks: int) -> dict[str, Any]:
    """Wait for all ranks, and return what they say of their files.

    No limit of time: a rank that cannot write ends the run, and with it this thread. Each rank by its name: one of an
    earlier launch, on a host that was frozen and goes on, may still write here.
    """
    done = [folder / f"rank-{rank:05d}.done" for rank in range(num_ranks)]
    while not all(path.exists() for path in done):
        time.sleep(LOOK_EVERY_S)
    entries = {}
    for path in done:
        entries.update(json.loads(path.read_text()))
        path.unlink()
    return entries


def publish(folder: Path, step: int, entries: dict[str, Any]) -> None:
    """Seal a folder, and give it its name."""
    final = folder.parent / f"step-{step:08d}"
    checkpoint.seal(folder, step, entries)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    checkpoint.sync(folder.parent)
