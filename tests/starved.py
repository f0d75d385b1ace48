"""A disk, or a memory, that is too small until it is enlarged: tmpfs and control groups of Linux, for root alone.

In: a folder and how many MB. Out: the folder on a disk of its own; a place for processes that the kernel kills in.
"""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
EMPTY_S = 60.0


@contextlib.contextmanager
def disk_of(folder: Path, limit_mb: float) -> Iterator[Callable[[], None]]:
    """A disk of its own for a folder, too small until it is enlarged; with a limit of 0 the disk that is there."""
    if not limit_mb:
        yield lambda: None
        return
    folder.mkdir()
    size = f"size={int(limit_mb * 1e6)}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=2g", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Memory:
    """A control group (of either version) with so much memory; who joins takes all its children along."""

    def __init__(self, name: str, limit_mb: float) -> None:
        self.is_old = (GROUPS / "memory").is_dir()
        self.folder = (GROUPS / "memory" if self.is_old else GROUPS) / f"brainloom_{name}"
        self.folder.mkdir()
        limit = self.folder / ("memory.limit_in_bytes" if self.is_old else "memory.max")
        limit.write_text(str(int(limit_mb * 1e6)))

    def join(self) -> None:
        """Called in a process that has only just begun."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def num_killed(self) -> int:
        """How many processes the kernel has killed in it."""
        found = re.search(
            r"^oom_kill (\d+)", (self.folder / ("memory.oom_control" if self.is_old else "memory.events")).read_text(),
            re.MULTILINE,
        )  # fmt: skip
        return int(found.group(1)) if found else 0

    def remove(self) -> None:
        """Take the group away; a process that was killed is in it until the kernel has cleared its memory."""
        deadline = time.monotonic() + EMPTY_S
        while True:
            try:
                return self.folder.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


@contextlib.contextmanager
def memory_of(name: str, limit_mb: float) -> Iterator[Memory | None]:
    """A control group of `limit_mb`; with a limit of 0 none."""
    if not limit_mb:
        yield None
        return
    memory = Memory(name, limit_mb)
    try:
        yield memory
    finally:
        memory.remove()
