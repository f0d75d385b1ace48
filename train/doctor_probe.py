"""What one host has and lacks for a run: `python -m train doctor-probe`, which the doctor starts on every host.

In:  a `Question` as JSON on stdin. Out: one line of JSON on stdout, a fact for each name; what cannot be found out, or
not in time (a dead file system), is `{"error": why}`. Nothing is changed on the host.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.store import Store
from train import leftovers
from train.network import free_port, interfaces, way_to

MARK = "brainloom-doctor "  # before the answer: a login shell may print lines of its own
FACT_S = 30.0  # a fact that takes longer is an error
PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "safetensors", "zarr")
CODE = ("prep/**/*.py", "train/**/*.py", "ds_configs/*.json")
TRIAL_BYTES = 64 * 2**20
_WORKER = re.compile(rb"\0(-m|--module)\0([^\0]+\0)*?train\0(worker|agent)\0")

Fact = Any


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the doctor asks a host; an empty text or path is not asked for. All paths are absolute, or URLs."""

    store: str = ""
    config: str = ""
    out: str = ""
    marker: str = ""  # a file that the doctor has put beside the run folder, to see whether all hosts see the same
    extensions: str = ""
    peer: str = ""  # another host, to find the interface that leads to it
    env: dict[str, str]  # GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME of the run


def facts(question: Question) -> dict[str, Fact]:
    """Every fact, found at the same time, each within FACT_S."""
    asked: dict[str, Callable[[], Fact]] = {
        "python": lambda: f"{sys.version.split()[0]} {sys.executable}",
        "versions": _versions,
        "code": _code,
        "gpus": _gpus,
        "processes": _processes,
        "locks": lambda: leftovers.locks(Path(question.extensions)),
        "interface": lambda: interface(question.peer, question.env),
        "limits": _limits,
        "shm": lambda: shutil.disk_usage("/dev/shm").total,
        "num_cores": os.cpu_count,
    }
    if question.config:
        asked["config"] = lambda: hashlib.sha256(Path(question.config).read_bytes()).hexdigest()
    if question.store:
        asked["store"] = lambda: Store(question.store).digest()
    if question.out:
        asked["disk"] = lambda: disk(Path(question.out), question.marker)
    started = {name: _start(fact) for name, fact in asked.items()}
    deadline = time.monotonic() + FACT_S
    return {name: _result(*one, deadline) for name, one in started.items()}


def _start(fact: Callable[[], Fact]) -> tuple[threading.Thread, list[Fact]]:
    box: list[Fact] = []

    def run() -> None:
        try:
            box.append(fact())
        except Exception as error:  # whatever it is, it is the answer
            box.append({"error": f"{type(error).__name__}: {error}"})

    thread = threading.Thread(target=run, daemon=True)  # a dead file system would hold another kind for ever
    thread.start()
    return thread, box


def _result(thread: threading.Thread, box: list[Fact], deadline: float) -> Fact:
    thread.join(max(0.0, deadline - time.monotonic()))
    return box[0] if box else {"error": f"no answer in {FACT_S:g} s"}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # said below
            found[name] = importlib.metadata.version(name)
    return {name: found.get(name, "not installed") for name in PACKAGES}


def _revision() -> str:
    """The git revision, with a + where files differ from it; "" without git."""
    try:
        revision = _said("git", "rev-parse", "--short=12", "HEAD").strip()
        return revision + ("+" if _said("git", "status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return ""


def _code() -> dict[str, str]:
    if not Path("train/__main__.py").exists():
        raise FileNotFoundError(f"no code in {Path.cwd()}")
    return {"digest": code_digest(Path.cwd()), "revision": _revision()}


def code_digest(root: Path) -> str:
    """One digest of all the code that a rank runs."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in root.glob(pattern)):
        digest.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _said(*words: str) -> str:
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout


def _gpus() -> dict[str, Fact]:
    """Per GPU its driver, name, and MiB used and in all; and how many torch can use."""
    if shutil.which("nvidia-smi") is None:
        return {"gpus": [], "torch": 0}
    query = "--query-gpu=driver_version,name,memory.used,memory.total"
    lines = _said("nvidia-smi", query, "--format=csv,noheader,nounits").strip().splitlines()
    import torch  # seconds, and only where there may be a GPU

    return {"gpus": [[word.strip() for word in line.split(",")] for line in lines], "torch": torch.cuda.device_count()}


def _processes() -> list[str]:
    """This user's ranks and agents that are alive: number and command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            command = path.read_bytes()
            if path.stat().st_uid == os.getuid() and _WORKER.search(command):
                found.append(f"{path.parent.name} {command.replace(bytes(1), b' ').decode(errors='replace').strip()}")
    return sorted(found)


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def disk(out: Path, marker: str) -> dict[str, Fact]:
    """Where the run folder lies: free bytes, bytes/s that a file with fsync takes, and whether the marker is seen."""
    folder = nearest_folder(out)
    free = shutil.disk_usage(folder).free
    seen = not marker or Path(marker).is_file()
    if free < 2 * TRIAL_BYTES:
        return {"folder": str(folder), "free": free, "write_bytes_s": 0.0, "shared": seen}
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        began_s = time.perf_counter()
        for _ in range(TRIAL_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - began_s
    return {"folder": str(folder), "free": free, "write_bytes_s": TRIAL_BYTES / seconds, "shared": seen}


def interface(peer: str, env: dict[str, str]) -> dict[str, Fact]:
    """The network interface that leads to `peer`, its address, Mbit/s (0: it does not say), and InfiniBand's ports."""
    way = way_to(peer)
    port = int(free_port(""))
    return {
        **_link(way.interface),
        "address": way.address,
        "names": interfaces(),
        "env": env,
        "port": port,
    }


def _link(name: str) -> dict[str, Fact]:
    mbit_s = 0
    with contextlib.suppress(OSError, ValueError):  # a virtual card says none, or -1
        mbit_s = max(0, int((Path("/sys/class/net") / name / "speed").read_text()))
    ports = {}
    for port in sorted(Path("/sys/class/infiniband").glob("*/ports/*")):
        state, rate = ((port / part).read_text().strip() for part in ("state", "rate"))
        ports[f"{port.parent.parent.name}:{port.name}"] = f"{state.split(': ')[-1]}, {rate}"
    return {"name": name, "mbit_s": mbit_s, "infiniband": ports}


def _limits() -> dict[str, int]:
    """Open files, and bytes that may be locked in memory; -1 is without a limit."""
    return {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[0] for name in ("nofile", "memlock")}


def configure(parser: argparse.ArgumentParser) -> None:
    """It has no arguments: the question comes on stdin, where no shell reads it."""


def main(args: argparse.Namespace) -> int:
    """Answer one question."""
    started_s = time.time()
    signal.alarm(int(2 * FACT_S))  # whatever happens, this process ends
    question = Question(**json.loads(sys.stdin.read()))
    found = facts(question)
    print(f"{MARK}{json.dumps({**found, 'started_s': started_s, 'ended_s': time.time()})}", flush=True)
    os._exit(0)  # a thread that hangs in a dead file system must not hold us
