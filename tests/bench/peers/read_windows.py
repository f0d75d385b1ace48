"""A peer's reader on random windows, in turns with bare memmaps in the same process; its values are compared with them.

In: zarr, zarrs or tensorstore (they read the store itself) or torch-brain (its own HDF5), a folder of
tests/bench/reader.py, turns, seconds. Out: rates of both as a line of JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from windows import WINDOW_NS, Read, Windows, copied_into, in_turns

NUM_COMPARED = 200
OTHERS = ("running", "pupil", "position", "film")


def by_zarr(windows: Windows, pipeline: str | None = None) -> Read:
    """zarr-python, one slice of one array per stream."""
    import zarr

    if pipeline:
        zarr.config.set({"codec_pipeline.path": pipeline})
    slices = windows.slices()
    arrays = [zarr.open_array(stream["path"], mode="r", zarr_format=3) for stream in windows.streams.values()]
    return lambda number: [np.asarray(array[part]) for array, part in zip(arrays, slices[number], strict=True)]


def by_tensorstore(windows: Windows) -> Read:
    """tensorstore, the reads of a window at once."""
    import tensorstore

    slices = windows.slices()
    arrays = [
        tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": stream["path"]}}).result()
        for stream in windows.streams.values()
    ]

    def read(number: int) -> list[np.ndarray]:
        reads = [array[part].read() for array, part in zip(arrays, slices[number], strict=True)]
        return [one.result() for one in reads]

    return read


def by_torch_brain(windows: Windows) -> Read:
    """torch-brain: a lazy slice of its HDF5, of which the streams are then read; spikes stay times."""
    import h5py
    from torch_brain.data import Data

    file = h5py.File(windows.folder / "session.h5")
    whole = Data.from_hdf5(file, lazy=True)
    starts_s = (windows.start_ns / 1e9).tolist()

    def read(number: int) -> list[np.ndarray]:
        part = whole.slice(starts_s[number], starts_s[number] + WINDOW_NS / 1e9)
        spikes = [part.spikes.timestamps, part.spikes.unit_index]
        return [part.roi.values, *spikes, *(getattr(part, name).values for name in OTHERS)]

    return read


READERS = {
    "zarr": by_zarr,
    "zarrs": lambda windows: by_zarr(windows, "zarrs.ZarrsCodecPipeline"),
    "tensorstore": by_tensorstore,
    "torch-brain": by_torch_brain,
}


def compare(windows: Windows, read: Read, has_times: bool) -> None:
    """Raises AssertionError where the peer's values are not those of the memmaps."""
    bare = windows.memmaps()
    names = list(windows.streams)
    for number in range(NUM_COMPARED):
        theirs, ours = read(number), bare(number)
        if has_times:
            roi, counts = ours[names.index("roi")], ours[names.index("spikes")]
            samples = roi.transpose(0, 2, 1).reshape(-1, roi.shape[1])
            assert abs(len(theirs[0]) - len(samples)) <= roi.shape[2], "about as many samples"
            assert abs(len(theirs[1]) - int(counts.sum())) <= 0.1 * len(theirs[1]), "about as many spikes"
        else:
            assert all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(theirs, ours, strict=True))


def main(name: str, folder: Path, turns: int, seconds: float) -> None:
    """Compare, then count in turns."""
    windows = Windows(folder)
    read = READERS[name](windows)
    compare(windows, read, has_times=name == "torch-brain")
    bare = copied_into(windows.memmaps(), windows.room(), len(windows))
    theirs = (read(number % len(windows)) for number in range(10**9))  # their values are arrays of their own already
    print(json.dumps(in_turns({"memmap": bare, "peer": theirs}, turns, seconds)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
