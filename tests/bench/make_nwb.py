"""Writes the recording that the benchmark runs on: 600 units, 2,000 ROIs, a film, behaviour; 30 minutes, 0.6 GB.

In: minutes, and a scale for the numbers of units, ROIs and frames. Out: an NWB file (HDF5, gzip 4 with shuffle, chunks
of about 10 MB as neuroconv cuts them), kept in a folder for temporary files. The same arguments give the same numbers.
"""

import argparse
import math
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from pynwb import NWBHDF5IO, NWBFile, TimeSeries
from pynwb.behavior import Position, PupilTracking, SpatialSeries
from pynwb.file import Subject
from pynwb.image import ImageSeries
from pynwb.ophys import DfOverF, ImageSegmentation, OpticalChannel, RoiResponseSeries
from scipy.signal import lfilter

__all__ = ["Size", "cache", "recording", "write_recording"]

Array = npt.NDArray[Any]
NUM_UNITS, NUM_ROIS, NUM_FRAMES = 600, 2_000, 1_800
SPIKES_PER_S = 5_600.0  # of 600 units: 10 M in 30 minutes
SPIKE_RATE_HZ = 30_000.0  # a sorter's times are whole samples
ROI_RATE_HZ, FILM_RATE_HZ, POSITION_RATE_HZ, RUNNING_RATE_HZ, PUPIL_RATE_HZ = 30.0, 30.0, 120.0, 60.0, 30.0
FRAME_SHAPE = (256, 320)  # height, width
CHUNK_BYTES = 10_000_000
NUM_BLOCKS = 7  # distinct blocks of ROI samples: 30 minutes; a longer recording repeats them
GZIP_LEVEL = 4
START = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the recording is."""

    minutes: float = 30.0
    scale: float = 1.0

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.minutes * 60.0

    def scaled(self, number: int) -> int:
        """A number of units, ROIs or frames; at least 2."""
        return max(2, round(number * self.scale))


def cache() -> Path:
    """Where the benchmark keeps recordings, stores and the peers' environments."""
    folder = Path(tempfile.gettempdir()) / "brainloom-bench"
    folder.mkdir(exist_ok=True)
    return folder


def recording(size: Size) -> Path:
    """The recording of this size, written if it is not there yet."""
    path = cache() / f"recording-{size.minutes:g}min-{size.scale:g}.nwb"
    if not path.exists():
        partial = path.with_name(f".{path.name}")
        write_recording(partial, size)
        partial.rename(path)
    return path


def write_recording(path: Path, size: Size) -> None:
    """Write the NWB file: its frame by pynwb, then the large arrays block by block."""
    with NWBHDF5IO(path, "w") as io:
        io.write(_frame_of_file(size))
    with h5py.File(path, "r+") as file:
        _write_spikes(file["units"], size)
        _write_rois(file["processing/ophys/DfOverF/roi"], size)
        _write_film(file, size)
        rng = np.random.default_rng(4)
        for place, rate_hz, width in (
            ("acquisition/running", RUNNING_RATE_HZ, 1),
            ("processing/behavior/PupilTracking/pupil", PUPIL_RATE_HZ, 1),
            ("processing/behavior/Position/position", POSITION_RATE_HZ, 2),
        ):
            _write_behavior(file[place], rng, round(size.seconds * rate_hz), rate_hz, width)


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """A chunk of about CHUNK_BYTES as neuroconv cuts it: whole frames of images, else the array's proportions."""
    if len(shape) == 3:
        return min(shape[0], CHUNK_BYTES // (itemsize * math.prod(shape[1:]))), *shape[1:]
    smallest = min(shape)
    proportions = [max(1, length // smallest) for length in shape]
    side = math.floor((CHUNK_BYTES / (math.prod(proportions) * itemsize)) ** (1 / len(shape)))
    return tuple(min(max(1, side) * part, length) for part, length in zip(proportions, shape, strict=True))


# ---------------------------------------------------------------- the frame


def _frame_of_file(size: Size) -> NWBFile:
    """All objects of the file; the large arrays hold two samples each."""
    nwb = NWBFile(
        session_description="a recording for the benchmark",
        identifier="bench",
        session_id="bench",
        session_start_time=START,
        file_create_date=START,
        subject=Subject(subject_id="mouse", species="Mus musculus", age="P90D", sex="F"),
    )
    _add_units(nwb, size.scaled(NUM_UNITS))
    _add_rois(nwb, size.scaled(NUM_ROIS))
    pair = np.zeros(2)
    nwb.add_acquisition(TimeSeries(name="running", data=pair, timestamps=pair, unit="cm/s"))
    behavior = nwb.create_processing_module("behavior", "what the animal did")
    behavior.add(PupilTracking(time_series=TimeSeries(name="pupil", data=pair, timestamps=pair, unit="pixels^2")))
    place = SpatialSeries(
        name="position", data=np.zeros((2, 2)), timestamps=pair, unit="m", reference_frame="arena, its corner"
    )
    behavior.add(Position(spatial_series=place))
    pixels = np.zeros((2, 2, 2), np.uint8)
    film = ImageSeries(name="film_frames", data=pixels, rate=FILM_RATE_HZ, starting_time=0.0, unit="n.a.", format="raw")
    nwb.add_stimulus_template(film)
    index = np.zeros(2, np.uint32)
    nwb.add_stimulus(TimeSeries(name="film", data=index, unit="N/A", rate=FILM_RATE_HZ, starting_time=0.0))
    for start in np.arange(1.0, size.seconds - 6.0, 6.0):
        nwb.add_trial(start_time=float(start), stop_time=float(start) + 4.0)
    return nwb


def _add_units(nwb: NWBFile, num_units: int) -> None:
    device = nwb.create_device("probe")
    group = nwb.create_electrode_group("probe", "a probe", "VISp", device)
    for channel in range(num_units):
        nwb.add_electrode(location="VISp", group=group, x=0.0, y=20.0 * channel, z=0.0)
    nwb.add_unit_column("quality", "the sorter's word")
    for unit in range(num_units):
        nwb.add_unit(spike_times=[0.0], electrodes=[unit], quality="good")


def _add_rois(nwb: NWBFile, num_rois: int) -> None:
    device = nwb.create_device("microscope")
    channel = OpticalChannel(name="green", description="GCaMP", emission_lambda=510.0)
    plane = nwb.create_imaging_plane(
        name="plane", optical_channel=channel, description="one plane", device=device, excitation_lambda=920.0,
        indicator="GCaMP6f", location="VISp",
    )  # fmt: skip
    segmentation = ImageSegmentation()
    module = nwb.create_processing_module("ophys", "cells")
    module.add(segmentation)
    table = segmentation.create_plane_segmentation(name="cells", description="cells", imaging_plane=plane)
    for roi in range(num_rois):
        table.add_roi(pixel_mask=[(roi, 0, 1.0)])
    region = table.create_roi_table_region(region=list(range(num_rois)), description="all")
    data = np.zeros((2, num_rois), np.float32)
    series = RoiResponseSeries(name="roi", data=data, unit="n.a.", rois=region, rate=ROI_RATE_HZ, starting_time=0.0)
    module.add(DfOverF(roi_response_series=series))


# ---------------------------------------------------------------- the large arrays


def _replaced(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: str) -> h5py.Dataset:
    """An empty dataset in place of a small one, with its attributes, compressed."""
    attributes = dict(group[name].attrs)
    del group[name]
    data = group.create_dataset(
        name, shape, dtype, chunks=chunk_shape(shape, np.dtype(dtype).itemsize),
        compression="gzip", compression_opts=GZIP_LEVEL, shuffle=True,
    )  # fmt: skip
    data.attrs.update(attributes)
    return data


def spikes(size: Size) -> Iterator[Array]:
    """Spike times (n,) in s of each unit: gamma intervals about a rate that swings slowly, on the sorter's samples."""
    num_units = size.scaled(NUM_UNITS)
    rng = np.random.default_rng(1)
    rate_hz = rng.lognormal(1.6, 1.1, NUM_UNITS)[:num_units]
    rate_hz *= SPIKES_PER_S * num_units / NUM_UNITS / rate_hz.sum()
    for unit in range(num_units):
        expected = rate_hz[unit] * size.seconds
        interval_s = rng.gamma(2.0, 0.5 / rate_hz[unit], round(expected + 5 * math.sqrt(expected) + 10))
        time_s = np.cumsum(interval_s)
        time_s += 2.0 * np.sin(time_s / (10.0 + unit % 50))  # its derivative stays above -1: in order
        time_s = np.rint(time_s * SPIKE_RATE_HZ) / SPIKE_RATE_HZ
        yield time_s[(time_s >= 0) & (time_s < size.seconds)]


def _write_spikes(units: h5py.Group, size: Size) -> None:
    stops = np.cumsum([len(time_s) for time_s in spikes(size)])
    data = _replaced(units, "spike_times", (int(stops[-1]),), "<f8")
    held: list[Array] = []
    written, num_held = 0, 0
    for number, time_s in enumerate(spikes(size)):
        held.append(time_s)
        num_held += len(time_s)
        if num_held >= data.chunks[0] or number == len(stops) - 1:
            joined = np.concatenate(held)
            whole = len(joined) if number == len(stops) - 1 else len(joined) // data.chunks[0] * data.chunks[0]
            data[written : written + whole] = joined[:whole]
            written, held, num_held = written + whole, [joined[whole:]], len(joined) - whole
    index = units["spike_times_index"]
    attributes = dict(index.attrs)
    attributes["target"] = data.ref
    del units["spike_times_index"]
    units.create_dataset("spike_times_index", data=stops.astype(np.uint32)).attrs.update(attributes)


def _write_rois(series: h5py.Group, size: Size) -> None:
    """dF/F: transients that decay within a second, and noise. Blocks are compressed once and repeated."""
    num_samples, num_rois = round(size.seconds * ROI_RATE_HZ), size.scaled(NUM_ROIS)
    data = _replaced(series, "data", (num_samples, num_rois), "<f4")
    rows, columns = data.chunks
    known: dict[int, list[bytes]] = {}
    for first in range(0, num_samples, rows):
        number = first // rows % NUM_BLOCKS
        if number not in known:
            known[number] = _roi_chunks(number, rows, columns, num_rois)
        for place, chunk in enumerate(known[number]):
            data.id.write_direct_chunk((first, place * columns), chunk)


def _roi_chunks(number: int, rows: int, columns: int, num_rois: int) -> list[bytes]:
    rng = np.random.default_rng((2, number))
    chunks = []
    for first in range(0, num_rois, columns):
        onsets = (rng.random((rows, columns), np.float32) < 0.01) * rng.standard_gamma(2.0, (rows, columns), np.float32)
        samples = lfilter([1.0], [1.0, -math.exp(-1 / (0.7 * ROI_RATE_HZ))], onsets, axis=0).astype(np.float32)
        samples += 0.1 * rng.standard_normal((rows, columns), np.float32)
        samples[:, max(0, num_rois - first) :] = 0.0  # beyond the array: the last chunk is as wide as the others
        chunks.append(_gzip(samples.astype("<f4")))
    return chunks


def _gzip(values: Array) -> bytes:
    """A chunk as HDF5's filters shuffle and deflate encode it."""
    shuffled = values.reshape(-1).view(np.uint8).reshape(-1, values.itemsize).T
    return zlib.compress(np.ascontiguousarray(shuffled).tobytes(), GZIP_LEVEL)


def _write_film(file: h5py.File, size: Size) -> None:
    """Frames (F, height, width) of patches that drift, with noise; they are shown again and again."""
    num_frames = size.scaled(NUM_FRAMES)
    data = _replaced(file["stimulus/templates/film_frames"], "data", (num_frames, *FRAME_SHAPE), "|u1")
    rng = np.random.default_rng(3)
    scene = np.kron(rng.integers(20, 200, (40, 48)).astype(np.uint8), np.ones((16, 16), np.uint8))
    for first in range(0, num_frames, data.chunks[0]):
        last = min(first + data.chunks[0], num_frames)
        frames = np.stack(
            [np.roll(scene, 3 * frame, axis=1)[: FRAME_SHAPE[0], : FRAME_SHAPE[1]] for frame in range(first, last)]
        )
        data[first:last] = frames + rng.integers(0, 16, frames.shape, np.uint8)
    num_shown = round(size.seconds * FILM_RATE_HZ)
    shown = file["stimulus/presentation/film"]
    shown.attrs["neurodata_type"] = "IndexSeries"  # pynwb no longer writes one that points into a template
    shown["indexed_timeseries"] = h5py.SoftLink("/stimulus/templates/film_frames")
    index = _replaced(shown, "data", (num_shown,), "<u4")
    index[:] = np.arange(num_shown) % num_frames


def _write_behavior(series: h5py.Group, rng: np.random.Generator, num_samples: int, rate_hz: float, width: int) -> None:
    """A slow walk on a camera's clock, whose samples are off by some 0.1 ms."""
    shape = (num_samples,) if width == 1 else (num_samples, width)
    walk = lfilter([0.02], [1.0, -0.98], rng.standard_normal(shape), axis=0)
    _replaced(series, "data", shape, "<f8")[...] = 10.0 + walk
    stamps = np.arange(num_samples) / rate_hz + 1e-4 * rng.standard_normal(num_samples)
    _replaced(series, "timestamps", (num_samples,), "<f8")[...] = stamps + 0.01


def main() -> None:
    """Write a recording, or say where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the recording (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of units, ROIs, frames (%(default)s)")
    args = parser.parse_args()
    path = recording(Size(minutes=args.minutes, scale=args.scale))
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
