"""The fault campaign: ingest killed or starved of disk or memory at a random moment; a rerun ends with the same bytes.

In: how many runs, a folder to work in. Out: one row per run, appended to tests/bench/CAMPAIGN_prep.jsonl, and a summary
in CAMPAIGN_prep.md. The number of a run gives its fault and its moment; a campaign that is started again goes on.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from campaign_table import by_fault, by_run, code_of, go_on
from nwb_builders import running, with_rois, with_units, write
from processes import below, cmdline, comes_true, is_alive, kill
from starved import Memory, disk_of, memory_of

from prep.synthetic import write_brain

ROOT = Path(__file__).parent.parent
RECORDINGS = Path(os.environ.get("BRAINLOOM_NWB_DIR", ROOT.parent / "shared" / "nwb"))
REAL = ("head_direction_A2929.nwb", "motor_cortex_anm00239123.nwb", "allen_layout_truncated.nwb",
        "retina_nwb1.nwb", "foraging_717121.nwb.zarr")  # fmt: skip
TABLE = ROOT / "tests" / "bench" / "CAMPAIGN_prep.jsonl"
SEED = 20260102
FAULTS = ("client", "worker", "scheduler", "their worker", "disk", "client", "their client", "worker", "memory", "disk")
# When the fault comes: while nothing is done yet, as soon as the run is there, or (random) at any moment of it.
STAGES = ("starting", "planning", "shards", "finishing", "catalog", "random")
PATIENCE_S = 240.0
LEAVING_S = 40.0  # until workers whose client was killed are gone


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one run."""

    number: int
    fault: str
    at_s: float  # after the start of the command; for disk and memory: 0
    limit_mb: float  # of disk or memory; 0: none
    first_code: int | None  # exit code of the run that the fault met; None: it hung and was killed
    first_s: float
    met: str  # what the run was at when the fault came; when it ended, for disk and memory
    sealed: int  # sessions and stimuli that were sealed when it was over
    error: str  # what it died of, or failed with
    rerun_code: int | None
    rerun_s: float
    same_bytes: bool
    verified: bool
    nothing_outside: bool
    nobody_left: bool  # no process of it went on
    said: str  # its last line of complaint

    @property
    def where(self) -> str:
        """The fault, and where it met the run."""
        return f"{self.fault} at {self.at_s} s"

    @property
    def is_sound(self) -> bool:
        """Whether everything is as it must be."""
        ended = self.first_code is not None and self.rerun_code is not None
        return ended and self.same_bytes and self.verified and self.nothing_outside and self.nobody_left


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The run that nothing disturbed."""

    files: dict[str, str]
    code: int
    seconds: float
    num_bytes: int

    @property
    def num_sealed(self) -> int:
        """Sessions and stimuli."""
        return sum(name.endswith(".manifest.json") for name in self.files)


# ---------------------------------------------------------------- recordings


def recordings(folder: Path, *, is_large: bool) -> Path:
    """The synthetic brain, real files where there are some, and one that takes seconds."""
    folder.mkdir(parents=True)
    write_brain(folder / "synthetic", None, "test", 0)
    if is_large:
        for name in REAL if RECORDINGS.is_dir() else ():
            source = RECORDINGS / name
            shutil.copytree(source, folder / name) if source.is_dir() else shutil.copyfile(source, folder / name)
        write_large(folder)
    return folder


def write_large(folder: Path) -> Path:
    """120 units and 300 ROIs for 20 minutes: several shards."""
    rng = np.random.default_rng(3)

    def fill(nwb: Any) -> None:
        with_units(*(np.sort(rng.uniform(0, 1200, 9_000)) for _ in range(120)))(nwb)
        with_rois({"DfOverF/dff": rng.normal(size=(36_000, 300)).astype("f4")}, 300, rate=30.0)(nwb)
        running(rng.normal(size=120_000), rate=100.0)(nwb)

    return write(folder, fill, "large.nwb")


# ---------------------------------------------------------------- processes


def command(
    source: Path, store: Path, scheduler: str | None = None, memory: Memory | None = None
) -> "subprocess.Popen[str]":
    """`python -m prep ingest` in a process of its own."""
    words = [sys.executable, "-m", "prep", "ingest", str(source), "--out", str(store), "--dataset", "d1"]
    words += ["--scheduler", scheduler] if scheduler else ["--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        words, cwd=store.parent, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=memory.join if memory else None,
    )  # fmt: skip


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, "subprocess.Popen[str]", "subprocess.Popen[str]"]]:
    """A scheduler and two workers of somebody else: address, scheduler, workers' front process."""
    dask, address_file = str(Path(sys.executable).parent / "dask"), folder / "scheduler.json"
    address_file.unlink(missing_ok=True)
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "text": True, "cwd": folder}
    quiet["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
    here = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(address_file)]
    scheduler = subprocess.Popen([dask, "scheduler", "--port", "0", *here], **quiet)
    comes_true(address_file.exists)
    words = [dask, "worker", "--nworkers", "2", "--nthreads", "1", "--no-dashboard", "--local-directory", str(folder)]
    workers = subprocess.Popen([*words, "--scheduler-file", str(address_file), "--death-timeout", "20"], **quiet)
    try:
        comes_true(lambda: len(list(below(workers.pid))) >= 2)
        yield str(json.loads(address_file.read_text())["address"]), scheduler, workers
    finally:
        for pid in [*below(workers.pid), workers.pid, scheduler.pid]:
            kill(pid)
        workers.wait()
        scheduler.wait()


def workers_of(pid: int) -> list[int]:
    """Processes below one that are Dask workers, not the trackers of their resources."""
    return [child for child in below(pid) if b"spawn_main" in cmdline(child) or b"forkserver" in cmdline(child)]


def ended(process: "subprocess.Popen[str]") -> tuple[int | None, str]:
    """Exit code and last line of complaint; None where it had to be killed."""
    try:
        _, errors = process.communicate(timeout=PATIENCE_S)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        for pid in [*below(process.pid), process.pid]:
            kill(pid)
        _, errors = process.communicate()
        code = None
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return code, lines[-1][:300] if lines else ""


# ---------------------------------------------------------------- one run


def files_of(folder: Path) -> dict[str, str]:
    """Every file of a store with its digest, but for the lock."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def stamps(folder: Path, *, but: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file outside of the store."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(but))
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def undisturbed(work: Path) -> Truth:
    """What a run makes of the recordings when nothing happens to it."""
    store, started = work / "truth" / "store", time.monotonic()
    store.parent.mkdir()
    code, said = ended(command(work / "in", store))
    seconds = time.monotonic() - started
    assert code in (0, 1), f"the undisturbed run ended with {code}: {said}"
    size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    return Truth(files=files_of(store), code=code, seconds=seconds, num_bytes=size)


def one_run(number: int, work: Path, truth: Truth) -> Row:
    """Disturb an ingest, run it again, and compare."""
    rng = np.random.default_rng([SEED, number])
    fault, moment = FAULTS[number % len(FAULTS)], STAGES[(number + number // len(FAULTS)) % len(STAGES)]
    at_s, share = float(rng.uniform(0.1, 1.0)) * truth.seconds, float(rng.uniform(0.02, 0.95))
    place = work / f"run{number}" / "deep"
    place.mkdir(parents=True)
    store, before = place / "store", stamps(work, but=place)
    disk_mb = share * truth.num_bytes / 1e6 if fault == "disk" else 0.0
    memory_mb = 110 + 90 * share if fault == "memory" else 0.0
    with disk_of(store, disk_mb) as enlarge:
        started = time.monotonic()
        with memory_of(f"{os.getpid()}_{number}", memory_mb) as memory:
            disturb = Disturbance(fault, moment, at_s, truth.num_sealed, memory)
            code, said, nobody_left, met, came_s = disturbed(disturb, work / "in", store, rng)
            error = error_of(store, said, memory.num_killed() if memory else 0)
        first_s, sealed = time.monotonic() - started, len(list(store.glob("*/[!.]*.manifest.json")))
        enlarge()
        started = time.monotonic()
        rerun_code, rerun_said = ended(command(work / "in", store))
        rerun_s = time.monotonic() - started
        verified = subprocess.run(
            [sys.executable, "-m", "prep", "verify", str(store)], cwd=ROOT, capture_output=True, check=False
        )
        same = rerun_code == truth.code and files_of(store) == truth.files
    row = Row(
        number=number, fault=fault, at_s=round(came_s, 2), limit_mb=round(disk_mb + memory_mb, 1), first_code=code,
        first_s=round(first_s, 1), met=met, sealed=sealed, error=error, rerun_code=rerun_code,
        rerun_s=round(rerun_s, 1), same_bytes=same, verified=verified.returncode == 0,
        nothing_outside=stamps(work, but=place) == before and {path.name for path in place.iterdir()} <= {"store"},
        nobody_left=nobody_left, said=said or rerun_said,
    )  # fmt: skip
    if row.is_sound:
        shutil.rmtree(place.parent)  # what is not sound stays, to be looked at
    return row


@dataclass(frozen=True)
class Disturbance:
    """What happens to a run, and when."""

    fault: str
    moment: str  # one of STAGES
    at_s: float  # where the moment is random
    num_sealed: int  # sessions and stimuli of the whole store
    memory: Memory | None

    def is_due(self, store: Path, seconds: float) -> bool:
        """Whether it is time."""
        if self.moment in ("random", "starting"):
            return seconds >= self.at_s * (1.0 if self.moment == "random" else 0.1)
        return stage(store, self.num_sealed) in STAGES[STAGES.index(self.moment) : -1]


def disturbed(
    disturb: Disturbance, source: Path, store: Path, rng: np.random.Generator
) -> tuple[int | None, str, bool, str, float]:
    """One ingest and its fault: exit code, last complaint, whether all processes are gone; what it met, and when."""
    fault, started = disturb.fault, time.monotonic()
    with contextlib.ExitStack() as stack:
        scratch, scheduler, address = Path(stack.enter_context(tempfile.TemporaryDirectory())), None, None
        if fault == "scheduler" or fault.startswith("their"):
            address, scheduler, workers = stack.enter_context(cluster(scratch))
        process, started = command(source, store, scheduler=address, memory=disturb.memory), time.monotonic()
        family: list[int] = []
        is_starved = fault in ("disk", "memory")
        while process.poll() is None and not is_starved and not disturb.is_due(store, time.monotonic() - started):
            family = [*below(process.pid)] or family
            time.sleep(0.002)
        met, came_s = stage(store, disturb.num_sealed), 0.0 if is_starved else time.monotonic() - started
        family = [*below(process.pid)] or family
        if fault in ("client", "their client"):
            kill(process.pid)
        elif fault == "scheduler" and scheduler is not None:
            kill(scheduler.pid)
        elif "worker" in fault:
            victims = workers_of(process.pid) if scheduler is None else [*below(workers.pid)]
            if victims:
                kill(int(victims[int(rng.integers(len(victims)))]))
        code, said = ended(process)
        nobody_left = comes_true(lambda: not any(is_alive(pid) for pid in family), LEAVING_S)
    return code, said, nobody_left, stage(store, disturb.num_sealed) if is_starved else met, came_s


def stage(store: Path, num_sealed: int) -> str:
    """What an ingest is at that will have sealed so many sessions and stimuli."""
    if (store / "catalog.json").exists():
        return "done"
    folders = list(store.glob("*/*.zarr"))
    sealed = len(list(store.glob("*/[!.]*.manifest.json")))
    if sealed >= num_sealed:
        return "catalog"
    if any((folder / "zarr.json").exists() for folder in folders if folder.name.startswith(".")):
        return "finishing"
    if len([folder for folder in folders if not folder.name.startswith(".")]) > sealed:
        return "finishing"  # renamed, not sealed yet
    if any((folder / "streams").exists() or (folder / "frames").exists() for folder in folders):
        return "shards"
    return "planning" if any((store / ".runs").glob("*")) else "starting"


def error_of(store: Path, said: str, num_killed: int) -> str:
    """What a run died of, or its sessions failed with, in a word."""
    listed = store / "failed.jsonl"
    text = said + (listed.read_text() if listed.exists() else "")
    words = {"no space left": "disk full", "disk is full": "disk full",
             "worker processes died": "workers died", "is lost": "scheduler lost",
             "memoryerror": "no memory", "allocate": "no memory", "it hung": "hung"}  # fmt: skip
    found = sorted({word for sign, word in words.items() if sign in text.lower()})
    return ", ".join([*found, *([f"{num_killed} killed for memory"] if num_killed else [])])


# ---------------------------------------------------------------- the table


def summary(rows: Sequence[Row]) -> str:
    """The table for people."""
    head = ["came at", "limit", "when it was at", "exit code", "sealed", "error", "rerun"]
    lines = ["# Faults while ingesting", "", f"{sum(row.is_sound for row in rows)} of {len(rows)} runs ended with the "
             "same bytes after a rerun, verified, with nothing written outside of the store and no process left.", "",
             *by_fault(rows),
             *by_run(head, rows, lambda row: [f"{row.at_s:.1f} s", f"{row.limit_mb:.0f} MB", row.met, code_of(row),
                                              row.sealed, row.error, f"{row.rerun_s:.0f} s"])]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def campaign(num_runs: int, table: Path, work: Path, *, is_large: bool = True) -> list[Row]:
    """Do the next `num_runs` runs; returns their rows."""
    recordings(work / "in", is_large=is_large)
    truth = undisturbed(work)
    print(f"undisturbed: {truth.seconds:.1f} s, {len(truth.files)} files, {truth.num_bytes / 1e6:.0f} MB", flush=True)
    return go_on(Row, table, num_runs, lambda number: one_run(number, work, truth), told, summary)


def told(row: Row) -> str:
    """A run in a line."""
    return (f"{row.fault:12s} at {row.at_s:5.1f} s, limit {row.limit_mb:6.0f} MB, {row.met}: code {row.first_code}, "
            f"{row.sealed} sealed, {row.error}; rerun {row.rerun_s:.1f} s")  # fmt: skip


def main() -> int:
    """Exit code: 0 all runs were sound, 1 some were not (named)."""
    parser = argparse.ArgumentParser(prog="python -m campaign", description=main.__doc__)
    parser.add_argument("which", choices=["prep", "train", "cluster"], help="what is put to the test")
    parser.add_argument("num", type=int, metavar="N", help="how many runs")
    parser.add_argument("--table", type=Path, help="where rows are appended (tests/bench/CAMPAIGN_*.jsonl)")
    args = parser.parse_args()
    which = importlib.import_module(
        {"prep": "campaign", "train": "campaign_train", "cluster": "campaign_cluster"}[args.which]
    )
    table = args.table or which.TABLE
    work = Path(tempfile.mkdtemp(prefix="campaign_"))
    rows = which.campaign(args.num, table, work)
    num_sound = sum(row.is_sound for row in rows)
    if num_sound == len(rows):
        shutil.rmtree(work)
    else:
        print(f"What was not sound is still in {work}.")
    print(f"{num_sound} of {len(rows)} runs were sound; {table.with_suffix('.md')} has them all.")
    return 0 if num_sound == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
