"""The benchmark of prep: against the limit, against peers, by phase, by workers, by length, over many small sessions.

In: `--only` some of it, sizes. Out: tables on stdout; a whole run writes RESULTS.md. Each piece of work runs in a
process of its own on one thread; CPU seconds are user + system of that process, imports left out; the best of several.
"""

import argparse
import contextlib
import datetime
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_nwb import Size, cache, recording
from measure import Cost, run, run_command
from peers.environment import PEERS, TORCH_BRAIN, interpreter
from science.results import write_section
from sessions import small_sessions

from prep.cluster import KEPT_BYTES, MALLOC
from prep.shards import Rows, rows_spec

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SECTIONS = ("limit", "prep", "workers", "memory", "peers", "sessions")
MAX_OVER_LIMIT, MAX_PEAK_MB, MAX_GROWTH, MIN_SPEEDUP = 1.5, 700.0, 1.10, 1.6
MAX_OVERHEAD_S, MAX_RERUN_S = 0.2, 5.0
LONGER = 10
WORKER = dict.fromkeys(MALLOC, str(KEPT_BYTES))  # environment


@dataclass
class Results:
    """What was measured, and the text that says so."""

    args: argparse.Namespace
    lines: list[str] = field(default_factory=list)
    turns: dict[str, list[Cost]] = field(default_factory=dict)

    def turn(self, name: str, cost: Cost) -> None:
        """Keep what one of the contestants took."""
        self.turns.setdefault(name, []).append(cost)

    def over(self, name: str) -> float:
        """CPU seconds of prep over those of another, in the middle one of all turns."""
        pairs = zip(self.turns["prep"], self.turns[name], strict=True)
        return float(np.median([own.cpu_s / other.cpu_s for own, other in pairs]))

    def say(self, *lines: str) -> None:
        """Add lines, and show them at once."""
        self.lines += lines
        print(*lines, sep="\n", flush=True)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a Markdown table."""
        cells = [[_cell(cell) for cell in row] for row in (head, ["---"] * len(head), *rows)]
        self.say(*(f"| {' | '.join(row)} |" for row in cells), "")

    def verdict(self, what: str, found: float, bound: float, *, least: bool = False, unit: str = "") -> None:
        """Say whether a promise is kept."""
        kept = found >= bound if least else found <= bound
        word = "at least" if least else "at most"
        self.say(f"* {'kept' if kept else '**NOT KEPT**'}: {what}: {found:.2f}{unit} ({word} {bound:g}{unit})", "")


def _cell(value: Any) -> str:
    return (
        f"{value:,.2f}"
        if isinstance(value, float) and value < 100
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def fresh(name: str) -> Path:
    """An empty folder of this name."""
    folder = cache() / f"out-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def warm(path: Path) -> None:
    """Read a file, so that no measurement waits for the disk."""
    with open(path, "rb") as file:
        while file.read(2**24):
            pass


def least(costs: Iterable[Cost]) -> Cost:
    """The run with the fewest CPU seconds: other work on the machine only ever adds."""
    return min(costs, key=lambda cost: cost.cpu_s)


# ---------------------------------------------------------------- the sections


def in_turns(results: Results) -> dict[str, list[Cost]]:
    """The limit, prep and torch-brain in turns, since machines change their speed within minutes; measured once."""
    if not results.turns:
        path = recording(Size(minutes=results.args.minutes, scale=results.args.scale))
        warm(path)
        of_peer = {}
        with contextlib.suppress(subprocess.CalledProcessError):  # pip failed, as `bench_peers` will say
            of_peer = {"python": interpreter(TORCH_BRAIN)} if "peers" in results.args.only else {}
        for _ in range(results.args.turns):
            results.turn("limit", run(HERE / "limit.py", path, fresh("limit")))
            results.turn("prep", run(HERE / "prep_once.py", path, fresh("prep"), **WORKER))
            if of_peer:
                results.turn(TORCH_BRAIN.name, run(HERE / "peers" / TORCH_BRAIN.script, path, fresh("peer"), **of_peer))
    return results.turns


def bench_limit(results: Results) -> None:
    """The shortest code that does the work."""
    turns = in_turns(results)
    path = recording(Size(minutes=results.args.minutes, scale=results.args.scale))
    results.say("## The limit", "")
    results.say(f"`python tests/bench/limit.py {path.name} OUT`; {path.stat().st_size / 1e6:,.0f} MB.", "")
    results.say(f"{', '.join(turns)} are measured in turns, {results.args.turns} times; the best of each is shown.")
    results.say("Their ratios are medians over the turns: a machine's speed changes, for all of a turn alike.", "")
    _costs(results, [("limit", least(turns["limit"]))])


def bench_prep(results: Results) -> None:
    """prep as one process without Dask, by phase."""
    path = recording(Size(minutes=results.args.minutes, scale=results.args.scale))
    cost = least(in_turns(results)["prep"])
    results.say("## prep, one process", "", f"`python tests/bench/prep_once.py {path.name} OUT`, with", "")
    results.say(
        f"`{' '.join(f'{name}={value}' for name, value in WORKER.items())}`, as prep sets them for its workers.", ""
    )
    _costs(results, [("prep", cost)])
    results.say("Where the time goes:", "")
    rest = cost.cpu_s - sum(cost.parts.values())
    rows = [(name, seconds, f"{seconds / cost.cpu_s:.0%}") for name, seconds in cost.parts.items()]
    results.table(("phase", "CPU s", "share"), [*rows, ("the rest", rest, f"{rest / cost.cpu_s:.0%}")])
    results.verdict("peak memory of one process", cost.peak_mb, MAX_PEAK_MB, unit=" MB")
    results.say(f"The arrays of the two stores are equal: {', '.join(equal_arrays())}.", "")
    results.verdict("prep over the limit, CPU", results.over("limit"), MAX_OVER_LIMIT, unit="x")


def equal_arrays() -> list[str]:
    """The arrays that the limit and prep wrote alike, values and clocks' lengths; differing ones end the run."""
    names = []
    session = next((cache() / "out-prep" / "bench").glob("*.zarr"))
    pixels = next((cache() / "out-prep" / "stimuli").glob("*.zarr"))
    for meta in sorted((cache() / "out-limit").rglob("zarr.json")):
        name = meta.parent.relative_to(cache() / "out-limit").as_posix()
        if name.endswith(("values", "frames")):
            other = pixels / "frames" if name.endswith("frames") else session / name
            if not _equal(meta.parent, other):
                raise SystemExit(f"{meta.parent} and {other} differ: the limit does not do the same work")
            names.append(name)
    return names


def _equal(first: Path, second: Path) -> bool:
    a, b = (Rows(path, rows_spec(path)) for path in (first, second))
    if a.spec != b.spec:
        return False
    step = a.spec.shard_rows
    blocks = ((i, min(i + step, a.spec.shape[0])) for i in range(0, a.spec.shape[0], step))
    return all(np.array_equal(a.read(*block), b.read(*block), equal_nan=a.spec.dtype[0] == "f") for block in blocks)


def bench_workers(results: Results) -> None:
    """The whole command with one worker and with two, and on a session of two minutes: what is left is start-up."""
    path = recording(Size(minutes=results.args.minutes, scale=results.args.scale))
    warm(path)
    small = small_sessions(1)
    costs = {
        (source, workers): quickest(results.args.repeat, source, workers)
        for source in (path, small)
        for workers in (1, 2)
    }
    results.say("## The whole command", "", "`python -m prep ingest RECORDING --out OUT --workers N`.", "")
    words = {path: "", small: "start-up: a session of 2 minutes, "}
    _costs(results, [(f"{words[source]}{n} worker{'s' * (n > 1)}", cost) for (source, n), cost in costs.items()])
    one, two = (costs[path, workers].wall_s for workers in (1, 2))
    begin_one, begin_two = (costs[small, workers].wall_s for workers in (1, 2))
    speedup = (one - begin_one) / (two - begin_two)
    results.say(f"2 workers against 1, start-up included: {one / two:.2f}x. The bound is on what comes after it.", "")
    results.verdict("2 workers against 1, wall without start-up", speedup, MIN_SPEEDUP, least=True, unit="x")
    results.verdict("peak memory of a worker", max(cost.peak_mb for cost in costs.values()), MAX_PEAK_MB, unit=" MB")


def quickest(times: int, source: Path, workers: int) -> Cost:
    """The whole command, by wall."""
    return min((ingest(source, fresh("cli"), workers) for _ in range(times)), key=lambda cost: cost.wall_s)


def ingest(source: Path, out: Path, workers: int) -> Cost:
    """The command that a person types."""
    command = [sys.executable, "-m", "prep", "ingest", source, "--out", out, "--workers", workers, "--dataset", "bench"]
    return run_command(command)


def bench_memory(results: Results) -> None:
    """Memory on a recording that is ten times as long."""
    args = results.args
    costs = {}
    for minutes in (args.minutes, args.minutes * LONGER):
        path = recording(Size(minutes=minutes, scale=args.scale))
        warm(path)
        costs[f"{minutes:g} min, {path.stat().st_size / 1e6:,.0f} MB"] = ingest(path, fresh("memory"), 2)
        shutil.rmtree(cache() / "out-memory")
    results.say(
        "## Ten times as long", "", "The whole command with 2 workers; the peak is that of the larger worker.", ""
    )
    _costs(results, list(costs.items()))
    short, long = (cost.peak_mb for cost in costs.values())
    results.verdict("peak memory of a worker on the longer one", long, MAX_PEAK_MB, unit=" MB")
    results.verdict("its growth", long / short, MAX_GROWTH, unit="x")


def bench_peers(results: Results) -> None:
    """Other tools on the same recording, each in its own environment."""
    path = recording(Size(minutes=results.args.minutes, scale=results.args.scale))
    warm(path)
    turns = {name: least(costs) for name, costs in in_turns(results).items()}
    unfair = {"limit": "", "prep": "", TORCH_BRAIN.name: TORCH_BRAIN.unfair}
    rows: list[tuple[Any, ...]] = [
        (name, cost.cpu_s, cost.wall_s, cost.peak_mb, unfair[name]) for name, cost in turns.items()
    ]
    for peer in PEERS:
        if peer.name in turns:
            continue
        try:
            python = interpreter(peer)
        except subprocess.CalledProcessError as error:
            why = (str(error.stderr).strip().splitlines() or ["pip failed"])[-1]
            rows.append((peer.name, "-", "-", "-", f"cannot be installed here: {why[:200]}"))
            continue
        command = (HERE / "peers" / peer.script, path)
        cost = least(run(*command, fresh("peer"), *peer.args, python=python) for _ in range(results.args.repeat))
        rows.append((peer.name, cost.cpu_s, cost.wall_s, cost.peak_mb, peer.unfair))
    results.say("## Peers, one process, the same recording", "")
    results.say("Scripts in `tests/bench/peers/`; the environments are made by pip, one for each.", "")
    results.table(("what", "CPU s", "wall s", "peak MB", "what is unfair in it"), rows)
    if TORCH_BRAIN.name in turns:
        results.verdict("prep against torch-brain's HDF5, CPU", results.over(TORCH_BRAIN.name), 1.0, unit="x")


def bench_sessions(results: Results) -> None:
    """Many small sessions, then the same again with nothing to do."""
    number = results.args.sessions
    folder = small_sessions(number)
    work = run(HERE / "prep_once.py", folder, fresh("work"), **WORKER)
    one = ingest(folder, fresh("one"), 1)
    two = ingest(folder, fresh("two"), 2)
    again = ingest(folder, cache() / "out-two", 2)
    results.say(f"## {number} small sessions", "")
    results.say("20 units, running at 60 Hz, trials, 2 minutes each.")
    results.say("The work itself: plan, shards and finish of all in one process.", "")
    _costs(results, [("the work itself", work), ("1 worker", one), ("2 workers", two), ("again, nothing to do", again)])
    each = [(name, seconds, 1e3 * seconds / number) for name, seconds in work.parts.items()]
    results.table(("phase of the work itself", "CPU s", "ms a session"), each)
    results.verdict("overhead per session", (one.wall_s - work.wall_s) / number, MAX_OVERHEAD_S, unit=" s")
    results.verdict("a run with nothing to do", again.wall_s, MAX_RERUN_S, unit=" s")


def _costs(results: Results, rows: Sequence[tuple[str, Cost]]) -> None:
    cells = [(name, cost.cpu_s, cost.wall_s, cost.peak_mb) for name, cost in rows]
    results.table(("what", "CPU s", "wall s", "peak MB"), cells)


# ---------------------------------------------------------------- the command


def head(results: Results, title: str, command: str) -> None:
    """What was run, on what."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("numpy", "h5py", "numcodecs", "zarr", "dask"))
    results.say(f"# {title}", "", f"`{command}`, {datetime.date.today()}. Written by the run; do not edit.", "")
    results.say(f"{cpu}, {os.cpu_count()} cores; load average {os.getloadavg()[0]:.1f} when the run began.", "")
    results.say(f"Python {platform.python_version()}, {libraries}.", "")
    results.say(
        "600 units (10 M spikes), 2,000 ROIs at 30 Hz, a film of 1,800 frames of 320 x 256, running, pupil, position.",
        "",
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="some sections; RESULTS.md stays")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the recording (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of its units, ROIs and frames (%(default)s)")
    parser.add_argument("--sessions", type=int, default=500, help="number of small sessions (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="of the limit, prep and torch-brain (%(default)s)")
    parser.add_argument("--repeat", type=int, default=2, help="runs of which the best counts (%(default)s)")
    results = Results(parser.parse_args())
    began = time.monotonic()
    head(results, "The benchmark of prep", "make bench")
    for section in SECTIONS:
        if section in results.args.only:
            globals()[f"bench_{section}"](results)
    if set(results.args.only) == set(SECTIONS):
        results.say(f"The run took {(time.monotonic() - began) / 60:.0f} minutes.")
        write_section(HERE / "RESULTS.md", "make bench", "\n".join(results.lines))


if __name__ == "__main__":
    main()
