"""The limit: the shortest code that reads the recording, bins, cuts, digests and writes the same arrays as Zarr v3.

In: the benchmark's recording, a folder. Out: a Zarr v3 group with the values and clocks of each stream, sharded as
prep shards them, and a JSON file of digests. No audit, no repair, no bound on memory, no statistics, no atomic files:
what is left is what no tool can leave out.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
BIN_NS, BINS = 20_000_000, 5
SHARD_BYTES = 32 * 2**20
TRACES = (  # name, path in the file, samples per token
    ("roi", "processing/ophys/DfOverF/roi", 3),
    ("running", "acquisition/running", 1),
    ("pupil", "processing/behavior/PupilTracking/pupil", 1),
    ("position", "processing/behavior/Position/position", 1),
)


class Writer:
    """Writes arrays into one folder and keeps the sha256 of each file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.digests: dict[str, str] = {}

    def file(self, name: str, *parts: Any) -> None:
        """Write and digest one file."""
        path, digest = self.root / name, hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
        self.digests[name] = digest.hexdigest()

    def whole(self, name: str, values: Array) -> None:
        """Write a small array as one raw chunk."""
        self._metadata(name, values, values.shape, [LITTLE])
        self.file(f"{name}/c/{'/'.join('0' * values.ndim)}", values.tobytes())

    def sharded(self, name: str, values: Array, chunk: int, fill: Any) -> None:
        """Write an array in shards of about 32 MiB, each with the crc32c of its chunks beside it."""
        row_bytes = values[0].nbytes
        num_chunks = min(max(1, SHARD_BYTES // (row_bytes * chunk)), -(-len(values) // chunk))
        grid = (num_chunks * chunk, *values.shape[1:])
        sharding = {
            "chunk_shape": [chunk, *values.shape[1:]],
            "codecs": [LITTLE],
            "index_codecs": [LITTLE, {"name": "crc32c"}],
            "index_location": "end",
        }
        self._metadata(name, values, grid, [{"name": "sharding_indexed", "configuration": sharding}], fill)
        for shard, first in enumerate(range(0, len(values), grid[0])):
            rows = np.ascontiguousarray(values[first : first + grid[0]])
            short = -len(rows) % chunk
            if short:
                rows = np.concatenate([rows, np.full((short, *rows.shape[1:]), fill, rows.dtype)])
            parts: list[Any] = list(rows.reshape(-1, chunk * row_bytes // rows.itemsize).view(np.uint8))
            sizes = np.array([len(part) for part in parts], "<u8")
            index = np.full((num_chunks, 2), 2**64 - 1, "<u8")
            index[: len(parts)] = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1)
            crc = np.array([google_crc32c.value(bytes(part)) for part in parts], "<u4").tobytes()
            tail = index.tobytes()
            self.file(f"{name}/c/{shard}/{'/'.join('0' * (values.ndim - 1))}", *parts, tail, crc32c(tail))
            self.file(f"{name}/digests/{shard}", crc, crc32c(crc))

    def _metadata(self, name: str, values: Array, grid: tuple[int, ...], codecs: list[Any], fill: Any = 0) -> None:
        meta = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": values.shape,
            "data_type": values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if fill != fill else fill,
            "codecs": codecs,
            "attributes": {},
        }
        self.file(f"{name}/zarr.json", json.dumps(meta).encode())


LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


def crc32c(data: bytes) -> bytes:
    """Checksum of 4 bytes, little-endian."""
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def write_spikes(units: h5py.Group, writer: Writer) -> None:
    """Spikes in bins of 20 ms."""
    stops = units["spike_times_index"][:].astype(np.int64)
    bins = np.rint(units["spike_times"][:] * 1e9).astype(np.int64) // BIN_NS
    first, last = int(bins.min()) // BINS, int(bins.max()) // BINS
    counts = np.zeros((last - first + 1, len(stops), BINS), np.uint8)
    token, place = np.divmod(bins - first * BINS, BINS)
    unit = np.repeat(np.arange(len(stops)), np.diff(stops, prepend=0))
    np.add.at(counts.reshape(-1), (token * len(stops) + unit) * BINS + place, 1)
    writer.sharded("streams/spikes/values", counts, 20, 255)
    writer.whole("streams/spikes/start_ns", np.arange(first, last + 1) * BINS * BIN_NS)


def write_trace(series: h5py.Group, writer: Writer, name: str, num_samples: int) -> None:
    """Samples of a series, `num_samples` to a token."""
    data = series["data"]
    if "timestamps" in series:
        time_s = series["timestamps"][:]
    else:
        start = series["starting_time"]
        time_s = start[()] + np.arange(len(data)) / start.attrs["rate"]
    samples = data[:].reshape(len(data), -1).astype(np.float32, copy=False)
    short = -len(samples) % num_samples
    if short:
        samples = np.concatenate([samples, np.full((short, samples.shape[1]), np.nan, np.float32)])
    values = samples.reshape(-1, num_samples, samples.shape[1]).transpose(0, 2, 1)
    duration_s = num_samples * float(np.median(np.diff(time_s[:1000])))
    writer.sharded(f"streams/{name}/values", values, round(2 / duration_s), float("nan"))
    writer.whole(f"streams/{name}/start_ns", np.rint(time_s[::num_samples] * 1e9).astype(np.int64))


def write_film(file: h5py.File, writer: Writer) -> None:
    """The frames, and which was shown when."""
    frames = file["stimulus/templates/film_frames/data"][:]
    writer.sharded("stimuli/film/frames", frames, max(1, 2**20 // frames[0].nbytes), 0)
    series = file["stimulus/presentation/film"]
    index = series["data"][:].astype(np.int32).reshape(-1, 1, 1)
    rate_hz = series["starting_time"].attrs["rate"]
    writer.sharded("streams/film/values", index, round(2 * rate_hz), -1)
    writer.whole("streams/film/start_ns", np.rint(np.arange(len(index)) / rate_hz * 1e9).astype(np.int64))


def write(recording: Path, root: Path) -> None:
    """All arrays of a recording."""
    writer = Writer(root)
    with h5py.File(recording, rdcc_nbytes=64 * 2**20) as file:
        write_spikes(file["units"], writer)
        for name, path, num_samples in TRACES:
            write_trace(file[path], writer, name, num_samples)
        write_film(file, writer)
    writer.file("digests.json", json.dumps(writer.digests, sort_keys=True).encode())


if __name__ == "__main__":
    from measure import measured

    with measured():
        write(Path(sys.argv[1]), Path(sys.argv[2]))
