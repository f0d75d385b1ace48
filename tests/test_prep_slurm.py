"""Ingest by the jobs of a real SLURM: the same bytes as on one machine, whatever becomes of jobs and client.

In: recordings of the synthetic brain, and little text files that stand for slow ones. Out: stores; exit codes.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_system import cluster_file, recordings
from processes import wait_for
from slurm_on_one_machine import Slurm, slurm, why_not
from store_builders import tree

from prep.synthetic import write_brain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
ROOT = Path(__file__).parent.parent
PATIENCE_S = 240.0
STAND_IN = """
import sys
import prep.ingest
from prep.__main__ import main
from store_builders import fake_planner
prep.ingest.plan_from_nwb = fake_planner
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


def two_nodes(folder: Path, **more: Any) -> Path:
    """A cluster file of the two nodes; `more`: other keys, or other values."""
    keys = {"kind": "slurm", "workers": 2, "memory": "1GB", "walltime": "00:30:00", "interface": "eth0"}
    return cluster_file(folder, **keys | {"log_directory": str(folder / "logs"), **more})


def start(nodes: Slurm, folder: Path, store: Path, cluster: Path | None) -> "subprocess.Popen[str]":
    """Ingest of stand-ins, on the login node; without a cluster file by processes of this machine."""
    words = [sys.executable, "-W", "error", "-c", STAND_IN, "ingest", str(folder), "--out", str(store)]
    words += ["--dataset", "d1", *(["--cluster", str(cluster)] if cluster else ["--workers", "2"])]
    environment = nodes.environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen(
        nodes.words("login", words),
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code, what it said on stdout, and on stderr."""
    try:
        shown, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return process.returncode, shown, errors


def expected(nodes: Slurm, folder: Path, store: Path) -> dict[str, str]:
    """What one machine makes of the recordings."""
    assert end(start(nodes, folder, store, None))[0] == 0
    return tree(store)


def test_make_prep_by_the_jobs_of_two_nodes_writes_what_one_machine_writes(nodes: Slurm, tmp_path: Path) -> None:
    write_brain(tmp_path / "in", None, "test", 0)
    words = ["make", "-o", ".venv/installed", "prep", f"SRC={tmp_path / 'in'}", "DATASET=d1"]
    there = [*words, f"OUT={tmp_path / 'there'}", f"CLUSTER={two_nodes(tmp_path)}"]
    pipes: dict[str, Any] = {"cwd": ROOT, "text": True, "capture_output": True, "check": False}
    by_jobs = subprocess.run(nodes.words("login", there), env=nodes.environment, **pipes)
    assert by_jobs.returncode == 0, by_jobs.stderr
    assert "(slurm), 2 workers of one thread and at most 1GB each; dashboard http://" in by_jobs.stderr
    here = subprocess.run([*words, f"OUT={tmp_path / 'here'}"], **pipes)
    assert here.returncode == 0, here.stderr
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    used = {nodes.run("scontrol", "show", "job", job).split("BatchHost=")[1].split()[0] for job in nodes.jobs("all")}
    assert used <= {"n1", "n2"} and used


def test_a_job_that_is_cancelled_midway_is_replaced_and_the_bytes_are_the_same(nodes: Slurm, tmp_path: Path) -> None:
    folder, store = recordings(tmp_path / "in", slow_s=0.8), tmp_path / "store"
    process = start(nodes, folder, store, two_nodes(tmp_path))
    wait_for(lambda: any(store.glob("d1/.s*.partial.zarr/streams/*/values/c/0/0/0")), "the first shard", PATIENCE_S)
    before = nodes.jobs("running")
    nodes.run("scancel", *before)  # both: nobody is left who could go on
    code, shown, errors = end(process)
    assert (code, "2 of 2 files are in the store." in shown) == (0, True), errors
    assert len(before) == 2
    assert tree(store) == expected(nodes, folder, tmp_path / "here")


def test_workers_leave_before_the_walltime_and_others_take_their_places(nodes: Slurm, tmp_path: Path) -> None:
    folder, store = recordings(tmp_path / "in", slow_s=4), tmp_path / "store"
    short = two_nodes(tmp_path, walltime="00:02:00", lifetime="00:00:12", workers=None, adaptive="{maximum: 2}")
    first = set(nodes.jobs("all"))
    code, _, errors = end(start(nodes, folder, store, short))
    assert code == 0, errors
    mine = set(nodes.jobs("all")) - first
    assert len(mine) > 2
    assert not {job for job in mine if "TIMEOUT" in nodes.run("scontrol", "show", "job", job)}
    assert tree(store) == expected(nodes, folder, tmp_path / "here")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_jobs_end_with_the_client(how: signal.Signals, nodes: Slurm, tmp_path: Path) -> None:
    folder, store = recordings(tmp_path / "in", slow_s=3), tmp_path / "store"
    before = set(nodes.jobs())
    process = start(nodes, folder, store, two_nodes(tmp_path))
    wait_for(lambda: any(store.glob("d1/.s*.partial.zarr/streams")), "a session in hand", PATIENCE_S)
    process.send_signal(how)
    code, _, errors = end(process)
    assert code == {signal.SIGKILL: -9, signal.SIGTERM: 130, signal.SIGINT: 130}[how], errors
    wait_for(lambda: not set(nodes.jobs()) - before, "the jobs to end", 60)


def test_a_job_that_is_refused_is_said_in_the_batch_systems_words(nodes: Slurm, tmp_path: Path) -> None:
    process = start(
        nodes, recordings(tmp_path / "in", slow_s=0.8), tmp_path / "store", two_nodes(tmp_path, queue="nowhere")
    )
    code, _, errors = end(process)
    assert code == 1
    last = errors.splitlines()[-1]
    assert last.startswith("prep ingest: no worker to be had: the batch system refuses the jobs (sbatch: error: ")
    assert "invalid partition specified: nowhere" in last


def test_jobs_that_end_before_they_are_workers_end_the_run(nodes: Slurm, tmp_path: Path) -> None:
    broken = two_nodes(tmp_path, local_directory="/proc/not/a/place")
    code, _, errors = end(start(nodes, recordings(tmp_path / "in", slow_s=0.8), tmp_path / "store", broken))
    assert code == 1
    assert "no worker to be had: the jobs end before they have reached the scheduler. Check the" in errors
    assert f"see what jobs print, in {tmp_path / 'logs'}" in errors
