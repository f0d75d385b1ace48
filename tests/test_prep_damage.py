"""What is told of damaged files and objects, word for word: sizes that lie, indexes of nothing, clocks of no recording.

In: small files that nwb_builders writes, damaged by hand. Out: nothing.
"""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from nwb_builders import plan, replace, running, with_units, write
from pynwb import NWBFile
from test_prep_nwb_zarr import running_zarr

from prep.nwb.session import plan_session
from prep.plan import PrepError, SessionPlan
from prep.recipe import Recipe
from prep.settings import NO_TIME


def fill(nwb: NWBFile) -> None:
    with_units([1.0, 2.0, 30.0], [3.0])(nwb)
    running(np.arange(99.0) % 7, starting_time=0.0, rate=10.0)(nwb)
    nwb.add_trial(start_time=1.0, stop_time=2.0)
    nwb.add_trial(start_time=3.0, stop_time=4.0)


def damaged(folder: Path, name: str, data: Any = None, **claims: Any) -> SessionPlan:
    """The plan of a file in which a dataset has other values, or claims a size without any."""
    path = write(folder, fill)
    if data is not None:
        replace(path, name, data)
    else:
        with h5py.File(path, "r+") as file:
            attributes = dict(file[name].attrs)
            del file[name]
            file.create_dataset(name, chunks=True, **claims).attrs.update(attributes)
    return plan_session(path, Recipe(), "d1")


def refused(session: SessionPlan) -> dict[str, str]:
    return {finding.path: finding.message for finding in session.refused}


@pytest.mark.parametrize("num_rows", [2**25, 2**31, 2**40, 2**60])
def test_an_array_that_claims_more_than_is_stored_is_named_and_never_read(tmp_path: Path, num_rows: int) -> None:
    session = damaged(tmp_path, "acquisition/running/data", shape=(num_rows,), dtype="f8")
    told = f"it claims {num_rows:,} values, but only 0 bytes are stored of it. Get the whole recording."
    assert refused(session) == {"acquisition/running/data": told, "acquisition/running": f"`data`: {told}"}
    assert [stream.spec.name for stream in session.streams] == ["spikes"]


def test_an_array_that_packs_well_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prep.nwb.file.LARGE_BYTES", 1000)
    path = write(tmp_path, fill)
    with h5py.File(path, "r+") as file:
        del file["acquisition/running/data"]
        level = np.arange(200_000.0) // 10_000
        steps = file.create_dataset("acquisition/running/data", data=level, chunks=(100_000,), compression="gzip")
        steps.attrs["unit"] = "cm/s"
        assert steps.nbytes > 100 * steps.id.get_storage_size() > 0
    assert refused(plan_session(path, Recipe(), "d1")) == {}


def test_a_text_that_claims_more_than_is_stored_is_as_a_text_that_is_not_there(tmp_path: Path) -> None:
    session = damaged(tmp_path, "session_description", shape=(2**40,), dtype=h5py.string_dtype())
    assert list(refused(session)) == ["session_description"]


def test_a_zarr_array_that_claims_more_than_is_stored_is_named(tmp_path: Path) -> None:
    path = running_zarr(tmp_path)
    meta = path / "acquisition" / "running" / "data" / ".zarray"
    meta.write_text(meta.read_text().replace("99", str(2**40)))
    with pytest.raises(PrepError, match="nothing to use"):
        plan_session(path, Recipe(), "d1")


def test_a_pipe_in_a_folder_is_no_metadata(tmp_path: Path) -> None:
    path = running_zarr(tmp_path)
    (path / ".zattrs").unlink()
    os.mkfifo(path / ".zattrs")
    with pytest.raises(PrepError, match=r"not complete \(OSError: s1.nwb.zarr/.zattrs is not a file\). Get it again."):
        plan_session(path, Recipe(), "d1")


def test_an_index_that_holds_no_whole_numbers_is_refused(tmp_path: Path) -> None:
    session = damaged(tmp_path, "units/spike_times_index", np.array([np.nan, 4.0]))
    told = "spike_times_index holds no whole numbers, so which spike is whose cannot be told. Write the file again."
    assert refused(session) == {"units": told}


@pytest.mark.parametrize("rate", [1e9, 1e300, 1e-9, 1e-300])
def test_a_rate_that_no_recording_has_is_refused(tmp_path: Path, rate: float) -> None:
    def fast(nwb: NWBFile) -> None:
        with_units([1.0, 20.0])(nwb)
        running(np.arange(99.0) % 7, starting_time=0.0, rate=rate)(nwb)

    told = f"its samples are {1 / rate:.3g} s apart; expected 1e-06 s to 30 days."
    assert refused(plan(tmp_path, fast)) == {"acquisition/running": told}


@pytest.mark.parametrize("start_s", [1e10, -1e10])
def test_a_start_that_nanoseconds_cannot_hold_is_refused(tmp_path: Path, start_s: float) -> None:
    def far(nwb: NWBFile) -> None:
        with_units([1.0, 20.0])(nwb)
        running(np.arange(99.0) % 7, starting_time=start_s, rate=10.0)(nwb)

    told = f"its times are {start_s:.3g} to {start_s:.3g} s; nanoseconds hold 9e+09 s."
    assert refused(plan(tmp_path, far)) == {"acquisition/running": told}


def test_a_time_that_nanoseconds_cannot_hold_is_not_given(tmp_path: Path) -> None:
    session = damaged(tmp_path, "intervals/trials/stop_time", np.array([2.0, 1e300]))
    assert session.intervals["trials"].stop_ns.tolist() == [2_000_000_000, NO_TIME]


def test_a_value_that_float32_cannot_hold_is_missing(tmp_path: Path) -> None:
    session = damaged(tmp_path, "acquisition/running/data", np.where(np.arange(99) == 5, 1e300, 1.0))
    (stream,) = (stream for stream in session.streams if stream.spec.name == "running")
    values = stream.reader.read(0, stream.spec.num_tokens)
    assert np.flatnonzero(np.isnan(values)).tolist() == [5] and not np.isinf(values).any()
