"""What may happen to one host of three: how it is brought about, what must be said of it, how it is undone.

In: hosts in namespaces, a run on them. Out: a fault of one host, which the others do not see; the host as it was.
"""

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hosts_on_one_machine import Hosts
from processes import below, cmdline, is_alive

from train.rank_environment import extensions_dir

SEED = 20261129
NAMES = ("n1", "n2", "n3")
NUM_STEPS = 30
# Fault: what must be said on stderr, with {host} for where it happened; and the exit code, None for any but 0.
FAULTS: dict[str, tuple[str, int | None]] = {
    "network cut": (r"{host} \(rank . of 3\) is lost: no pulse of its agent for \d+ s", 0),
    "sshd gone": (r"{host} \(rank . of 3\) is lost: its agent has gone without a word \(ssh ended with 255", 0),
    "rank killed": (r"rank . of 3 on {host} failed first .*: signal SIGKILL", 0),
    "rank stopped": (r"rank . is late: .*its process is stopped \(state T\) \(process \d+ on {host}\)", 0),
    "agent killed": (r"{host} \(rank . of 3\) is lost: its agent has gone without a word", 0),
    "host frozen": (r"{host} \(rank . of 3\) is lost: no pulse of its agent for \d+ s", 0),
    "launcher killed": ("", None),
    "disk full": (r"(?s)rank . of 3 on {host} failed first .*cannot be written: .*No space left on device", 2),
    "wrong Python": (r"{host} \(its agent does not start \(ssh ended with 1: this is another Python", 0),
    "stale lock": (r"{host}: removed .*/deepspeed_shm_comm/lock: a build that was killed left it", 0),
}


@dataclass(frozen=True)
class Fault:
    """What happens to a run, and when."""

    kind: str
    host: str
    step: int  # -1: while the ranks start
    after_s: float

    @classmethod
    def of(cls, number: int) -> "Fault":
        """The fault of a run: a function of its number."""
        rng = np.random.default_rng([SEED, number])
        step = -1 if rng.random() < 0.2 else int(rng.integers(NUM_STEPS * 2 // 3))
        kind, host = [*FAULTS][number % len(FAULTS)], NAMES[(number + number // len(FAULTS)) % len(NAMES)]
        return cls(kind, host, step, float(rng.uniform(0, 8.0 if step < 0 else 0.5)))


@dataclass
class Place:
    """Three hosts, a run on them, and what was done to a host, which can be undone."""

    made: Hosts
    work: Path
    out: Path
    env: dict[str, str] = field(repr=False)

    def ours(self, name: str) -> list[int]:
        """Agents and ranks of a host, and the launcher on the login host; none that has ended."""
        words = (b"agent", b"worker", b"train")
        commands = {pid: cmdline(pid).split(b"\0")[1:4] for pid in self.all_of(name)}
        return [
            pid for pid, argv in commands.items() if argv[:2] == [b"-m", b"train"] and argv[2:] and argv[2] in words
        ]

    def all_of(self, name: str) -> list[int]:
        return [pid for pid in below(self.made.fronts[name]) if is_alive(pid)]

    def of_kind(self, name: str, word: bytes) -> list[int]:
        return [pid for pid in self.ours(name) if cmdline(pid).split(b"\0")[3] == word]

    def strike(self, fault: Fault, launcher: int) -> None:
        """Let it happen."""
        host, kind = fault.host, fault.kind
        if kind == "network cut":
            self.made.cut(host)
        elif kind == "sshd gone":
            sessions = [pid for pid in self.all_of(host) if b"sshd" in cmdline(pid)][1:]
            send(sessions, signal.SIGKILL)
        elif kind == "host frozen":
            send(self.all_of(host), signal.SIGSTOP)
        elif kind == "launcher killed":
            send([launcher], signal.SIGKILL)
        elif kind == "disk full":
            folder = self.out / "checkpoints"
            folder.mkdir(exist_ok=True)
            self.made.inside(host, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder))
        elif kind == "agent killed":
            send(self.of_kind(host, b"agent"), signal.SIGKILL)
        elif kind == "wrong Python":
            self.made.inside(host, "mount", "--bind", str(wrong_python(self.work)), os.path.realpath(sys.executable))
            send(self.of_kind(host, b"agent"), signal.SIGKILL)
        else:
            if kind == "stale lock":
                self.made.inside(
                    host, "mount", "--bind", str(locked(self.work, self.env)), str(extensions_dir(self.env))
                )
            send(self.of_kind(host, b"worker"), signal.SIGSTOP if kind == "rank stopped" else signal.SIGKILL)

    def undo(self, fault: Fault) -> None:
        """The host as it was."""
        host, kind = fault.host, fault.kind
        if kind == "network cut":
            self.made.mend(host)
        elif kind == "host frozen":
            send([*below(self.made.fronts[host])], signal.SIGCONT)
        mounts = {
            "disk full": self.out / "checkpoints",
            "wrong Python": os.path.realpath(sys.executable),
            "stale lock": extensions_dir(self.env),
        }
        if kind in mounts:
            self.made.inside(host, "umount", "--lazy", str(mounts[kind]))


def send(pids: Sequence[int], number: int) -> None:
    """A signal to processes that are there."""
    for pid in pids:
        os.kill(pid, number)


def wrong_python(work: Path) -> Path:
    """What stands in the place of Python where that is another one."""
    path = work / "wrong-python"
    path.write_text('#!/bin/sh\necho "this is another Python: No module named train" >&2\nexit 1\n')
    path.chmod(0o755)
    return path


def locked(work: Path, env: dict[str, str]) -> Path:
    """A folder of compiled ops as a build that was killed leaves it."""
    path = work / "locked"
    if not path.exists():
        shutil.copytree(extensions_dir(env), path)
    (path / "deepspeed_shm_comm").mkdir(exist_ok=True)
    lock = path / "deepspeed_shm_comm" / "lock"
    lock.touch()
    os.utime(lock, (1e9, 1e9))
    return path
