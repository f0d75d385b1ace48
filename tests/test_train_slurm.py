"""Training under a real SLURM: in an allocation, and as a batch job that is interrupted, comes again, and ends.

In: a SLURM of two nodes on this machine, a tiny store. Out: exit codes, states of jobs, losses to the last bit.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm_on_one_machine import Slurm, slurm, why_not
from train_builders import ROOT, losses, tiny_run, tiny_store

from train import hostfile
from train.hostfile import Host
from train.metrics import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
NUM_STEPS = 40
PATIENCE_S = 400.0
ENDED = ("COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm") / "made") as made:
        yield made


@dataclass
class Job:
    """A run that is submitted by its generated script."""

    cluster: Slurm
    out: Path
    number: str = ""

    def call(self, *words: str) -> str:
        done = subprocess.run(
            self.cluster.words("login", words),
            env=_env(self.cluster, self.out),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *options: str) -> None:
        self.number = self.call(
            "sbatch", "--parsable", *options, f"--chdir={ROOT}", str(self.out / "job.sbatch")
        ).strip()

    def state(self) -> str:
        """As SLURM has it: PENDING, RUNNING, COMPLETED, …"""
        return self.about("JobState")

    def about(self, name: str) -> str:
        words = self.call("scontrol", "--oneliner", "show", "job", self.number).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def log(self) -> str:
        path = self.out / f"slurm-{self.number}.log"
        return path.read_text() if path.exists() else "(no log)"

    def wait(self, what: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            has_ended = self.state() in ENDED
            if what():
                return
            assert not has_ended and time.monotonic() < deadline_s, self.log()[-6000:]
            time.sleep(0.1)

    def wait_for_steps(self, number: int) -> None:
        self.wait(lambda: len(read_metrics(self.out)) >= number)

    def wait_for_the_end(self) -> None:
        """COMPLETED, after one restart."""
        self.wait(lambda: self.state() == "COMPLETED")
        assert self.about("Restarts") == "1" and self.about("ExitCode") == "0:0", self.log()


def _env(cluster: Slurm, folder: Path) -> dict[str, str]:
    return {
        **{key: value for key, value in cluster.environment.items() if not key.startswith("MAKE")},
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR") or str(folder / "ext"),
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.getbasetemp() / "run.yaml"
    tiny_run(num_steps=NUM_STEPS).save(path)
    return path


@pytest.fixture(scope="module")
def uninterrupted(cluster: Slurm, store: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, by make in an allocation of salloc: the hostfile, the doctor, the ranks, all of it started by srun."""
    folder = tmp_path_factory.mktemp("salloc")
    names = {"STORE": store, "RUN": config, "OUT": folder / "run", "HOSTFILE": folder / "hostfile"}
    values = [f"{name}={value}" for name, value in names.items()]
    script = folder / "in-the-allocation.sh"
    lines = [["make", "-s", "-o", ".venv/installed", target, *values] for target in ("hostfile", "doctor", "train")]
    script.write_text("set -e\n" + "".join(f"{shlex.join(line)}\n" for line in lines))
    words = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", "bash", str(script)]
    done = subprocess.run(
        cluster.words("login", words), cwd=ROOT, env=_env(cluster, folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert hostfile.read(folder / "hostfile") == [Host("n1", 1), Host("n2", 1)]
    assert "srun" in done.stderr or "agent" in done.stderr, "no ssh: these nodes have none"
    return folder / "run"


@pytest.fixture
def job(cluster: Slurm, store: Path, config: Path, tmp_path: Path) -> Job:
    """The generated script of the same run, in a folder whose name wants quoting."""
    out = tmp_path / 'it\'s a "run"'
    made = Job(cluster, out)
    words = ["--config", str(config), "--store", str(store), "--out", str(out), "--nodes", "2", "--slots", "1"]
    said = made.call(sys.executable, "-m", "train", "sbatch", *words, "--device", "cpu", "--time", "10")
    assert shlex.split(said)[-1] == str(out / "job.sbatch")
    return made


def test_make_train_in_an_allocation_starts_its_ranks_by_srun(uninterrupted: Path) -> None:
    assert len(losses(uninterrupted)) == NUM_STEPS
    assert json.loads((uninterrupted / "environment.json").read_text())["world_size"] == 2


def test_slurm_takes_the_script_and_its_shell_is_good(job: Job) -> None:
    script = job.out / "job.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    job.call("sbatch", "--test-only", str(script))


def test_a_job_that_gets_usr1_comes_again_and_ends_with_the_losses_of_one_that_did_not(
    job: Job, uninterrupted: Path
) -> None:
    job.submit()
    job.wait_for_steps(5)
    job.call("scancel", "--signal=USR1", "--batch", job.number)
    job.wait_for_the_end()
    assert "asked to stop: saved step" in job.log()
    assert losses(job.out) == losses(uninterrupted)


def test_a_job_whose_ranks_get_sigterm_comes_again(job: Job, uninterrupted: Path) -> None:
    """As where another job takes its nodes: SLURM sends it to all processes of the job's steps, not to its shell."""
    job.submit()
    job.wait_for_steps(5)
    job.call("scancel", "--signal=TERM", job.number)
    job.wait_for_the_end()
    assert losses(job.out) == losses(uninterrupted)


def test_a_job_whose_time_is_nearly_up_comes_again(job: Job, uninterrupted: Path) -> None:
    """SLURM itself sends the signal; the second allocation has the time that is needed."""
    job.submit("--time=2", "--signal=B:USR1@100")
    job.wait(lambda: job.about("Restarts") == "1")
    job.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    job.wait_for_the_end()
    assert losses(job.out) == losses(uninterrupted)


def test_a_job_that_a_person_cancels_saves_and_stays_away(job: Job) -> None:
    job.submit()
    job.wait_for_steps(5)
    job.call("scancel", job.number)
    job.wait(lambda: job.state() == "CANCELLED")
    job.wait(lambda: not job.cluster.jobs())
    assert job.about("Restarts") == "0" and "asked to stop: saved step" in job.log()
