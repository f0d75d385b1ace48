"""The environment of a rank: what goes along to other hosts, and what torch.distributed and DeepSpeed read.

In: the launcher's environment, and a `Task`, which is one host's part of a launch. Out: variables.
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# What goes to other hosts. Their own environment is the rest: home folders and modules are theirs.
FORWARDED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|DS_ACCELERATOR|OMP_NUM_THREADS|TORCH_EXTENSIONS_DIR"
    r"|(NCCL|TORCH_NCCL|GLOO|UCX|MV2|PYTHON|HF|BRAINLOOM|AWS|WANDB|MLFLOW)_?\w*)$"
)
SECRET = re.compile(r"TOKEN|SECRET|API_KEY|PASSWORD|AWS_ACCESS_KEY_ID")
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one host runs: `command` for each of its ranks, which have `env` beside what is each one's own."""

    command: list[str]
    log_dir: str
    num_ranks: int  # of all hosts
    first_rank: int = 0
    num_slots: int
    address: str = LOOPBACK  # where rank 0 serves the rendezvous
    port: str
    interface: str = ""  # that leads to the other hosts; "": this host is alone
    env: dict[str, str] = field(repr=False)  # keys and passwords among it

    @property
    def ranks(self) -> range:
        """The ranks of this host."""
        return range(self.first_rank, self.first_rank + self.num_slots)


def forwarded(env: Mapping[str, str]) -> dict[str, str]:
    """What ranks on other hosts get of the launcher's environment. It goes through a pipe: no process list shows it."""
    found = {key: value for key, value in sorted(env.items()) if FORWARDED.match(key)}
    return {**found, "TORCH_EXTENSIONS_DIR": str(extensions_dir(env))}


def shown(env: Mapping[str, str]) -> list[str]:
    """KEY=VALUE lines for people: what is secret is not shown."""
    return [f"{key}={'(not shown)' if SECRET.search(key) else value}" for key, value in sorted(env.items())]


def rank_environment(task: Task, rank: int, env: Mapping[str, str]) -> dict[str, str]:
    """Return `env` with what one rank of a task reads."""
    # An outer torchrun's variables would make rank 0 wait for a store that nobody serves.
    result = {key: value for key, value in env.items() if not key.startswith("TORCHELASTIC_")}
    slots = str(task.num_slots)
    result.update(RANK=str(rank), WORLD_SIZE=str(task.num_ranks), LOCAL_RANK=str(rank - task.first_rank))
    result.update(LOCAL_WORLD_SIZE=slots, LOCAL_SIZE=slots, MASTER_ADDR=task.address, MASTER_PORT=task.port)
    if "DS_ACCELERATOR" not in env and not _has_cuda():
        result["DS_ACCELERATOR"] = "cpu"
    if task.interface:
        # Left alone, Gloo listens where the host's own name leads, which may be 127.0.1.1; NCCL may take docker0.
        result.setdefault("GLOO_SOCKET_IFNAME", task.interface)
        result.setdefault("NCCL_SOCKET_IFNAME", f"={task.interface}")
    elif task.address == LOOPBACK and result.get("DS_ACCELERATOR") == "cpu" and sys.platform == "linux":
        result.setdefault("GLOO_SOCKET_IFNAME", "lo")
    result.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // task.num_slots)))
    result.setdefault("PYTHONUNBUFFERED", "1")
    result.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_dir(env)))
    return result


def extensions_dir(env: Mapping[str, str]) -> Path:
    """Return where compiled ops go: TORCH_EXTENSIONS_DIR, or a folder of this install, shared with no other."""
    return Path(env.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")


def _has_cuda() -> bool:
    devices = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
    if sys.platform == "linux" and not any(Path(device).exists() for device in devices):
        return False  # spares the seconds that importing torch takes
    import torch

    return torch.cuda.device_count() > 0


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
