"""Node lists: ranges as SLURM means them, and which hosts an include and an exclude list leave.

In:  lists of nodes. Out: names, or the text of the refusal.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from train.hostfile import Host, HostfileError
from train.node_list import expand, select

LISTS = [
    ("n[01-03,7],x2-[1-2]", ["n01", "n02", "n03", "n7", "x2-1", "x2-2"]),
    (
        "node[01-02,7]-gpu[1-2]",
        ["node01-gpu1", "node01-gpu2", "node02-gpu1", "node02-gpu2", "node7-gpu1", "node7-gpu2"],
    ),
    ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
    ("n[5]", ["n5"]),
    ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ("a,b", ["a", "b"]),
]
OURS = [("r[1-2]n[01-02]-ib", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"])]  # scontrol 22.05 prints nothing for it


@pytest.mark.parametrize(("nodes", "names"), [*LISTS, *OURS, ("a b", ["a", "b"]), ("a, b,c\n", ["a", "b", "c"])])
def test_node_lists_are_expanded_as_slurm_means_them(nodes: str, names: list[str]) -> None:
    assert expand(nodes) == names


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="no SLURM on this machine")
@pytest.mark.parametrize("nodes", [nodes for nodes, _ in LISTS])
def test_slurm_itself_expands_them_to_the_same_names(nodes: str, tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=localhost\n", encoding="utf-8")
    words = ["scontrol", "show", "hostnames", nodes]
    said = subprocess.run(
        words, env={**os.environ, "SLURM_CONF": str(conf)}, capture_output=True, text=True, check=True
    )
    assert expand(nodes) == said.stdout.split()


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


def test_hosts_are_included_and_excluded_by_ranges_and_keep_their_order() -> None:
    hosts = [Host(f"n{number}", 8) for number in (4, 3, 2, 1)]
    assert select(hosts, None, None) == hosts
    assert select(hosts, "n[1-3]", "n2") == [Host("n3", 8), Host("n1", 8)]
    with pytest.raises(HostfileError, match=r"--include/--exclude: found n9; expected names among n4, n3, n2, n1"):
        select(hosts, None, "n9")
    with pytest.raises(HostfileError, match=r"found no host that is left of .* Exclude fewer"):
        select(hosts, "n1", "n[1-4]")
