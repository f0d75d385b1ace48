"""The templates of hostfiles/: what can be known of them without a cluster.

In: the files. Out: shells and parsers that take them; SLURM's own word where it can be had.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from slurm_on_one_machine import slurm, why_not

from train.__main__ import COMMANDS

FOLDER = Path(__file__).resolve().parent.parent / "hostfiles"
SLURM = FOLDER / "slurm-8x8-h100.sbatch"
SCRIPTS = [SLURM, FOLDER / "pbs-8x8.pbs"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_job_script_is_good_shell_and_its_commands_exist(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    commands = re.findall(r'"\$python" -m train (\S+)', script.read_text())
    assert commands == ["hostfile", "doctor", "train"] and set(commands) <= COMMANDS.keys()


def test_the_manifest_is_an_mpijob_whose_pods_share_one_environment() -> None:
    manifest = yaml.safe_load((FOLDER / "kubernetes-mpijob.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    spec = manifest["spec"]
    pods = {name: each["template"]["spec"] for name, each in spec["mpiReplicaSpecs"].items()}
    launcher, worker = (pods[name]["containers"][0] for name in ("Launcher", "Worker"))
    assert launcher["env"] == worker["env"] and launcher["volumeMounts"] == worker["volumeMounts"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == spec["slotsPerWorker"]
    given = {each["name"]: each["value"] for each in launcher["env"]}
    assert words_of_the_run(launcher["args"][0], given)[-2:] == ["--hostfile", "hostfiles/cluster"]
    assert words_of_the_run(launcher["args"][0], {**given, "HUB": "/a hub"})[-2:] == ["--hub", "/a hub"]
    mounted = {mount["name"] for mount in worker["volumeMounts"]}
    assert all(mounted == {volume["name"] for volume in pod["volumes"]} for pod in pods.values())


def words_of_the_run(script: str, environment: dict[str, str]) -> list[str]:
    """The words of a launcher's `train`; nothing is run."""
    shown = script.replace("exec .venv/bin/python", r"exec printf '%s\n'")
    command = ["bash", "-euc", f"make() {{ :; }}\n{shown}"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_every_template_stands_in_the_readme() -> None:
    text = (FOLDER / "README.md").read_text()
    templates = {path.name for path in FOLDER.iterdir()} - {"README.md", "cluster"}
    assert {name for name in templates if not name.startswith("job-") and name not in text} == set()


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_slurm_takes_the_job_scaled_down_to_two_nodes(tmp_path: Path) -> None:
    words = [
        "sbatch",
        "--test-only",
        "--nodes=2",
        "--gpus-per-node=0",
        "--time=1:00:00",
        str(SLURM),
    ]
    with slurm(tmp_path / "slurm") as made:
        done = subprocess.run(
            made.words("login", words), env=made.environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0 and "on nodes n[1-2]" in done.stderr, done.stderr
