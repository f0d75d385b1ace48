"""The fault campaign of training: killed, starved, damaged at random moments, it goes on as if nothing had been.

In: how many runs, a folder to work in. Out: one row per run, appended to tests/bench/CAMPAIGN_train.jsonl, and a
summary in CAMPAIGN_train.md. The number of a run gives its fault and moment; a campaign that is started again goes on.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from campaign import ended
from campaign_table import by_fault, by_run, code_of, go_on
from processes import below, comes_true, is_alive
from starved import disk_of
from train_builders import LAUNCHER, losses, prepare_run, rank_environment, tiny_run, tiny_store

from train import checkpoint

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "bench" / "CAMPAIGN_train.jsonl"
SEED = 20260706
FAULTS = ("kill one", "kill all", "terminate", "truncate", "flip", "disk")
# Where in a save it comes; or in a step; or (random) at any moment. The first six are inside of a save.
MOMENTS = ("copying", "writing", "digesting", "collecting", "sealing", "pruning", "stepping", "random")
NUM_STEPS, SAVE_EVERY, KEEP = 12, 2, 3
LEAVING_S = 12.0  # until all ranks are gone, once the launcher is

# A rank that does something to the run at one moment of one step: argv is "worker", folder, fault, moment, rank, step.
WORKER = """
import os, signal, sys, threading, time
from pathlib import Path
from train import checkpoint, loop, saving
from train.engine import Engine
_, _, out, fault, moment, victim, step, at_s = sys.argv
POINTS = {"copying": (checkpoint, "files_of"), "writing": (saving, "write_files"),
          "digesting": (checkpoint, "entry_of"), "collecting": (saving, "collect"),
          "sealing": (checkpoint, "seal"), "pruning": (checkpoint, "prune"), "stepping": (Engine, "train_step"),
          "random": (Engine, "train_step")}
place, name = POINTS[moment]
original, seen = getattr(place, name), 0

def strike():
    if fault == "terminate":
        return os.kill(os.getppid(), signal.SIGTERM)
    pids = [int(path.read_text()) for path in Path(out).glob("rank-*.pid")] if fault != "kill one" else []
    for pid in [*(pid for pid in pids if pid != os.getpid()), os.getpid()]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended by itself
            pass

def struck(*args, **more):
    global seen
    seen += 1
    if os.environ["RANK"] == victim:
        if moment == "random" and seen == 1:
            threading.Timer(float(at_s), strike).start()
        elif moment != "random" and seen == int(step):
            strike()
    return original(*args, **more)

if fault not in ("none", "disk"):
    setattr(place, name, struck)
Path(out, f"rank-{os.environ['RANK']}.pid").write_text(str(os.getpid()))
from train.__main__ import main
sys.exit(main(["worker", "--out", out]))
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one run."""

    number: int
    fault: str
    moment: str
    victim: int  # the rank that it came from
    first_code: int | None  # exit code of the run that the fault met; None: it hung and was ended
    first_s: float
    error: str  # what a rank said of the disk
    damaged: str  # the file that was damaged before the rerun
    sealed: int  # step of the newest checkpoint that was whole; 0: none
    resumed: int  # step that the rerun went on from
    passed_over: int  # checkpoints that it named and did not use
    rerun_code: int | None
    rerun_s: float
    same_losses: bool  # of all steps, to the last bit
    same_state: bool  # of the last checkpoint, to the last bit
    nobody_left: bool  # no process of either went on
    said: str  # the last complaint

    @property
    def where(self) -> str:
        """The fault, and where it met the run."""
        return f"{self.fault}, {self.moment}"

    @property
    def is_sound(self) -> bool:
        """Whether it went on from the newest checkpoint that was whole, and ended like the undisturbed run."""
        was_named = self.first_code == 0 or self.fault != "disk" or "cannot be written" in self.error
        went_on = self.first_code is not None and self.rerun_code == 0 and self.resumed == self.sealed
        return was_named and went_on and self.same_losses and self.same_state and self.nobody_left


@dataclass(frozen=True)
class Truth:
    """The run that nothing disturbed."""

    losses: list[float]
    state: dict[str, str]  # digests of the tensors of its last checkpoint
    seconds: float  # of its steps
    num_bytes: int  # of a checkpoint


@dataclass(frozen=True)
class Fault:
    """What happens to a run, and when."""

    kind: str
    moment: str
    victim: int
    count: int  # how many times the moment has come before
    at_s: float  # where it is random: after the first step began

    @classmethod
    def of(cls, number: int, seconds: float) -> "Fault":
        """The fault of a run: a function of its number, but for how long the steps take here."""
        rng = np.random.default_rng([SEED, number])
        kind, moment = FAULTS[number % len(FAULTS)], MOMENTS[(number + number // len(FAULTS)) % len(MOMENTS)]
        victim = 0 if moment in ("collecting", "sealing", "pruning") else int(rng.integers(2))  # what rank 0 alone does
        most = {"stepping": NUM_STEPS, "digesting": 2 * NUM_STEPS // SAVE_EVERY}.get(moment, NUM_STEPS // SAVE_EVERY)
        return cls(kind, moment, victim, int(rng.integers(1, most + 1)), float(rng.uniform(0, seconds)))


def launched(out: Path, fault: Fault) -> tuple[int | None, str, bool]:
    """Two ranks until they end: exit code, last complaint, whether all processes are gone."""
    words = [out, fault.kind, fault.moment, fault.victim, fault.count, fault.at_s]
    worker = [sys.executable, "-c", WORKER, "worker", *map(str, words)]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(out), *worker], cwd=ROOT, env=rank_environment(), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    family: set[int] = set()
    while process.poll() is None and len(family) < 2:
        family |= {*below(process.pid)}
        time.sleep(0.02)
    code, said = ended(process)
    return code, said, comes_true(lambda: not any(is_alive(pid) for pid in family), LEAVING_S)


def state_of(root: Path) -> dict[str, str]:
    """Digests of the tensors of the newest checkpoint, by file name."""
    found, _ = checkpoint.newest(root)
    files = found.manifest["files"] if found else {}
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def prepared(work: Path, name: str) -> Path:
    """A run folder: a checkpoint every other step, by two ranks."""
    run = replace(tiny_run(num_steps=NUM_STEPS, average_steps=6), checkpoint_every=SAVE_EVERY, keep_checkpoints=KEEP)
    return prepare_run(work / name, tiny_store(work), run)


def undisturbed(work: Path) -> Truth:
    """What a run is when nothing happens to it."""
    out = prepared(work, "truth")
    code, said, _ = launched(out, Fault("none", "random", 0, 0, 0.0))
    assert code == 0, f"the undisturbed run ended with {code}: {said}"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    [newest, *_] = sorted((out / "checkpoints").iterdir(), reverse=True)
    num_bytes = sum(path.stat().st_size for path in newest.iterdir())
    return Truth(losses(out), state_of(out / "checkpoints"), sum(row["seconds"] for row in rows), num_bytes)


def damage(root: Path, fault: str, rng: np.random.Generator) -> str:
    """Cut a file of the newest checkpoint short, or turn one bit of it; returns which."""
    sealed = sorted(root.glob("step-*"))
    if fault not in ("truncate", "flip") or not sealed:
        return ""
    files = sorted(sealed[-1].iterdir())
    path = files[int(rng.integers(len(files)))]
    content = bytearray(path.read_bytes())
    place = int(rng.integers(len(content)))
    if fault == "truncate":
        content = content[:place]
    else:
        content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    return f"{sealed[-1].name}/{path.name}"


def one_run(number: int, work: Path, truth: Truth) -> Row:
    """Disturb a run, start it again, and compare."""
    fault, rng = Fault.of(number, truth.seconds), np.random.default_rng([SEED, number, 1])
    out = prepared(work, f"run{number}")
    root, log = out / "checkpoints", out / "logs" / "rank-00000.log"
    limit_mb = float(rng.uniform(0.3, KEEP + 1)) * truth.num_bytes / 1e6 if fault.kind == "disk" else 0.0
    with disk_of(root, limit_mb) as enlarge:
        began_s = time.monotonic()
        code, said, nobody_left = launched(out, fault)
        first_s = time.monotonic() - began_s
        error = "; ".join(re.findall(r"train worker: (.*cannot be written: [^.]*)", all_logs(out)))
        damaged = damage(root, fault.kind, rng)
        whole, seen = checkpoint.newest(root)[0], log.stat().st_size
        enlarge()
        began_s = time.monotonic()
        rerun_code, rerun_said, nobody_left_again = launched(out, Fault("none", "random", 0, 0, 0.0))
        rerun_s = time.monotonic() - began_s
        rerun = log.read_bytes()[seen:].decode()
        resumed = re.search(r"resuming from .* \(step (\d+),", rerun)
        row = Row(
            number=number, fault=fault.kind, moment="" if fault.kind == "disk" else fault.moment, victim=fault.victim,
            first_code=code, first_s=round(first_s, 1), error=error[:200].replace(str(out), ""), damaged=damaged,
            sealed=whole.step if whole else 0, resumed=int(resumed.group(1)) if resumed else 0,
            passed_over=rerun.count("passed over:"), rerun_code=rerun_code, rerun_s=round(rerun_s, 1),
            same_losses=rerun_code == 0 and losses(out) == truth.losses, same_state=state_of(root) == truth.state,
            nobody_left=nobody_left and nobody_left_again, said=rerun_said or said,
        )  # fmt: skip
    if row.is_sound:
        shutil.rmtree(out)  # what is not sound stays, to be looked at
    return row


def all_logs(out: Path) -> str:
    """What all ranks have said."""
    return "\n".join(path.read_text(errors="replace") for path in sorted((out / "logs").glob("rank-*.log")))


def summary(rows: Sequence[Row]) -> str:
    """The table for people."""
    head = ["moment", "rank", "exit code", "newest whole", "went on from", "passed over"]
    lines = ["# Faults while training", "", f"{sum(row.is_sound for row in rows)} of {len(rows)} runs went on from the "
             "newest checkpoint that was sealed and whole, and ended with the losses and the state of the undisturbed "
             "run to the last bit, with no process left.", "",
             *by_fault(rows),
             *by_run(head, rows, lambda row: [row.moment, row.victim, code_of(row), row.sealed, row.resumed,
                                              row.passed_over])]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def campaign(num_runs: int, table: Path, work: Path) -> list[Row]:
    """Do the next `num_runs` runs; returns their rows."""
    work.mkdir(parents=True, exist_ok=True)
    truth = undisturbed(work)
    print(f"undisturbed: {truth.seconds:.1f} s of steps, {truth.num_bytes / 1e6:.1f} MB a checkpoint", flush=True)
    return go_on(Row, table, num_runs, lambda number: one_run(number, work, truth), told, summary)


def told(row: Row) -> str:
    """A run in a line."""
    return (f"{row.fault:9s} {row.moment:10s} rank {row.victim}: code {row.first_code}, "
            f"{row.error or row.damaged or 'no damage'}; whole {row.sealed}, went on from {row.resumed}")  # fmt: skip
