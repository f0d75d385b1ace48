"""How many random windows a second training gets from a store, beside bare memmaps and peers, in turns.

In: the benchmark's recording (0.6 GB), ingested where it is not yet. Out: tables on stdout; with `--write` a section
of RESULTS.md. `python -W ignore tests/bench/reader.py [--no-peers] [--write]`; the files are in the page cache.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_nwb import Size, cache, recording
from measure import run as run_script
from peers.environment import READING, interpreter
from run import WORKER, Results, head
from science.results import write_section
from windows import WINDOW_NS, Read, Windows, copied_into, in_turns

from prep.store import Session, Store
from train import config
from train.build import model_config
from train.loader import TrainingSamples, batches, read_ahead

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MEMMAP, OWN, WHOLE = "bare memmap, places known", "Brainloom's reader", "whole windows, as batches"
NUM_WINDOWS, BATCH = 5_000, 16
MIN_SHARE, MIN_DELIVERED, MAX_OPEN_MS, MAX_SIZE = 0.5, 2_000.0, 0.4, 1.05
SAMPLES = ["train.num_steps=100000", "train.families=[co_smoothing+decoding, encoding, forecasting]"]


def made(minutes: float) -> tuple[Path, Session]:
    """A folder with the store, the bare values of each stream, and windows that start anywhere."""
    path, folder = recording(Size(minutes=minutes)), cache() / f"reader-{minutes:g}"
    if not (folder / "windows.npz").exists():
        folder.mkdir(exist_ok=True)
        run_script(HERE / "prep_once.py", path, folder / "store", **WORKER)
        _write_bare(folder, Store(folder / "store").session(0))
    return folder, Store(folder / "store").session(0)


def _write_bare(folder: Path, session: Session) -> None:
    streams = [session.stream(name) for name in session.stream_names]
    described = {}
    for stream in streams:
        stream.read(slice(0, stream.spec.num_tokens)).tofile(folder / stream.spec.name)
        values = folder / "store" / session.entry["path"] / "streams" / stream.spec.name / "values"
        kind = {"dtype": stream.rows.spec.dtype, "shape": stream.spec.shape, "path": str(values)}
        described[stream.spec.name] = kind
    (folder / "streams.json").write_text(json.dumps(described))
    begin_ns = max(int(stream.start_ns[0]) for stream in streams)
    end_ns = min(int(stream.start_ns[-1]) for stream in streams)
    start_ns = np.random.default_rng(1).integers(begin_ns, end_ns - WINDOW_NS, NUM_WINDOWS)
    spans = [[stream.start_ns.searchsorted((at, at + WINDOW_NS)) for stream in streams] for at in start_ns]
    np.savez(folder / "windows.npz", start_ns=start_ns, tokens=np.array(spans))


def from_store(session: Session, windows: Windows) -> Read:
    """A window's values as the store's reader gives them, from a time alone."""
    starts_ns = windows.start_ns.tolist()
    streams = [session.stream(name) for name in windows.streams]

    def read(number: int) -> list[np.ndarray]:
        start_ns = starts_ns[number]
        return [stream.read(stream.tokens(start_ns, start_ns + WINDOW_NS)) for stream in streams]

    return read


def compare(session: Session, windows: Windows) -> float:
    """Every window's values against the bare ones, each chunk for the first time. Returns seconds of CPU."""
    began_s, ours, bare = time.process_time(), from_store(session, windows), windows.memmaps()
    for number in range(len(windows)):
        pairs = zip(ours(number), bare(number), strict=True)
        if not all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs):
            raise SystemExit(f"window {number} differs from the bare values")
    return time.process_time() - began_s


def delivered(session: Session, windows: Windows) -> Iterator[None]:
    """Windows as batches that another thread has filled, one by one, as the training process takes them."""
    read, order = from_store(session, windows), itertools.cycle(range(len(windows)))

    def filled() -> dict[str, torch.Tensor]:
        room = windows.room(BATCH)
        for place, number in enumerate(itertools.islice(order, BATCH)):
            for values, stream in zip(read(number), room, strict=True):
                stream[place, : len(values)] = values
        return {name: torch.from_numpy(stream) for name, stream in zip(windows.streams, room, strict=True)}

    for _ in read_ahead((filled(), []) for _ in itertools.count()):
        yield from itertools.repeat(None, BATCH)


def samples(store: Path) -> Iterator[None]:
    """Samples of the debug configuration as the loop takes them: units drawn, masked, standardised, in batches."""
    run = config.load(ROOT / "train/configs/debug.yaml", SAMPLES)
    for batch in batches(TrainingSamples(store, run, model_config(run)), 0, 0, 1):
        yield from itertools.repeat(None, len(batch["labels"]))


def bench_own(results: Results, folder: Path, session: Session) -> None:
    """The reader, batches and samples, each in turns with memmaps."""
    windows = Windows(folder)
    first_s = compare(session, windows)
    size = sum(part.nbytes for part in windows.memmaps()(0))
    results.say(
        f"A window: {WINDOW_NS / 1e9:g} s from any start, {size / 1e3:.0f} kB in {len(windows.streams)} streams."
    )
    results.say(
        f"{len(windows):,} windows on first touch, digests checked, equal to the bare ones: {first_s:.1f} CPU s."
    )
    roads = {
        MEMMAP: copied_into(windows.memmaps(), windows.room(), len(windows)),
        OWN: copied_into(from_store(session, windows), windows.room(), len(windows)),
        WHOLE: delivered(session, windows),
        "training samples, debug, as batches": samples(folder / "store"),
    }
    found = in_turns(roads, results.args.turns, results.args.seconds)
    limit, whole = found[MEMMAP], found[WHOLE]
    results.say("Windows per second of CPU, copied into arrays that are there already; medians over turns:", "")
    shares = {name: float(np.median(np.array(rates) / limit)) for name, rates in found.items()}
    rows = [(name, float(np.median(rates)), f"{shares[name]:.0%}") for name, rates in found.items()]
    results.table(("what", "windows/s", "of memmap"), rows)
    results.verdict("the reader, of memmap", shares[OWN], MIN_SHARE, least=True)
    results.verdict("whole windows as batches", float(np.median(whole)), MIN_DELIVERED, least=True, unit="/s")


def bench_open(results: Results, folder: Path) -> None:
    """What it takes to open a session whose files are in the page cache, and how large the store is."""
    store, alone, whole = Store(folder / "store"), [], []
    for _ in range(300):
        store._open.clear()
        began_s = time.perf_counter()
        session = store.session(0)
        alone.append(time.perf_counter() - began_s)
        for name in session.stream_names:
            session.stream(name)
        whole.append(time.perf_counter() - began_s)
    results.verdict("a session opened, its manifest checked", min(alone) * 1e3, MAX_OPEN_MS, unit=" ms")
    results.say(f"With all its streams, their clocks and statistics checked: {min(whole) * 1e3:.2f} ms.", "")
    on_disk = sum(path.stat().st_size for path in (folder / "store" / "bench").rglob("*") if path.is_file())
    raw = sum((folder / name).stat().st_size for name in Windows(folder).streams)
    clocks = sum(8 * stream["shape"][0] for stream in Windows(folder).streams.values())
    results.say(f"On disk {on_disk / 1e6:,.1f} MB; values {raw / 1e6:,.1f} MB, clocks {clocks / 1e6:,.1f} MB.")
    results.verdict("the session on disk, of its values and clocks", on_disk / (raw + clocks), MAX_SIZE, unit="x")


def bench_peers(results: Results, folder: Path) -> None:
    """Other readers of the same windows, each in a process and an environment of its own, in turns with memmaps."""
    path = recording(Size(minutes=results.args.minutes))
    rows: list[tuple[str, float | str, str, str]] = []
    for peer in READING:
        try:
            python = interpreter(peer)
            if peer.script:
                run_script(HERE / "peers" / peer.script, path, folder, python=python)
            command = [python, HERE / "peers" / "read_windows.py", *peer.args, folder]
            command += [results.args.turns, results.args.seconds]
            done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            why = (str(error.stderr).strip().splitlines() or ["it failed"])[-1]
            rows.append((peer.name, "-", "-", f"does not run here: {why[:200]}"))
            continue
        found = {name: np.array(rates) for name, rates in json.loads(done.stdout.splitlines()[-1]).items()}
        share = float(np.median(found["peer"] / found["memmap"]))
        rows.append((peer.name, float(np.median(found["peer"])), f"{share:.1%}", peer.unfair))
    results.say("The same windows by peers, each in turns with memmaps in its own process:", "")
    results.table(("what", "windows/s", "of memmap", "what is unfair in it"), rows)


def main() -> None:
    """Make what is missing, measure, say what was promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the recording (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="of all that is compared (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU seconds of each in a turn (%(default)s)")
    parser.add_argument("--no-peers", action="store_true", help="without the environments of others")
    parser.add_argument("--write", action="store_true", help="write the section of RESULTS.md")
    results = Results(parser.parse_args())
    folder, session = made(results.args.minutes)
    torch.set_num_threads(1)
    head(results, "Random windows from a store", "python -W ignore tests/bench/reader.py --write")
    results.say(f"torch {version('torch')}.", "")
    bench_own(results, folder, session)
    bench_open(results, folder)
    if not results.args.no_peers:
        bench_peers(results, folder)
    if results.args.write:
        write_section(HERE / "RESULTS.md", "make bench, reading", "\n".join(results.lines))


if __name__ == "__main__":
    main()
