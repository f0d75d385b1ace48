"""Lists of node names as schedulers and people write them: `n[01-03,7],x2` is n01 n02 n03 n7 x2.

In:  a list with ranges; hosts, and which of them to include and exclude.
Out: names in the order of the list; the hosts that are left.
"""

from __future__ import annotations

import re

from train.hostfile import Host, HostfileError

MAX_NODES = 100_000  # a typing error in a bracket range must not fill the memory


def select(hosts: list[Host], include: str | None, exclude: str | None) -> list[Host]:
    """Return the hosts that `include` names (all without it) and `exclude` does not; both are node lists.

    Raises HostfileError for a name that no host has, and where no host is left.
    """
    names = [host.name for host in hosts]
    wanted = expand(include) if include else names
    unwanted = expand(exclude) if exclude else []
    if unknown := [name for name in [*wanted, *unwanted] if name not in names]:
        raise HostfileError(
            f"--include/--exclude: found {', '.join(unknown)}; expected names among {', '.join(names)}. "
            "Correct the list."
        )
    left = [host for host in hosts if host.name in wanted and host.name not in unwanted]
    if not left:
        raise HostfileError(
            f"--include/--exclude: found no host that is left of {', '.join(names)}; expected at least one. "
            "Exclude fewer."
        )
    return left


def expand(nodes: str) -> list[str]:
    """Expand a SLURM node list: `n[01-03,7],x2` -> n01 n02 n03 n7 x2; several brackets in a name multiply."""
    names = [name for part in _split_outside_brackets(nodes) for name in _expand_one(part, nodes)]
    if not names:
        raise _list_error(nodes, "no node name")
    return names


def _split_outside_brackets(nodes: str) -> list[str]:
    parts = re.findall(r"(?:\[[^\[\]]*\]|[^\[\],\s])+|[\[\]]|,", nodes)
    if "[" in parts or "]" in parts:
        raise _list_error(nodes, "a bracket without its partner")
    return [part for part in parts if part != ","]


def _expand_one(part: str, nodes: str) -> list[str]:
    names = [""]
    for piece in re.findall(r"\[[^\]]*\]|[^\[]+", part):
        choices = _ranges(piece[1:-1], nodes) if piece.startswith("[") else [piece]
        if len(names) * len(choices) > MAX_NODES:
            raise _list_error(nodes, f"more than {MAX_NODES} nodes")
        names = [name + choice for name in names for choice in choices]
    return names


def _ranges(text: str, nodes: str) -> list[str]:
    choices: list[str] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", item, re.ASCII)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise _list_error(nodes, f"{item!r} inside a bracket")
        last = int(match[2] or match[1])
        if last - int(match[1]) + len(choices) >= MAX_NODES:
            raise _list_error(nodes, f"more than {MAX_NODES} nodes")
        # The first number's width is the padding of all: [08-11] is 08 09 10 11.
        choices += [f"{number:0{len(match[1])}d}" for number in range(int(match[1]), last + 1)]
    return choices


def _list_error(nodes: str, found: str) -> HostfileError:
    return HostfileError(
        f"node list {nodes!r}: found {found}; expected names such as `a b` or `n[01-03,7],x2`. "
        'Correct NODES, or compare with `scontrol show hostnames "$SLURM_JOB_NODELIST"`.'
    )
