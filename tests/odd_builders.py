"""Builds files that are odd and honest: events, trials and tables, bent by h5py to what other tools write.

In: names, times, values, and edits of the written file. Out: functions that fill an NWBFile, and plans.
"""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from hdmf.common import DynamicTable, VectorData
from nwb_builders import RNG, running, write
from pynwb import NWBFile, TimeSeries

from prep.nwb.session import plan_session
from prep.plan import Finding, SessionPlan
from prep.recipe import Recipe


def bent(folder: Path, fill: Callable[[NWBFile], None], edit: Callable[[h5py.File], None]) -> SessionPlan:
    path = write(folder, fill)
    with h5py.File(path, "r+") as file:
        edit(file)
    return plan_session(path, Recipe(), "d1")


def only(session: SessionPlan, code: str) -> Finding:
    (found,) = [item for item in session.findings if item.code == code]
    return found


def moments(name: str, time_s: object, data: object = None) -> Callable[[NWBFile], None]:
    data = np.ones(len(time_s)) if data is None else data
    return lambda nwb: nwb.add_acquisition(TimeSeries(name=name, data=data, unit="n.a.", timestamps=time_s))


def with_trials(starts_s: np.ndarray, length_s: float, **columns: object) -> Callable[[NWBFile], None]:
    def fill(nwb: NWBFile) -> None:
        for name in columns:
            nwb.add_trial_column(name, "a column")
        for row, start_s in enumerate(starts_s):
            cells = {name: column[row] for name, column in columns.items()}
            nwb.add_trial(start_time=start_s, stop_time=start_s + length_s, **cells)

    return fill


def table(name: str, **columns: object) -> Callable[[NWBFile], None]:
    data = [VectorData(name=key, description="d", data=value) for key, value in columns.items()]

    def fill(nwb: NWBFile) -> None:
        module = nwb.processing.get("behavior") or nwb.create_processing_module("behavior", "d")
        module.add(DynamicTable(name=name, description="d", columns=data))

    return fill


def together(*fills: Callable[[NWBFile], None]) -> Callable[[NWBFile], None]:
    def fill(nwb: NWBFile) -> None:
        for one in fills:
            one(nwb)

    return fill


REGULAR = running(RNG.normal(size=6000), starting_time=0.0, rate=20.0)  # 300 s


def swap(file: h5py.File, path: str, data: np.ndarray) -> None:
    attributes = dict(file[path].attrs)
    del file[path]
    file[path] = data
    file[path].attrs.update(attributes)
