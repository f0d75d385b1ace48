"""Clusters: strict files, job scripts, workers that come, go and are replaced, and an end where nobody is left.

In: cluster files, stand-ins for recordings, a batch system and a Dask scheduler of the tests. Out: stores, exit codes.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import batch_system
import pytest
from batch_system import cluster_file, recordings
from processes import wait_for
from store_builders import tree

import prep.cluster
import prep.progress
import prep.worker_jobs
from prep.__main__ import main
from prep.cluster import connect, job_script
from prep.cluster_config import ClusterConfig, load
from prep.plan import PrepError
from prep.progress import in_words, shown
from prep.settings import ConfigError

ROOT = Path(__file__).parent.parent
TEMPLATES = ROOT / "prep" / "clusters"
PATIENCE_S = 90.0
STAND_IN = """
import sys
import prep.ingest
from prep.__main__ import main
from store_builders import fake_planner
prep.ingest.plan_from_nwb = fake_planner
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
SLURM = {"kind": "slurm", "workers": 2, "memory": "1GB", "walltime": "01:00:00"}
LOCAL = {"kind": "local", "workers": 2, "memory": "1GB"}


def start(folder: Path, store: Path, *words: str, path: str = "") -> "subprocess.Popen[str]":
    """`python -m prep ingest` of stand-ins in a process of its own; `path` goes in front of PATH."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}" if path else environment["PATH"]
    whole = [sys.executable, "-W", "error", "-c", STAND_IN, "ingest", str(folder), "--out", str(store), *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*whole, "--dataset", "d1"], env=environment, cwd=store.parent, **pipes)


def end(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code, what it said on stdout, and on stderr."""
    try:
        shown, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return process.returncode, shown, errors


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What two processes of this machine make of the recordings, whose slowness leaves no trace."""
    folder = tmp_path_factory.mktemp("truth")
    assert end(start(recordings(folder / "in"), folder / "store", "--workers", "2"))[0] == 0
    return digests(folder / "store")


def digests(store: Path) -> dict[str, str]:
    """The values of a store: what depends on the text of a stand-in, which says how slow it is, left out."""
    return {name: digest for name, digest in tree(store).items() if "/streams/" in name and "/values/" in name}


# ---------------------------------------------------------------- cluster files


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_template_is_a_valid_cluster_file_of_the_kind_that_it_is_named_after(path: Path) -> None:
    assert load(path).kind == path.stem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "slrum"}, "kind = 'slrum' is text; expected one of local, slurm, pbs, lsf, kubernetes"),
        ({"partition": "x"}, "partition = 'x' is not a known key"),
        ({"walltme": "x"}, "Did you mean walltime?"),
        ({"memory": None}, "memory is missing. Add it."),
        ({"memory": "2"}, "memory = 2 is a whole number; expected text"),
        ({"memory": "2G"}, "memory = '2G'; expected a number and a unit, such as 2GB or 1500MiB"),
        ({"memory": "100MB"}, "memory = '100MB' is too little for a worker; expected at least 500MB"),
        ({"workers": None}, "workers or adaptive: give one of them"),
        ({"adaptive": "{maximum: 3}"}, "workers or adaptive: give one of them"),
        ({"workers": None, "adaptive": "{minimum: 4, maximum: 3}"}, "adaptive.minimum = 4, maximum = 3; expected 0 <="),
        ({"workers": 0}, "workers = 0; expected at least 1"),
        ({"allowed_failures": 0}, "allowed_failures = 0; expected at least 1"),
        ({"workers": 6, "workers_per_job": 4}, "workers_per_job = 4 does not divide the number of workers"),
        ({"walltime": None}, "walltime is missing, which kind slurm needs. Add it."),
        ({"walltime": "4h"}, "walltime = '4h'; expected HH:MM:SS, such as 04:00:00"),
        ({"lifetime": "01:00:00"}, "lifetime = '01:00:00' is not below walltime = '01:00:00'"),
        ({"lifetime": "00:00:00"}, "lifetime = '00:00:00' is not below walltime"),
        ({"image": "x"}, "image is for kind kubernetes; kind is slurm. Remove it."),
        ({"kind": "local"}, "walltime is for kind slurm, pbs, lsf; kind is local. Remove it."),
        ({"kind": "kubernetes", "walltime": None}, "image is missing, which kind kubernetes needs. Add it."),
    ],
)
def test_a_wrong_cluster_file_is_an_error_that_names_file_key_and_remedy(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cluster_file(tmp_path, **(SLURM | change))
    assert main(["ingest", str(recordings(tmp_path / "in")), "--out", "x", "--cluster", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"prep ingest: {path}: ") and message in said


def test_workers_leave_at_80_percent_of_the_walltime_some_sooner_some_later() -> None:
    config = ClusterConfig(kind="slurm", workers=1, memory="2GB", walltime="01:00:00")
    assert (config.lifetime_s, config.stagger_s) == (2880, 360)
    early = ClusterConfig(kind="slurm", workers=1, memory="2GB", walltime="01:00:00", lifetime="00:01:00")
    assert (early.lifetime_s, early.stagger_s) == (60, 30)


def test_who_works_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["ingest", "in", "--out", "x", "--scheduler", "tcp://h:1", "--cluster", "c.yaml"])
    assert left.value.code == 2
    assert "argument --cluster: not allowed with argument --scheduler" in capsys.readouterr().err


# ---------------------------------------------------------------- job scripts

HEADS = {
    "slurm": [
        "#SBATCH -p long",
        "#SBATCH -A lab",
        "#SBATCH -n 1",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --mem=8654M",
        "#SBATCH -t 26:00:00",
        "#SBATCH --hold",
    ],
    "pbs": [
        "#PBS -q long",
        "#PBS -A lab",
        "#PBS -l select=1:ncpus=4:mem=8654mb",
        "#PBS -l walltime=26:00:00",
        "#PBS --hold",
    ],
    "lsf": [
        "#BSUB -q long",
        '#BSUB -P "lab"',
        "#BSUB -n 4",
        '#BSUB -R "span[hosts=1]"',
        "#BSUB -M 9073742",
        "#BSUB -W 26:00",
        "#BSUB --hold",
    ],
}


@pytest.mark.parametrize("kind", ["slurm", "pbs", "lsf"])
def test_a_job_script_asks_for_what_the_file_says(kind: Any, tmp_path: Path) -> None:
    config = ClusterConfig(
        kind=kind,
        workers=8,
        memory="2GB",
        walltime="26:00:00",
        lifetime="20:00:00",
        queue="long",
        account="lab",
        directives=("--hold",),
        workers_per_job=4,
        interface="lo",
        local_directory="/scratch",
        log_directory=str(tmp_path / "logs"),
    )
    script = job_script(config)
    lines = script.splitlines()
    assert [line for line in lines if line in HEADS[kind]] == HEADS[kind]
    assert f"{tmp_path / 'logs'}/" in script
    command = lines[-1]
    assert command.startswith(f"{sys.executable} -m distributed.cli.dask_worker tcp://127.0.0.1:")
    for words in (
        "--nthreads 1 --memory-limit 1.86GiB --nworkers 4 --nanny",
        "--local-directory /scratch",
        "--lifetime 72000s --lifetime-stagger 10800s",
        "--interface lo",
    ):
        assert words in command


def test_a_dry_run_prints_the_job_script_and_submits_nothing(tmp_path: Path) -> None:
    path = cluster_file(tmp_path, **SLURM)
    commands = batch_system.install(tmp_path / "bin")
    words = ("--cluster", str(path), "--dry-run")
    code, shown, errors = end(start(recordings(tmp_path / "in"), tmp_path / "store", *words, path=str(commands)))
    assert (code, errors) == (0, "")
    assert shown.startswith("#!/usr/bin/env bash\n") and "#SBATCH -t 01:00:00" in shown
    assert "2 of 2 files would be ingested." in shown
    assert not list(commands.glob("*.script")) and not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("module", "keys", "remedy"),
    [
        ("dask_jobqueue", SLURM, "Install it: .venv/bin/pip install -c constraints.txt dask-jobqueue"),
        (
            "dask_kubernetes",
            LOCAL | {"kind": "kubernetes", "image": "i"},
            ".venv/bin/pip install dask-kubernetes; helm",
        ),
    ],
)
def test_a_library_that_is_not_there_is_named_with_how_to_install_it(
    module: str, keys: dict[str, Any], remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (module, f"{module}.operator"):
        monkeypatch.setitem(sys.modules, name, None)
    config = load(cluster_file(tmp_path, **keys))
    with pytest.raises(ConfigError, match=f"kind = '{config.kind}' needs {module}, which is not importable") as caught:
        with connect(None, 1, config):
            pass
    assert remedy in str(caught.value)


def test_a_network_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(cluster_file(tmp_path, **SLURM, interface="ib7"))
    with pytest.raises(ConfigError, match=r"the slurm cluster does not start: .*ib7.* Check interface: and the rest"):
        job_script(config)


def test_ctrl_c_stays_an_interrupt_when_a_batch_systems_library_is_loaded(tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # the shell may have it ignored
    code += "import prep.cluster as c; c._imported('dask_jobqueue', 'slurm'); "
    code += "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------- workers that come and go


def test_processes_of_a_cluster_file_have_its_memory_and_write_the_same_values(
    truth: dict[str, str], tmp_path: Path
) -> None:
    path = cluster_file(tmp_path, **LOCAL)
    with connect(None, 1, load(path)) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        assert [(worker["nthreads"], worker["memory_limit"]) for worker in workers] == [(1, 10**9)] * 2
    code, _, errors = end(start(recordings(tmp_path / "in"), tmp_path / "store", "--cluster", str(path)))
    assert code == 0
    assert "(local), 2 workers of one thread and at most 1GB each; dashboard http://127.0.0.1:" in errors
    assert digests(tmp_path / "store") == truth


@pytest.mark.slow
def test_while_all_workers_are_busy_there_are_more_of_them_up_to_the_maximum(tmp_path: Path) -> None:
    config = load(cluster_file(tmp_path, **LOCAL | {"workers": None, "adaptive": "{maximum: 3}"}))
    with connect(None, 1, config) as client:
        future = client.submit(time.sleep, 20)
        wait_for(lambda: len(client.nthreads()) == 3, "three workers", PATIENCE_S)
        future.cancel()


@pytest.mark.slow
def test_idle_workers_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prep.worker_jobs, "IDLE_TIMES", 1)
    monkeypatch.setattr(prep.worker_jobs, "INTERVAL_S", 0.2)
    config = load(cluster_file(tmp_path, **LOCAL | {"workers": None, "adaptive": "{maximum: 2}"}))
    with connect(None, 1, config) as client:
        wait_for(lambda: not client.nthreads(), "all workers to leave", PATIENCE_S)
        assert client.submit(int, "7").result(PATIENCE_S) == 7


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A batch system of this machine, in front of PATH and asked more often."""
    commands = batch_system.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    for name, value in (("INTERVAL_S", 0.2), ("LIST_S", 0.5), ("HOLD_S", 0.2)):
        monkeypatch.setattr(prep.worker_jobs, name, value)
    return commands


@pytest.mark.slow
def test_jobs_that_die_are_replaced(quick: Path, tmp_path: Path) -> None:
    config = load(cluster_file(tmp_path, **SLURM | {"workers": 4, "workers_per_job": 2, "interface": "lo"}))
    with connect(None, 1, config) as client:
        wait_for(lambda: len(client.nthreads()) == 4, "four workers", PATIENCE_S)
        assert batch_system.kill_jobs(quick) == 2
        wait_for(lambda: not client.nthreads(), "all workers to leave", PATIENCE_S)
        assert client.submit(int, "7").result(PATIENCE_S) == 7
        wait_for(lambda: len(client.nthreads()) == 4, "four workers", PATIENCE_S)
    assert len(list(quick.glob("*.script"))) == 4
    wait_for(lambda: not batch_system.running(quick), "the jobs to end", PATIENCE_S)


@pytest.mark.slow
def test_jobs_that_are_refused_end_the_run_with_the_batch_systems_words(quick: Path, tmp_path: Path) -> None:
    (quick / "refuses").write_text("sbatch: error: invalid partition specified: nowhere\n")
    with pytest.raises(PrepError, match=r"refuses the jobs \(sbatch: error: invalid partition specified: nowhere\)"):
        with connect(None, 1, load(cluster_file(tmp_path, **SLURM))):
            time.sleep(PATIENCE_S)


@pytest.mark.slow
def test_jobs_that_end_before_they_are_workers_end_the_run(quick: Path, tmp_path: Path) -> None:
    config = load(cluster_file(tmp_path, **SLURM, local_directory="/proc/not/a/place"))
    with pytest.raises(PrepError, match="no worker to be had: the jobs end before they have reached the scheduler"):
        with connect(None, 1, config):
            time.sleep(PATIENCE_S)


# ---------------------------------------------------------------- deaths


@contextlib.contextmanager
def their_cluster(folder: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A scheduler of somebody else with two workers: address, scheduler."""
    address = folder / "scheduler.json"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    dask = [sys.executable, "-m", "dask"]
    where = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(address)]
    scheduler = subprocess.Popen([*dask, "scheduler", "--port", "0", *where], cwd=folder, **quiet)
    wait_for(address.exists, "the scheduler's file", PATIENCE_S)
    words = ["worker", "--nworkers", "2", "--nthreads", "1", "--no-dashboard", "--scheduler-file", str(address)]
    workers = subprocess.Popen([*dask, *words, "--death-timeout", "20"], cwd=folder, start_new_session=True, **quiet)
    try:
        yield address.read_text().split('"address": "')[1].split('"')[0], scheduler
    finally:
        with contextlib.suppress(ProcessLookupError):  # the test has ended them
            os.killpg(workers.pid, signal.SIGKILL)
        scheduler.kill()
        workers.wait()
        scheduler.wait()


def is_under_way(store: Path) -> bool:
    """Whether a shard has been written."""
    return any(store.glob("d1/.s*.partial.zarr/streams/*/values/c/*/0/0"))


def test_a_scheduler_that_dies_ends_the_run_with_one_line_and_the_next_one_ends_with_the_same_values(
    truth: dict[str, str], tmp_path: Path
) -> None:
    folder, store = recordings(tmp_path / "in", slow_s=1.0), tmp_path / "store"
    with their_cluster(tmp_path) as (address, scheduler):
        process = start(folder, store, "--scheduler", address)
        wait_for(lambda: is_under_way(store), "the first shard", PATIENCE_S)
        scheduler.kill()
        killed = time.monotonic()
        code, shown, errors = end(process)
        assert time.monotonic() - killed < 45
    first, last = errors.splitlines()
    assert (code, shown) == (1, "")
    assert first.startswith(f"prep ingest: scheduler {address}, ") and "; dashboard http://127.0.0.1:" in first
    assert last == (
        f"prep ingest: the connection to the Dask scheduler at {address} is lost: it ended, or cannot be reached. "
        "What is sealed stays. Start it again, and run the same command to go on."
    )
    assert not (store / "failed.jsonl").exists()
    assert end(start(folder, store, "--workers", "2"))[0] == 0
    assert digests(store) == truth


@pytest.mark.slow
def test_a_client_that_is_killed_leaves_the_workers_of_others_to_the_next_run(
    truth: dict[str, str], tmp_path: Path
) -> None:
    folder, store = recordings(tmp_path / "in", slow_s=0.5), tmp_path / "store"
    with their_cluster(tmp_path) as (address, _):
        process = start(folder, store, "--scheduler", address)
        wait_for(lambda: is_under_way(store), "the first shard", PATIENCE_S)
        process.kill()
        end(process)
        code, shown, errors = end(start(folder, store, "--scheduler", address))
    assert (code, "2 of 2 files are in the store." in shown) == (0, True), errors
    assert digests(store) == truth


@pytest.mark.slow
def test_a_batch_systems_jobs_end_with_a_client_that_is_killed(tmp_path: Path) -> None:
    commands = batch_system.install(tmp_path / "bin")
    path = cluster_file(tmp_path, **SLURM, interface="lo")
    folder, store = recordings(tmp_path / "in", slow_s=2.0), tmp_path / "store"
    process = start(folder, store, "--cluster", str(path), path=str(commands))
    wait_for(lambda: is_under_way(store), "the first shard", PATIENCE_S)
    wait_for(lambda: len(batch_system.running(commands)) == 2, "two jobs", PATIENCE_S)
    process.kill()
    end(process)
    wait_for(lambda: not batch_system.running(commands), "the jobs to end", PATIENCE_S)


# ---------------------------------------------------------------- progress


def test_progress_names_each_session_in_hand_with_its_shards() -> None:
    in_hand = [(f"{number}.nwb", number, 40) for number in range(10)]
    assert in_words(500, 12, in_hand[:2]) == "12 of 500 sessions; 0.nwb 0/40 shards, 1.nwb 1/40 shards"
    assert in_words(500, 12, in_hand).endswith("7.nwb 7/40 shards and 2 more")
    assert in_words(500, 500, []) == "500 of 500 sessions"


def test_without_a_terminal_progress_is_a_line_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(prep.progress.time, "monotonic", lambda: now[0])
    with shown(3, lambda: (1, [("a.nwb", 2, 5)])) as show:
        for _ in range(100):
            now[0] += 0.7
            show()
    assert capsys.readouterr().err == "prep ingest: 1 of 3 sessions; a.nwb 2/5 shards\n" * 2


def test_a_worker_that_never_closes_does_not_keep_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prep.cluster, "CLOSE_S", 1.0)

    async def never(*_: Any, **__: Any) -> None:
        await asyncio.sleep(PATIENCE_S)

    began = time.monotonic()
    with connect(None, 1) as client:
        for worker in client.cluster.workers.values():
            worker.close = never
    assert time.monotonic() - began < PATIENCE_S / 2
    wait_for(lambda: not multiprocessing.active_children(), "the workers to end", PATIENCE_S)
