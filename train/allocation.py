"""Where hosts come from: NODES, SLURM, LSF, PBS, a hostfile of MPI (Kubernetes has one), or this machine.

In:  environment variables, and the files that they name; `python -m train hostfile`.
Out: hosts with their slots, where each came from in words, and the job that they belong to; the hostfile.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from train import hostfile
from train.hostfile import Host, HostfileError, job_of
from train.node_list import expand, select

DEFAULT_PATH = Path("hostfiles/cluster")
SLURM_GPUS = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE")  # 8, h100:8 or a100:4,h100:4
SLURM_TASKS = ("SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE")  # 8; 8(x3),4
MPI_HOSTFILES = (
    "OMPI_MCA_orte_default_hostfile",  # Open MPI up to 4; Kubernetes MPIJob
    "PRTE_MCA_prte_default_hostfile",  # Open MPI 5 (PRRTE, PMIx)
    "OMPI_MCA_prte_default_hostfile",
    "I_MPI_HYDRA_HOST_FILE",  # Intel MPI
    "HYDRA_HOST_FILE",  # MPICH
)
_HET_NODES = re.compile(r"SLURM_JOB_NODELIST_HET_GROUP_([0-9]+)", re.ASCII)
MPIJOB_HOSTFILE = Path("/etc/mpi/hostfile")
_LISTED = re.compile(r"(?P<name>[^\s:]+)(:(?P<count>[0-9]+))?(?P<keys>(\s+[\w-]+\s*=\s*[0-9]+)*)", re.ASCII)


@dataclass(frozen=True)
class Allocation:
    """Hosts, where they come from (for the hostfile's header), and the scheduler's job, if they are one's."""

    hosts: list[Host]
    origin: str
    job: str = ""


def discover(env: Mapping[str, str]) -> Allocation:
    """Return the hosts to use: NODES, then a scheduler's, then an MPI hostfile's, then this machine.

    SLOTS overrules the number of ranks per host in each case. Raises HostfileError.
    """
    slots = _positive(env["SLOTS"], "SLOTS") if env.get("SLOTS") else None
    for source in _SOURCES:
        if found := source(env, slots):
            return found if slots is None else _with_slots(found, slots)
    origin = f"this machine ({socket.gethostname()}), no scheduler found"
    return Allocation([Host("localhost", slots or _num_gpus() or 1)], origin)


def _with_slots(found: Allocation, slots: int) -> Allocation:
    return replace(found, hosts=[replace(host, slots=slots) for host in found.hosts], origin=f"{found.origin}, SLOTS")


def _from_list(env: Mapping[str, str], slots: int | None) -> Allocation | None:
    nodes = env.get("NODES")
    if not nodes:
        return None
    if slots is None:
        raise HostfileError(
            f"NODES={nodes!r} has no SLOTS: found no number of ranks per node; expected a whole number from 1 on. "
            "Give SLOTS=N (`--slots N`), the number of GPUs of one node."
        )
    return Allocation([Host(name, slots) for name in expand(nodes)], f"NODES={nodes}")


def _slurm(env: Mapping[str, str], slots: int | None) -> Allocation | None:
    """The components of a heterogeneous job have variables of their own, which end in _HET_GROUP_n."""
    numbers = [int(match[1]) for name in env if (match := _HET_NODES.fullmatch(name))]
    groups = [f"_HET_GROUP_{number}" for number in sorted(numbers)] or [""]
    hosts: list[Host] = []
    origins = []
    for group in groups:
        nodes = env.get(f"SLURM_JOB_NODELIST{group}") or env.get("SLURM_NODELIST")
        if not nodes:
            return None
        names = expand(nodes)
        each, variable = ([slots] * len(names), "") if slots else _slurm_slots(env, group, len(names))
        hosts += [Host(*pair) for pair in zip(names, each, strict=True)]
        origins.append(f"SLURM_JOB_NODELIST{group}={nodes}{variable}")
    return Allocation(hosts, "; ".join(origins), job_of(env))


def _slurm_slots(env: Mapping[str, str], group: str, num_nodes: int) -> tuple[list[int], str]:
    """The ranks of each node, and which variable says so; GPUs go before tasks."""
    for variable in (f"{name}{group}" for name in SLURM_GPUS):
        if text := env.get(variable):
            slots = sum(_positive(item.split(":")[-1], variable) for item in text.split(","))
            return [slots] * num_nodes, f", {variable}={text}"
    if text := env.get(variable := f"SLURM_JOB_GPUS{group}"):  # the numbers of this node's GPUs: 0,1,2 or 0-2
        return [len(expand(f"gpu[{text}]"))] * num_nodes, f", {variable}={text}"
    for variable in (f"{name}{group}" for name in SLURM_TASKS):
        if text := env.get(variable):
            return _per_node(text, variable, num_nodes), f", {variable}={text}"
    raise HostfileError(
        f"SLURM says which nodes, but not how many ranks each: found none of {', '.join(SLURM_GPUS + SLURM_TASKS)}"
        f"{f' with {group}' if group else ''}. "
        "Give SLOTS=N (`--slots N`), or ask for --gpus-per-node or --ntasks-per-node."
    )


def _per_node(text: str, variable: str, num_nodes: int) -> list[int]:
    """The counts of `2(x3),1`: 2 2 2 1; one count alone holds for every node."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"([^()]*)(?:\(x([1-9][0-9]{0,5})\))?", item, re.ASCII)
        counts += [_positive(match[1] if match else item, variable)] * int(match[2] or 1 if match else 1)
    if len(counts) == 1:
        return counts * num_nodes
    if len(counts) != num_nodes:
        raise HostfileError(
            f"{variable}={text!r}: found {len(counts)} counts; expected one for each of {num_nodes} nodes. "
            "Give SLOTS=N (`--slots N`)."
        )
    return counts


def _lsf(env: Mapping[str, str], slots: int | None) -> Allocation | None:
    if path := env.get("LSB_DJOB_HOSTFILE"):
        counts, origin = _counted(Path(path)), f"LSB_DJOB_HOSTFILE={path}"
    elif text := env.get("LSB_MCPU_HOSTS"):
        words = text.split()
        if len(words) % 2:
            raise HostfileError(
                f"LSB_MCPU_HOSTS={text!r}: expected pairs of a name and a count. Give NODES and SLOTS instead."
            )
        numbers = [_positive(word, "LSB_MCPU_HOSTS") for word in words[1::2]]
        counts, origin = _summed(zip(words[::2], numbers, strict=True)), f"LSB_MCPU_HOSTS={text}"
    elif text := env.get("LSB_HOSTS"):
        counts, origin = Counter(text.split()), f"LSB_HOSTS={text}"
    else:
        return None
    first, *others = counts
    if others and counts[first] == 1 and min(counts[name] for name in others) > 1:
        origin += f", without {first}: one slot where the others have more, so it only launches"
        del counts[first]
    return Allocation(_hosts(counts), origin, job_of(env))


def _pbs(env: Mapping[str, str], slots: int | None) -> Allocation | None:
    """Torque lists GPUs in a file of their own, as NAME-gpuN; it is empty for a job that asked for none."""
    gpus = Path(env.get("PBS_GPUFILE") or os.devnull)
    if gpus.is_file() and gpus.stat().st_size:
        counts = _summed((re.sub(r"-gpu[0-9]+$", "", name), count) for name, count in _counted(gpus).items())
        return Allocation(_hosts(counts), f"PBS_GPUFILE={gpus}", job_of(env))
    if path := env.get("PBS_NODEFILE"):
        return Allocation(_hosts(_counted(Path(path))), f"PBS_NODEFILE={path}", job_of(env))
    return None


def _mpi(env: Mapping[str, str], slots: int | None) -> Allocation | None:
    for variable in MPI_HOSTFILES:
        if path := env.get(variable):
            return Allocation(_hosts(_counted(Path(path))), f"{variable}={path}", job_of(env))
    if "KUBERNETES_SERVICE_HOST" in env and MPIJOB_HOSTFILE.is_file():
        return Allocation(_hosts(_counted(MPIJOB_HOSTFILE)), f"Kubernetes MPIJob, {MPIJOB_HOSTFILE}")
    return None


_SOURCES: tuple[Callable[[Mapping[str, str], int | None], Allocation | None], ...]
_SOURCES = (_from_list, _slurm, _lsf, _pbs, _mpi)


def _hosts(counts: Mapping[str, int]) -> list[Host]:
    return [Host(name, count) for name, count in counts.items()]


def _summed(counts: Iterable[tuple[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for name, count in counts:
        total[name] += count
    return total


def _counted(path: Path) -> Counter[str]:
    """How often a scheduler's file names each host: a line counts 1, or the N of `NAME:N` or `NAME slots=N`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HostfileError(
            f"{path}: the scheduler's node file cannot be read ({error}); expected one node name per line. "
            'Give NODES="a b" SLOTS=N instead.'
        ) from None
    entries = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    counts = _summed(_listed(line, path, number) for number, line in entries if line)
    if not counts:
        raise HostfileError(
            f'{path}: found no host; expected one node name per line. Give NODES="a b" SLOTS=N instead.'
        )
    return counts


def _listed(line: str, path: Path, number: int) -> tuple[str, int]:
    match = _LISTED.fullmatch(line)
    keys = dict(re.findall(r"([\w-]+)\s*=\s*([0-9]+)", match["keys"], re.ASCII)) if match else {}
    if match is None or not keys.keys() <= {"slots", "max_slots", "max-slots"}:
        raise HostfileError(
            f"{path}, line {number}: found {line!a}; expected `NAME`, `NAME:N` or `NAME slots=N max_slots=M`. "
            'Correct the line, or give NODES="a b" SLOTS=N instead.'
        )
    return match["name"], _positive(keys.get("slots") or match["count"] or "1", f"{path}, line {number}: slots")


def _positive(text: str, where: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text, re.ASCII):
        raise HostfileError(
            f"{where}={text!r}: expected a whole number from 1 to 9999, the number of ranks that start on one node. "
            f"Correct {where}."
        )
    return int(text)


def _num_gpus() -> int:
    import torch  # seconds to import, and needed on this road only

    return torch.cuda.device_count()


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m train hostfile`."""
    parser.description = "Write a hostfile from a list of nodes, from the scheduler's variables, or for this machine."
    parser.add_argument("--nodes", help='node names: "a b" or "n[01-08]" (default: NODES, the scheduler, this machine)')
    parser.add_argument("--slots", help="ranks per node (default: SLOTS, the scheduler, the number of GPUs)")
    parser.add_argument("--include", metavar="NODES", help='use these alone: "n[1-4]"')
    parser.add_argument("--exclude", metavar="NODES", help='leave these out: "n3"')
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH, help="file to write (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    """Find the hosts, write the hostfile, print it and where it went."""
    given = {name: value for name, value in (("NODES", args.nodes), ("SLOTS", args.slots)) if value is not None}
    try:
        found = discover({**os.environ, **given})
        hosts = select(found.hosts, args.include, args.exclude)
        known = not found.job.startswith("SLURM")  # SLURM knows the way to its nodes
        hostfile.write(args.out, hosts, found.origin, found.job, known)
    except (HostfileError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(args.out.read_text(encoding="utf-8"), end="")
    print(f"-> {args.out}: {len(hosts)} node(s) x {hosts[0].slots} slot(s)")
    return 0
