"""Shards that are mapped into memory, bounded by the limit of open files, and what has been checked in them.

In: open files. Out: arrays that point into them. Each mapping costs a process one open file until the last array into
it is gone; the longest unused are let go first, and an array that is still held stays good.
"""

import itertools
import mmap
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Key = tuple[int, str, int]  # reader, array, shard
MOST = 16_384  # a quarter of the mappings that Linux grants a process

_NUMBERS = itertools.count()


@dataclass(slots=True)
class Mapped:
    """One shard in memory."""

    data: npt.NDArray[np.uint8]  # the whole file
    rows: Array | None  # of raw chunks: (n, ...) rows, pointing into `data`
    places: list[slice]  # of each chunk in `data`
    digests: list[int]  # crc32c of each chunk
    checked: bytearray  # one byte for each chunk: 1 once it was found to be whole
    is_kept: bool = True  # False: mapped for one read, because arrays that are held elsewhere use up the limit


class Checked:
    """Which chunks one reader has checked; outlives the sessions that it closes and the shards that it lets go."""

    def __init__(self) -> None:
        self.number = next(_NUMBERS)
        self.chunks: dict[tuple[str, int], bytearray] = {}
        weakref.finalize(self, MAPPINGS.drop, self.number).atexit = False

    def __reduce__(self) -> tuple[type["Checked"], tuple[()]]:
        return Checked, ()  # another process checks for itself


class Mappings:
    """All mapped shards of this process, the longest unused first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, Mapped] = OrderedDict()
        self._alive: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # let go, but still held by an array, too
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Mappings that are open, each with its file."""
        return len(self._alive)

    def get(self, key: Key) -> Mapped | None:
        """A shard that is mapped already."""
        found = self._kept.get(key)
        if found is not None:
            try:  # noqa: SIM105 (suppress takes longer than all else here)
                self._kept.move_to_end(key)
            except KeyError:  # let go by another thread just now; what is held here stays good
                pass
        return found

    def add(self, key: Key, file: BinaryIO, read: Callable[[Array], Mapped]) -> Mapped:
        """Map a file; `read` makes a shard of its bytes, or raises."""
        with self._lock:
            while self._kept and len(self._alive) >= most_mappings():
                self._kept.popitem(last=False)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._alive.add(mapping)
            mapped = read(np.frombuffer(mapping, np.uint8))
            mapped.is_kept = len(self._alive) <= most_mappings()
            if mapped.is_kept:
                self._kept[key] = mapped
            return mapped

    def drop(self, reader: int, name: str | None = None) -> None:
        """Let go what a reader has mapped: all, or the shards of one array."""
        with self._lock:
            for key in [key for key in self._kept if key[0] == reader and name in (None, key[1])]:
                self._kept.pop(key, None)

    def after_fork(self) -> None:
        """A child's mappings stay good; the lock may have been held by a thread that the child does not have."""
        self._lock = threading.RLock()


def most_mappings() -> int:
    """Half of the files that this process may open: the other half is for all else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(1, min(MOST, soft // 2))


MAPPINGS = Mappings()
os.register_at_fork(after_in_child=MAPPINGS.after_fork)
