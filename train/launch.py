"""Start one process per slot of a hostfile, watch them, and end all of them when one fails.

In:  hosts, a command (a whole argv), a folder for logs, the environment of the ranks.
Out: how it ended (0 only when every rank ended with 0; exit_codes.py), and `rank-0000r.log` per rank. On this machine
the ranks are the launcher's own; on others an agent has them (train/agent.py). No shell reads anything of it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from train import hostfile, leftovers
from train.events import Hello, Said
from train.hostfile import Host, HostfileError
from train.network import free_port
from train.nodes import AGENT, Node
from train.on_hosts import reached_at, words_for
from train.rank_environment import Task, extensions_dir, forwarded, rank_environment, shown
from train.ranks import LaunchError, Ranks, say
from train.supervise import TICK_S, Outcome, Signals, Supervision, end, ranks_in_words

Choice = Callable[[list[Host], list[str]], list[Host]]


def launch(hosts: list[Host], command: list[str], log_dir: Path, env: Mapping[str, str]) -> int:
    """Run `command` once per slot and return the first failing rank's exit code (128 + n for signal n), or 0.

    `env` is the environment of the launcher, usually `os.environ`. SIGINT, SIGTERM and SIGHUP go to every rank and end
    the run with 128 + n, SIGUSR1 is only passed on; where all ranks have saved and left with STOPPED, that is the code.
    A second stop signal ends the run within seconds. A rank that hangs ends it with HUNG, a lost host with LOST.
    Raises LaunchError before anything has started.
    """
    with Signals() as signals:
        return Launcher(command, log_dir, env, signals).once(hosts, all_of(hosts)).code


def all_of(hosts: list[Host]) -> Choice:
    """Every host must be there; otherwise nothing starts, and LaunchError names those that are not."""

    def choose(there: list[Host], missing: list[str]) -> list[Host]:
        if missing:
            raise LaunchError(
                f"{len(missing)} of {len(hosts)} hosts are not there: {'; '.join(missing)}. Expected "
                f"`{shlex.join(hostfile.ssh_check(hosts[0]))}` to end with 0 for each, and this Python in this folder. "
                "`make doctor` says more; or take them out of the hostfile. Nothing was started."
            )
        return there

    return choose


class Launcher:
    """Launches of one command, one after the other; agents of earlier ones that come back late are ended."""

    def __init__(self, command: list[str], log_dir: Path, env: Mapping[str, str], signals: Signals) -> None:
        self._command, self._log_dir, self._env, self._signals = command, log_dir.resolve(), env, signals
        self._mark, self._first = uuid.uuid4().hex, ""  # the host that had rank 0 at first

    def once(self, pool: list[Host], choose: Choice) -> Outcome:
        """Start ranks on the hosts of the pool that `choose` takes of those that answer, and watch them.

        Raises LaunchError where they cannot start; nothing is left in any case.
        """
        self._log_dir.mkdir(parents=True, exist_ok=True)
        leftovers.clear_beats(self._log_dir)
        if all_here(pool):
            return self._here(pool[0])
        nodes = self._call(pool)
        try:
            self._wait_for(nodes)
            if self._signals.stop is not None:
                return Outcome(code=128 + self._signals.stop)
            there = [node for node in nodes if node.lost is None]
            missing = [f"{node.name} ({node.lost.why})" for node in nodes if node.lost is not None]
            chosen = choose([node.host for node in there], missing)
            taken = [node for host in chosen for node in there if node.name == host.name]
            end([node for node in nodes if node not in taken])
            self._begin(taken, chosen)
            return Supervision(taken, self._signals).watch()
        finally:
            end(nodes)

    def _here(self, host: Host) -> Outcome:
        leftovers.clear_unused_memory(time.time() - leftovers.MEMORY_S)
        for lock in leftovers.clear_stale_locks(extensions_dir(self._env), time.time()):
            say(f"launch: removed {lock}: a build that was killed left it, and every rank would have waited for it")
        task = task_here(host, self._command, self._log_dir, free_port())
        say(f"launch: {host.slots} rank(s) on this machine, port {task.port}, logs in {self._log_dir}")
        return Supervision([Ranks(task, self._env)], self._signals).watch()

    def _call(self, pool: list[Host]) -> list[Node]:
        """Start an agent on every host of the pool."""
        words, nodes = words_for(pool, self._env), list[Node]()
        try:
            for host in pool:
                nodes.append(Node(host, words, f"{self._mark}@{host.name}"))
                peer = next((reached_at(other) for other in pool if other != host), "")
                nodes[-1].ask(peer, str(extensions_dir(self._env)))
        except OSError as error:  # no ssh here
            end(nodes)
            program = error.filename or "ssh"
            raise LaunchError(
                f"launch: cannot start {program!r} on this machine: {error.strerror}; it starts ranks on other hosts. "
                "Install it, or use a hostfile with this machine only."
            ) from None
        return nodes

    def _wait_for(self, nodes: list[Node]) -> None:
        """Until every agent has said hello, or is lost."""
        while self._signals.stop is None and any(node.hello is None and node.lost is None for node in nodes):
            time.sleep(TICK_S)
            for node in nodes:
                for event in node.poll():
                    if isinstance(event, Said):
                        say(f"launch: {node.name}: {event.text}")

    def _begin(self, nodes: list[Node], hosts: list[Host]) -> None:
        hellos: list[Hello] = [node.hello for node in nodes if node.hello is not None]
        held = {key for hello in hellos for key, lock in hello.locks.items() if lock["held"]}
        self._first = self._first or hosts[0].name
        address = hellos[0].address
        if hosts[0].name == self._first:  # of another host nobody has said anything
            address = self._env.get("MASTER_ADDR") or address
        port = self._env.get("MASTER_PORT") or hellos[0].port
        num_ranks, first = sum(host.slots for host in hosts), 0
        for node, host, hello in zip(nodes, hosts, hellos, strict=True):
            task = Task(
                command=self._command,
                log_dir=str(self._log_dir),
                num_ranks=num_ranks,
                first_rank=first,
                num_slots=host.slots,
                address=address,
                port=port,
                interface=hello.interface,
                env={**forwarded(self._env), leftovers.MARK: f"{self._mark}@{host.name}"},
            )
            # A shared lock may be held on another host.
            node.begin(task, [key.rpartition(" ")[0] for key in hello.locks if key not in held])
            say(f"launch: {node.name}: {ranks_in_words(task.ranks)} of {num_ranks}, agent {hello.pid}")
            first += host.slots
        say(f"launch: they meet at {address}:{port}, logs in {self._log_dir}")


def task_here(host: Host, command: list[str], log_dir: Path, port: str) -> Task:
    """What this machine runs where it is alone."""
    return Task(command=command, log_dir=str(log_dir), num_ranks=host.slots, num_slots=host.slots, port=port, env={})


def plan(hosts: list[Host], command: list[str], log_dir: Path, env: Mapping[str, str]) -> str:
    """Return what `launch` would run, where, and with which environment; starts and writes nothing."""
    lines = []
    if all_here(hosts):
        task = task_here(hosts[0], command, log_dir, "<a free port>")
        for rank in task.ranks:
            rank_env = rank_environment(task, rank, env)
            added = " ".join(f"{key}={value}" for key, value in sorted(rank_env.items()) if env.get(key) != value)
            lines += [f"this machine, rank {rank}, log {log_dir / f'rank-{rank:05d}.log'}:", f"    {added}"]
            lines.append(f"    {shlex.join(command)}")
        return "\n".join(lines)
    words, first = words_for(hosts, env), 0
    for host in hosts:
        ranks = range(first, first + host.slots)
        agent = shlex.join(words(host, [*AGENT, "<mark>"]))
        lines += [f"{host.name}: {ranks_in_words(ranks)}, started by an agent:", f"    {agent}"]
        first += host.slots
    lines += ["each rank, without a shell:", f"    {shlex.join(command)}"]
    lines += ["with what its host has as environment, RANK and the like, and of this one:"]
    return "\n".join([*lines, *(f"    {line}" for line in shown(forwarded(env)))])


def all_here(hosts: Sequence[Host]) -> bool:
    """Is this machine the only host? Raises LaunchError for no host, and for one that is there twice."""
    if not hosts:
        raise LaunchError("launch: found no host; expected at least one. Run `make hostfile`.")
    here = [host.name for host in hosts if hostfile.is_this_machine(host.name)]
    if len(here) > 1:
        raise LaunchError(
            f"launch: the hosts {', '.join(here)} are all this machine; expected every machine once. "
            "Keep one of them, with all its ranks in slots=N."
        )
    return len(hosts) == 1 and len(here) == 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m train launch`."""
    parser.description = "Start the worker once per slot of a hostfile, watch the ranks, end all when one fails."
    parser.add_argument("--hostfile", type=Path, required=True, help="NAME slots=N lines; see hostfiles/README.md")
    parser.add_argument("--out", type=Path, default=Path("runs/launch"), help="logs go to OUT/logs (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run where, and stop")
    parser.add_argument("worker", nargs="*", metavar="-- ARG", help="arguments of `python -m train worker`")


def main(args: argparse.Namespace) -> int:
    """Launch the worker; the exit code is the launch's, or 2 where it cannot start."""
    command = [sys.executable, "-m", "train", "worker", *args.worker]
    try:
        hosts = hostfile.read(args.hostfile)
        if args.dry_run:
            print(plan(hosts, command, args.out / "logs", os.environ))
            return 0
        return launch(hosts, command, args.out / "logs", os.environ)
    except (LaunchError, HostfileError, OSError) as error:
        say(f"{type(error).__name__}: {error}")
        return 2
