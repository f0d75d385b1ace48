"""Files of a store survive a power cut, and appear whole or not at all.

In: bytes, hand-built sessions. Out: files in temporary folders; which of them were made durable before which rename.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from store_builders import build_store

from prep.catalog import MANIFEST, sealed_folder
from prep.disk import appears_whole, files_below, sha256, write_bytes, write_parts, written_together


@pytest.fixture
def durable(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Inodes of what was made durable."""
    inodes: set[int] = set()
    fsync = os.fsync

    def noted(handle: int) -> None:
        fsync(handle)
        inodes.add(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    return inodes


def test_no_seal_stands_over_bytes_that_a_power_cut_takes(
    tmp_path: Path, durable: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seals: list[str] = []
    replace = Path.replace

    def checked(self: Path, target: Path) -> Path:
        if target.name.endswith(MANIFEST):
            folder = sealed_folder(target)
            names = files_below(folder)
            assert sorted(json.loads(self.read_bytes())["files"]) == names != []
            assert [path.name for path in (self, *(folder / name for name in names)) if not is_in(path, durable)] == []
            seals.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", checked)
    (tmp_path / "a.nwb").write_text("x")
    build_store(tmp_path / "store", tmp_path / "a.nwb", "s1")
    assert len(seals) == 2 and f"s1{MANIFEST}" in seals  # the session's and its stimulus'


def is_in(path: Path, durable: set[int]) -> bool:
    return path.stat().st_ino in durable


def test_a_file_is_durable_when_it_is_written_or_with_others_at_the_end(tmp_path: Path, durable: set[int]) -> None:
    alone = write_parts(tmp_path / "alone", [b"1", b"2"])
    assert is_in(tmp_path / "alone", durable) and alone == {"bytes": 2, "sha256": sha256(tmp_path / "alone")}
    with written_together() as written:
        entry = write_bytes(tmp_path / "deep" / "first", b"3")
        write_bytes(tmp_path / "scratch", b"4", is_kept=False)
        assert not is_in(tmp_path / "deep" / "first", durable)
    assert written == {tmp_path / "deep" / "first": entry}
    assert is_in(tmp_path / "deep" / "first", durable) and not is_in(tmp_path / "scratch", durable)
    write_bytes(tmp_path / "after", b"5")
    assert is_in(tmp_path / "after", durable)


def test_an_fsync_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(handle: int) -> None:
        raise OSError(5, "the disk is on fire")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="on fire"), written_together():
        write_bytes(tmp_path / "a", b"1")
    with pytest.raises(OSError, match="on fire"):
        write_bytes(tmp_path / "b", b"1")
    assert files_below(tmp_path) == ["a"]


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def parts() -> Any:
        yield b"1"
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_parts(tmp_path / "a", parts())
    with pytest.raises(ValueError, match="no more"), appears_whole(tmp_path / "b") as temporary:
        temporary.write_bytes(b"1")
        raise ValueError("no more")
    assert files_below(tmp_path) == []


def test_files_below_a_folder_are_all_files_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b", "a/c", "a/.hidden", "a.b/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    assert files_below(tmp_path) == ["a.b/d", "a/.hidden", "a/c", "b"]
    assert files_below(tmp_path / "not there") == []
