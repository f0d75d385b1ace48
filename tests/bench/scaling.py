"""`make bench-scaling`: what the dry run says of a step on two hosts, beside what the step takes.

In: nothing; two hosts in network namespaces of this machine, one rank each, between them a link with a rate and a
delay. Out: a section of tests/bench/RESULTS.md.

The doctor measures latency and bandwidth of each link. What a rank computes is known from a link that is not slowed:
its step, less the exchanges that the model says for the constants which the doctor measured there. The prediction for
a slow link is that, and the exchanges by the model for its constants. All links take turns, since the machine's speed
changes within minutes; the medians of the turns are compared.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.science import results
from hosts_on_one_machine import Hosts, hosts, why_not
from slow_link import NAME, slow_link
from train_builders import ROOT, tiny_run, tiny_store

from prep.store import Store
from train import hostfile
from train.config import ModelConfig, RunConfig
from train.dry_run import job_of
from train.hostfile import Host
from train.metrics import read_metrics
from train.plan import Plan, plan_of, samples_of
from train.sources import SourceTable
from train.traffic import laptop

LINKS = ((1000.0, 1.0), (200.0, 2.0), (50.0, 5.0))  # Mbit/s, ms
NUM_STEPS, NUM_FIRST = 16, 4  # the first are not counted: modules are not gathered ahead yet
ALLOWED = 0.20
HEAD = ["link", "latency, ms", "bandwidth, MB/s", "exchanges, s", "predicted, s", "measured, s", "off by"]


@dataclass
class Measured:
    """Of a link, in all turns: the doctor's constants (microseconds, GB/s) and the median step."""

    latencies_us: list[float] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)

    def constants(self) -> dict[str, float]:
        """Fields of Machine."""
        return {
            "latency_inter": statistics.median(self.latencies_us),
            "bandwidth_inter": statistics.median(self.bandwidths),
        }

    def exchange_s(self, plan: Plan) -> float:
        """What the model says of a step's exchanges over this link."""
        return replace(plan, machine=replace(plan.machine, **self.constants())).pace.exchange_s

    def step_s(self) -> float:
        """The median."""
        return statistics.median(self.steps_s)


class Bench:
    """Two hosts, a store, the debug preset under ZeRO-3."""

    def __init__(self, made: Hosts, folder: Path) -> None:
        self.made, self.folder = made, folder
        self.store = tiny_store(folder)
        self.run: RunConfig = replace(
            tiny_run(num_steps=NUM_STEPS), model=ModelConfig(preset="debug"), checkpoint_every=NUM_STEPS
        )
        self.run.save(folder / "run.yaml")
        hostfile.write(folder / "hostfile", [Host(name, 1) for name in made.names], "bench")

    def plan(self) -> Plan:
        """Of the run on the two hosts."""
        store = Store(self.store)
        job = job_of(self.run, len(self.made.names), 1, len(SourceTable(store)), False)
        return plan_of(job, laptop(8.0), *samples_of(self.run, store))

    def call(self, interface: str, *arguments: object) -> str:
        """A command of train on the login host; what it prints."""
        env = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "train", *map(str, arguments), "--hostfile", str(self.folder / "hostfile")]
        done = self.made.run(*words, cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)})
        if done.returncode:
            raise SystemExit(f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    def measure(self, interface: str, into: Measured) -> None:
        """One turn: the doctor, then a run."""
        said = self.call(interface, "doctor")
        found = re.search(r"--bandwidth-inter (\S+) --latency-inter (\S+?)\"", said)
        assert found is not None, said
        into.bandwidths.append(float(found[1]))
        into.latencies_us.append(float(found[2]))
        out = Path(tempfile.mkdtemp(dir=self.folder, prefix="run-")) / "run"
        self.call(interface, "train", "--config", self.folder / "run.yaml", "--store", self.store, "--out", out)
        into.steps_s.append(statistics.median(row["seconds"] for row in read_metrics(out)[NUM_FIRST:]))
        print(interface, into, flush=True)


def way(made: Hosts, link: tuple[float, float] | None) -> AbstractContextManager[None]:
    """The link of a turn; None is the one that is there."""
    return nullcontext() if link is None else slow_link(made, *link)


def compare(num_turns: int, folder: Path) -> list[list[str]]:
    """Rows of the table."""
    measured: dict[tuple[float, float] | None, Measured] = {link: Measured() for link in (None, *LINKS)}
    with hosts(folder / "hosts", ("n1", "n2")) as made:
        bench = Bench(made, folder)
        plan = bench.plan()
        for _ in range(num_turns):
            for link, into in measured.items():
                with way(made, link):
                    bench.measure("eth0" if link is None else NAME, into)
    free = measured[None]
    compute_s = free.step_s() - free.exchange_s(plan)
    rows = []
    for link, found in measured.items():
        predicted = compute_s + found.exchange_s(plan)
        constants = found.constants()
        off = predicted / found.step_s() - 1
        rows.append(
            [
                "as it is" if link is None else f"{link[0]:g} Mbit/s, {link[1]:g} ms",
                f"{constants['latency_inter'] / 1e3:.2f}",
                f"{constants['bandwidth_inter'] * 1e3:.1f}",
                f"{found.exchange_s(plan):.2f}",
                f"{predicted:.2f}",
                f"{found.step_s():.2f}",
                "by definition" if link is None else f"{off:+.0%}{'' if abs(off) <= ALLOWED else ' (!)'}",
            ]
        )
    return rows


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    if why_not():
        raise SystemExit(why_not())
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(args.turns, Path(folder))
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    text = "\n\n".join(
        [
            "# A step on two hosts, predicted and measured",
            f"`make bench-scaling`, {date.today().isoformat()}, revision {revision.stdout.strip()}. Written by the "
            f"run; do not edit. torch {version('torch')}, deepspeed {version('deepspeed')}; debug preset, ZeRO-3, "
            f"fp32, two hosts of one rank each on {os.cpu_count()} hyperthreads, Gloo. Latency and bandwidth as "
            f"`make doctor` measured them, medians of {args.turns} turns; allowed: {ALLOWED:.0%}.",
            results.table(HEAD, rows),
        ]
    )
    results.write_section(ROOT / "tests" / "bench" / "RESULTS.md", "make bench-scaling", text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
