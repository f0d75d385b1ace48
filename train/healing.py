"""A run over several hosts goes on where one of them does not: on those that answer, from the last sealed checkpoint.

In:  the hosts of a hostfile, how many of them to use, a launcher, the run folder.
Out: the exit code of the last launch, and a row of incidents.jsonl for each that ended badly: what, where, at which
step, how long it took to be noticed, who went on.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train import incident_log
from train.exit_codes import STOPPED
from train.hostfile import Host
from train.launch import Launcher, all_of
from train.ranks import LaunchError, say
from train.run_folder import sealed_step
from train.supervise import Outcome, Signals

PAUSE_S = 30.0  # before the next try, where no host answers
NOBODY = "nobody answers"
MISTAKE = 2  # exit code of what a person has to change


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a run may go on: with so many hosts, on so many ranks as `fits` allows, after so many restarts in a row."""

    num_nodes: int
    max_restarts: int  # without a new checkpoint in between
    fits: Callable[[int], bool]  # may the run have this number of ranks?


def largest(there: list[Host], num_nodes: int, fits: Callable[[int], bool]) -> list[Host]:
    """Of the hosts that answer, in their order, those that make the most ranks that fit, with equal slots; or none."""
    slots = there[0].slots if there else 0
    sizes = [(nodes * each, each, nodes) for nodes in range(1, min(num_nodes, len(there)) + 1) for each in
             range(1, slots + 1) if fits(nodes * each)]  # fmt: skip
    if not sizes:
        return []
    _, each, nodes = max(sizes)  # of equal ones, that on fewer hosts
    return [Host(host.name, each) for host in there[:nodes]]


def would_come_again(outcome: Outcome, before: Outcome | None, has_moved: bool) -> bool:
    """Is it a person's mistake, or the very error that ended the launch before, with no new checkpoint since?

    A host that is lost, or a rank that is late, is never the same.
    """
    if outcome.what == "rank failed" and outcome.code == MISTAKE:
        return True
    if has_moved or before is None or outcome.what not in ("rank failed", "rank killed"):
        return False
    where = outcome.what == "rank failed" or outcome.hosts == before.hosts  # a signal says less than a traceback
    return where and (outcome.code, outcome.said) == (before.code, before.said)


class Healing:
    """One run, launch after launch."""

    def __init__(self, hosts: list[Host], terms: Terms, run_dir: Path, launcher: Launcher, signals: Signals) -> None:
        self._hosts, self._terms, self._run_dir = hosts, terms, run_dir
        self._launcher, self._signals = launcher, signals
        self._blamed = Counter[str]()  # by host: how often it was at fault since the last checkpoint
        self._before: Outcome | None = None  # how the last launch ended

    def run(self) -> int:
        """Launch until the run is done, is asked to stop, or cannot go on. Raises LaunchError if it cannot begin."""
        num_restarts = 0
        while True:
            sealed = sealed_step(self._run_dir)
            outcome = self._launch()
            if outcome.code in (0, STOPPED) or self._signals.is_leaving:
                return outcome.code
            has_moved = sealed_step(self._run_dir) > sealed
            num_restarts = 1 if has_moved else num_restarts + 1
            self._blamed = Counter(outcome.hosts) + (Counter() if has_moved else self._blamed)
            if problem := self._why_not(outcome, has_moved, num_restarts):
                say(f"healing: not started again: {problem}")
                self._write(outcome, [])
                return outcome.code
            say(
                f"healing: restart {num_restarts} of at most {self._terms.max_restarts} without a new checkpoint, from "
                f"step {sealed_step(self._run_dir)}"
            )
            if outcome.what != NOBODY:
                self._before = outcome

    def _why_not(self, outcome: Outcome, has_moved: bool, num_restarts: int) -> str:
        if would_come_again(outcome, self._before, has_moved):
            return "it would come again. Mend it, and give the same command"
        if num_restarts > self._terms.max_restarts:
            return f"--max-restarts {self._terms.max_restarts} without a new checkpoint. See {incident_log.INCIDENTS}"
        return ""

    def _launch(self) -> Outcome:
        pool = sorted(self._hosts, key=lambda host: self._blamed[host.name])  # stable: those at fault come last
        try:
            return self._launcher.once(pool, self._choose)
        except LaunchError as error:
            if self._before is None:
                raise
            say(f"healing: {error}")
        until_s = time.monotonic() + PAUSE_S
        while time.monotonic() < until_s and self._signals.stop is None:
            time.sleep(0.1)
        code = self._before.code if self._signals.stop is None else 128 + self._signals.stop
        return Outcome(code=code, what=NOBODY)

    def _choose(self, there: list[Host], missing: list[str]) -> list[Host]:
        """The hosts of the next launch: all that are wanted at first, as many as there are after that."""
        wanted = self._terms.num_nodes
        if self._before is None and len(there) < wanted:
            return all_of(self._hosts)(there, missing)
        chosen = largest(there, wanted, self._terms.fits)
        if not chosen:
            raise LaunchError(f"no host is left that can go on: {'; '.join(missing) or 'their ranks do not fit'}.")
        full, num_ranks = wanted * there[0].slots, sum(host.slots for host in chosen)
        if missing:
            say(f"healing: without {'; '.join(missing)}")
        if num_ranks < full:
            more = f"; {len(there)} host(s) answer" if len(chosen) < min(wanted, len(there)) else ""
            say(f"healing: on {num_ranks} ranks instead of {full}, with the same global batch{more}")
        if self._before is not None or missing:
            self._write(self._before or Outcome(code=0, what="host left out", said="; ".join(missing)), chosen)
        return chosen

    def _write(self, outcome: Outcome, chosen: list[Host]) -> None:
        sealed = sealed_step(self._run_dir)
        row = {
            "step": sealed if outcome.step is None else outcome.step,
            "what": outcome.what,
            "hosts": list(outcome.hosts),
            "ranks": list(outcome.ranks),
            "seen": outcome.said,
            "noticed_s": round(outcome.noticed_s, 1),
            "from_step": sealed,
            "went_on": [f"{host.name} slots={host.slots}" for host in chosen],
        }
        with contextlib.suppress(OSError):  # a full disk: it has been said on stderr
            incident_log.append(self._run_dir, row)
