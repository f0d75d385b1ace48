"""The doctor: each fault that can be planted is named with what mends it, and a healthy host is not.

In:  facts as hosts report them, this machine, and hosts behind a stand-in for ssh.
Out: lines of `ok` and `FAIL`, exit codes.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from train import doctor_pairs, doctor_probe, dry_run, on_hosts
from train.doctor import of_the_network
from train.doctor_checks import CHECKS, Context, Found, Line, all_reduce, lines
from train.doctor_pairs import Task, rounds
from train.doctor_probe import Question, facts
from train.hostfile import Host

ROOT = Path(__file__).resolve().parent.parent
GPU = ["570.1", "NVIDIA H100", "10", "81559"]
IB = {"mlx5_0:1": "ACTIVE, 400 Gb/sec (4X NDR)", "mlx5_1:1": "ACTIVE, 400 Gb/sec (4X NDR)"}
HEALTHY: dict[str, Any] = {
    "python": "3.11.7 /x/.venv/bin/python",
    "versions": {"torch": "2.13.0", "zarr": "3.1.6"},
    "code": {"digest": "c" * 64, "revision": "0123456789ab"},
    "config": "d" * 64,
    "store": "e" * 64,
    "gpus": {"gpus": [GPU, GPU], "torch": 2},
    "processes": [],
    "locks": {"/ext/op/lock 7": {"held": True, "age_s": 3.0}},
    "disk": {"folder": "/shared", "free": 1e12, "write_bytes_s": 5e8, "shared": True},
    "interface": {
        "name": "ib0",
        "address": "10.0.0.1",
        "mbit_s": 400_000,
        "infiniband": IB,
        "names": ["lo", "eth0", "ib0"],
        "env": {"NCCL_SOCKET_IFNAME": "=ib0", "GLOO_SOCKET_IFNAME": "ib0"},
        "port": 1,
    },
    "limits": {"nofile": 65536, "memlock": -1},
    "shm": 2**34,
    "num_cores": 96,
    "started_s": 1000.5,
    "ended_s": 1002.5,
    "asked_s": 1000.0,
    "answered_s": 1003.0,
}
HOSTS = [Host("n1", 2), Host("n2", 2), Host("n3", 2)]


def _found(fault: dict[str, Any] | None = None, host: str = "n2", names: tuple[str, ...] = ("n1", "n2", "n3")) -> Found:
    """Healthy hosts, one of which has other facts; a dotted name is a fact inside a fact."""
    found = {name: copy.deepcopy(HEALTHY) for name in names}
    for key, value in (fault or {}).items():
        target = found[host]
        *parents, last = key.split(".")
        for parent in parents:
            target = target[parent]
        target[last] = value
    return found


def _bad(found: Found, **context: Any) -> list[str]:
    return [str(line) for line in lines(found, Context(HOSTS, **context)) if line.fix]


def test_healthy_hosts_have_a_line_for_each_check_and_no_fail() -> None:
    said = lines(_found(), Context(HOSTS))
    assert not [str(line) for line in said if line.fix]
    names = [name for text, _ in CHECKS for name in text.split(":")[0].split(", ")]
    assert [line.check for line in said if line.host == "n2"] == names
    assert str(said[0]) == "n1               python      ok    3.11.7 /x/.venv/bin/python"


def test_one_host_alone_is_compared_with_nothing_and_is_well() -> None:
    said = lines(_found(names=("n1",), host="n1"), Context(HOSTS))
    assert not [line for line in said if line.fix]
    compared = [line.check for line in said if line.text.endswith("one host: nothing to compare")]
    assert compared == ["python", "versions", "code", "config", "store", "driver", "interface"]


@pytest.mark.parametrize(
    ("fault", "check", "text", "fix"),
    [
        ({"python": "3.12.1 /x"}, "python", "3.12.1 /x, but n1 has 3.11.7", "the same Python"),
        ({"versions.zarr": "3.0.0"}, "versions", "zarr 3.0.0, but n1 has torch 2.13.0, zarr 3.1.6", "make install"),
        ({"code": {"digest": "f" * 64, "revision": "abc+"}}, "code", "revision abc+, but n1 has", "same revision"),
        ({"config": "0" * 64}, "config", "digest 000000000000, but n1 has digest dddd", "copy the run's YAML"),
        ({"config": {"error": "FileNotFoundError: x"}}, "config", "FileNotFoundError: x", "copy the run's YAML"),
        ({"store": {"error": "StoreError: gone"}}, "store", "StoreError: gone", "mount the store at the same path"),
        ({"store": {"error": "no answer in 30 s"}}, "store", "no answer in 30 s", "mount the store"),
        ({"gpus": {"gpus": [GPU], "torch": 1}}, "gpus", "1 GPU(s), 1 of them for torch, slots=2", "SLOTS=1"),
        ({"gpus": {"gpus": [], "torch": 0}}, "gpus", "0 GPU(s)", "SLOTS=N"),
        ({"gpus.torch": 0}, "gpus", "2 GPU(s), 0 of them for torch", "newer driver"),
        ({"gpus": {"gpus": [["470.2", *GPU[1:]]] * 2, "torch": 2}}, "driver", "470.2, but n1 has 570.1", "same driver"),
        ({"gpus.gpus": [GPU, [*GPU[:2], "70000", GPU[3]]]}, "gpu memory", "GPU 1 has 70000 of 81559 MiB", "nvidia-smi"),
        ({"processes": ["17 python -m train worker"]}, "processes", "1 rank(s) of an earlier", "`kill 17` there"),
        ({"locks": {"/ext/op/lock 9": {"held": False, "age_s": 60}}}, "locks", "nobody holds, 60 s", "remove /ext"),
        ({"disk.free": 1e9}, "disk", "1.0 GB free", "free 2.1 GB for the checkpoints"),
        ({"disk.write_bytes_s": 1e6}, "disk", "1 MB/s with fsync", "faster disk"),
        ({"disk.shared": False}, "disk", "not the folder that the others see", "shared file system"),
        ({"disk": {"error": "PermissionError: no"}}, "disk", "PermissionError: no", "every host can write"),
        ({"started_s": 997.0}, "clock", "3.0 s or more behind", "start chrony"),
        ({"ended_s": 1009.0}, "clock", "6.0 s or more ahead", "start chrony"),
        ({"interface.mbit_s": 1000}, "interface", "1 Gbit/s", "others have 400 Gbit/s: look at the cable"),
        ({"interface.infiniband": {"mlx5_0:1": "DOWN, 10"}}, "interface", "mlx5_0:1 DOWN", "2 active InfiniBand"),
        ({"interface.env": {"NCCL_SOCKET_IFNAME": "=bond0"}}, "interface", "=bond0 is not there", "one of lo eth0 ib0"),
        ({"interface.env": {"GLOO_SOCKET_IFNAME": "eth"}}, "interface", "IFNAME=eth is not there", "one of"),
        ({"interface": {"error": "gaierror: no"}}, "interface", "gaierror: no", "names that resolve"),
        ({"limits.nofile": 1024}, "limits", "1024 open files", "`ulimit -n`"),
        ({"limits.memlock": 65536}, "limits", "0 MiB of locked memory", "`ulimit -l unlimited`"),
        ({"shm": 64 * 2**20}, "shm", "/dev/shm has 64 MiB", "1024 MiB are needed"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_the_one_fail_and_names_host_text_and_fix(
    fault: dict[str, Any], check: str, text: str, fix: str
) -> None:
    (said,) = _bad(_found(fault))
    assert said.startswith(f"n2               {check:<11} FAIL  ")
    told, mends = said.split(". Fix: ")
    assert text in told and fix in mends


def test_on_hosts_without_gpus_shm_is_by_rank() -> None:
    found = _found()
    for its in found.values():
        its["gpus"] = {"gpus": [], "torch": 0}
        its["interface"].update(env={}, infiniband={}, mbit_s=0)
        its["shm"] = 2 * 64 * 2**20
    assert not _bad(found)
    found["n2"]["shm"] -= 1
    (said,) = _bad(found)
    assert "/dev/shm has 128 MiB" in said and "128 MiB are needed" in said


def test_a_lock_that_another_host_holds_on_a_shared_disk_is_not_stale() -> None:
    lock = "/ext/op/lock 7"
    found = _found({"locks": {lock: {"held": False, "age_s": 60.0}}})
    assert not _bad(found)  # n1 and n3 see it held
    for name in ("n1", "n3"):
        found[name]["locks"] = {}
    assert len(_bad(found)) == 1


def test_the_run_says_how_much_disk_it_needs() -> None:
    assert "free 2000.0 GB for the checkpoints" in _bad(_found(), needed_bytes=2e12)[0]


def _rates(**pairs: float) -> list[Line]:
    return all_reduce([{"pair": pair.split("_"), "gbit_s": rate} for pair, rate in pairs.items()])


def test_the_slow_host_is_named_and_not_its_partners() -> None:
    said = _rates(n1_n2=10.0, n1_n3=1.0, n2_n3=1.1)
    assert [line.host for line in said if line.fix] == ["n3"]
    assert "this host is slow, others reach 10.00 Gbit/s" in said[-1].fix
    assert not [line for line in _rates(n1_n2=10.0, n1_n3=9.0, n2_n3=8.0) if line.fix]


def test_a_slow_or_lost_way_between_two_hosts_is_named_at_both() -> None:
    said = _rates(n1_n2=10.0, n1_n3=10.0, n2_n3=1.0)
    assert [(line.host, "slow with" in line.text) for line in said if line.fix] == [("n2", True), ("n3", True)]
    lost = [{"pair": ["n1", "n2"], "error": "timed out"}, {"pair": ["n1", "n3"], "gbit_s": 3.0}]
    assert [line.text.partition("; ")[2] for line in all_reduce(lost) if line.fix] == [
        "failed with n2: timed out",
        "failed with n1: timed out",
    ]


@pytest.mark.parametrize("number", [2, 3, 4, 7, 8])
def test_every_pair_meets_once_and_no_host_is_twice_in_a_round(number: int) -> None:
    made = rounds(number)
    assert sorted(pair for each in made for pair in each) == [
        (a, b) for a in range(number) for b in range(a + 1, number)
    ]
    assert all(len({name for pair in each for name in pair}) == 2 * len(each) for each in made)


# ---------------------------------------------------------------- what the probe finds on this machine


def _question(tmp_path: Path, **more: Any) -> Question:
    return Question(out=str(tmp_path / "runs" / "x"), extensions=str(tmp_path / "ext"), env={}, **more)


def test_the_probe_finds_every_fact_on_this_machine_and_leaves_nothing(tmp_path: Path) -> None:
    config = ROOT / "train" / "configs" / "debug.yaml"
    found = facts(_question(tmp_path, config=str(config), peer="127.0.0.1"))
    errors = {name: its["error"] for name, its in found.items() if isinstance(its, dict) and "error" in its}
    assert not errors
    assert found["python"] == f"{sys.version.split()[0]} {sys.executable}"
    assert found["interface"]["name"] == "lo" and found["versions"]["torch"].startswith("2.")
    assert found["disk"]["folder"] == str(tmp_path) and found["disk"]["write_bytes_s"] > 0
    assert not list(tmp_path.iterdir())


def test_stale_locks_and_ranks_that_are_alive_are_found(tmp_path: Path) -> None:
    for name in ("stale", "held"):
        (tmp_path / "ext" / name).mkdir(parents=True)
        (tmp_path / "ext" / name / "lock").touch()
        os.utime(tmp_path / "ext" / name / "lock", (1000, 1000))
    code = "import sys, time; print('up', flush=True); time.sleep(60)"
    rank = subprocess.Popen([sys.executable, "-c", code, "-m", "train", "worker"], stdout=subprocess.PIPE)
    try:
        assert rank.stdout is not None and rank.stdout.readline()
        with open(tmp_path / "ext" / "held" / "lock", "rb"):
            found = facts(_question(tmp_path))
    finally:
        rank.kill()
        rank.communicate()
    assert {Path(key.split()[0]).parent.name: its["held"] for key, its in found["locks"].items()} == {
        "stale": False,
        "held": True,
    }
    assert any(line.startswith(f"{rank.pid} ") for line in found["processes"])


def test_a_full_disk_a_wrong_store_and_a_dead_file_system_are_facts_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 1000))
    monkeypatch.setattr(doctor_probe, "FACT_S", 1.0)
    monkeypatch.setattr(doctor_probe, "_versions", lambda: time.sleep(3))
    found = facts(_question(tmp_path, store=str(tmp_path / "none"), marker=str(tmp_path / "marker")))
    assert found["disk"] == {"folder": str(tmp_path), "free": 1000, "write_bytes_s": 0.0, "shared": False}
    assert found["store"]["error"].startswith("StoreError: ") and "is missing" in found["store"]["error"]
    assert found["versions"]["error"] == "no answer in 1 s"


def test_other_code_has_another_digest(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "x.py").write_text("a = 1\n")
    before = doctor_probe.code_digest(tmp_path)
    (tmp_path / "train" / "x.py").write_text("a = 2\n")
    assert doctor_probe.code_digest(tmp_path) != before


# ---------------------------------------------------------------- the command

# ssh for tests: every host is this machine; what is odd about one stands in its name.
SSH = r"""
import json, subprocess, sys, time
if sys.argv[1] == "-G":
    print(f"hostname {sys.argv[2]}\nproxyjump gate")
    sys.exit()
host, command = sys.argv[-2:]
if host == "locked":
    print("root@locked: Permission denied (publickey).", file=sys.stderr)
    sys.exit(255)
if host == "hangs":
    time.sleep(60)
if host == "empty":
    command = command.replace("python", "no-python")
done = subprocess.run(["sh", "-c", command], capture_output=True, stdin=sys.stdin)
sys.stderr.buffer.write(done.stderr)
for line in done.stdout.decode().splitlines():
    mark, _, rest = line.partition(" ")
    if host == "fast" and "ended_s" in rest:
        rest = json.dumps({**json.loads(rest), "ended_s": time.time() + 100})
    if host == "other" and "ended_s" in rest:
        rest = json.dumps({**json.loads(rest), "code": {"digest": "0" * 64, "revision": "old"}})
    print(mark, rest)
sys.exit(done.returncode)
"""


def _doctor(tmp_path: Path, *words: str, hosts: str = "", **env: str) -> "subprocess.CompletedProcess[str]":
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(f"#!{sys.executable} -S\n{SSH}")
    (tmp_path / "bin" / "ssh").chmod(0o755)
    if hosts:
        (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in hosts.split()))
        words = ("--hostfile", str(tmp_path / "hosts"), *words)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    clean.update(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", TORCH_EXTENSIONS_DIR=str(tmp_path / "ext"), **env)
    command = [sys.executable, "-m", "train", "doctor", *words]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


def _fails(done: "subprocess.CompletedProcess[str]") -> list[str]:
    """What failed; ranks of other runs on this machine are not the test's."""
    return [line for line in done.stdout.splitlines() if " FAIL " in line and " processes " not in line]


def test_this_machine_alone_is_well(tmp_path: Path) -> None:
    words = ["--config", "train/configs/debug.yaml", "--out", str(tmp_path / "runs" / "x")]
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    done = _doctor(tmp_path, *words, "--hostfile", str(tmp_path / "hosts"))
    assert not _fails(done), done.stdout + done.stderr
    assert "localhost        all-reduce  ok    one host: nothing to compare" in done.stdout
    assert "localhost        gpus        ok    none: 1 rank(s) on the CPU" in done.stdout or "GPU(s)" in done.stdout
    assert done.returncode == (1 if " processes   FAIL" in done.stdout else 0)


def test_each_host_with_a_fault_of_its_own_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "ext" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (1000, 1000))
    interface = doctor_probe.interface("nobody.invalid", {})["name"]
    done = _doctor(tmp_path, hosts="good locked empty fast other", GLOO_SOCKET_IFNAME=interface)
    fails = _fails(done)
    assert done.returncode == 1, done.stderr
    assert (
        "locked           reachable   FAIL  root@locked: Permission denied (publickey). Fix: make `ssh -o BatchMode=yes"
        in done.stdout
    )
    assert "make hostfile ARGS='--exclude locked'" in done.stdout
    assert any("empty            python      FAIL" in line and "not found" in line for line in fails), done.stdout
    assert any("fast             clock       FAIL" in line and "ahead" in line for line in fails)
    assert any("other            code        FAIL  digest 000000000000, revision old" in line for line in fails)
    assert {line.split()[0] for line in fails if " locks " in line} == {"good", "fast", "other"}
    assert {line.split()[1] for line in fails if line.startswith("good")} - {"all-reduce"} == {"locks"}
    # ssh knows the names and nobody else; the three that answered meet by their addresses all the same. How fast they
    # are beside each other is this machine's load.
    measured = [line for line in done.stdout.splitlines() if " all-reduce  " in line]
    assert len(measured) == 3 and all("2 pair(s)" in line for line in measured), done.stdout
    assert not [line for line in measured if "failed with" in line]


def test_two_processes_measure_their_pair_and_the_first_of_them_tells() -> None:
    port = doctor_probe.interface("127.0.0.1", {})["port"]
    task = {"names": ["a", "b"], "address": "127.0.0.1", "port": port, "interface": "lo", "use_gpu": False}
    commands = [[sys.executable, "-m", "train", "doctor-pairs"]] * 2
    answers = on_hosts.ask_all(commands, [json.dumps({**task, "rank": rank}).encode() for rank in (0, 1)], 250.0)
    first, second = (json.loads(answer.out.removeprefix(doctor_probe.MARK)) for answer in answers)
    assert [result["pair"] for result in first] == [["a", "b"]] and first[0]["gbit_s"] > 0 and not second
    assert 1 < first[0]["latency_us"] < 1e6, "something between a microsecond and a second"


def test_what_is_said_of_the_network_is_of_its_slowest_way_and_dry_run_takes_it() -> None:
    lost = {"pair": ["a", "d"], "error": "timed out"}
    ways = [{"gbit_s": 8.0, "latency_us": 90.0}, {"gbit_s": 4.0, "latency_us": 30.0}, lost]
    said = of_the_network(ways)
    assert said.endswith('the worst of 2 pair(s): make dry-run ARGS="--bandwidth-inter 0.5 --latency-inter 90.0"')
    assert of_the_network([lost]) == ""
    parser = argparse.ArgumentParser()
    dry_run.configure(parser)
    args = parser.parse_args(["--config", "x", *said.split('"')[1].split()])
    assert (args.bandwidth_inter, args.latency_inter) == (0.5, 90)


def test_a_host_that_does_not_come_is_an_error_of_its_pairs_and_costs_the_others_no_time() -> None:
    task = Task(rank=0, names=["a", "b", "c"], address="10.0.0.1", port=9, interface="", use_gpu=False)
    result = doctor_pairs._measure(task, HashStore(), (0, 2), came=[0, 1])
    assert result == {"pair": ["a", "c"], "error": "c did not come to 10.0.0.1:9"}
    assert not doctor_pairs._comes(HashStore(), ["never"], time.monotonic())


def test_a_host_that_hangs_costs_its_time_out_and_is_named() -> None:
    begun = time.monotonic()
    sleep = [sys.executable, "-c", "import time; print('x', flush=True); time.sleep(60)"]
    late, other = on_hosts.ask_all([sleep, ["cat"]], [b"", b"text"], 2.0)
    assert (late.code, late.out, late.reached) == (None, "x\n", False)
    assert (other.code, other.out, other.reached) == (0, "text", True)
    assert time.monotonic() - begun < 20


def test_a_dry_run_prints_what_would_be_asked_where(tmp_path: Path) -> None:
    done = _doctor(tmp_path, "--dry-run", hosts="a b")
    assert done.returncode == 0
    assert "a: ssh -o BatchMode=yes -o ConnectTimeout=5 a 'cd " in done.stdout and "doctor-probe" in done.stdout
    assert "clock: within a second" in done.stdout and "all-reduce: between every pair" in done.stdout


def test_a_wrong_hostfile_is_an_error_and_never_this_machine_alone(tmp_path: Path) -> None:
    done = _doctor(tmp_path, "--hostfile", str(tmp_path / "none"))
    assert done.returncode == 2 and "no hostfile can be read here" in done.stderr and not done.stdout


@pytest.mark.parametrize(
    "odd", ["a b", "it's", 'say "x"', ";touch CANARY", "$(touch CANARY)", "`touch CANARY`", "a\nb", "*"]
)
def test_the_one_shell_of_ssh_gets_folder_and_arguments_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    folder = tmp_path / odd
    folder.mkdir()
    monkeypatch.chdir(folder)
    words = on_hosts.words_for([Host("a", 1), Host("b", 1)], {})(Host("a", 1), ["printf", "%s|", odd, "$HOME"])
    assert words[:-1] == ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "a"]
    done = subprocess.run(["sh", "-c", words[-1]], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout == f"{odd}|$HOME|"
    assert not list(folder.iterdir()) and not Path("/CANARY").exists()


def test_in_a_slurm_job_srun_takes_the_words_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    env = {"SLURM_JOB_ID": "7", "PATH": str(tmp_path)}
    words = on_hosts.words_for([Host("a", 1), Host("b", 1)], env)(Host("a", 1), ["x", "$(id)"])
    assert words[0] == "srun" and "--nodelist=a" in words and words[-2:] == ["x", "$(id)"]
    lost = on_hosts.Answer(1, "", "srun: error: Unable to create step\nsrun: error: node down\n", 0, 1)
    failed = on_hosts.Answer(1, "", "python: not found\nsrun: error: a: task 0: Exited with 1\n", 0, 1)
    assert not lost.reached and failed.reached and failed.last_line == "python: not found"


def test_what_the_hosts_are_asked_is_json_on_stdin() -> None:
    question = {"store": 'a"b $(id)', "env": {"GLOO_SOCKET_IFNAME": "x y"}}
    assert Question(**json.loads(json.dumps(question))).store == 'a"b $(id)'
