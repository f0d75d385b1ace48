"""Writes many small sessions: one recording by pynwb, and copies of it under other ids.

In: a number of sessions. Out: a folder of NWB files, kept among the benchmark's recordings.
"""

import shutil
from pathlib import Path

import h5py
import numpy as np
from make_nwb import START, cache
from pynwb import NWBHDF5IO, NWBFile, TimeSeries

NUM_UNITS, SECONDS = 20, 120.0


def small_sessions(number: int) -> Path:
    """A folder with that many files of one small session each: 20 units, running, trials; 2 minutes."""
    folder = cache() / f"sessions-{number}"
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        first = partial / "s0000.nwb"
        _write(first)
        for i in range(1, number):
            copy = partial / f"s{i:04d}.nwb"
            shutil.copyfile(first, copy)
            _rename(copy, copy.stem)
        partial.rename(folder)
    return folder


def _write(path: Path) -> None:
    rng = np.random.default_rng(5)
    nwb = NWBFile(session_description="small", identifier=path.stem, session_id=path.stem, session_start_time=START)
    for _ in range(NUM_UNITS):
        nwb.add_unit(spike_times=np.sort(rng.random(600) * SECONDS))
    data = rng.random(round(SECONDS * 60))
    nwb.add_acquisition(TimeSeries(name="running", data=data, rate=60.0, starting_time=0.0, unit="cm/s"))
    for start in np.arange(0.0, SECONDS, 5.0):
        nwb.add_trial(start_time=float(start), stop_time=float(start) + 2.0)
    with NWBHDF5IO(path, "w") as io:
        io.write(nwb)


def _rename(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        for field in ("identifier", "general/session_id"):
            file[field][()] = name
