"""Stand-ins for sbatch, squeue and scancel that run each job as a process of this machine: a batch system for tests.

In: a folder. Out: the three commands in it, to be put in front of PATH; what they did is in the same folder.
"""

import os
import signal
from pathlib import Path

from processes import is_alive

SESSIONS = (1, 2)
COMMANDS = {
    "sbatch": """
        if [ -e {folder}/refuses ]; then cat {folder}/refuses >&2; exit 1; fi
        number=$$
        cp "$1" {folder}/$number.script
        setsid bash {folder}/$number.script > {folder}/$number.out 2>&1 &
        echo $! > {folder}/$number.pid
        echo "Submitted batch job $number"
    """,
    "squeue": """
        for file in {folder}/*.pid; do
            if [ -e "$file" ] && kill -0 $(cat $file) 2> /dev/null; then basename $file .pid; fi
        done
        exit 0
    """,
    "scancel": "kill -TERM -- -$(cat {folder}/$1.pid)",
}


def install(folder: Path) -> Path:
    """Write the commands."""
    folder.mkdir()
    for name, script in COMMANDS.items():
        path = folder / name
        path.write_text("#!/bin/bash\n" + script.format(folder=folder))
        path.chmod(0o755)
    return folder


def running(folder: Path) -> list[int]:
    """The process group of each job that runs."""
    return [
        pid for pid in (int(path.read_text()) for path in folder.glob("*.pid") if path.read_text()) if is_alive(pid)
    ]


def kill_jobs(folder: Path) -> int:
    """Kill all jobs as a node that fails would; how many there were."""
    jobs = running(folder)
    for group in jobs:
        os.killpg(group, signal.SIGKILL)
    return len(jobs)


def cluster_file(folder: Path, **keys: object) -> Path:
    """A cluster file; keys that are None are left out."""
    path = folder / "cluster.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items() if value is not None))
    return path


def recordings(folder: Path, slow_s: float = 0.0) -> Path:
    """Two stand-ins for recordings, whose shards take `slow_s` each."""
    folder.mkdir()
    for number in SESSIONS:
        (folder / f"{number}.nwb").write_text(f"session=s{number} seed={number} slow_s={slow_s}")
    return folder
