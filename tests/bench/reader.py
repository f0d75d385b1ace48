"""How many random windows a second the reader gives, against bare memmaps of the same values in the same run.

In: a folder for a store of about 0.5 GB (600 units, 2,000 ROIs, video index, behaviour; 30 minutes), made where it is
missing. Out: a table. `python tests/bench/reader.py FOLDER [SECONDS]`; the files are in the page cache when it counts.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prep import catalog
from prep.settings import COUNT_MISSING, SPLITS, Kind
from prep.shards import Array, create_rows, write_array, write_group, write_shard
from prep.store import Session, Store, StreamSpec, create_stream, seal

NS = 1_000_000_000
ORIGIN_NS = 12_000_000 * NS
DURATION_S = 1800
WINDOW_NS = 2 * NS
TOKEN_NS = NS // 10
FOLDER = "bench/recording.zarr"
STREAMS: dict[str, tuple[Kind, int, int, int]] = {  # kind, sources, samples per token, duration of a token
    "spikes": ("counts", 600, 5, TOKEN_NS),
    "rois": ("trace", 2000, 2, TOKEN_NS),
    "video": ("frames", 1, 1, NS // 30),
    "running": ("trace", 2, 10, TOKEN_NS),
    "pupil": ("trace", 3, 6, TOKEN_NS),
}


def specification(name: str) -> StreamSpec:
    """One of STREAMS."""
    kind, num_sources, samples, duration_ns = STREAMS[name]
    return StreamSpec(
        name=name,
        kind=kind,
        modality="behavior",
        num_tokens=DURATION_S * NS // duration_ns,
        num_sources=num_sources,
        samples_per_token=samples,
        duration_ns=duration_ns,
        sample_ns=duration_ns // samples,
        channels=tuple(str(number) for number in range(num_sources)),
    )


def draw(spec: StreamSpec, rng: np.random.Generator) -> Array:
    """Values (K, S, P): spikes at rates that are log-normal around 4 Hz, noise for the rest."""
    if spec.kind == "counts":
        rate_hz = np.exp(rng.normal(1.0, 1.0, spec.num_sources)).astype(np.float32)
        counts = rng.poisson(np.broadcast_to(rate_hz[None, :, None] * 0.02, spec.shape))
        return np.minimum(counts, COUNT_MISSING - 1).astype(np.uint8)
    if spec.kind == "frames":
        return np.arange(spec.num_tokens, dtype=np.int32).reshape(spec.shape)
    return rng.standard_normal(spec.shape, np.float32)


def make_store(root: Path, is_raw: bool) -> None:
    """One sealed session; `is_raw`: the counts uncompressed too."""
    rng, session = np.random.default_rng(0), root / FOLDER
    write_group(session, {"brainloom": {}})
    for name in STREAMS:
        spec = specification(name)
        rows = replace(spec.rows(), codec="raw") if is_raw else spec.rows()
        create_stream(session, spec, ORIGIN_NS + np.arange(spec.num_tokens) * spec.duration_ns)
        folder = session / "streams" / name
        create_rows(folder / "values", rows)
        values = draw(spec, rng)
        for shard, start in enumerate(range(0, spec.num_tokens, rows.shard_rows)):
            write_shard(folder / "values", rows, shard, values[start : start + rows.shard_rows])
        for part in ("mean", "scale"):
            write_array(folder / part, np.ones(spec.num_sources, np.float32))
        (root / "bare").mkdir(exist_ok=True)
        values.tofile(root / "bare" / name)
    seal(session, session_entry())
    catalog.write(root)


def session_entry() -> dict[str, Any]:
    """What the catalog says of the session: what a reader asks for."""
    specs = [specification(name) for name in sorted(STREAMS)]
    streams = [{"name": spec.name, "num_tokens": spec.num_tokens, "types": [], "stimulus": None} for spec in specs]
    ids = {"dataset_id": "bench", "session_id": "recording", "path": FOLDER}
    versions = {"recipe_digest": "0" * 64, "features_version": 0, "sources": []}
    return {**ids, **versions, "streams": streams, "num_units": 0, "split_labels": list(SPLITS)}


def from_store(session: Session) -> Callable[[int], list[Array]]:
    """A window's values as the store's reader gives them."""

    def read(start_ns: int) -> list[Array]:
        streams = [session.stream(name) for name in STREAMS]
        return [stream.read(stream.tokens(start_ns, start_ns + WINDOW_NS)) for stream in streams]

    return read


def from_memmaps(root: Path) -> Callable[[int], list[Array]]:
    """A window's values by one slice of one bare memmap per stream: the limit."""
    held = []
    for name in STREAMS:
        spec = specification(name)
        values = np.memmap(root / "bare" / name, spec.rows().dtype, "r", shape=spec.shape)
        held.append((np.asarray(values), spec.duration_ns))

    def read(start_ns: int) -> list[Array]:
        offset_ns = start_ns - ORIGIN_NS
        return [values[-(-offset_ns // step) : -(-(offset_ns + WINDOW_NS) // step)] for values, step in held]

    return read


def rate(read: Callable[[int], list[Array]], starts: Sequence[int], seconds: float, is_copied: bool) -> float:
    """Windows per second of CPU (the machine may be shared); copied, as into a batch, or merely pointed at."""
    count, begin = 0, time.process_time()
    while (took := time.process_time() - begin) < seconds:
        for start in starts[count % len(starts) :][:50]:
            for values in read(start):
                if is_copied:
                    values.copy()
        count += 50
    return count / took


def main(folder: Path, seconds: float) -> None:
    """Make what is missing, warm, check that all roads give the same, count, print."""
    rng = np.random.default_rng(1)
    last_ns = DURATION_S * NS - WINDOW_NS
    starts = [ORIGIN_NS + int(start) for start in rng.integers(0, last_ns, 10_000)]
    roads: dict[str, Callable[[int], list[Array]]] = {}
    for name, is_raw in (("counts zstd, as prep writes them", False), ("counts raw", True)):
        root = folder / ("raw" if is_raw else "zstd")
        if not (root / "catalog.json").exists():
            make_store(root, is_raw)
        begin = time.perf_counter()
        session = Store(root).session(0)
        roads[name] = from_store(session)
        roads[name](starts[0])
        print(f"{name}: store, session and first window in {(time.perf_counter() - begin) * 1e3:.1f} ms")
        roads["bare memmap"] = from_memmaps(root)
    for name, read in roads.items():
        begin = time.perf_counter()
        for start in range(ORIGIN_NS, ORIGIN_NS + last_ns, WINDOW_NS):
            same = zip(read(start), roads["bare memmap"](start), strict=True)
            assert all(np.array_equal(ours, bare) for ours, bare in same)
        print(f"{name}: every window, first touch, compared with the bare ones: {time.perf_counter() - begin:.2f} s")
    size = sum(values.nbytes for values in roads["bare memmap"](starts[0]))
    print(f"random windows of {WINDOW_NS / NS:.0f} s ({size / 1e3:.0f} kB) per CPU second")
    for is_copied in (True, False):
        best = dict.fromkeys(roads, 0.0)
        for _ in range(3):  # in turn, as the machine's load varies
            best = {name: max(best[name], rate(read, starts, seconds, is_copied)) for name, read in roads.items()}
        for name, found in best.items():
            share = found / best["bare memmap"]
            print(f"  {'copied ' if is_copied else 'pointed'} {name:<34} {found:>9,.0f}  {share:6.1%} of the limit")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 2.0)
