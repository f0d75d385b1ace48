"""Is every host fit to train? `python -m train doctor` asks all of them at once and prints a line per check and host.

In:  a hostfile (or this machine), and the run's store, YAML and folder.
Out: lines of `ok` or `FAIL` with what mends it; exit code 0 where all is ok, 1 where something is not. Nothing is
changed anywhere, and what is started ends by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prep.store import Store, StoreError
from train import config, hostfile
from train.allocation import DEFAULT_PATH, discover
from train.doctor_checks import CHECKS, MIN_FREE_BYTES, Context, Facts, Found, Line, all_reduce, lines
from train.doctor_probe import FACT_S, MARK, Question, nearest_folder
from train.hostfile import Host
from train.on_hosts import Answer, ask_all, reached_at, words_for
from train.rank_environment import extensions_dir

PROBE_S = FACT_S + 15.0  # with the way there and the start of Python
STATE_BYTES = 12  # of a parameter in a checkpoint: itself and two moments
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
PROBE = [sys.executable, "-m", "train", "doctor-probe"]
PAIRS = [sys.executable, "-m", "train", "doctor-pairs"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--hostfile", type=Path, default=DEFAULT_PATH, help="%(default)s; where that is missing, this machine alone"
    )
    parser.add_argument("--store", default="", help="the run's token store")
    parser.add_argument("--config", type=Path, help="the run's YAML")
    parser.add_argument("--out", type=Path, help="the run folder; it need not be there yet")
    parser.add_argument("--dry-run", action="store_true", help="print what would be asked where, and stop")


def main(args: argparse.Namespace) -> int:
    """Ask, check, print."""
    hosts = _hosts(args.hostfile)
    words = words_for(hosts, os.environ)
    if args.dry_run:
        print("\n".join(f"{host.name}: {shlex.join(words(host, PROBE))}" for host in hosts))
        print("\n".join(["checks:", "  reachable: answers without a password", *(f"  {text}" for text, _ in CHECKS)]))
        print("  all-reduce: between every pair of hosts; names the slow one")
        return 0
    context = Context(hosts, _needed_bytes(args.config, args.store))
    with _marker(args.out, len(hosts)) as marker:
        questions = [json.dumps(asdict(_question(args, hosts, host, marker))).encode() for host in hosts]
        answers = ask_all([words(host, PROBE) for host in hosts], questions, PROBE_S)
    found: Found = {}
    said: list[Line] = []
    for host, answer in zip(hosts, answers, strict=True):
        said += _answered(host, answer, found)
    said += lines(found, context)
    pairs, results = _all_reduce([host for host in hosts if host.name in found], found, os.environ)
    said += pairs
    order = {host.name: number for number, host in enumerate(hosts)}
    for line in sorted(said, key=lambda line: order[line.host]):
        print(line)
    if network := of_the_network(results):
        print(network)
    bad = sum(bool(line.fix) for line in said)
    print(f"{len(hosts)} host(s), {len(said)} checks, {bad} FAIL", file=sys.stderr)
    return 1 if bad else 0


def _hosts(path: Path) -> list[Host]:
    if path == DEFAULT_PATH and not path.exists():
        print(f"no {path}: this machine alone", file=sys.stderr)
        return discover({key: os.environ[key] for key in ("SLOTS",) if key in os.environ}).hosts
    return hostfile.read_for_run(path, os.environ)


def _question(args: argparse.Namespace, hosts: list[Host], host: Host, marker: str) -> Question:
    return Question(
        store=args.store if "://" in args.store or not args.store else str(Path(args.store).resolve()),
        config=str(args.config.resolve()) if args.config else "",
        out=str(args.out.resolve()) if args.out else "",
        marker=marker,
        extensions=str(extensions_dir(os.environ)),
        peer=next((reached_at(other) for other in hosts if other != host), ""),
        env={name: os.environ[name] for name in INTERFACES if name in os.environ},
    )


def _needed_bytes(path: Path | None, store: str) -> float:
    """What the checkpoints of a run take: of the core, and of the unit table where the store can be read from here."""
    if path is None:
        return MIN_FREE_BYTES
    from train.build import model_config  # torch: seconds to import
    from train.flops import parameters

    run = config.load(path)
    model = model_config(run)
    num_units = 0
    with contextlib.suppress(StoreError, OSError):  # the checks say so
        num_units = sum(entry["num_units"] for entry in Store(store).entries)
    count = sum(parameters(model).values()) + num_units * model.unit_embed_size
    return MIN_FREE_BYTES + count * STATE_BYTES * (run.keep_checkpoints + 1)


@contextlib.contextmanager
def _marker(out: Path | None, num_hosts: int) -> Iterator[str]:
    """A file beside the run folder while the hosts look for it; "" where nothing can be written or compared."""
    if out is None or num_hosts == 1:
        yield ""
        return
    try:
        descriptor, path = tempfile.mkstemp(prefix=".doctor-", dir=nearest_folder(out.resolve()))
    except OSError:  # the check of the disk says so
        yield ""
        return
    os.close(descriptor)
    try:
        yield path
    finally:
        os.unlink(path)


def _answered(host: Host, answer: Answer, found: Found) -> Iterator[Line]:
    """Put the facts of a host into `found`, and say whether it answered."""
    facts = _marked(answer.out)
    took = f"answered in {answer.ended_s - answer.began_s:.1f} s"
    if facts is not None:
        found[host.name] = {**facts, "asked_s": answer.began_s, "answered_s": answer.ended_s}
        yield Line(host.name, "reachable", took)
    elif answer.code is None:
        yield Line(host.name, "reachable", f"no answer in {PROBE_S:g} s", f"look at the host, or {_leave_out(host)}")
    elif not answer.reached:
        fix = f"make `{shlex.join(hostfile.ssh_check(host))}` work (ssh-copy-id, accept its key once; in a SLURM job: "
        fix += f"`scontrol show node {host.name}`), or {_leave_out(host)}"
        yield Line(host.name, "reachable", answer.last_line, fix)
    else:
        yield Line(host.name, "reachable", took)
        fix = f"put the code in {os.getcwd()} and Python at {sys.executable} there too (`make stage`), or share them"
        yield Line(host.name, "python", answer.last_line, fix)


def _leave_out(host: Host) -> str:
    return f"leave it out: `make hostfile ARGS='--exclude {host.name}'`"


def _marked(out: str) -> Any:
    """What stands behind the mark; None where there is no such line."""
    line = next((line for line in out.splitlines() if line.startswith(MARK)), None)
    return None if line is None else json.loads(line.removeprefix(MARK))


def _all_reduce(hosts: list[Host], found: Found, env: os._Environ[str]) -> tuple[list[Line], list[Facts]]:
    """Measure every pair of the hosts that answered; a host that is slow with all others is named."""
    usable = [host for host in hosts if "error" not in found[host.name]["interface"]]
    if len(usable) < 2:
        return [Line(host.name, "all-reduce", "one host: nothing to compare") for host in usable], []
    from train.doctor_pairs import time_limit_s  # imports torch: seconds

    words = words_for(usable, env)
    tasks = [json.dumps(_task(rank, usable, found)).encode() for rank in range(len(usable))]
    answers = ask_all([words(host, PAIRS) for host in usable], tasks, time_limit_s(len(usable)))
    results = {host.name: _marked(answer.out) for host, answer in zip(usable, answers, strict=True)}
    said = [_no_pairs(host, answer) for host, answer in zip(usable, answers, strict=True) if results[host.name] is None]
    measured = [result for each in results.values() for result in each or []]
    return said + all_reduce(measured), measured


def of_the_network(results: list[Facts]) -> str:
    """What `make dry-run` wants to know of the network: a ring is as slow as the slowest of its links."""
    rates = [result["gbit_s"] / 8 for result in results if "gbit_s" in result]
    if not rates:
        return ""
    latency_us = max(result["latency_us"] for result in results if "gbit_s" in result)
    options = f"--bandwidth-inter {min(rates):.3g} --latency-inter {latency_us:.1f}"
    return f'network: GB/s and us a message, the worst of {len(rates)} pair(s): make dry-run ARGS="{options}"'


def _task(rank: int, hosts: list[Host], found: Found) -> Facts:
    own, first = (found[hosts[index].name]["interface"] for index in (rank, 0))
    return {
        "rank": rank,
        "names": [host.name for host in hosts],
        "address": first["address"],
        "port": first["port"],
        "interface": own["env"].get("GLOO_SOCKET_IFNAME") or own["name"],
        "use_gpu": all(found[host.name]["gpus"].get("torch") for host in hosts),
    }


def _no_pairs(host: Host, answer: Answer) -> Line:
    text = "no answer in time" if answer.code is None else answer.last_line
    return Line(host.name, "all-reduce", text, "open the ports between the hosts (torch and Gloo choose free ones)")
