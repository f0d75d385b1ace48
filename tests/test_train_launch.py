"""The launcher: what ranks get, what is said when one fails, and that nothing is left behind.

In:  tiny Python scripts as the command, a launcher in a process of its own where signals are tested.
Out: exit codes, logs, messages, and the absence of processes.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import is_alive, rank_log, rank_script, wait_for

from train import hostfile, launch, leftovers, rank_environment, ranks
from train.exit_codes import STOPPED
from train.hostfile import Host
from train.ranks import LaunchError

ROOT = Path(__file__).resolve().parent.parent
HERE = [Host("localhost", 2)]
WORKER = [sys.executable, "-m", "train", "worker"]
ENV = {"PATH": os.environ["PATH"], "DS_ACCELERATOR": "cpu"}


@pytest.fixture(autouse=True)
def _own_extensions_and_no_name_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hostfile, "addresses", lambda name: set())
    ENV["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")
    yield
    del ENV["TORCH_EXTENSIONS_DIR"]


def test_every_rank_gets_its_environment_and_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = rank_script(
        "import json; print(json.dumps(dict(os.environ))); print(sys.argv[1], file=sys.stderr)", "a $b 'c"
    )
    assert launch.launch(HERE, command, tmp_path / "logs", {**ENV, "TORCHELASTIC_USE_AGENT_STORE": "True"}) == 0
    ports = set()
    for rank in (0, 1):
        first, second = sorted(rank_log(tmp_path, rank).splitlines(), key=lambda line: line[0] != "{")
        env = json.loads(first)
        assert second == "a $b 'c"
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["LOCAL_SIZE"]) == ("2", "2", "2")
        assert (env["MASTER_ADDR"], env["DS_ACCELERATOR"], env["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "cpu", "lo")
        assert "TORCHELASTIC_USE_AGENT_STORE" not in env
        ports.add(int(env["MASTER_PORT"]))
    assert len(ports) == 1
    assert capsys.readouterr().out == rank_log(tmp_path, 0)


def test_what_is_set_is_kept_and_what_is_not_has_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_environment, "_num_cores", lambda: 9)
    monkeypatch.setattr(rank_environment, "_has_cuda", lambda: False)
    task = launch.task_here(Host("localhost", 4), [], tmp_path, "1234")
    env = rank_environment.rank_environment(task, 1, {})
    assert (env["OMP_NUM_THREADS"], env["DS_ACCELERATOR"], env["GLOO_SOCKET_IFNAME"]) == ("2", "cpu", "lo")
    assert env["TORCH_EXTENSIONS_DIR"] == str(Path(sys.prefix) / "torch_extensions")
    kept = {"OMP_NUM_THREADS": "7", "GLOO_SOCKET_IFNAME": "eth1", "TORCH_EXTENSIONS_DIR": "/x"}
    assert kept.items() <= rank_environment.rank_environment(task, 1, kept).items()
    monkeypatch.setattr(rank_environment, "_has_cuda", lambda: True)
    with_cuda = rank_environment.rank_environment(task, 1, {})
    assert "DS_ACCELERATOR" not in with_cuda and "GLOO_SOCKET_IFNAME" not in with_cuda


def test_the_first_failing_rank_is_named_and_the_others_are_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "print('up', os.getpid(), flush=True)\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(60)"
    start = time.monotonic()
    assert launch.launch([Host("127.0.0.1", 3)], rank_script(code), tmp_path / "logs", ENV) == 3
    assert time.monotonic() - start < 5
    said = capsys.readouterr().err
    assert "rank 1 of 3 failed first and the others were stopped: exit code 3." in said
    assert str(tmp_path / "logs" / "rank-00001.log") in said and "  | up " in said
    assert not any(is_alive(int(rank_log(tmp_path, rank).split()[1])) for rank in range(3))


def test_the_last_traceback_is_shown_and_a_victim_is_not_blamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "if os.environ['RANK'] == '0': raise RuntimeError('Connection closed by peer')\n"
        "time.sleep(0.2)\n"
        "print('noise\\n' * 100)\n"
        "raise ValueError('window 17 is not finite')"
    )
    assert launch.launch(HERE, rank_script(code), tmp_path / "logs", ENV) == 1
    said = capsys.readouterr().err
    assert "rank 1 of 2 failed first and the others were stopped: exit code 1." in said
    assert "  | Traceback (most recent call last)" in said and "  | ValueError: window 17 is not finite" in said
    assert "noise" not in said


def test_a_rank_that_is_killed_is_named_with_its_signal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    assert launch.launch(HERE, rank_script(code), tmp_path / "logs", ENV) == 128 + 9
    assert (
        "rank 1 of 2 failed first and the others were stopped: signal SIGKILL (out of memory?"
        in capsys.readouterr().err
    )


def test_a_rank_that_ignores_sigterm_is_killed_with_its_helpers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "KILL_GRACE_S", 0.3)
    code = (
        "import subprocess\n"
        "if os.environ['RANK'] == '1':\n"
        "    while not os.path.exists(sys.argv[1]): time.sleep(0.02)\n"
        "    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "helper = subprocess.Popen(['sleep', '60'])\n"
        "print(os.getpid(), helper.pid, flush=True)\n"
        "open(sys.argv[1], 'w').close()\n"
        "time.sleep(60)"
    )
    assert launch.launch(HERE, rank_script(code, str(tmp_path / "ready")), tmp_path / "logs", ENV) == 1
    pids = [int(word) for word in rank_log(tmp_path, 0).split()]
    wait_for(lambda: not any(is_alive(pid) for pid in pids), "the rank and its helper to end")


def test_a_second_launch_appends_to_the_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("one", "two"):
        assert launch.launch([Host("localhost", 1)], rank_script(f"print('{word}')"), tmp_path / "logs", ENV) == 0
    assert rank_log(tmp_path, 0) == "one\ntwo\n" == capsys.readouterr().out


LAUNCHER = """
import sys
from pathlib import Path
from train.hostfile import Host
from train.launch import launch
import os
sys.exit(launch([Host("localhost", 2)], sys.argv[2:], Path(sys.argv[1]), os.environ))
"""


def _launcher(tmp_path: Path, code: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a launcher of two ranks that say their pid, and wait until they have."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", LAUNCHER, str(tmp_path / "logs"), *rank_script(code)],
        env={**ENV, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    logs = [tmp_path / "logs" / f"rank-{rank:05d}.log" for rank in (0, 1)]
    wait_for(lambda: all(log.exists() and log.read_text().endswith("\n") for log in logs), "the ranks to start")
    return process, [int(log.read_text().split()[0]) for log in logs]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_reaches_every_rank_and_ends_everything(
    tmp_path: Path, number: signal.Signals
) -> None:
    code = (
        "def save(*_):\n    print('saved', flush=True); sys.exit(0)\n"
        f"signal.signal({int(number)}, save)\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    )
    process, pids = _launcher(tmp_path, code)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert f"{number.name}, passed on to 2 process(es)" in err and "saved" in out
    assert all("saved" in rank_log(tmp_path, rank) for rank in (0, 1))
    assert not any(is_alive(pid) for pid in pids)


def test_sigusr1_is_passed_on_and_a_second_sigterm_does_not_wait(tmp_path: Path) -> None:
    code = (
        "signal.signal(signal.SIGUSR1, lambda *_: print('checkpoint', flush=True))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])\n"
        "count = []\n"
        "def stop(*_):\n    count.append(1); print('no', flush=True)\n    if len(count) > 1: sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print(os.getpid(), flush=True)\nwhile True: time.sleep(60)"
    )
    process, pids = _launcher(tmp_path, code)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: all("checkpoint" in rank_log(tmp_path, rank) for rank in (0, 1)), "the checkpoints")
    process.terminate()
    wait_for(lambda: all("no" in rank_log(tmp_path, rank) for rank in (0, 1)), "the refusals")
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM and not any(is_alive(pid) for pid in pids)


@pytest.mark.parametrize("codes", [(85, 85), (85, 0)])
def test_only_where_all_ranks_have_saved_and_left_the_launcher_says_so(tmp_path: Path, codes: tuple[int, int]) -> None:
    code = (
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({codes}[int(os.environ['RANK'])]))\n"
        "print(os.getpid(), flush=True)\ntime.sleep(60)"
    )
    process, pids = _launcher(tmp_path, code)
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == (STOPPED if codes == (85, 85) else 128 + signal.SIGTERM)
    assert not any(is_alive(pid) for pid in pids)


def test_ranks_that_a_batch_system_has_asked_to_stop_are_no_failure(tmp_path: Path) -> None:
    assert (
        launch.launch(HERE, rank_script("time.sleep(int(os.environ['RANK'])); sys.exit(85)"), tmp_path, ENV) == STOPPED
    )


def test_memory_that_ranks_of_this_launch_share_is_given_back_and_no_other(tmp_path: Path) -> None:
    prefix, port = f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1", f"{os.getpid()}-test"
    mine, other = Path(f"{prefix}_{port}_1"), Path(f"{prefix}_{port}2_1")
    mine.touch()
    other.touch()
    leftovers.clear_shared_memory("127.0.0.1", port)
    assert not mine.exists() and other.exists()
    other.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_memory_that_a_killed_launch_has_left_is_given_back_unless_it_is_used_or_new() -> None:
    prefix = f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_test_{os.getpid()}"
    used, left, new = (Path(f"{prefix}_{name}") for name in ("used", "left", "new"))
    for path in (used, left, new):
        path.write_bytes(bytes(4096))
    for path in (used, left):
        os.utime(path, (1000, 1000))
    with open(used, "rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ):
        assert left in (cleared := leftovers.clear_unused_memory(2000)) and used not in cleared and new not in cleared
        assert used.exists() and new.exists() and not left.exists()
    for path in (used, new):
        path.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_launcher_that_is_killed_leaves_no_orphans(tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    process, pids = _launcher(tmp_path, code)
    assert all(is_alive(pid) for pid in pids)
    process.kill()
    process.communicate(timeout=10)
    wait_for(lambda: not any(is_alive(pid) for pid in pids), "the ranks to end")


def test_two_ranks_really_reduce_over_gloo(tmp_path: Path) -> None:
    code = (
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.tensor([float(dist.get_rank() + 1)])\n"
        "dist.all_reduce(x)\n"
        "print('sum', x.item())\n"
        "dist.destroy_process_group()"
    )
    assert launch.launch(HERE, [sys.executable, "-c", code], tmp_path / "logs", ENV) == 0
    assert all("sum 3.0" in rank_log(tmp_path, rank) for rank in (0, 1))


def test_a_lock_that_nobody_holds_is_removed_and_a_held_or_new_one_is_not(tmp_path: Path) -> None:
    locks = {name: tmp_path / "ext" / name / "lock" for name in ("held", "stale", "new")}
    for lock in locks.values():
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (1000, 1000))
    os.utime(locks["new"])
    with open(locks["held"], "rb"):
        assert leftovers.clear_stale_locks(tmp_path / "ext", time.time() - 60) == [locks["stale"]]
    assert locks["held"].exists() and locks["new"].exists() and not locks["stale"].exists()
    assert leftovers.clear_stale_locks(tmp_path / "no such folder", time.time()) == []


def test_the_launch_says_that_it_removed_a_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = Path(ENV["TORCH_EXTENSIONS_DIR"]) / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (1000, 1000))
    assert launch.launch([Host("localhost", 1)], rank_script(""), tmp_path / "logs", ENV) == 0
    assert f"launch: removed {lock}: a build that was killed left it" in capsys.readouterr().err


def test_launches_that_cannot_start_say_why(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"rank 0 cannot start '/no/program': No such file .* Check the command"):
        launch.launch(HERE, ["/no/program"], tmp_path / "logs", ENV)
    with pytest.raises(LaunchError, match=r"found no host; .* Run `make hostfile`"):
        launch.launch([], rank_script(""), tmp_path / "logs", ENV)
    with pytest.raises(LaunchError, match=r"hosts localhost, 127\.0\.0\.1 are all this machine; .* Keep one"):
        launch.launch([Host("localhost", 1), Host("127.0.0.1", 1)], rank_script(""), tmp_path / "logs", ENV)


def _main(*argv: str) -> int:
    """Parse as `python -m train` does: in a sub-command."""
    parser = argparse.ArgumentParser()
    launch.configure(parser.add_subparsers().add_parser("launch"))
    return launch.main(parser.parse_args(["launch", *argv]))


def test_a_dry_run_shows_the_ranks_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostfile.write(tmp_path / "hosts", HERE, "test")
    out = tmp_path / "run"
    assert _main("--hostfile", str(tmp_path / "hosts"), "--out", str(out), "--dry-run", "--", "--x", "a b") == 0
    printed = capsys.readouterr().out
    for rank in (0, 1):
        assert f"this machine, rank {rank}, log {out}/logs/rank-{rank:05d}.log:" in printed
        assert f" RANK={rank} " in printed
    assert printed.count(shlex.join([*WORKER, "--x", "a b"])) == 2
    assert not out.exists()


def test_a_missing_or_wrong_hostfile_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("--hostfile", str(tmp_path / "none"), "--", "--x") == 2
    assert "HostfileError" in capsys.readouterr().err
    (tmp_path / "wrong").write_text("localhost slots=2.5\n", encoding="utf-8")
    assert _main("--hostfile", str(tmp_path / "wrong"), "--", "--x") == 2
    assert "line 1: found 'localhost slots=2.5'" in capsys.readouterr().err
