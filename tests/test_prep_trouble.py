"""What a person sees of disks that are full, read-only or not theirs, and of files that change while they are read.

In: stand-ins for recordings, real errors of the system. Out: messages, stores in temporary folders.
"""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from store_builders import FakeRecipe, fake_planner

from prep.__main__ import main
from prep.cluster import connect
from prep.disk import in_words
from prep.files import find_files
from prep.ingest import run_ingest
from prep.plan import SessionPlan
from prep.tasks import one_line

GO_ON = "What is sealed stays: run the same command again to go on."


def growing(paths: Sequence[Path], recipe: Any, dataset_id: str) -> SessionPlan:
    """Plans a recording to which somebody still writes."""
    plan = fake_planner(paths, recipe, dataset_id)
    if "grows" in paths[0].name:
        with open(paths[0], "a") as file:
            file.write(" ")
    return plan


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "/s/d1: the disk is full. Free some of it, or give another."),
        (errno.EDQUOT, "/s/d1: your share of the disk is used up. Free some of it, or give another."),
        (errno.EROFS, "/s/d1: the disk can only be read. Give another."),
        (errno.EACCES, "/s/d1: you may not read or write there. Ask whom it belongs to, or give another."),
        (errno.ESTALE, "/s/d1: the disk, or the server that holds it, does not answer. Check it, or give another."),
    ],
)
def test_an_error_of_a_disk_says_what_to_do(number: int, message: str) -> None:
    assert one_line(OSError(number, os.strerror(number), "/s/d1")) == f"{message} {GO_ON}"


def test_an_error_that_is_no_disks_keeps_its_type() -> None:
    assert in_words(OSError("the disk is on fire")) == ""
    assert one_line(OSError("the disk is on fire")) == "OSError: the disk is on fire"


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_write_that_finds_no_room_is_told_of_in_these_words() -> None:
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert one_line(caught.value) == f"the disk is full. Free some of it, or give another. {GO_ON}"


def test_a_store_where_a_file_is_in_the_way_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.nwb").write_text("session=s1")
    out = tmp_path / "a.nwb" / "store"
    assert main(["ingest", str(tmp_path / "a.nwb"), "--out", str(out)]) == 2
    assert "a file is in the place of a folder. Give another." in capsys.readouterr().err


def test_a_recording_that_grows_while_it_is_read_is_not_sealed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name in ("a", "grows"):
        (tmp_path / f"{name}.nwb").write_text(f"session={name}")
    files = find_files([tmp_path], "d1", store)
    with connect(None, 1) as client:
        outcomes = run_ingest(files, store, FakeRecipe(), lambda: client, planner=growing)
        assert [row.state for row in outcomes] == ["ok", "failed"]
        assert outcomes[1].reason == "the file changed while it was being read. Run the same `make prep` again."
        again = run_ingest(files, store, FakeRecipe(), lambda: client, planner=fake_planner)
    assert [row.state for row in again] == ["already there", "ok"]
