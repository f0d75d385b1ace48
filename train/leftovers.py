"""What earlier runs left on this host and the next one would stumble over: locks, shared memory, beats, processes.

In: folders, addresses, the mark of a launch. Out: what was removed or ended; nothing of another user's, or in use.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

MEMORY_S = 60.0  # between the making of a buffer and its mapping
MARK = "BRAINLOOM_LAUNCH"  # in the environment of a rank: the mark that its agent has as an argument


def locks(folder: Path) -> dict[str, dict[str, bool | float]]:
    """By file (path and inode, so that a shared file is the same on every host): whether one of this host's processes
    holds the lock, and the seconds since it was made.
    """
    now, found = time.time(), {}
    for lock in sorted(folder.glob("*/lock")):
        with contextlib.suppress(FileNotFoundError):  # its build has just ended
            status = lock.stat()
            key = f"{lock} {status.st_ino}"
            found[key] = {"held": not is_stale(lock, now), "age_s": now - status.st_mtime}
    return found


def clear_stale_locks(directory: Path, before: float) -> list[Path]:
    """Remove `*/lock` files that no process holds and that are older than `before` (seconds since 1970); return them.

    torch keeps its lock file open while it compiles and deletes it at the end. A build that was killed leaves the
    file, and every later run waits for it for ever, without a message.
    """
    stale = [lock for lock in sorted(directory.glob("*/lock")) if is_stale(lock, before)]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def is_stale(lock: Path, before: float) -> bool:
    """Is a lock file older than `before` (seconds since 1970), and held by no process that this one can see?"""
    try:
        status = lock.stat()
    except FileNotFoundError:  # let go just now
        return False
    if status.st_mtime >= before or status.st_uid != os.getuid():
        return False  # another user's open files cannot be seen
    if not Path("/proc/self/fd").is_dir():
        return before - status.st_mtime > 3600  # without /proc, age is all there is
    target = str(lock.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process has ended, or is another user's
            if os.readlink(link) == target:
                return False
    return True


def clear_shared_memory(address: str, port: str) -> None:
    """Remove what DeepSpeed's ranks of one launch left in memory, 67 MB each: nobody else has our user and port."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_*"):
        buffer.unlink(missing_ok=True)


def clear_unused_memory(before: float) -> list[Path]:
    """Remove the same of launches that were killed: older than `before` (seconds since 1970), mapped by no process."""
    found = [*Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")]
    used = set[str]()
    for path in Path("/proc").glob("[0-9]*/maps") if found else ():
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            used |= {
                line.rpartition("/")[2] for line in path.read_text().splitlines() if "/deepspeed_allreduce" in line
            }
    unused = []
    for path in found:
        with contextlib.suppress(FileNotFoundError):  # its launch has just removed it
            if path.name not in used and path.stat().st_mtime < before:
                path.unlink()
                unused.append(path)
    return unused


def clear_beats(log_dir: Path) -> None:
    """Remove the beats of ranks that were killed."""
    for path in log_dir.glob("rank-*.beat"):
        path.unlink(missing_ok=True)


def end_marked(mark: str) -> list[int]:
    """Kill agents and ranks of this host that carry the mark, but this process; return their ids.

    A host that was frozen or cut off has them, if it comes back before they have noticed.
    """
    words, entry, found = mark.encode(), f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            # Word for word: the ssh of a launcher has the same in one argument.
            is_agent = (path / "cmdline").read_bytes().split(b"\0")[1:5] == [b"-m", b"train", b"agent", words]
            if int(path.name) != os.getpid() and (is_agent or entry in (path / "environ").read_bytes().split(b"\0")):
                os.kill(int(path.name), signal.SIGKILL)
                found.append(int(path.name))
    return sorted(found)
