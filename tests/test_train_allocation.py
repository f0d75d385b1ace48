"""Where the list of nodes comes from: each scheduler's variables and files, in the forms that they really have.

In:  environments as schedulers set them. Out: hosts and where they come from, or the text of the refusal.
"""

import argparse
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from train import allocation, hostfile
from train.allocation import discover
from train.hostfile import Host, HostfileError

ROOT = Path(__file__).resolve().parent.parent
TWO = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}


@pytest.fixture(autouse=True)
def _every_name_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostfile, "addresses", lambda name: set() if "unknown" in name else {f"address of {name}"})


def _file(tmp_path: Path, content: str) -> str:
    path = tmp_path / "nodes"
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_a_list_of_nodes_comes_before_the_scheduler() -> None:
    found = discover({**TWO, "SLURM_GPUS_ON_NODE": "8", "NODES": "a b", "SLOTS": "4"})
    assert found.hosts == [Host("a", 4), Host("b", 4)] and found.origin.startswith("NODES=a b") and found.job == ""


@pytest.mark.parametrize(
    ("env", "slots"),
    [
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"}, [8, 8]),
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, [4, 4]),
        ({"SLURM_GPUS_PER_NODE": "a100:2,h100:4"}, [6, 6]),
        ({"SLURM_JOB_GPUS": "0,1,2", "SLURM_TASKS_PER_NODE": "1(x2)"}, [3, 3]),
        ({"SLURM_JOB_GPUS": "0-3"}, [4, 4]),
        ({"SLURM_NTASKS_PER_NODE": "3"}, [3, 3]),
        ({"SLURM_TASKS_PER_NODE": "2(x2)"}, [2, 2]),
        ({"SLURM_TASKS_PER_NODE": "2,1"}, [2, 1]),
        ({"SLURM_TASKS_PER_NODE": "2"}, [2, 2]),
        ({"SLURM_GPUS_ON_NODE": "8", "SLOTS": "5"}, [5, 5]),
    ],
)
def test_slurm_gives_nodes_and_slots(env: dict[str, str], slots: list[int]) -> None:
    found = discover({**TWO, **env})
    assert found.hosts == [Host("n1", slots[0]), Host("n2", slots[1])]
    assert found.origin.startswith("SLURM_JOB_NODELIST=n[1-2]") and found.job == "SLURM 7"


def test_a_heterogeneous_slurm_job_is_the_sum_of_its_components() -> None:
    env = {
        **TWO,
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "x[01-02]",
        "SLURM_GPUS_PER_NODE_HET_GROUP_1": "8",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "n1",
        "SLURM_TASKS_PER_NODE_HET_GROUP_0": "4",
    }
    assert discover(env).hosts == [Host("n1", 4), Host("x01", 8), Host("x02", 8)]
    assert [host.slots for host in discover({**env, "SLOTS": "4"}).hosts] == [4, 4, 4]
    del env["SLURM_TASKS_PER_NODE_HET_GROUP_0"]
    with pytest.raises(HostfileError, match=r"SLURM_TASKS_PER_NODE with _HET_GROUP_0\. Give SLOTS=N"):
        discover(env)


@pytest.mark.parametrize(
    "content", ["n1\nn1\nn2\nn2\n", "n1\nn2\nn1\nn2\n\n", "n1:2\nn2:2\n", "# c\nn1 slots=2\nn2 slots=2"]
)
@pytest.mark.parametrize("variable", ["PBS_NODEFILE", "LSB_DJOB_HOSTFILE", *allocation.MPI_HOSTFILES])
def test_files_of_other_schedulers_are_counted_in_each_form(tmp_path: Path, variable: str, content: str) -> None:
    path = _file(tmp_path, content)
    found = discover({variable: path})
    assert found.hosts == [Host("n1", 2), Host("n2", 2)] and found.origin == f"{variable}={path}"


def test_open_mpis_grammar_is_understood_and_anything_else_named_by_its_line(tmp_path: Path) -> None:
    def read(content: str) -> list[Host]:
        return discover({"OMPI_MCA_orte_default_hostfile": _file(tmp_path, content)}).hosts

    assert read("w-0.svc slots=1 max_slots=4 # c\nw-1.svc slots = 1 max-slots=2\n") == [
        Host("w-0.svc", 1),
        Host("w-1.svc", 1),
    ]
    for line in ("w slots=1abc", "w slots=2.5", "w cpus=2", "w:", "w:2:3", "w x", "w slots=1 x"):
        with pytest.raises(HostfileError, match=r"line 2: found '.*'; expected `NAME`, `NAME:N` or `NAME slots=N"):
            read(f"ok slots=1\n{line}\n")
    with pytest.raises(HostfileError, match=r"line 1: slots='0': expected a whole number from 1"):
        read("w slots=0\n")
    with pytest.raises(HostfileError, match=r"nodes: found no host; expected"):
        read("# nothing\n")


def test_torque_counts_gpus_in_a_file_of_their_own(tmp_path: Path) -> None:
    nodes = tmp_path / "cpus"
    nodes.write_text("n1\nn2\n", encoding="utf-8")
    gpus = _file(tmp_path, "n1-gpu1\nn1-gpu0\nn2-gpu1\nn2-gpu0\n")
    env = {"PBS_NODEFILE": str(nodes), "PBS_GPUFILE": gpus, "PBS_JOBID": "9.server"}
    found = discover(env)
    assert found.hosts == [Host("n1", 2), Host("n2", 2)] and found.job == "PBS 9.server"
    Path(gpus).write_text("", encoding="utf-8")
    assert discover(env).hosts == [Host("n1", 1), Host("n2", 1)]
    Path(gpus).unlink()
    assert discover(env).hosts == [Host("n1", 1), Host("n2", 1)]
    nodes.write_text("rack1-gpu2\n", encoding="utf-8")  # a host may be called so
    assert discover(env).hosts == [Host("rack1-gpu2", 1)]


@pytest.mark.parametrize(
    "env",
    [
        {"LSB_MCPU_HOSTS": "h1 2 h2 2"},
        {"LSB_HOSTS": "h1 h1 h2 h2"},
        {"LSB_MCPU_HOSTS": "batch5 1 h1 2 h2 2"},
        {"LSB_HOSTS": "batch5 h1 h1 h2 h2"},
    ],
)
def test_lsf_gives_hosts_without_the_one_that_only_launches(env: dict[str, str]) -> None:
    found = discover({**env, "LSB_JOBID": "3"})
    assert found.hosts == [Host("h1", 2), Host("h2", 2)] and found.job == "LSF 3"
    assert ("without batch5" in found.origin) == ("batch5" in str(env))
    assert discover({"LSB_MCPU_HOSTS": "h1 1 h2 1"}).hosts == [Host("h1", 1), Host("h2", 1)]


def test_a_kubernetes_mpijob_is_found_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(_file(tmp_path, "job-worker-0.job.ns.svc:8\njob-worker-1.job.ns.svc:8\n"))
    monkeypatch.setattr(allocation, "MPIJOB_HOSTFILE", path)
    found = discover({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert found.hosts == [Host("job-worker-0.job.ns.svc", 8), Host("job-worker-1.job.ns.svc", 8)]
    monkeypatch.setattr(allocation, "_num_gpus", lambda: 0)
    assert discover({}).hosts == [Host("localhost", 1)]


def test_without_a_scheduler_it_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "_num_gpus", lambda: 0)
    assert discover({}).hosts == [Host("localhost", 1)]
    assert discover({"SLOTS": "3"}).hosts == [Host("localhost", 3)]
    monkeypatch.setattr(allocation, "_num_gpus", lambda: 4)
    assert discover({}).hosts == [Host("localhost", 4)]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NODES": "a b"}, r"NODES='a b' has no SLOTS: .* Give SLOTS=N"),
        ({"SLURM_JOB_NODELIST": "n1"}, "not how many ranks each: .* Give SLOTS=N"),
        ({"SLOTS": "many"}, "SLOTS='many': expected a whole number from 1 to 9999"),
        ({"SLOTS": "0"}, "SLOTS='0': expected a whole number"),
        ({"SLURM_JOB_NODELIST": "n1", "SLURM_GPUS_ON_NODE": "x"}, "SLURM_GPUS_ON_NODE='x'"),
        ({**TWO, "SLURM_TASKS_PER_NODE": "2(x3)"}, "SLURM_TASKS_PER_NODE='2\\(x3\\)': found 3 counts; .* 2 nodes"),
        ({**TWO, "SLURM_TASKS_PER_NODE": "2(y3)"}, "SLURM_TASKS_PER_NODE='2\\(y3\\)': expected a whole number"),
        ({"LSB_MCPU_HOSTS": "h1 2 h2"}, "LSB_MCPU_HOSTS='h1 2 h2': expected pairs of a name and a count"),
        ({"PBS_NODEFILE": "/no/such/file"}, r"node file cannot be read .* Give NODES="),
    ],
)
def test_what_is_unknown_or_wrong_is_asked_for(env: dict[str, str], message: str) -> None:
    with pytest.raises(HostfileError, match=message):
        discover(env)


def _main(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    allocation.configure(parser)
    return allocation.main(parser.parse_args(argv))


def test_the_command_writes_prints_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cluster"
    words = ["--nodes", "n[1-4]", "--slots", "8", "--include", "n[1-3]", "--exclude", "n2"]
    assert _main(*words, "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert printed == out.read_text(encoding="utf-8") + f"-> {out}: 2 node(s) x 8 slot(s)\n"
    assert hostfile.read(out) == [Host("n1", 8), Host("n3", 8)]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("n[2-1]", "HostfileError: node list 'n[2-1]'"),
        ("unknown1", "found 'unknown1', which neither the name service nor ssh's config knows here"),
        ("me@n1", "found 'me@n1'; expected a host name"),
        ("$(touch${IFS}x)", "found '$(touch${IFS}x)'; expected a host name"),
    ],
)
def test_the_command_ends_with_2_and_the_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nodes: str, message: str
) -> None:
    assert _main("--nodes", nodes, "--slots", "8", "--out", str(tmp_path / "x")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_slurm_need_not_tell_the_name_service_of_its_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TWO, "SLURM_JOB_NODELIST": "unknown[1-2]", "SLURM_GPUS_ON_NODE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert _main("--out", str(tmp_path / "x")) == 0
    assert len(hostfile.read_for_run(tmp_path / "x", os.environ)) == 2
    with pytest.raises(HostfileError, match=r"line 5: found 'unknown1', which neither"):
        hostfile.read_for_run(tmp_path / "x", {})


def test_the_job_is_written_down_and_another_job_refuses_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**TWO, "SLURM_GPUS_ON_NODE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert _main("--out", str(tmp_path / "x")) == 0
    for env in ({"SLURM_JOB_ID": "7"}, {}):
        assert len(hostfile.read_for_run(tmp_path / "x", env)) == 2
    with pytest.raises(
        HostfileError, match=r"line 4: found the hosts of job SLURM 7; expected those of this job, SLURM 8"
    ):
        hostfile.read_for_run(tmp_path / "x", {"SLURM_JOB_ID": "8"})


@pytest.mark.parametrize(
    "bad",
    [
        '"; touch CANARY; "',
        "'; touch CANARY; '",
        "$(shell touch CANARY)",
        "$$(touch CANARY)",
        "`touch CANARY`",
        "a\ntouch CANARY",
    ],
)
@pytest.mark.parametrize("variable", ["NODES", "SLOTS", "HOSTFILE"])
def test_make_hostfile_runs_nothing_that_stands_in_a_value(tmp_path: Path, variable: str, bad: str) -> None:
    folder = tmp_path / "copy"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "installed").touch()
    for name in ("setup.py", "constraints.txt"):
        (folder / name).touch()
        os.utime(folder / name, (0, 0))
    shutil.copy(ROOT / "Makefile", folder)
    python = folder / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$*" "$NODES" "$SLOTS" > seen\n')
    python.chmod(0o755)
    subprocess.run(["make", "-s", "hostfile", f"{variable}={bad}"], cwd=folder, check=True, capture_output=True)
    assert not (folder / "CANARY").exists()
    assert bad in (folder / "seen").read_text() or "\n" in bad
