"""The generated batch script: what is filled into the template, and what is refused.

In: the template, runs of the repository. Out: a script that shells take, whose values are what was given.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from train_builders import ROOT, tiny_run

from train import config
from train.__main__ import main
from train.batch_job import TEMPLATE, fill

ODD = 'it\'s a "run" \\ $HOME `id` %u'


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ds_configs are; nothing of the cluster is set."""
    monkeypatch.chdir(ROOT)
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA"):
        monkeypatch.delenv(name, raising=False)


def made(folder: Path, *options: str) -> str:
    tiny_run(global_batch_size=128).save(folder / "run.yaml")
    words = ["--config", str(folder / "run.yaml"), "--store", "s3://b/it's", "--out", str(folder / ODD), *options]
    assert main(["sbatch", *words]) == 0
    return (folder / ODD / "job.sbatch").read_text()


def variables(script: str, *names: str) -> list[str]:
    """As a shell that reads the script has them; what it would run is left out."""
    head = script.partition("mkdir -p")[0].replace("set -euo pipefail", "SLURM_JOB_ID=47")
    shown = "\n".join(f'printf "%s\\0" "${name}"' for name in names)
    done = subprocess.run(["bash", "-c", f"{head}\n{shown}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_every_value_arrives_as_it_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, out = made(tmp_path, "train.num_steps=7"), tmp_path / ODD
    assert shlex.split(capsys.readouterr().out) == ["sbatch", f"--chdir={ROOT}", str(out / "job.sbatch")]
    names = ("STORE", "RUN", "OUT", "HOSTFILE")
    assert variables(script, *names) == ["s3://b/it's", str(out / "job.yaml"), str(out), f"{out}/hostfile-47"]
    assert config.load(out / "job.yaml").train.num_steps == 7
    assert "CHANGE" not in script and "IFNAME" not in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    if shutil.which("shellcheck"):  # SC2016: quoted values that look as if they wanted to be expanded
        subprocess.run(["shellcheck", "--shell=bash", "--exclude=SC2016", "-"], input=script, text=True, check=True)


def test_a_new_run_may_begin_with_a_hub_folder(tmp_path: Path) -> None:
    """A run that has saved goes on without it, so that none needs to be there; a job that is requeued says it again."""
    (tmp_path / ODD / "checkpoints" / "step-1").mkdir(parents=True)
    script = made(tmp_path, "--hub", str(tmp_path / ODD / "hub"))
    assert variables(script, "hub") == [f"{tmp_path}/{ODD}/hub"] and '${hub:+--hub "$hub"}' in script
    assert variables(made(tmp_path), "hub") == [""]


def test_the_options_of_sbatch_are_those_of_the_template_with_other_values(tmp_path: Path) -> None:
    def options(script: str) -> dict[str, str]:
        return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))

    template, script = options(TEMPLATE.read_text()), options(made(tmp_path, "--nodes", "2", "--time", "2-12"))
    assert script | {"job-name": "brainloom", "output": "slurm-%j.log"} == template | {"nodes": "2", "time": "2-12"}
    assert script["output"] == f'"{tmp_path}/it\'s a \\"run\\" \\\\ $HOME `id` %%u/slurm-%j.log"'
    alike = options(made(tmp_path))
    assert (alike["nodes"], alike["gpus-per-node"], alike["ntasks-per-node"]) == ("8", "8", "1")
    without = options(made(tmp_path, "--device", "cpu", "--nodes", "2", "--slots", "4"))
    assert "gpus-per-node" not in without and without["ntasks-per-node"] == "4"


def test_what_is_set_of_the_cluster_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_IB_HCA", "=mlx5_0,mlx5_1")
    script = made(tmp_path)
    assert variables(script, "NCCL_IB_HCA", "NCCL_DEBUG") == ["=mlx5_0,mlx5_1", "WARN"]


def test_a_line_to_change_without_a_value_is_left_out() -> None:
    template = "#!/bin/bash\n# about\n#SBATCH --a=1\n#SBATCH --b\nexport X=1 Y=2 # CHANGE: x\nz=3 # CHANGE\nrest"
    filled = fill(template, {"a": None}, {"Y": "a b"}).splitlines()
    assert filled[0] == "#!/bin/bash" and filled[2:] == ["#SBATCH --b", "export Y='a b'", "rest"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "0"], "--nodes 0 --slots 8: both must be at least 1."),
        (["--time", "1h; id"], "--time '1h; id' is no time of SLURM's. Expected 90 (minutes), "),
        (["--hub", "nowhere"], "nowhere is no hub folder: it has no config.json. Make one: make export"),
        (["--nodes", "3"], "train.global_batch_size 128 is not a multiple of micro_batch_size x ranks (2 x 24)."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_before_the_job_waits_in_a_queue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    tiny_run(global_batch_size=128).save(tmp_path / "run.yaml")
    words = ["--config", str(tmp_path / "run.yaml"), "--store", "store", "--out", str(tmp_path / "out"), *options]
    assert main(["sbatch", *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_it_is_submitted_where_that_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/submitted\nexit 3\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    made(tmp_path)
    assert not (tmp_path / "submitted").exists()
    words = ["--config", str(tmp_path / "run.yaml"), "--store", "store", "--out", str(tmp_path / "out"), "--submit"]
    assert main(["sbatch", *words]) == 3
    assert (tmp_path / "submitted").read_text() == f"--chdir={ROOT}\n{tmp_path}/out/job.sbatch\n"
