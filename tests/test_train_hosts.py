"""Several real hosts, each with its own network, processes and sshd: the hostfile, the doctor, a run over two of them.

In: hosts in namespaces of this machine, a tiny store. Out: what the commands print, losses, and nothing left behind.
"""

import io
import os
import shlex
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts_on_one_machine import Hosts, hosts, why_not
from processes import below, cmdline, comes_true
from slurm_on_one_machine import slurm
from slurm_on_one_machine import why_not as why_no_slurm
from train_builders import ROOT, losses, prepare_run, rank_environment, tiny_run, tiny_store, train_ranks

from train import hostfile, stage
from train.exit_codes import STOPPED
from train.hostfile import Host

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(tmp_path_factory.mktemp("hosts") / "made", ("n1", "n2", "n3")) as made:
        yield made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


def _env(folder: Path) -> dict[str, str]:
    # Compiled ops are in a folder of this test: no lock of another run is in sight.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "MAKE", "PBS", "LSB"))}
    return {**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder / "ext")}


def _make(made: Hosts, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """A target of make on the login host, in this clone as it is installed."""
    return made.run("make", "-s", "-o", ".venv/installed", *words, cwd=ROOT, env=_env(folder))


def _fails(done: "subprocess.CompletedProcess[str]") -> list[list[str]]:
    return [line.split(maxsplit=3) for line in done.stdout.splitlines() if " FAIL " in line]


def test_the_hosts_are_apart_and_leave_nothing(tmp_path: Path) -> None:
    def left() -> str:
        return subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout

    with hosts(tmp_path / "made", ("a", "b")) as made:
        assert made.run("ssh", "b", "hostname; hostname -I").stdout.split() == ["b", made.address("b")]
        assert made.run("ssh", "b", "ps ax").stdout.count("\n") < 10
        assert made.run("hostname").stdout == "login\n"
        made.cut("b")
        assert made.run("ssh", "-o", "ConnectTimeout=1", "b", "true").returncode == 255
        made.mend("b")
        assert made.run("ssh", "b", "true").returncode == 0
        sleeper = made.run("ssh", "a", "sleep 1234.5 > /dev/null 2>&1 & echo up")
        assert sleeper.stdout == "up\n" and made.tag in left()
    assert made.tag not in left() and not any(Path("/etc/netns").glob(f"{made.tag}*"))
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if b"1234.5" in command or made.tag.encode() in command]


def test_make_hostfile_and_make_doctor_find_two_hosts_well(three: Hosts, store: Path, tmp_path: Path) -> None:
    path = tmp_path / "cluster"
    done = _make(three, tmp_path, "hostfile", "NODES=n[1-2]", "SLOTS=1", f"HOSTFILE={path}")
    assert done.returncode == 0 and hostfile.read(path) == [Host("n1", 1), Host("n2", 1)], done.stderr
    done = _make(three, tmp_path, "doctor", f"HOSTFILE={path}", f"STORE={store}", f"OUT={tmp_path / 'run'}")
    assert not _fails(done) and done.returncode == 0, done.stdout + done.stderr
    assert "n2               interface   ok    eth0 (" in done.stdout
    measured = [line for line in done.stdout.splitlines() if " all-reduce  ok" in line and "1 pair(s)" in line]
    assert len(measured) == 2
    assert 'the worst of 1 pair(s): make dry-run ARGS="--bandwidth-inter ' in done.stdout.splitlines()[-1]
    unknown = _make(three, tmp_path, "hostfile", "NODES=n[1-4]", "SLOTS=1", f"HOSTFILE={path}")
    assert unknown.returncode == 2 and "found 'n4', which neither the name service" in unknown.stderr
    alias = _make(three, tmp_path, "hostfile", f"NODES=n1 {three.address('n1')}", "SLOTS=1", f"HOSTFILE={path}")
    assert alias.returncode == 2 and f"which is {three.address('n1')} as 'n1' of line" in alias.stderr


def test_the_doctor_names_the_host_that_is_cut_off_and_the_one_that_is_slow(three: Hosts, tmp_path: Path) -> None:
    hostfile.write(tmp_path / "cluster", [Host(name, 1) for name in three.names], "test")
    words = ["doctor", f"HOSTFILE={tmp_path / 'cluster'}", f"OUT={tmp_path / 'run'}", "STORE="]
    three.shape("n3", "60mbit")
    done = _make(three, tmp_path, *words)
    assert [(host, check) for host, check, *_ in _fails(done)] == [("n3", "all-reduce")], done.stdout
    assert "this host is slow, others reach" in done.stdout and done.returncode == 2  # make's own for any failure
    three.cut("n3")
    try:
        done = _make(three, tmp_path, *words)
    finally:
        three.mend("n3")
        three.shape("n3", "10gbit")
    assert [(host, check) for host, check, *_ in _fails(done)] == [("n3", "reachable")], done.stdout
    assert "leave it out: `make hostfile ARGS='--exclude n3'`" in done.stdout


def test_a_run_over_two_hosts_saves_on_a_signal_goes_on_and_has_the_losses_of_one_host(
    three: Hosts, store: Path, tmp_path: Path
) -> None:
    run = tiny_run(num_steps=8)
    one = prepare_run(tmp_path / "one", store, run)
    assert train_ranks(one, slots=2) == 0
    run.save(tmp_path / "run.yaml")
    hostfile.write(tmp_path / "cluster", [Host("n1", 1), Host("n2", 1)], "test")
    words = ["--config", tmp_path / "run.yaml", "--store", store, "--out", tmp_path / "two"]
    command = [sys.executable, "-m", "train", "train", *words, "--hostfile", tmp_path / "cluster"]
    env = {**rank_environment(), "DS_ACCELERATOR": "cpu"}
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            three.words("login", list(map(str, command))), cwd=ROOT, env=env, stdout=said, stderr=said, text=True
        )
        rows = tmp_path / "two" / "metrics.jsonl"
        assert comes_true(lambda: process.poll() is not None or (rows.exists() and rows.read_text()), 300)
        [launcher] = [
            pid for pid in below(process.pid) if cmdline(pid).split(b"\0")[1:4] == [b"-m", b"train", b"train"]
        ]
        os.kill(launcher, signal.SIGUSR1)
        assert process.wait(timeout=60) == STOPPED, (tmp_path / "said").read_text()
    assert "SIGUSR1, passed on to 2 process(es)" in (tmp_path / "said").read_text()
    assert 0 < len(losses(tmp_path / "two")) < 8
    done = three.run(*map(str, command), cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resuming from" in done.stdout and "n2: rank 1 of 2, agent " in done.stderr
    assert max(abs(a - b) for a, b in zip(losses(one), losses(tmp_path / "two"), strict=True)) < 1e-5


def test_make_hostfile_doctor_and_train_take_three_hosts_and_the_losses_are_those_of_one(
    three: Hosts, store: Path, tmp_path: Path
) -> None:
    run = tiny_run(num_steps=4, global_batch_size=6, micro_batch_size=1)
    one = prepare_run(tmp_path / "one", store, run)
    assert train_ranks(one, slots=2) == 0
    run.save(tmp_path / "run.yaml")
    values = [
        f"{name}={value}"
        for name, value in {
            "RUN": tmp_path / "run.yaml",
            "STORE": store,
            "OUT": tmp_path / "three",
            "HOSTFILE": tmp_path / "cluster",
        }.items()
    ]
    for words in (["hostfile", "NODES=n[1-3]", "SLOTS=1"], ["doctor"], ["train"]):
        done = _make(three, tmp_path, *words, *values)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "n3: rank 2 of 3, agent " in done.stderr
    assert max(abs(a - b) for a, b in zip(losses(one), losses(tmp_path / "three"), strict=True)) < 1e-5


def test_hosts_that_do_not_share_the_code_get_it_by_make_stage_and_the_doctor_finds_them_well(
    three: Hosts, store: Path, tmp_path: Path
) -> None:
    code = tmp_path / "the code"
    code.mkdir()
    with tarfile.open(fileobj=io.BytesIO(stage.packed(ROOT, None))) as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "code").rename(code)
    for name in ("n2", "n3"):
        three.inside(name, "mount", "-t", "tmpfs", "tmpfs", str(code))
    hostfile.write(tmp_path / "cluster", [Host(name, 1) for name in three.names], "test")
    tiny_run(num_steps=2, global_batch_size=6, micro_batch_size=1).save(tmp_path / "run.yaml")
    values = {"HOSTFILE": tmp_path / "cluster", "RUN": tmp_path / "run.yaml", "STORE": store, "OUT": tmp_path / "out"}

    def make(target: str) -> "subprocess.CompletedProcess[str]":
        words = [f"{name}={value}" for name, value in values.items()]
        command = ["make", "-s", "-o", ".venv/installed", f"PY={sys.executable}", target, *words]
        return three.run(*command, cwd=code, env=_env(tmp_path))

    without = make("doctor")
    assert {(host, check) for host, check, *_ in _fails(without)} == {("n2", "code"), ("n3", "code")}, without.stdout
    assert f"no code in {code}. Fix: put it there (`make stage`)" in without.stdout
    staged = make("stage")
    assert [line.split(maxsplit=3) for line in staged.stdout.splitlines()] == [
        ["n1", "code", "ok", "sees this folder"],
        ["n2", "code", "ok", "staged"],
        ["n3", "code", "ok", "staged"],
    ], staged.stderr
    with_it = make("doctor")
    assert not _fails(with_it) and with_it.returncode == 0, with_it.stdout + with_it.stderr
    done = make("train")
    assert done.returncode == 0 and len(losses(tmp_path / "out")) == 2, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_run_folder_that_a_host_does_not_see_is_said(three: Hosts, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    three.inside("n2", "mount", "-t", "tmpfs", "tmpfs", str(out))
    tiny_run(num_steps=2).save(tmp_path / "run.yaml")
    hostfile.write(tmp_path / "cluster", [Host("n1", 1), Host("n2", 1)], "test")
    values = {"HOSTFILE": tmp_path / "cluster", "RUN": tmp_path / "run.yaml", "STORE": store, "OUT": out}
    words = [f"{name}={value}" for name, value in values.items()]
    done = _make(three, tmp_path, "doctor", *words)
    assert [(host, check) for host, check, *_ in _fails(done)] == [("n2", "disk")], done.stdout
    done = _make(three, tmp_path, "train", *words)
    assert done.returncode == 2 and "The run folder must lie on a disk that all hosts share" in done.stderr
    assert "rank 1 of 2 on n2 failed first" in done.stderr


# A launch of its own on two nodes, which is asked to save after some seconds; argv: the folder of logs.
IN_A_JOB = """
import os, signal, sys, threading
from pathlib import Path
from train import launch
from train.hostfile import Host
code = '''
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(85))
print(os.environ["RANK"], os.environ["MASTER_ADDR"], os.environ["GLOO_SOCKET_IFNAME"], sys.argv[1:], flush=True)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
time.sleep(60)
'''
threading.Timer(3.0, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
command = [sys.executable, "-c", code, "a b;$(id)\\n%h"]
sys.exit(launch.launch([Host("n1", 1), Host("n2", 1)], command, Path(sys.argv[1]), os.environ))
"""


@pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm())
def test_in_an_allocation_of_slurm_agents_are_started_by_srun_and_a_signal_reaches_both(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(IN_A_JOB)
    with slurm(tmp_path / "slurm") as made:
        job = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "logs")]
        words = made.words("login", ["salloc", "--quiet", "--nodes=2", "--ntasks=2", *job])
        env = {**made.environment, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == STOPPED, done.stderr
    lines = [(tmp_path / "logs" / f"rank-0000{rank}.log").read_text().strip() for rank in (0, 1)]
    address = lines[0].split()[1]
    assert lines == [f"{rank} {address} eth0 {['a b;$(id)' + chr(10) + '%h']}" for rank in (0, 1)]
    assert "n2: rank 1 of 2, agent " in done.stderr and "SIGUSR1, passed on to 2 process(es)" in done.stderr


@pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm())
def test_in_an_allocation_of_slurm_the_nodes_are_found_and_asked_by_srun(tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    cluster, python = tmp_path / "cluster", [sys.executable, "-m", "train"]
    lines = [[*python, "hostfile", "--out", str(cluster)], [*python, "doctor", "--hostfile", str(cluster)]]
    script.write_text("".join(f"{shlex.join(line)}\n" for line in lines))
    with slurm(tmp_path / "slurm") as made:
        words = made.words("login", ["salloc", "--quiet", "--nodes=2", "--ntasks=2", "bash", str(script)])
        env = {**made.environment, "TORCH_EXTENSIONS_DIR": str(tmp_path / "ext"), "GLOO_SOCKET_IFNAME": "eth0"}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert hostfile.read(cluster) == [Host("n1", 1), Host("n2", 1)], done.stderr
    assert "# From: SLURM_JOB_NODELIST=n[1-2], SLURM_TASKS_PER_NODE=1(x2)" in cluster.read_text()
    fails = [(host, check) for host, check, *_ in _fails(done) if check != "processes"]  # other runs of this machine
    assert not fails and done.stdout.count(" all-reduce  ok") == 2, done.stdout + done.stderr
