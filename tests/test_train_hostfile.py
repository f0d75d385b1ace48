"""The hostfile's grammar and its messages: a table of cases that are written, and one of families that are generated.

In:  hostfiles written here, hostfiles/example, and the table of hostfiles/README.md.
Out: what was read, or the text of the refusal.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from train.hostfile import Host, HostfileError, read, read_for_run, render, write

ROOT = Path(__file__).resolve().parent.parent


KNOWN = {"n1": "10.0.0.1", "alias": "10.0.0.1", "n2": "10.0.0.2", "n3": "10.0.0.3", "localhost": "127.0.0.1"}


@pytest.fixture(autouse=True)
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that knows KNOWN and addresses, and a machine that is called `own`."""

    def resolve(name: str, *args: Any, **kwargs: Any) -> list[Any]:
        address = name if name.replace(".", "").isdigit() else KNOWN.get(name.lower())
        if address is None:
            raise socket.gaierror(f"{name} is not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "gethostname", lambda: "own.cluster")


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
    assert len(single) == 8
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
        ("n1 slots=2.5\n", ["'n1 slots=2.5'", "a whole number from 1 to 9999"]),
        ("n1 slots=-2\n", ["'n1 slots=-2'"]),
        ("n1 slots=08\n", ["'n1 slots=08'"]),
        ("n1 slots=\u0668\n", ["line 1"]),
        ("n1\u00a0slots=8\n", ["line 1"]),
        ("n1 slots=8 # rack\n", ["the comment on a line of its own"]),
        ("n1 slots=8 n2 slots=8\n", ["line 1"]),
        ("n1:22 slots=8\n", ["'n1:22'", "write `n1`", "port belongs in ~/.ssh/config"]),
        ("me@n1 slots=8\n", ["'me@n1'", "write `n1`", "user belongs in ~/.ssh/config"]),
        ("-oProxyCommand=x slots=8\n", ["'-oProxyCommand=x'", "a host name of letters"]),
        ("n\u043ede slots=8\n", ["'n\\u043ede'", "'\\u043e' only looks like a letter"]),
        ("fe80::1 slots=8\n", ["'fe80::1'", "give the IPv6 address a name"]),
        ("10.0.0.300 slots=8\n", ["'10.0.0.300'", "an IPv4 address of four numbers", "write the whole address"]),
        (f"{'n' * 64} slots=8\n", ["at most 253 long and 63 between dots"]),
        ("n1 slots=10000\n", ["from 1 to 9999"]),
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


def test_two_names_of_one_machine_are_refused(tmp_path: Path) -> None:
    assert len(read(_file(tmp_path, "n1 slots=1\nn2 slots=1\nunknown slots=1\nother slots=1\n"))) == 4
    with pytest.raises(HostfileError, match=r"line 2: found 'alias', which is 10\.0\.0\.1 as 'n1' of line 1 is"):
        read(_file(tmp_path, "n1 slots=1\nalias slots=1\n"))
    with pytest.raises(
        HostfileError, match=r"line 3: found 'own', which is this machine as 'own\.cluster' of line 1 is"
    ):
        read(_file(tmp_path, "own.cluster slots=1\nn2 slots=1\nown slots=1\n"))
    with pytest.raises(
        HostfileError, match=r"line 2: found 'localhost' beside other hosts.*`hostname` says own\.cluster"
    ):
        read(_file(tmp_path, "n1 slots=1\nlocalhost slots=1\n"))


def test_a_name_of_sshs_config_is_known_by_what_stands_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(
        '#!/bin/sh\ncase "$2" in\n  short) echo hostname n1;;\n  far) echo hostname deep; echo proxyjump gate;;\n'
        "  *) echo hostname $2; echo proxycommand none;;\nesac\n"
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert len(read_for_run(_file(tmp_path, "short slots=1\nfar slots=1\nn2 slots=1\n"), {})) == 3
    with pytest.raises(HostfileError, match=r"line 2: found 'n1', which is 10\.0\.0\.1 as 'short' of line 1 is"):
        read(_file(tmp_path, "short slots=1\nn1 slots=1\n"))
    with pytest.raises(
        HostfileError, match=r"line 2: found 'nope', which neither the name service nor ssh's config knows"
    ):
        read_for_run(_file(tmp_path, "n1 slots=1\nnope slots=1\n"), {})


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


GOOD_NAMES = ["n1", "N1", "node-01", "a.b.c", "node_1", "7up", "10.0.0.1", "x" * 63, ".".join(["x" * 61] * 4), "cafe"]
GOOD_LINES = ["{} slots=2", "  {} slots=2", "{}\tslots=2", "{} \t slots=2\t ", "\t{} slots=2"]
BAD_NUMBERS = ["", "0", "00", "08", "+8", "-2", "2.5", "8.", "8abc", "8 8", "0x8", "1e3", "1_0", "10000", "9" * 5000]
BAD_NUMBERS += ["8,", "8;", "8#", "'8'", '"8"', "8/2", "nan", "eight", "\uff18", "\u0668", "8\u00a0", "8\0", "8\x1b[0m"]
BAD_KEYS = ["", "8", "slots", "slots 8", "slots = 8", "slots= 8", "slots =8", "Slots=8", "SLOTS=8", "slot=8", "slots:8"]
BAD_KEYS += [
    "slots==8",
    "gpus=8",
    "max_slots=8",
    "slots=8 max_slots=8",
    "slots=8 slots=8",
    "slots=8 # rack",
    "slots=8 x",
]
BAD_NAMES = [
    "-n1",
    "n1-",
    ".n1",
    "n1.",
    "n..1",
    "n-.1",
    "_n1",
    "n1:22",
    "me@n1",
    "me@n1:22",
    "fe80::1",
    "[::1]",
    "n1,n2",
]
BAD_NAMES += [
    "n[1-2]",
    "n1/24",
    "ssh://n1",
    "$(id)",
    "`id`",
    "n1;id",
    "n1|id",
    "n1&",
    "n1>x",
    "'n1'",
    '"n1"',
    "n*",
    "n?",
]
BAD_NAMES += [
    "~",
    "n\\1",
    "%h",
    "n1%eth0",
    "!n1",
    "{n1}",
    "(n1)",
    "-oProxyCommand=id",
    "x" * 64,
    ".".join(["x" * 62] * 5),
]
BAD_NAMES += ["10.0.0.300", "10.0.0", "1", "012.0.0.1", "0x7f.0.0.1", "0x7f000001", "2130706433", "1.2.3.4.5"]
BAD_NAMES += [
    "n\u043ede",
    "\uff4e1",
    "n\u200b1",
    "n\u00ad1",
    "\ufeffn1",
    "\u00f1",
    "n\u20101",
    "n1\u202e",
    "n1\0",
    "\x1b[1mn1",
]
BAD_BLANKS = ["\u00a0", "\u2003", "\x0b", "\x0c", "\x85", "\u2028", "\u3000", "\0"]
BAD_BYTES = [b"\xff", b"n1 slots=8\xff", b"n\xc31 slots=8", b"n1 slots=8\r", b"\r", b"# c\r", b"n1 slots=8\r# c"]
PAIRS = [("n9", "n9"), ("n9", "N9"), ("w0", "W0"), ("n1", "alias"), ("n1", "10.0.0.1"), ("localhost", "127.0.0.1")]
PAIRS += [("own", "own.cluster"), ("own", "localhost"), ("n9", "localhost"), ("n9", "127.0.0.1"), ("n9", "127.1.2.3")]
BEFORE = {1: b"", 4: b"# c\n\nother slots=8\n"}  # the line on which the fault comes to stand, and what stands before


def _families() -> Iterator[tuple[str, bytes, int]]:
    """Family, content, and the line that is refused (0: none is)."""
    yield from (("name", f"{name} slots=2\n".encode(), 0) for name in GOOD_NAMES)
    yield from (("blanks", line.format("n1").encode() + end, 0) for line in GOOD_LINES for end in (b"\n", b""))
    yield from (("number", f"n1 slots={number}".encode(), 0) for number in (1, 8, 9999))
    yield from (
        ("comment", f"#{text}\nn1 slots=2\n  # end".encode(), 0) for text in ("", " c", "\u00e9", "n1 slots=0", "!")
    )
    yield from (("many", "".join(f"n{i} slots=8\n" for i in range(1, n)).encode(), 0) for n in (2, 3, 40))
    lines = [("number", f"n1 slots={number}".encode()) for number in BAD_NUMBERS]
    lines += [("key", f"n1 {key}".encode()) for key in BAD_KEYS]
    lines += [("name", f"{name} slots=8".encode()) for name in BAD_NAMES]
    lines += [("blank", f"n1{blank}slots=8".encode()) for blank in BAD_BLANKS]
    lines += [("bytes", line) for line in BAD_BYTES]
    yield from ((family, before + line + b"\n", at) for family, line in lines for at, before in BEFORE.items())
    yield from (("twice", f"{a} slots=8\n# c\n{b} slots=8\n".encode(), 3) for a, b in PAIRS)
    yield from (("unequal", f"n2 slots={a}\nn3 slots={b}\n".encode(), 2) for a, b in ((8, 4), (1, 2), (8, 80)))
    yield from (("empty", content, 1) for content in (b"", b"\n", b"  \n\t\n", b"# c\n", b"#n1 slots=8"))
    yield from (("mark", mark + "n1 slots=8\n".encode(code), 1) for mark, code in MARKS)


MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))


def test_what_the_spec_accepts_is_read_and_each_refusal_names_its_line(tmp_path: Path) -> None:
    cases = list(dict.fromkeys(_families()))
    assert len(cases) >= 200
    wrong = []
    for family, content, line in cases:
        try:
            read(_file(tmp_path, content))
            said = ""
        except HostfileError as error:
            said = str(error)
        if bool(said) != bool(line) or (line and (f", line {line}: found " not in said or "To mend it: " not in said)):
            wrong.append((family, content[:80], line, said))
        assert said.isascii() and "\0" not in said and "\x1b" not in said, said
    assert not wrong


def test_the_spec_names_every_family(tmp_path: Path) -> None:
    text = (ROOT / "hostfiles" / "README.md").read_text(encoding="utf-8")
    rows = text.split("what was found and the remedy")[1].split("\n\n## ")[0]
    assert {family for family, _, line in _families() if line} <= set(rows.replace("|", " ").split())


def test_a_number_of_any_length_and_a_name_of_any_bytes_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    alphabet = list(b"n1 slots=8\t#@:.-\xff\0[]")
    for _ in range(500):
        content = bytes(rng.choice(alphabet, size=int(rng.integers(0, 30))))
        try:
            hosts = read(_file(tmp_path, content))
        except HostfileError:  # refused, with its line: as it should be
            continue
        assert all(1 <= host.slots <= 9999 for host in hosts)
