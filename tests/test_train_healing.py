"""Healing: which hosts go on, what is not tried again, what is written of it; and launches over agents that die.

In: outcomes made up, agents on this machine for hosts of their own names. Out: hosts, exit codes, rows of incidents.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from train import healing, hostfile, launch
from train.exit_codes import HUNG, STOPPED
from train.healing import Healing, Terms, largest, would_come_again
from train.hostfile import Host
from train.ranks import LaunchError
from train.run_folder import sealed_step
from train.supervise import Outcome, Signals

ROOT = Path(__file__).resolve().parent.parent
HOSTS = [Host(f"node-{letter}.invalid", 2) for letter in "abcd"]
LOST = Outcome(
    code=1, what="host silent", hosts=(HOSTS[1].name,), ranks=(2, 3), said="no pulse", step=5, noticed_s=8.04
)
FAILED = Outcome(code=1, what="rank failed", hosts=(HOSTS[0].name,), ranks=(0,), said="ValueError: x", step=1)
KILLED = Outcome(code=137, what="rank killed", hosts=(HOSTS[0].name,), ranks=(0,), said="signal SIGKILL")
DONE = Outcome(code=0)


def divides(number: int) -> Callable[[int], bool]:
    return lambda num_ranks: number % num_ranks == 0


@pytest.mark.parametrize(
    ("num_there", "global_batch", "hosts", "slots"),
    [(4, 8, 4, 2), (3, 8, 2, 2), (3, 12, 3, 2), (3, 3, 3, 1), (1, 8, 1, 2), (3, 7, 1, 1), (0, 8, 0, 0)],
)
def test_the_most_ranks_that_fit_go_on_with_equal_slots(
    num_there: int, global_batch: int, hosts: int, slots: int
) -> None:
    chosen = largest(HOSTS[:num_there], 4, divides(global_batch))
    assert chosen == [Host(host.name, slots) for host in HOSTS[:hosts]]


def test_spares_are_not_used_while_the_others_are_there_and_none_may_fit() -> None:
    assert largest(HOSTS, 2, divides(8)) == HOSTS[:2]
    assert largest(HOSTS, 4, lambda num_ranks: False) == []


def test_a_mistake_or_the_same_error_without_a_new_checkpoint_would_come_again() -> None:
    assert would_come_again(replace(FAILED, code=2), None, True), "a person's mistake"
    assert not would_come_again(FAILED, None, False) and not would_come_again(FAILED, FAILED, True)
    assert would_come_again(FAILED, FAILED, False)
    assert would_come_again(replace(FAILED, hosts=("other",)), FAILED, False), "the same on another host"
    assert not would_come_again(replace(FAILED, said="ValueError: y"), FAILED, False)
    assert would_come_again(KILLED, KILLED, False)
    assert not would_come_again(replace(KILLED, hosts=("other",)), KILLED, False)
    assert not would_come_again(LOST, LOST, False)
    assert not would_come_again(Outcome(code=HUNG, what="late"), Outcome(code=HUNG, what="late"), False)


class Scripted:
    """A launcher whose launches end as they are told; it keeps which hosts each had."""

    def __init__(self, run_dir: Path, outcomes: Sequence[Outcome], there: Callable[[int], list[str]] | None = None):
        self._run_dir, self._outcomes, self._there = run_dir, list(outcomes), there
        self.launches: list[list[Host]] = []
        self.seals_at: dict[int, int] = {}  # by launch: the step of the checkpoint that it leaves

    def once(self, pool: list[Host], choose: Any) -> Outcome:
        number = len(self.launches)
        names = [host.name for host in pool] if self._there is None else self._there(number)
        there, missing = [h for h in pool if h.name in names], [h.name for h in pool if h.name not in names]
        self.launches.append([])
        self.launches[-1] = choose(there, missing)
        if number in self.seals_at:
            seal(self._run_dir, self.seals_at[number])
        return self._outcomes[number]


def seal(run_dir: Path, step: int) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def healed(run_dir: Path, launcher: Any, num_nodes: int = 3, max_restarts: int = 3) -> int:
    terms = Terms(num_nodes=num_nodes, max_restarts=max_restarts, fits=divides(24))
    return Healing(HOSTS, terms, run_dir, launcher, Signals()).run()


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "incidents.jsonl").read_text().splitlines()]


def test_a_spare_takes_the_place_of_a_lost_host_and_it_is_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = Scripted(tmp_path, [LOST, DONE], lambda number: [h.name for h in HOSTS if number == 0 or h != HOSTS[1]])
    launcher.seals_at[0] = 4
    assert healed(tmp_path, launcher) == 0
    assert launcher.launches == [HOSTS[:3], [HOSTS[0], HOSTS[2], HOSTS[3]]]
    (row,) = rows(tmp_path)
    assert (row["step"], row["what"], row["hosts"], row["ranks"]) == (5, "host silent", [HOSTS[1].name], [2, 3])
    assert (row["noticed_s"], row["from_step"], len(row["went_on"])) == (8.0, 4, 3) and row["unix_s"] > 0
    assert "restart 1 of at most 3 without a new checkpoint, from step 4" in capsys.readouterr().err


def test_without_a_spare_fewer_ranks_go_on_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launcher = Scripted(tmp_path, [LOST, DONE], lambda number: [h.name for h in HOSTS[: 4 if number == 0 else 2]])
    assert healed(tmp_path, launcher, num_nodes=4) == 0
    assert launcher.launches == [HOSTS, HOSTS[:2]]
    said = capsys.readouterr().err
    assert (
        "healing: without node-c.invalid; node-d.invalid" in said and "on 4 ranks instead of 8, with the same" in said
    )


def test_a_host_that_answers_again_is_kept_and_one_at_fault_comes_after_the_spare(tmp_path: Path) -> None:
    launcher = Scripted(tmp_path, [LOST, DONE])
    assert healed(tmp_path, launcher) == 0
    assert launcher.launches[1] == [HOSTS[0], HOSTS[2], HOSTS[3]]
    again = Scripted(tmp_path, [LOST, DONE])
    assert healed(tmp_path, again, num_nodes=4) == 0
    assert len(again.launches[1]) == 4


def test_at_first_all_that_are_wanted_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"2 of 4 hosts are not there: node-c\.invalid; node-d\.invalid"):
        healed(tmp_path, Scripted(tmp_path, [DONE], lambda number: [host.name for host in HOSTS[:2]]))
    spared = Scripted(tmp_path, [DONE], lambda number: [host.name for host in HOSTS[1:]])
    assert healed(tmp_path, spared) == 0 and spared.launches == [HOSTS[1:]]
    assert rows(tmp_path)[0]["what"] == "host left out"


@pytest.mark.parametrize(
    ("outcomes", "launches"),
    [
        ([replace(FAILED, code=2)], 1),
        ([FAILED, FAILED], 2),
        ([LOST, LOST, LOST, LOST], 4),
        ([replace(DONE, code=STOPPED)], 1),
    ],
)  # fmt: skip
def test_what_is_given_up_and_when(tmp_path: Path, outcomes: list[Outcome], launches: int) -> None:
    launcher = Scripted(tmp_path, outcomes)
    assert healed(tmp_path, launcher) == outcomes[-1].code and len(launcher.launches) == launches


def test_a_run_that_was_asked_to_leave_is_not_started_again(tmp_path: Path) -> None:
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        launcher: Any = Scripted(tmp_path, [LOST])
        terms = Terms(num_nodes=3, max_restarts=3, fits=divides(24))
        assert Healing(HOSTS, terms, tmp_path, launcher, signals).run() == LOST.code
    assert len(launcher.launches) == 1


def test_a_run_that_moves_on_may_be_restarted_for_ever(tmp_path: Path) -> None:
    launcher = Scripted(tmp_path, [*([LOST] * 9), DONE])
    launcher.seals_at = {number: number + 1 for number in range(9)}
    assert healed(tmp_path, launcher, max_restarts=1) == 0 and len(launcher.launches) == 10
    assert sealed_step(tmp_path) == 9 and [row["from_step"] for row in rows(tmp_path)] == [*range(1, 10)]


def test_where_nobody_answers_it_waits_and_asks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "PAUSE_S", 0.01)
    launcher = Scripted(tmp_path, [LOST, LOST, DONE], lambda number: [] if number == 1 else [h.name for h in HOSTS])
    assert healed(tmp_path, launcher) == 0
    assert [len(hosts) for hosts in launcher.launches] == [3, 0, 3]
    assert [row["what"] for row in rows(tmp_path)] == ["host silent"]


def test_a_run_whose_agent_is_killed_goes_on_over_new_agents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hostfile, "addresses", lambda name: set())
    monkeypatch.setattr(launch, "words_for", lambda hosts, env: lambda host, words: words)
    monkeypatch.chdir(ROOT)
    code = (
        "import os, sys, time\n"
        "rank, folder = os.environ['RANK'], sys.argv[1]\n"
        "if os.path.exists(folder + '/killed'): sys.exit(0)\n"
        "if rank == '2':\n"
        "    open(folder + '/killed', 'w').close()\n"
        "    os.kill(os.getppid(), 9)\n"
        "time.sleep(60)"
    )
    env = {"PATH": os.environ["PATH"], "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path / "ext")}
    terms = Terms(num_nodes=2, max_restarts=1, fits=divides(4))
    with Signals() as signals:
        command = [sys.executable, "-S", "-c", code, str(tmp_path)]
        launcher = launch.Launcher(command, tmp_path / "logs", env, signals)
        assert Healing(HOSTS[:2], terms, tmp_path, launcher, signals).run() == 0
    said = capsys.readouterr().err
    assert "launch: node-b.invalid (ranks 2 to 3 of 4) is lost: its agent has gone" in said
    (row,) = rows(tmp_path)
    assert (row["what"], row["hosts"], row["ranks"]) == ("agent lost", ["node-b.invalid"], [2, 3])
    assert sorted(row["went_on"]) == ["node-a.invalid slots=2", "node-b.invalid slots=2"]
