"""NWB-Zarr folders, v2 and v3: they become what the HDF5 file of the same recording becomes.

In: HDF5 files that nwb_builders writes, written again as folders in the way of hdmf-zarr. Out: nothing.
"""

import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numcodecs
import numpy as np
import pytest
import zarr
from nwb_builders import RNG, heading, reason, running, values, with_rois, with_units, write
from pynwb import NWBFile

from prep.nwb.file import address, follow, get, is_dataset, is_group, is_text, links, open_file, text_at, texts
from prep.nwb.inventory import walk
from prep.nwb.session import UnusableFile, plan_session
from prep.nwb.zarr_file import ZarrReference
from prep.plan import BrokenObject, PrepError, SessionPlan
from prep.recipe import Recipe

BLOSC = numcodecs.Blosc()


# ---------------------------------------------------------------- a folder from an HDF5 file


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Writes an HDF5 file again as a folder."""

    file: h5py.File
    version: int  # of Zarr

    def reference(self, path: str) -> dict[str, Any]:
        found = {"source": ".", "path": path}
        return {"zarr_dtype": "object", "value": found} if self.version == 2 else {"_REFERENCE": found}

    def attributes(self, item: Any) -> dict[str, Any]:
        return {key: self.attribute(value) for key, value in item.attrs.items() if not key.startswith(".")}

    def attribute(self, value: Any) -> Any:
        if isinstance(value, h5py.Reference):
            return self.reference(self.file[value].name)
        if isinstance(value, np.ndarray | np.generic):
            return [self.attribute(item) for item in value.tolist()] if np.ndim(value) else value.item()
        return value.decode() if isinstance(value, bytes) else value

    def group(self, group: h5py.Group, folder: Path) -> None:
        attributes, found = self.attributes(group), []
        for name in group:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.SoftLink):
                found.append({"name": name, "source": ".", "path": link.path})
            elif isinstance(group[name], h5py.Group):
                if name != "specifications":
                    self.group(group[name], folder / name)
            else:
                self.dataset(group[name], folder / name)
        if found:
            attributes["zarr_link" if self.version == 2 else "_LINKS"] = found
        write_group(folder, attributes, self.version)

    def dataset(self, data: h5py.Dataset, folder: Path) -> None:
        cells, attributes = np.asarray(data[()]), self.attributes(data)
        is_reference = h5py.check_ref_dtype(data.dtype) is not None
        if self.version == 2:
            attributes["zarr_dtype"] = "object" if is_reference else "str"
            if cells.shape == ():
                cells, attributes["zarr_dtype"] = cells.reshape(1), "scalar"
        elif is_reference:
            attributes["_DTYPE"] = "object_reference"
        if is_reference:
            paths = [self.file[cell].name for cell in cells.flat]
            dicts = [{"source": ".", "path": path, "object_id": "o"} for path in paths]
            cells = as_objects(dicts if self.version == 2 else paths, cells.shape)
        elif is_text(data):
            cells = as_objects([cell.decode() for cell in cells.flat], cells.shape)
        elif data.dtype.names:
            return  # masks, which are not read
        if cells.dtype != object:
            chunks = tuple(max(1, -(-n // 2)) for n in cells.shape)
            array = zarr.create_array(
                folder, shape=cells.shape, dtype=cells.dtype, chunks=chunks, zarr_format=self.version,
                attributes=attributes, config={"write_empty_chunks": True},
            )  # fmt: skip
            array[...] = cells
        elif self.version == 2:
            codec = numcodecs.JSON() if is_reference else numcodecs.VLenUTF8()
            write_objects(folder, cells, attributes, codec)
        else:
            kind = np.dtypes.StringDType()
            array = zarr.create_array(folder, shape=cells.shape, dtype=kind, zarr_format=3, attributes=attributes)
            array[...] = cells.astype(kind)


def as_objects(cells: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    found = np.empty(len(cells), object)
    found[:] = cells
    return found.reshape(shape)


def write_group(folder: Path, attributes: dict[str, Any], version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if version == 3:
        content = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        (folder / "zarr.json").write_text(json.dumps(content))
    else:
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(json.dumps(attributes))


def write_objects(folder: Path, cells: np.ndarray, attributes: dict[str, Any], codec: Any) -> None:
    """A Zarr v2 array of objects (N,), two chunks."""
    folder.mkdir(parents=True)
    chunk = max(1, -(-len(cells) // 2))
    meta = {
        "zarr_format": 2, "shape": cells.shape, "chunks": [chunk], "dtype": "|O", "fill_value": 0, "order": "C",
        "compressor": BLOSC.get_config(), "filters": [codec.get_config()],
    }  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(meta))
    (folder / ".zattrs").write_text(json.dumps(attributes))
    for place in range(0, len(cells), chunk):
        block = np.full(chunk, cells[0], object)
        part = cells[place : place + chunk]
        block[: len(part)] = part
        (folder / str(place // chunk)).write_bytes(BLOSC.encode(codec.encode(block)))


def to_zarr(path: Path, version: int = 2) -> Path:
    folder = path.with_name(path.stem + ".nwb.zarr")
    with h5py.File(path) as file:
        Copy(file=file, version=version).group(file, folder)
    return folder


def with_everything(nwb: NWBFile) -> None:
    device = nwb.create_device("probe")
    shank = nwb.create_electrode_group("shank0", "d", "CA1", device)
    for depth in (10.0, 20.0, 30.0):
        nwb.add_electrode(x=1.0, y=depth, z=3.0, location="CA1", group=shank)
    spikes = [np.sort(RNG.uniform(0, 60, 400)) for _ in range(3)]
    for i, times in enumerate(spikes):
        nwb.add_unit(spike_times=times, electrodes=[i], electrode_group=shank)
    with_rois({"DfOverF/dff": RNG.normal(size=(600, 4)), "Fluorescence/Raw": RNG.normal(size=(600, 4))}, 4)(nwb)
    running(RNG.normal(size=601), starting_time=0.0, rate=10.0)(nwb)
    heading(np.linspace(0, 700, 1200), "degrees")(nwb)
    nwb.add_trial_column("rewarded", "d")
    nwb.add_trial_column("side", "d")
    for i in range(5):
        nwb.add_trial(start_time=10.0 * i, stop_time=10.0 * i + 5, rewarded=i % 2 == 0, side="lr"[i % 2])


def running_zarr(folder: Path, **clock: Any) -> Path:
    clock = clock or {"starting_time": 0.0, "rate": 10.0}
    return to_zarr(write(folder, running(RNG.normal(size=99), **clock)))


def planned(path: Path) -> SessionPlan:
    return plan_session(path, Recipe(), "d1")


# ---------------------------------------------------------------- the tests


@pytest.mark.parametrize("version", [2, 3])
def test_a_folder_becomes_what_the_hdf5_file_becomes(tmp_path: Path, version: int):
    path = write(tmp_path, with_everything)
    expected, found = planned(path), planned(to_zarr(path, version))
    masks = "processing/ophys/ImageSegmentation/PlaneSegmentation/pixel_mask"
    assert found.coverage == tuple(row for row in expected.coverage if row.path != masks)
    assert [item.spec for item in found.streams] == [item.spec for item in expected.streams]
    assert {item.spec.name for item in found.streams} >= {"spikes", "dff", "running", "heading"}
    for ours, theirs in zip(found.streams, expected.streams, strict=True):
        assert np.array_equal(values(ours), values(theirs), equal_nan=True)
        assert np.array_equal(ours.start_ns, theirs.start_ns)
    assert list(found.units.unit_key) == list(expected.units.unit_key)
    assert list(found.units.region) == list(expected.units.region) == ["CA1"] * 3 + ["V1"] * 4
    assert np.array_equal(found.units.xyz_um, expected.units.xyz_um, equal_nan=True)
    assert found.splits == expected.splits
    assert found.findings == expected.findings
    assert found.session_id == expected.session_id
    trials = {name: list(column) for name, column in found.intervals["trials"].columns.items()}
    assert trials == {name: list(column) for name, column in expected.intervals["trials"].columns.items()}
    assert len(pickle.dumps(found)) < 100_000, "the plan holds an open folder"


@pytest.mark.parametrize("version", [2, 3])
def test_a_folder_answers_as_h5py_does(tmp_path: Path, version: int):
    path = write(tmp_path, with_everything)
    with open_file(path) as theirs, open_file(to_zarr(path, version)) as ours:
        assert list(ours) == [name for name in theirs if name != "specifications"]
        assert len(ours) == len(list(ours))
        assert "units" in ours
        assert "units/nothing" not in ours
        assert get(ours, "units/spike_times/deeper") is None
        assert get(ours, "../elsewhere") is None
        assert ours["units"]["/units/id"] == ours["units/id"] != ours["units"]
        for name in ("units/spike_times", "acquisition/running/data", "intervals/trials/rewarded", "identifier"):
            a, b = ours[name], theirs[name]
            assert is_dataset(a)
            assert not is_group(a)
            assert (a.shape, a.ndim, a.size, a.dtype.kind, a.name) == (b.shape, b.ndim, b.size, b.dtype.kind, b.name)
            if a.shape:
                assert len(a) == len(b)
                assert list(a) == list(b)
                assert a[1] == b[1]
                assert np.array_equal(a[2:4], b[2:4])
                assert np.array_equal(np.asarray(a), b[()])
        data, expected = ours["processing/ophys/DfOverF/dff/data"], theirs["processing/ophys/DfOverF/dff/data"]
        for key in ((slice(None), slice(1, 3)), ([1, 5, 9],), (4, 2), (slice(0, 9, 2), 1)):
            assert np.array_equal(data[key], expected[key])
        assert text_at(ours, "identifier") == "i"
        assert texts(ours["intervals/trials"], "side", 5) == ["l", "r", "l", "r", "l"]
        assert list(ours["units"].attrs["colnames"]) == list(theirs["units"].attrs["colnames"])
        rate = ours["acquisition/running/starting_time"].attrs["rate"]
        assert (rate, rate.shape) == (10.0, ())
        with pytest.raises(TypeError, match="identifier is a scalar"):
            len(ours["identifier"])


@pytest.mark.parametrize("version", [2, 3])
def test_references_lead_to_their_objects(tmp_path: Path, version: int):
    with open_file(to_zarr(write(tmp_path, with_everything), version)) as file:
        shank = file["general/extracellular_ephys/shank0"]
        cells = file["units/electrode_group"]
        assert not is_text(cells)
        assert [follow(file, cell) == shank for cell in cells[()]] == [True] * 3
        table = file["units/electrodes"].attrs["table"]
        assert follow(file, table) == file["general/extracellular_ephys/electrodes"]
        assert address(follow(file, table)) != address(shank)
        assert follow(file, ZarrReference(source=".", path="/nowhere")) is None
        assert follow(file, ZarrReference(source="../missing.zarr", path="/units")) is None


def add_links(folder: Path, *entries: dict[str, str]) -> None:
    path = folder / "acquisition" / ".zattrs"
    path.write_text(json.dumps({**json.loads(path.read_text()), "zarr_link": list(entries)}))


def test_links_inside_are_not_walked_twice_and_those_that_lead_nowhere_are_named(tmp_path: Path):
    folder = running_zarr(tmp_path)
    add_links(
        folder,
        {"name": "again", "source": ".", "path": "/acquisition/running"},
        {"name": "circle", "source": ".", "path": "/acquisition/circle"},
        {"name": "itself", "source": folder.name, "path": "/acquisition/running"},
        {"name": "lost", "source": "missing.nwb.zarr", "path": "/acquisition/x"},
    )
    session = planned(folder)
    assert [item.spec.name for item in session.streams] == ["running"]
    assert reason(session, "acquisition/lost") == "link to missing.nwb.zarr:/acquisition/x, which cannot be opened"
    with open_file(folder) as file:
        assert [node.path for node in walk(file)[0]] == ["/", "acquisition/running"]
        assert [name for name, _, _ in links(file["acquisition"])] == ["lost", "running"]
        assert file["acquisition/again/data"] == file["acquisition/running/data"]
        assert get(file, "acquisition/circle") is None


@pytest.mark.parametrize("source", ["../other.nwb.zarr", "other.nwb.zarr"])  # of the folder, or beside it
def test_links_to_another_folder_are_followed(tmp_path: Path, source: str):
    other = running_zarr(tmp_path)
    other = other.rename(other.with_name("other.nwb.zarr"))
    folder = to_zarr(write(tmp_path, with_units([1.0, 2.0])))
    add_links(folder, {"name": "linked", "source": source, "path": "/acquisition/running"})
    session = planned(folder)
    assert [item.spec.name for item in session.streams] == ["spikes", "linked"]
    assert np.array_equal(values(session.streams[1]), values(planned(other).streams[0]), equal_nan=True)


class Opened:
    """What a pickle can do: run a program."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("dtype", ["|O", "<f8"])
@pytest.mark.parametrize("place", ["filters", "compressor"])
def test_a_pickle_is_never_opened(tmp_path: Path, dtype: str, place: str):
    folder, trace = running_zarr(tmp_path), tmp_path / "opened"
    data = folder / "acquisition/running/data"
    meta = json.loads((data / ".zarray").read_text())
    meta |= {"dtype": dtype, "chunks": meta["shape"], "filters": None, "compressor": None}
    meta[place] = [{"id": "pickle", "protocol": 5}] if place == "filters" else {"id": "pickle", "protocol": 5}
    shutil.rmtree(data)
    data.mkdir()
    (data / ".zarray").write_text(json.dumps(meta))
    (data / "0").write_bytes(pickle.dumps(Opened(trace)))
    with open_file(folder) as file, pytest.raises(BrokenObject, match="pickled Python objects, which are never opened"):
        file["acquisition/running/data"][()]
    with pytest.raises(UnusableFile):
        planned(folder)
    assert not trace.exists()


def test_texts_that_are_pickled_are_as_texts_that_are_not_there(tmp_path: Path):
    folder = running_zarr(tmp_path)
    shutil.rmtree(folder / "identifier")
    cells = np.array(["x"], object)
    write_objects(folder / "identifier", cells, {"zarr_dtype": "scalar"}, numcodecs.Pickle())
    with open_file(folder) as file:
        assert not is_text(file["identifier"])
        assert text_at(file, "identifier") == ""
    assert len(planned(folder).streams) == 1


def test_objects_of_another_codec_are_not_read(tmp_path: Path):
    folder = running_zarr(tmp_path)
    write_objects(folder / "odd", np.array(["x"], object), {}, numcodecs.MsgPack())
    with open_file(folder) as file, pytest.raises(BrokenObject, match=r"objects coded by \['msgpack2'\]; expected one"):
        file["odd"][()]


def test_rows_of_several_fields_are_read_with_their_references(tmp_path: Path):
    folder = running_zarr(tmp_path)
    fields = [{"name": "first", "dtype": "int32"}, {"name": "series", "dtype": "object"}]
    rows = as_objects([[i, {"source": ".", "path": "/acquisition/running"}] for i in range(3)], (3,))
    write_objects(folder / "rows", rows, {"zarr_dtype": fields}, ObjectJson())
    with open_file(folder) as file:
        rows = file["rows"][()]
        assert rows["first"].tolist() == [0, 1, 2]
        assert all(follow(file, cell) == file["acquisition/running"] for cell in rows["series"])


class ObjectJson(numcodecs.JSON):
    """NumPy would take the fields of a row for another axis."""

    def encode(self, buf: Any) -> bytes:
        return json.dumps([*buf.tolist(), buf.dtype.str, list(buf.shape)]).encode()


def test_an_array_with_a_missing_chunk_is_refused_by_name_and_the_rest_is_kept(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        running(RNG.normal(size=99), starting_time=0.0, rate=10.0)(nwb)
        running(RNG.normal(size=99), name="torn", starting_time=0.0, rate=10.0)(nwb)

    folder = to_zarr(write(tmp_path, fill))
    (folder / "acquisition/torn/starting_time/0").unlink()
    session = planned(folder)
    assert [item.spec.name for item in session.streams] == ["running"]
    assert reason(session, "acquisition/torn") == "1 of its 1 chunks are missing; get the whole folder"
    assert [finding.path for finding in session.refused] == ["acquisition/torn"]


def test_an_array_with_a_damaged_chunk_is_refused_by_name_and_the_rest_is_kept(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        running(RNG.normal(size=99), starting_time=0.0, rate=10.0)(nwb)
        running(RNG.normal(size=99), name="torn", timestamps=np.arange(99) / 10)(nwb)

    folder = to_zarr(write(tmp_path, fill))
    chunk = folder / "acquisition/torn/timestamps/1"
    chunk.write_bytes(chunk.read_bytes()[:20])
    session = planned(folder)
    assert [item.spec.name for item in session.streams] == ["running"]
    assert "it cannot be read" in reason(session, "acquisition/torn")
    assert [finding.path for finding in session.refused] == ["acquisition/torn"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (".zattrs", "{", r"damaged or not complete \(OSError: s1.nwb.zarr/.zattrs is not JSON\)\. Get it again"),
        (".zattrs", "[]", "s1.nwb.zarr/.zattrs is not a JSON object"),
        (".zattrs", "{}", r"a Zarr folder, but not NWB \(no nwb_version\)"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path, name: str, content: str, message: str):
    folder = running_zarr(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(PrepError, match=message) as caught:
        planned(folder)
    assert "\n" not in str(caught.value)


def test_an_array_alone_is_not_a_recording(tmp_path: Path):
    zarr.create_array(tmp_path / "x.zarr", shape=(3,), dtype="f8", zarr_format=3)
    with pytest.raises(PrepError, match=r"x\.zarr is not a Zarr group"):
        planned(tmp_path / "x.zarr")
