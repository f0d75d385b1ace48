"""Run one command on every host at once, each with its own text on stdin and a time-out: by ssh, srun, or here.

In:  a host, an argv and a text. Out: an exit code, what was printed, and when; a host that hangs costs its time-out.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from train.hostfile import Host, addresses, is_this_machine, job_of, ssh_check

Words = Callable[[Host, list[str]], list[str]]


@dataclass(frozen=True)
class Answer:
    """What one host answered; `code` is None where it did not in time, and times are seconds since 1970 here."""

    code: int | None
    out: str
    err: str
    began_s: float
    ended_s: float

    @property
    def reached(self) -> bool:
        """Whether the host itself answered: ssh ends with 255 where it does not, and of srun alone is heard."""
        lines = self.err.strip().splitlines()
        return self.code not in (None, 255) and not (lines and all(line.startswith("srun:") for line in lines))

    @property
    def last_line(self) -> str:
        """What was said last on stderr, by the command rather than by what started it."""
        lines = self.err.strip().splitlines()
        own = [line for line in lines if not line.startswith("srun:")]
        return (own or lines or [f"exit code {self.code}"])[-1]


def words_for(hosts: list[Host], env: Mapping[str, str], folder: str = "") -> Words:
    """Return what turns an argv into one that runs it on a host, in this folder or another one; or here, as it is."""
    if len(hosts) == 1 and is_this_machine(hosts[0].name):
        return lambda host, words: words
    if job_of(env).startswith("SLURM") and shutil.which("srun", path=env.get("PATH")):
        return lambda host, words: _by_srun(host, words, folder or os.getcwd())
    return lambda host, words: _by_ssh(host, words, folder or os.getcwd())


def _by_srun(host: Host, words: list[str], folder: str) -> list[str]:
    step = ["--quiet", "--overlap", "--nodes=1", "--ntasks=1", "--cpu-bind=none", f"--nodelist={host.name}"]
    return ["srun", *step, f"--chdir={folder}", *words]


def _by_ssh(host: Host, words: list[str], folder: str) -> list[str]:
    """ssh gives one string to the shell of the other side, the only one that reads what stands here."""
    return [*ssh_check(host)[:-1], f"cd {shlex.quote(folder)} && exec {shlex.join(words)}"]


def reached_at(host: Host) -> str:
    """An address, since the ranks find each other by addresses: the hosts need not know each other's names."""
    return min(addresses(host.name), default=host.name)


def ask_all(commands: list[list[str]], texts: list[bytes], timeout_s: float) -> list[Answer]:
    """Run the commands at the same time, each with its text on stdin; the answers come in their order."""
    with ThreadPoolExecutor(max_workers=len(commands)) as pool:
        return list(pool.map(lambda command, text: _ask(command, text, timeout_s), commands, texts))


def _ask(command: list[str], text: bytes, timeout_s: float) -> Answer:
    began_s = time.time()
    code: int | None = None
    try:
        done = subprocess.run(command, input=text, capture_output=True, timeout=timeout_s, check=False)
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        out, err = late.stdout or b"", late.stderr or b""
    except OSError as error:
        code, out, err = 127, b"", f"{command[0]}: {error.strerror}".encode()
    return Answer(code, out.decode(errors="replace"), err.decode(errors="replace"), began_s, time.time())
