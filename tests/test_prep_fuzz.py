"""Ingest of damaged recordings: no crash, no hang, no write outside the store, no flood of memory, one line for each.

In: damaged files, each of a number (fuzz_nwb). Out: nothing; the slow test takes 300 of them.
"""

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fuzz_nwb import TURNS, damaged, sound_files
from processes import below

from prep.store import Store
from prep.verify import verify

ROOT = Path(__file__).parent.parent
ADDRESS_SPACE = 3 * 2**30  # of each process: a flood of memory is an error in the process, not the end of the machine
PEAK_MB = 700.0
QUICK, MANY = len(TURNS), 300  # quick: each kind of damage once
PATIENCE_S = 280.0
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@dataclass
class Ingested:
    """What one run made of damaged files."""

    done: dict[str, str]  # file: what was done to it
    told: dict[str, list[str]]  # file: lines about it in failed.jsonl
    states: dict[str, str]  # file: refused, failed, partly; not there: ok
    sealed: set[str]
    returncode: int | None
    errors: str
    peaks_mb: dict[int, float] = field(default_factory=dict)

    def of(self, pattern: str) -> list[str]:
        """What is told of files, where it matches."""
        return [f"{file} ({self.done[file]}): {line}" for file, lines in self.told.items() for line in lines
                if re.search(pattern, line)]  # fmt: skip


def ingest_damaged(numbers: Sequence[int], sound: Sequence[Path], box: Path, patience_s: float) -> Ingested:
    """Damage files and ingest them by the command, in a folder deep inside of `box`."""
    here = box / "a" / "b"
    for name in ("in", "cwd"):
        (here / name).mkdir(parents=True)
    done = {path.name: what for path, what in (damaged(number, sound, here / "in") for number in numbers)}
    before = contents(box)
    scratch = box.parent / f"{box.name}_scratch"
    scratch.mkdir()
    words = [sys.executable, "-W", "error", "-m", "prep", "ingest", str(here / "in"), "--out", str(here / "store")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    limit = (ADDRESS_SPACE, ADDRESS_SPACE)
    process = subprocess.Popen(
        [*words, "--workers", "2", "--dataset", "d1"], cwd=here / "cwd", env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit), **pipes,
    )  # fmt: skip
    peaks = watch(process, patience_s)
    returncode = process.poll()
    process.kill()
    errors = process.communicate()[1]
    after = {name: content for name, content in contents(box).items() if not name.startswith("a/b/store")}
    assert after == before, "something outside of the store has changed"
    return told_of(here / "store", done, returncode, errors, peaks)


def told_of(
    store: Path, done: dict[str, str], returncode: int | None, errors: str, peaks: dict[int, float]
) -> Ingested:
    """What the store says of each file."""
    result = Ingested(done, {}, {}, set(), returncode, errors, peaks)
    listed = store / "failed.jsonl"
    for row in map(json.loads, listed.read_text().splitlines() if listed.exists() else []):
        result.told.setdefault(row["file"], []).append(f"{row['object']}: {row['error']}")
        result.states[row["file"]] = row["state"]
    if (store / "catalog.json").exists():
        result.sealed = {source["file"] for entry in Store(store).entries for source in entry["sources"]}
    return result


def watch(process: "subprocess.Popen[str]", patience_s: float) -> dict[int, float]:
    """Peak memory (MB) of each process until the first has ended, or the time is up."""
    peaks: dict[int, float] = {}
    deadline = time.monotonic() + patience_s
    while process.poll() is None and time.monotonic() < deadline:
        for pid in [process.pid, *below(process.pid)]:
            found = re.search(r"VmHWM:\s+(\d+) kB", status(pid))
            peaks[pid] = float(found.group(1)) / 1024 if found else peaks.get(pid, 0.0)
        time.sleep(0.1)
    return peaks


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return ""


def contents(box: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything in a folder."""
    found = ((path, path.lstat()) for path in box.rglob("*"))
    return {path.relative_to(box).as_posix(): (info.st_size, info.st_mtime_ns) for path, info in found
            if not (path.is_dir() and path.name == "b")}  # fmt: skip


def complaints(errors: str) -> list[str]:
    """What was printed on stderr but for how far the run is, which one that takes half a minute says."""
    return [line for line in errors.splitlines() if not re.match(r"prep ingest: \d+ of \d+ sessions", line)]


def check(found: Ingested) -> None:
    """What must hold whatever was done to the files."""
    assert found.returncode == 1, f"exit code {found.returncode}: {found.errors}"
    assert complaints(found.errors) == []
    assert found.done.keys() == {*found.sealed, *(file for file, state in found.states.items() if state != "partly")}
    assert found.of(r"\n|Traceback") == []
    assert found.of("worker processes died") == []
    assert found.of(r": $|: \w+(Error|Exception)\b") == [], "not in words that a physiologist understands"
    assert all(peak < PEAK_MB for peak in found.peaks_mb.values()), found.peaks_mb


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sound_files(tmp_path_factory.mktemp("sound") / "files")


def test_damaged_recordings_are_told_of_in_one_line_and_stop_nobody(sound: list[Path], tmp_path: Path) -> None:
    found = ingest_damaged(range(QUICK), sound, tmp_path / "box", PATIENCE_S)
    check(found)
    assert len(found.states) > QUICK / 4 and len(found.sealed) > QUICK / 4
    store = tmp_path / "box" / "a" / "b" / "store"
    assert [problem for row in verify(store) for problem in row.problems] == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_three_hundred_damaged_recordings_are_told_of_in_one_line(sound: list[Path], tmp_path: Path) -> None:
    found = ingest_damaged(range(MANY), sound, tmp_path / "box", 10 * PATIENCE_S)
    check(found)
    store = tmp_path / "box" / "a" / "b" / "store"
    assert [problem for row in verify(store) for problem in row.problems] == []
