"""The fault campaign of several hosts: one is cut off, frozen, killed, starved at a random moment; the run goes on.

In: how many runs, a folder to work in. Out: one row per run, appended to tests/bench/CAMPAIGN_cluster.jsonl, and a
summary in CAMPAIGN_cluster.md. Three hosts in namespaces of this machine, a rank on each; a campaign that is started
again goes on. The number of a run gives its fault, host and moment.
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

from campaign_table import by_fault, by_run, code_of, go_on
from cluster_faults import FAULTS, NAMES, NUM_STEPS, Fault, Place
from hosts_on_one_machine import LOGIN, Hosts, hosts
from processes import below, cmdline, comes_true, is_alive
from train_builders import losses, prepare_run, rank_environment, tiny_run, tiny_store, train_ranks

from train import hostfile
from train.hostfile import Host
from train.run_folder import sealed_step

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "bench" / "CAMPAIGN_cluster.jsonl"
SAVE_EVERY = 4
NAMED_S, LEAVING_S, PATIENCE_S = 15.0, 25.0, 900.0
MAX_ERROR = 1e-5  # of a loss: other numbers of ranks add in another order


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one run."""

    number: int
    fault: str
    host: str
    step: int  # that was done when it came; -1: the ranks were only starting
    named_s: float | None  # until the message; None: there was none
    said: str
    first_code: int | None  # exit code of the run that the fault met; None: it hung and was ended
    first_s: float
    went_on: list[str]  # the hosts of the last launch of it that went on by itself
    from_step: int  # of the checkpoint that they began with
    incidents: int
    rerun_code: int | None  # of the same command after that; None: it was not needed
    rerun_s: float
    error: float  # the largest difference of a loss from the run that nothing disturbed; -1: steps are missing
    nobody_left: bool
    gone_s: float  # until that was so, once the run had ended (and the host was no longer frozen)

    @property
    def where(self) -> str:
        """The fault, and where it met the run."""
        return f"{self.fault} on {self.host}"

    @property
    def is_sound(self) -> bool:
        """Whether it was named in time, healed where it can be, and ended like the undisturbed run."""
        code = FAULTS[self.fault][1]
        is_named = self.fault == "launcher killed" or (self.named_s is not None and self.named_s <= self.patience_s)
        if code == 0:
            ended = self.first_code == 0 and bool(self.went_on) and self.incidents > 0
        else:
            ended = self.first_code not in (0, None) and code in (None, self.first_code) and self.rerun_code == 0
        return is_named and ended and self.nobody_left and 0 <= self.error <= MAX_ERROR

    @property
    def patience_s(self) -> float:
        """What follows a fault is named when it is met: a host's Python and locks once the run starts again."""
        return 3 * NAMED_S if self.fault in ("wrong Python", "stale lock") else NAMED_S


def prepared(work: Path, name: str) -> Path:
    """A run folder whose global batch three, two and one ranks can share."""
    run = replace(
        tiny_run(num_steps=NUM_STEPS, global_batch_size=6, micro_batch_size=1),
        checkpoint_every=SAVE_EVERY,
        log_every=1,
    )
    out = prepare_run(work / name, tiny_store(work), run)
    run.save(work / "run.yaml")
    return out


def undisturbed(work: Path) -> list[float]:
    """The losses of the run on one host that nothing disturbs."""
    out = prepared(work, "truth")
    assert train_ranks(out, slots=2) == 0
    return losses(out)


def start(place: Place, log: Path) -> "subprocess.Popen[bytes]":
    """`python -m train train` on the login host."""
    path = place.work / "cluster"
    hostfile.write(path, [Host(name, 1) for name in NAMES], "campaign")
    words = ["--config", place.work / "run.yaml", "--store", place.work / "tiny-store", "--out", place.out]
    command = [sys.executable, "-m", "train", "train", *map(str, words), "--hostfile", str(path)]
    with open(log, "ab") as file:
        return subprocess.Popen(
            place.made.words(LOGIN, command),
            cwd=ROOT,
            env=place.env,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
        )


def ended(process: "subprocess.Popen[bytes]") -> int | None:
    """The exit code; None where it had to be killed."""
    try:
        return process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()  # with --kill-child: all that it has started here
        process.wait()
        return None


def num_done(out: Path) -> int:
    """Steps that were done."""
    rows = out / "metrics.jsonl"
    return rows.read_text().count("\n") if rows.exists() else 0


def one_run(number: int, made: Hosts, work: Path, truth: list[float]) -> Row:
    """Disturb a run, see it heal or start it again, and compare."""
    fault, log = Fault.of(number), work / f"run{number}.log"
    env = {**rank_environment(), "DS_ACCELERATOR": "cpu"}
    place = Place(made, work, prepared(work, f"run{number}"), env)
    log.write_bytes(b"")
    began_s = time.monotonic()
    process = start(place, log)
    is_due = (
        (lambda: "they meet at" in log.read_text()) if fault.step < 0 else (lambda: num_done(place.out) > fault.step)
    )
    assert comes_true(lambda: process.poll() is not None or is_due(), PATIENCE_S) and process.poll() is None, (
        log.read_text()
    )
    comes_true(lambda: fault.step >= 0 or bool(place.of_kind(fault.host, b"worker")))
    time.sleep(fault.after_s)
    [launcher] = [pid for pid in below(process.pid) if cmdline(pid).split(b"\0")[1:4] == [b"-m", b"train", b"train"]]
    everybody = {launcher, *(pid for name in NAMES for pid in place.ours(name))}
    step = num_done(place.out) - 1
    struck_s = time.monotonic()
    place.strike(fault, launcher)
    pattern = FAULTS[fault.kind][0].format(host=fault.host)
    found: list[re.Match[str]] = []
    comes_true(lambda: bool(pattern and found.extend(re.finditer(pattern, log.read_text()))) or bool(found) or
         process.poll() is not None, PATIENCE_S)  # fmt: skip
    named_s = round(time.monotonic() - struck_s, 1) if found else None
    code = ended(process)
    first_s = time.monotonic() - began_s
    if fault.kind == "host frozen":
        place.undo(fault)
    began_s = time.monotonic()
    nobody_left = left_none(place, everybody)
    gone_s = time.monotonic() - began_s
    if fault.kind != "host frozen":
        place.undo(fault)
    sealed = sealed_step(place.out)
    incidents = [json.loads(line) for line in lines_of(place.out / "incidents.jsonl")]
    rerun_code, rerun_s = None, 0.0
    if code != 0:
        began_s = time.monotonic()
        rerun_code = ended(start(place, log))
        rerun_s = time.monotonic() - began_s
        nobody_left = nobody_left and left_none(place, set())
    done = num_done(place.out)
    errors = [abs(a - b) for a, b in zip(losses(place.out), truth, strict=True)] if done == NUM_STEPS else [-1.0]
    row = Row(
        number=number, fault=fault.kind, host=fault.host, step=step, named_s=named_s,
        said=found[0].group(0).splitlines()[0] if found else log.read_text()[-300:], first_code=code,
        first_s=round(first_s, 1), went_on=incidents[-1]["went_on"] if incidents else [],
        from_step=incidents[-1]["from_step"] if incidents else sealed, incidents=len(incidents),
        rerun_code=rerun_code, rerun_s=round(rerun_s, 1), error=max(errors), nobody_left=nobody_left,
        gone_s=round(gone_s, 1),
    )  # fmt: skip
    if row.is_sound:
        shutil.rmtree(place.out)  # what is not sound stays, to be looked at
    return row


def left_none(place: Place, everybody: set[int]) -> bool:
    """Whether all that the run had, on any host, is gone within LEAVING_S."""

    def is_empty() -> bool:
        return not any(map(is_alive, everybody)) and not any(place.ours(name) for name in NAMES)

    return comes_true(is_empty, LEAVING_S)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def summary(rows: Sequence[Row]) -> str:
    """The table for people."""
    head = ["host", "after step", "named after", "exit code", "went on from step", "with hosts", "rerun",
            "largest error of a loss"]  # fmt: skip
    lines = ["# Faults of one host of three", "",
             f"{sum(row.is_sound for row in rows)} of {len(rows)} runs were sound: the fault was named within "
             f"{NAMED_S:g} s ({3 * NAMED_S:g} s where it shows at the next start alone), nothing was left running on "
             "any host, and all losses are within 1e-5 of a run that nothing disturbed, after the run had healed "
             "itself or, where it cannot, after the same command.", "",
             *by_fault(rows, slowest_named_after=slowest_named, nothing_left_after=lambda mine: seconds(
                 max(row.gone_s for row in mine))),
             *by_run(head, rows, lambda row: [
                 row.host, row.step, seconds(row.named_s), code_of(row), row.from_step,
                 " ".join(host.split()[0] for host in row.went_on) or "-",
                 "-" if row.rerun_code is None else row.rerun_code, f"{row.error:.1e}"])]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def slowest_named(rows: Sequence[Row]) -> str:
    return seconds(max((row.named_s for row in rows if row.named_s is not None), default=None))


def campaign(num_runs: int, table: Path, work: Path) -> list[Row]:
    """Do the next `num_runs` runs; returns their rows."""
    work.mkdir(parents=True, exist_ok=True)
    truth = undisturbed(work)

    def one(number: int) -> Row:
        with hosts(work / f"hosts{number}", NAMES) as made:
            return one_run(number, made, work, truth)

    return go_on(Row, table, num_runs, one, told, summary)


def told(row: Row) -> str:
    """A run in a line."""
    return (f"{row.fault:15s} on {row.host} after step {row.step:3d}: named after {seconds(row.named_s)}, code "
            f"{row.first_code} in {row.first_s:.0f} s, from step {row.from_step}, rerun {row.rerun_code}, error "
            f"{row.error:.1e}")  # fmt: skip
