"""Agents: what a launch over several hosts starts, hears, and leaves behind when it is over.

In: agents on this machine, each for a host of its own name, without a network; tiny Python scripts as the command.
Out: exit codes, logs, messages, and the absence of processes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import is_alive, rank_log, rank_script, wait_for

from train import agent, hostfile, launch, leftovers, nodes
from train.events import Exit, Gone, Hello, Looked, Lost, Output, Pulse, Said, from_line, to_line
from train.exit_codes import HUNG, LOST, STOPPED
from train.hostfile import Host
from train.ranks import LaunchError

ROOT = Path(__file__).resolve().parent.parent
HOSTS = [Host("node-a.invalid", 1), Host("node-b.invalid", 2)]
ODD = ["a b", "it's", '"q"', "$HOME", "$(id) `id` \\", "*", "a;b", "%h", "two\nlines", "é ☃"]

# A launcher of a process of its own over HOSTS, to be signalled or killed; argv: the folder of logs, a rank's command.
LAUNCHER = """
import os, sys
from pathlib import Path
from train import launch
from train.hostfile import Host
launch.words_for = lambda hosts, env: lambda host, words: words
hosts = [Host("node-a.invalid", 1), Host("node-b.invalid", 2)]
sys.exit(launch.launch(hosts, sys.argv[2:], Path(sys.argv[1]), os.environ))
"""


@pytest.fixture(autouse=True)
def _agents_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostfile, "addresses", lambda name: set())
    monkeypatch.setattr(launch, "words_for", lambda hosts, env: lambda host, words: words)
    monkeypatch.chdir(ROOT)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}


# ---------------------------------------------------------------- a launch over hosts


def test_ranks_of_all_hosts_get_every_argument_and_variable_whole(
    tmp_path: Path, env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {f"BRAINLOOM_{number}": value for number, value in enumerate(ODD)}
    command = rank_script("print(json.dumps([sys.argv[1:], dict(os.environ)]))", *ODD)
    assert launch.launch(HOSTS, command, tmp_path / "logs", {**env, **odd, "HF_TOKEN": "a secret"}) == 0
    ports = set()
    for rank in range(3):
        arguments, seen = json.loads(rank_log(tmp_path, rank))
        assert arguments == ODD and odd.items() <= seen.items() and seen["HF_TOKEN"] == "a secret"
        assert (seen["RANK"], seen["WORLD_SIZE"]) == (str(rank), "3")
        assert (seen["LOCAL_RANK"], seen["LOCAL_WORLD_SIZE"]) == (("0", "1"), ("0", "2"), ("1", "2"))[rank]
        ports.add((seen["MASTER_ADDR"], seen["MASTER_PORT"]))
    said = capsys.readouterr()
    assert len(ports) == 1 and said.out == rank_log(tmp_path, 0)
    assert "node-b.invalid: ranks 1 to 2 of 3, agent " in said.err and "a secret" not in said.err


def test_the_first_error_of_any_rank_is_shown_with_its_host(
    tmp_path: Path, env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "if os.environ['RANK'] == '0': raise RuntimeError('Connection closed by peer')\n"
        "print(os.getpid(), flush=True)\n"
        "if os.environ['RANK'] == '2': raise OSError(28, 'No space left on device')\n"
        "time.sleep(60)"
    )
    assert launch.launch(HOSTS, rank_script(code), tmp_path / "logs", env) == 1
    said = capsys.readouterr().err
    assert "rank 2 of 3 on node-b.invalid failed first and the others were stopped: exit code 1. Its last" in said
    assert "  | OSError: [Errno 28] No space left on device" in said
    assert not is_alive(int(rank_log(tmp_path, 1)))


@pytest.mark.parametrize(
    ("number", "says"),
    [(signal.SIGKILL, "its agent has gone without a word (python"), (signal.SIGSTOP, "no pulse of its agent for ")],
)
def test_an_agent_that_is_killed_or_frozen_is_named_and_all_is_ended(
    tmp_path: Path,
    env: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    says: str,
) -> None:
    monkeypatch.setattr(nodes, "LOST_S", 2.0)
    code = (
        "print(os.getpid(), os.getppid(), flush=True)\n"
        "logs = [f'{sys.argv[1]}/rank-0000{rank}.log' for rank in range(3)]\n"
        "while not all(os.path.exists(log) and os.path.getsize(log) for log in logs): time.sleep(0.02)\n"
        f"if os.environ['RANK'] == '2': os.kill(os.getppid(), {int(number)})\n"
        "time.sleep(60)"
    )
    began_s = time.monotonic()
    assert launch.launch(HOSTS, rank_script(code, str(tmp_path / "logs")), tmp_path / "logs", env) == LOST
    assert time.monotonic() - began_s < 15
    assert f"launch: node-b.invalid (ranks 1 to 2 of 3) is lost: {says}" in capsys.readouterr().err
    pids = [int(word) for rank in range(3) for word in rank_log(tmp_path, rank).split()]
    wait_for(lambda: not any(is_alive(pid) for pid in pids), "all to end")


def test_a_rank_that_is_stopped_is_named_by_the_beats_that_its_agent_sends(
    tmp_path: Path, env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        f"import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom train.heartbeat import Heart\n"
        "heart = Heart(Path(sys.argv[1]), int(os.environ['RANK']), patience_s=600)\n"
        "heart.begin(7)\n"
        "def where_it_stops():\n    os.kill(os.getpid(), signal.SIGSTOP)\n    time.sleep(60)\n"
        "if os.environ['RANK'] == '2': where_it_stops()\ntime.sleep(60)"
    )
    began_s = time.monotonic()
    assert launch.launch(HOSTS, [sys.executable, "-c", script, str(tmp_path / "logs")], tmp_path / "logs", env) == HUNG
    assert time.monotonic() - began_s < 15
    said = capsys.readouterr().err
    assert "watchdog: rank 2 is late: it has not moved for " in said and "stopped (state T)" in said
    assert "in where_it_stops" in said and "rank 1 is late" not in said


def test_hosts_that_do_not_answer_are_all_named_and_nothing_starts(
    tmp_path: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(host: Host, argv: list[str]) -> list[str]:
        ends = {"b": 'echo "ssh: no route to host" >&2; exit 255', "c": 'echo "python: not found" >&2; exit 127'}
        return ["sh", "-c", ends[host.name[5]]] if host.name[5] in ends else argv

    monkeypatch.setattr(launch, "words_for", lambda hosts, env: words)
    hosts = [*HOSTS, Host("node-c.invalid", 2)]
    with pytest.raises(LaunchError, match=r"2 of 3 hosts are not there") as error:
        launch.launch(hosts, rank_script(f"open({str(tmp_path / 'started')!r}, 'w')"), tmp_path / "logs", env)
    assert "node-b.invalid (it cannot be reached (sh ended with 255: ssh: no route to host))" in str(error.value)
    assert "node-c.invalid (its agent does not start (sh ended with 127: python: not found))" in str(error.value)
    assert not (tmp_path / "started").exists()


def test_without_ssh_the_message_says_what_to_do(
    tmp_path: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "words_for", lambda hosts, env: lambda host, words: ["/no/ssh", *words])
    with pytest.raises(LaunchError, match=r"cannot start '/no/ssh' on this machine: No such file .* Install it"):
        launch.launch(HOSTS, rank_script(""), tmp_path / "logs", env)


def test_a_command_that_is_no_program_is_named_with_the_host(
    tmp_path: Path, env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.launch(HOSTS, ["/no/program"], tmp_path / "logs", env) == LOST
    assert "rank 0 cannot start '/no/program': No such file" in capsys.readouterr().err


def test_a_stale_lock_of_a_host_is_removed_and_said(
    tmp_path: Path, env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    lock = Path(env["TORCH_EXTENSIONS_DIR"]) / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (1000, 1000))
    assert launch.launch(HOSTS, rank_script(""), tmp_path / "logs", env) == 0
    assert f"launch: node-a.invalid: removed {lock}: a build that was killed left it" in capsys.readouterr().err
    assert not lock.exists()


def launched(
    tmp_path: Path, env: dict[str, str], code: str, *arguments: str
) -> tuple["subprocess.Popen[str]", list[int]]:
    """A launcher in a process of its own, and the ids of its ranks, once all have said theirs."""
    command = rank_script("print(os.getpid(), flush=True)\n" + code, *arguments)
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path / "logs"), *command],
        env={**env, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: all(rank_log(tmp_path, rank).endswith("\n") for rank in range(3)), "the ranks to start")
    return process, [int(rank_log(tmp_path, rank).split()[0]) for rank in range(3)]


def test_a_signal_to_the_launcher_reaches_the_ranks_of_all_hosts_which_save_and_leave(
    tmp_path: Path, env: dict[str, str]
) -> None:
    code = (
        "while not os.path.exists(sys.argv[1]): time.sleep(0.02)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(85))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])\n"
        "time.sleep(60)"
    )
    process, pids = launched(tmp_path, env, code, str(tmp_path / "ready"))
    process.send_signal(signal.SIGTSTP)
    process.send_signal(signal.SIGUSR1)  # before they can save: it waits for them
    time.sleep(0.5)
    assert all(is_alive(pid) for pid in pids)
    (tmp_path / "ready").touch()
    _, said = process.communicate(timeout=20)
    assert process.returncode == STOPPED, said
    assert (
        "not stopped by Ctrl-Z" in said
        and "SIGUSR1, passed on to 3 process(es)" in said
        and not any(is_alive(pid) for pid in pids)
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_all_hosts_and_its_number_is_the_code(
    tmp_path: Path, env: dict[str, str], number: signal.Signals
) -> None:
    process, pids = launched(tmp_path, env, "time.sleep(60)")
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number and not any(is_alive(pid) for pid in pids)


def test_a_launcher_that_is_killed_leaves_nothing_on_any_host(tmp_path: Path, env: dict[str, str]) -> None:
    process, pids = launched(tmp_path, env, "time.sleep(60)")
    agents = [int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in pids]
    assert process.pid not in agents and len(set(agents)) == 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(is_alive, [*pids, *agents])), "all to end")


# ---------------------------------------------------------------- an agent by itself


@pytest.fixture
def alone(tmp_path: Path, env: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    command = [*nodes.AGENT, "a-mark"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield process
        process.kill()


def order(process: "subprocess.Popen[str]", **content: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(content) + "\n")
    process.stdin.flush()


def test_an_agent_whose_stdin_ends_ends_its_ranks_and_itself(alone: "subprocess.Popen[str]", tmp_path: Path) -> None:
    task = launch.task_here(
        Host("x", 1), rank_script("print(os.getpid(), flush=True); time.sleep(60)"), tmp_path / "logs", "1"
    )
    order(alone, task=vars(task), stale=[])
    wait_for(lambda: rank_log(tmp_path, 0), "the rank")
    assert alone.stdin is not None
    alone.stdin.close()
    assert alone.wait(timeout=10) == 1 and not is_alive(int(rank_log(tmp_path, 0)))


def test_an_agent_that_hears_no_pulse_ends_its_ranks_and_itself(alone: "subprocess.Popen[str]", tmp_path: Path) -> None:
    task = launch.task_here(
        Host("x", 1), rank_script("print(os.getpid(), flush=True); time.sleep(60)"), tmp_path / "logs", "1"
    )
    order(alone, task=vars(task), stale=[])
    began_s = time.monotonic()
    assert alone.wait(timeout=agent.LOST_S + 10) == 1 and not is_alive(int(rank_log(tmp_path, 0)))
    assert time.monotonic() - began_s > agent.LOST_S - 1


def test_what_an_earlier_agent_of_the_same_mark_left_is_ended_and_no_other(tmp_path: Path) -> None:
    sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    marked = subprocess.Popen(sleeper, env={**os.environ, leftovers.MARK: "mark@n1"})
    other = subprocess.Popen(sleeper, env={**os.environ, leftovers.MARK: "mark@n2"})
    front = subprocess.Popen(["sh", "-c", "sleep 60; true", "python -m train agent mark@n1"])  # as ssh has it
    try:
        wait_for(lambda: b"sleep" in Path(f"/proc/{marked.pid}/cmdline").read_bytes(), "the processes")
        assert leftovers.end_marked("mark@n1") == [marked.pid]
        assert marked.wait(timeout=5) == -signal.SIGKILL and other.poll() is None and front.poll() is None
    finally:
        for process in (marked, other, front):
            process.kill()
            process.wait()


def test_events_are_the_same_after_their_way_and_noise_is_none() -> None:
    hello = Hello(7, "10.0.0.1", "eth0", "1234", {"/x/lock 5": {"held": False, "age_s": 2.0}})
    for event in (hello, Said("x\ny"), Output("é"), Pulse([], [3]), Exit(1, -9, "a\nb", "/log"), Looked([]), Gone()):
        line = to_line(event)
        assert line.count("\n") == 1 and from_line(line) == event
    for noise in ("Welcome to node-a!", "", "{}", "[1]", '{"Hello": 3}', '{"Lost": {"what": "x", "why": "y"}}', "3"):
        assert from_line(noise) is None
    assert Lost("silent", "no pulse").silent_s == 0.0


# ---------------------------------------------------------------- a dry run


def test_a_dry_run_shows_the_agents_the_command_and_the_environment_without_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(hostfile, "addresses", lambda name: set())
    monkeypatch.setenv("BRAINLOOM_X", "y z")
    monkeypatch.setenv("WANDB_API_KEY", "a secret")
    hostfile.write(tmp_path / "hosts", HOSTS[1:], "test")
    parser = argparse.ArgumentParser()
    launch.configure(parser.add_subparsers().add_parser("launch"))
    words = ["launch", "--hostfile", str(tmp_path / "hosts"), "--out", str(tmp_path / "run"), "--dry-run", "--", "--x"]
    assert launch.main(parser.parse_args(words)) == 0
    printed = capsys.readouterr().out
    assert "node-b.invalid: ranks 0 to 1, started by an agent:\n    ssh -o BatchMode=yes -o ConnectTimeout=5" in printed
    assert "-m train agent" in printed and "-m train worker --x\n" in printed
    assert "    BRAINLOOM_X=y z\n" in printed and "WANDB_API_KEY=(not shown)" in printed and "a secret" not in printed
    assert not (tmp_path / "run").exists()
