"""The hostfile's grammar, its messages, and where the list of nodes comes from.

In:  hostfiles written here, and hostfiles/example.
Out: what was read, or the text of the refusal.
"""

from __future__ import annotations

import argparse
import socket
from pathlib import Path
from typing import Any

import pytest

from train import hostfile
from train.hostfile import Host, HostfileError, discover, expand, read, render, write

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names resolve only where a test says so."""

    def nowhere(name: str, *args: Any, **kwargs: Any) -> list[Any]:
        raise socket.gaierror(f"{name} is not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)


def _file(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "hosts"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_the_example_in_the_repository_is_valid() -> None:
    assert read(ROOT / "hostfiles" / "example") == [Host("node01", 8), Host("node02", 8)]


def test_the_refusals_that_the_readme_lists_are_refused(tmp_path: Path) -> None:
    text = (ROOT / "hostfiles" / "README.md").read_text(encoding="utf-8")
    table = text.split("what was found and the remedy")[1].split("A missing file")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| `")]
    single = [row.strip("`") for row in rows if row.count("`") == 2]
    assert len(single) == 6
    for line in single:
        with pytest.raises(HostfileError, match="line 1"):
            read(_file(tmp_path, line + "\n"))


def test_comments_blank_lines_tabs_and_a_missing_last_newline_are_fine(tmp_path: Path) -> None:
    path = _file(tmp_path, "# a comment\n\n  n1\tslots=2 \n   # another\nN-2.lab_a slots=2")
    assert read(path) == [Host("n1", 2), Host("N-2.lab_a", 2)]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("n1\n", ["line 1: found 'n1'", "expected `NAME slots=N`", "add ` slots=N`"]),
        ("# c\nn1 slots = 8\n", ["line 2", "without blanks around `=`"]),
        ("n1 slots=0\n", ["line 1", "at least 1"]),
        ("n1 slots=8abc\n", ["'n1 slots=8abc'", "nothing may follow the number"]),
        ("n1 slots=2.5\n", ["'n1 slots=2.5'", "a whole number from 1 on"]),
        ("n1 slots=-2\n", ["'n1 slots=-2'"]),
        ("n1 slots=08\n", ["'n1 slots=08'"]),
        ("n1 slots=\u0668\n", ["line 1"]),
        ("n1\u00a0slots=8\n", ["line 1"]),
        ("n1 slots=8 # rack\n", ["the comment on a line of its own"]),
        ("n1 slots=8 n2 slots=8\n", ["line 1"]),
        ("n1:22 slots=8\n", ["'n1:22'", "write `n1`", "port belongs in ~/.ssh/config"]),
        ("me@n1 slots=8\n", ["'me@n1'", "write `n1`", "user belongs in ~/.ssh/config"]),
        ("-oProxyCommand=x slots=8\n", ["'-oProxyCommand=x'", "a host name of letters"]),
        ("\ufeffn1 slots=8\n", ["line 1: found a byte-order mark", "without BOM"]),
        ("n1 slots=8\r\n", ["line 1: found a carriage return", "end in LF", "dos2unix"]),
        (b"n1 slots=8\n\xff slots=8\n", ["line 2", "UTF-8"]),
        ("# nothing\n", ["found no host at all", "make hostfile"]),
        ("", ["found no host at all"]),
        ("n1 slots=8\nn2 slots=8\nn1 slots=8\n", ["line 3", "the host of line 1", "every host once"]),
        ("n1 slots=8\nN1 slots=8\n", ["line 2: found 'N1', which is the host of line 1"]),
        ("n1 slots=8\n\nn2 slots=4\n", ["line 3: found slots=4", "slots=8 as on line 1", "leave the odd host out"]),
    ],
)
def test_a_refusal_names_file_line_found_expected_and_remedy(
    tmp_path: Path, content: str | bytes, parts: list[str]
) -> None:
    path = _file(tmp_path, content)
    with pytest.raises(HostfileError) as caught:
        read(path)
    message = str(caught.value)
    for part in [str(path), "line ", "expected", "To mend it:", *parts]:
        assert part in message


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(HostfileError, match=r"nowhere: no hostfile can be read here .*make hostfile NODES="):
        read(tmp_path / "nowhere")
    with pytest.raises(HostfileError, match="Is a directory"):
        read(tmp_path)


def test_two_names_of_one_address_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"n1": "10.0.0.1", "alias": "10.0.0.1", "n2": "10.0.0.2"}

    def resolve(name: str, *args: Any, **kwargs: Any) -> list[Any]:
        if name not in known:
            raise socket.gaierror(name)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known[name], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert len(read(_file(tmp_path, "n1 slots=1\nn2 slots=1\nunknown slots=1\nother slots=1\n"))) == 4
    with pytest.raises(HostfileError, match=r"line 2: found 'alias', which resolves to 10\.0\.0\.1 as 'n1' of line 1"):
        read(_file(tmp_path, "n1 slots=1\nalias slots=1\n"))


def test_what_is_rendered_is_read_back_and_says_where_it_came_from(tmp_path: Path) -> None:
    hosts = [Host("a", 2), Host("b", 2)]
    text = render(hosts, "a list\nc slots=9")
    assert "# From: a list c slots=9\n" in text and "# Written: 20" in text
    assert read(_file(tmp_path, text)) == hosts


def test_write_replaces_whole_files_and_refuses_what_read_refuses(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cluster"
    write(path, [Host("a", 2)], "test")
    with pytest.raises(HostfileError, match="not written yet"):
        write(path, [Host("a", 2), Host("A", 2)], "test")
    assert read(path) == [Host("a", 2)]
    assert [entry.name for entry in path.parent.iterdir()] == ["cluster"]


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("n[01-03,7],x2-[1-2]", ["n01", "n02", "n03", "n7", "x2-1", "x2-2"]),
        ("a b", ["a", "b"]),
        ("a, b,c", ["a", "b", "c"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("r[1-2]n[01-02]-ib", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]),
        ("n[5]", ["n5"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_node_lists_are_expanded_as_slurm_means_them(nodes: str, names: list[str]) -> None:
    assert expand(nodes) == names


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ("n[3-1]", "'3-1' inside a bracket"),
        ("n[]", "'' inside a bracket"),
        ("n[a-b]", "'a-b' inside a bracket"),
        ("n[1-3", "a bracket without its partner"),
        ("n1-3]", "a bracket without its partner"),
        ("n[1-[2-3]]", "a bracket without its partner"),
        ("n[1-99999999]", "more than 100000 nodes"),
        ("n[1-999]m[1-999]", "more than 100000 nodes"),
        (" , ", "no node name"),
    ],
)
def test_a_wrong_node_list_is_refused_with_a_remedy(nodes: str, found: str) -> None:
    with pytest.raises(HostfileError) as caught:
        expand(nodes)
    assert f"found {found}; expected names such as" in str(caught.value)


def test_a_list_of_nodes_comes_before_the_scheduler() -> None:
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8"}
    hosts, origin = discover(slurm, "a b", 4)
    assert hosts == [Host("a", 4), Host("b", 4)] and "NODES=a b" in origin
    assert discover({"NODES": "c", "SLOTS": "2"}, None, None)[0] == [Host("c", 2)]


@pytest.mark.parametrize(
    ("env", "slots"),
    [
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"}, 8),
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "a100:2,h100:4"}, 6),
        ({"SLURM_NTASKS_PER_NODE": "3"}, 3),
        ({"SLURM_GPUS_ON_NODE": "8", "SLOTS": "5"}, 5),
    ],
)
def test_slurm_gives_nodes_and_slots(env: dict[str, str], slots: int) -> None:
    hosts, origin = discover({"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", **env}, None, None)
    assert hosts == [Host("n1", slots), Host("n2", slots)]
    assert origin == "SLURM job 7, SLURM_JOB_NODELIST=n[1-2]"


def test_other_schedulers_node_files_are_counted(tmp_path: Path) -> None:
    nodes = _file(tmp_path, "n1\nn1\nn2\nn2\n")
    for variable in ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE"):
        assert discover({variable: str(nodes)}, None, None)[0] == [Host("n1", 2), Host("n2", 2)]
    mpi = tmp_path / "mpi"
    mpi.write_text("w-0.svc slots=1\nw-1.svc slots=1\n", encoding="utf-8")
    found = discover({"OMPI_MCA_orte_default_hostfile": str(mpi)}, None, 8)[0]
    assert found == [Host("w-0.svc", 8), Host("w-1.svc", 8)]
    with pytest.raises(HostfileError, match=r"node file cannot be read .* Give NODES="):
        discover({"PBS_NODEFILE": str(tmp_path / "gone")}, None, None)


def test_without_a_scheduler_it_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostfile, "_num_gpus", lambda: 0)
    assert discover({}, None, None)[0] == [Host("localhost", 1)]
    assert discover({}, None, 3)[0] == [Host("localhost", 3)]
    monkeypatch.setattr(hostfile, "_num_gpus", lambda: 4)
    assert discover({}, None, None)[0] == [Host("localhost", 4)]


@pytest.mark.parametrize(
    ("env", "nodes", "slots", "message"),
    [
        ({}, "a b", None, r"NODES='a b' has no SLOTS: .* Give SLOTS=N"),
        ({"SLURM_JOB_NODELIST": "n1"}, None, None, "not how many ranks each: .* Give SLOTS=N"),
        ({"SLOTS": "many"}, None, None, "SLOTS='many': expected a whole number from 1 on"),
        ({}, None, 0, "--slots='0': expected a whole number from 1 on"),
        ({"SLURM_JOB_NODELIST": "n1", "SLURM_GPUS_ON_NODE": "x"}, None, None, "SLURM_GPUS_ON_NODE='x'"),
    ],
)
def test_slots_that_are_unknown_or_wrong_are_asked_for(
    env: dict[str, str], nodes: str | None, slots: int | None, message: str
) -> None:
    with pytest.raises(HostfileError, match=message):
        discover(env, nodes, slots)


def _main(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    hostfile.configure(parser)
    return hostfile.main(parser.parse_args(argv))


def test_the_command_writes_prints_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cluster"
    assert _main("--nodes", "n[1-2]", "--slots", "8", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert printed == out.read_text(encoding="utf-8") + f"-> {out}: 2 node(s) x 8 slot(s)\n"


def test_the_command_ends_with_2_and_the_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("--nodes", "n[2-1]", "--slots", "8", "--out", str(tmp_path / "x")) == 2
    assert "HostfileError: node list 'n[2-1]'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
