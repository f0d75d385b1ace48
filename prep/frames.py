"""Where the pixels of a stimulus lie in a store, and how they are written while they are first looked at.

In: frames, in order. Out: whole shards in a partial folder. What names them is their digest, which is known when all
have been seen: frames that are written as they pass by need not be decoded a second time.
"""

import contextlib
import math
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.disk import written_together
from prep.parts import has_part, write_part
from prep.plan import PlannedStimulus
from prep.shards import RowsSpec, rows_spec, write_shard
from prep.store import SHARD_BYTES

Pixels = npt.NDArray[np.uint8]

STIMULI = "stimuli"
PARTIAL = ".partial.zarr"
FRAME_CHUNK_BYTES = 2**20
SEEN = "seen"  # the part of a stimulus that was written while it was looked at
_PLACE: ContextVar[tuple[Path, str] | None] = ContextVar("store and run to which frames may be written", default=None)


def partial_folder(folder: Path, run: str) -> Path:
    """The folder in which `run` writes what becomes `folder`."""
    return folder.with_name(f".{folder.name.removesuffix('.zarr')}.{run}{PARTIAL}")


def stimulus_folder(root: Path, digest: str) -> Path:
    """Where a stimulus' pixels lie."""
    return root / STIMULI / f"{digest}.zarr"


def stimulus_rows(shape: Sequence[int]) -> RowsSpec:
    """The layout of frames (F, H, W[, C]): chunks of about 1 MiB, shards of about 32."""
    frames, *size = shape
    chunk = max(1, min(frames, FRAME_CHUNK_BYTES // max(1, math.prod(size))))
    chunks = max(1, min(SHARD_BYTES // max(1, chunk * math.prod(size)), math.ceil(frames / chunk)))
    return RowsSpec(shape=tuple(shape), dtype="uint8", fill=0, chunk_rows=chunk, shard_rows=chunk * chunks, codec="raw")


def num_stimulus_shards(stimulus: PlannedStimulus) -> int:
    """Shards along the frame axis."""
    return math.ceil(stimulus.shape[0] / stimulus_rows(stimulus.shape).shard_rows)


def write_frames(partial: Path, rows: RowsSpec, shard: int, frames: Pixels) -> None:
    """Write one whole shard of frames, and the part that tells of it."""
    files = write_shard(partial / "frames", rows, shard, frames)
    write_part(partial, str(shard), {f"frames/{name}": entry for name, entry in files.items()}, {})


def was_seen(partial: Path) -> bool:
    """Whether all shards of a stimulus were written while it was looked at."""
    return has_part(partial, SEEN)


# ---------------------------------------------------------------- while they are looked at


@contextlib.contextmanager
def writing_what_is_seen(root: Path, run: str) -> Iterator[None]:
    """While the block runs, frames that are looked at are also written to the store at `root`, unsealed."""
    token = _PLACE.set((root, run))
    try:
        yield
    finally:
        _PLACE.reset(token)


def seen_frames(most: int, size: tuple[int, ...]) -> "SeenFrames | None":
    """What writes up to `most` frames of one size; None where none are asked for, or the store may have them."""
    place = _PLACE.get()
    if place is None:
        return None
    root, run = place
    others = (root / STIMULI).glob("*.zarr/frames/zarr.json")
    return (
        None if any(rows_spec(meta.parent).shape[1:] == size for meta in others) else SeenFrames(root, run, most, size)
    )


class SeenFrames:
    """Writes distinct frames as they come, shard by shard; a disk that fails only means that they are written later."""

    def __init__(self, root: Path, run: str, most: int, size: tuple[int, ...]) -> None:
        self.root, self.run, self.size = root, run, size
        self.partial = partial_folder(root / STIMULI / f"seen-{uuid.uuid4().hex}.zarr", run)
        self.rows = stimulus_rows((most, *size))  # of all shards but the last: so far there are more frames than in one
        self.held = np.empty((self.rows.shard_rows, *size), np.uint8)
        self.num_held = self.num_shards = 0
        self.is_lost = False

    def add(self, frame: Pixels) -> None:
        """One more frame (H, W[, C])."""
        if self.num_held == len(self.held):
            self._try(self._write, self.rows)
            self.num_held = 0
        self.held[self.num_held] = frame
        self.num_held += 1

    def close(self, digest: str, num_frames: int) -> None:
        """All frames have come: put them where the stimulus of this digest is being written, if it is nowhere yet."""
        self._try(self._publish, digest, stimulus_rows((num_frames, *self.size)))
        shutil.rmtree(self.partial, ignore_errors=True)

    def _write(self, rows: RowsSpec) -> None:
        with written_together():
            write_frames(self.partial, rows, self.num_shards, self.held[: self.num_held])
        self.num_shards += 1

    def _publish(self, digest: str, rows: RowsSpec) -> None:
        self._write(rows)
        write_part(self.partial, SEEN, {}, {})
        folder = stimulus_folder(self.root, digest)
        if not folder.is_dir():
            self.partial.rename(partial_folder(folder, self.run))  # which fails where others are writing it

    def _try(self, step: Any, *args: Any) -> None:
        try:
            if not self.is_lost:
                step(*args)
        except OSError:  # the disk is full, or others were quicker: whoever needs the frames writes them, and says so
            self.is_lost = True
