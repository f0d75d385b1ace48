"""torch-brain: the recording into its HDF5, by the objects that its own pipelines build.

In: a recording, a folder. Out: session.h5; the cost on stdout. In its favour: spike times are read in bulk, where its
own `extract_spikes_from_nwbfile` reads unit by unit and makes Python lists.
"""

import sys
from datetime import datetime
from pathlib import Path

import h5py
import numpy as np
from pynwb import NWBHDF5IO, TimeSeries
from torch_brain.data import ArrayDict, Data, IrregularTimeSeries, RegularTimeSeries, SessionDescription

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import measured


def irregular(series: TimeSeries) -> IrregularTimeSeries:
    """A series with time stamps."""
    return IrregularTimeSeries(timestamps=series.timestamps[:], values=series.data[:], domain="auto")


def regular(series: TimeSeries) -> RegularTimeSeries:
    """A series with a rate."""
    return RegularTimeSeries(values=series.data[:], sampling_rate=series.rate, domain_start=series.starting_time)


def convert(recording: Path, out: Path) -> None:
    """Read with pynwb, write with Data.to_hdf5."""
    with NWBHDF5IO(recording, "r") as io:
        nwb = io.read()
        stops = nwb.units.spike_times_index.data[:].astype(np.int64)
        unit = np.repeat(np.arange(len(stops)), np.diff(stops, prepend=0))
        time_s = nwb.units["spike_times"].target.data[:]
        spikes = IrregularTimeSeries(timestamps=time_s, unit_index=unit, domain="auto")
        spikes.sort()
        behavior = nwb.processing["behavior"]
        roi = regular(nwb.processing["ophys"]["DfOverF"]["roi"])
        data = Data(
            session=SessionDescription(id="bench", recording_date=datetime(2024, 1, 1)),
            spikes=spikes,
            units=ArrayDict(id=np.arange(len(stops)).astype(str).astype("S")),
            roi=roi,
            running=irregular(nwb.acquisition["running"]),
            pupil=irregular(behavior["PupilTracking"]["pupil"]),
            position=irregular(behavior["Position"]["position"]),
            film=regular(nwb.stimulus["film"]),
            film_frames=ArrayDict(frames=nwb.stimulus_template["film_frames"].data[:]),
            domain=roi.domain,
        )
        with h5py.File(out / "session.h5", "w") as file:
            data.to_hdf5(file)


if __name__ == "__main__":
    with measured():
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
