"""Rows of packed datasets are what HDF5 itself gives, chunk by chunk and whatever the packing; damage is told.

In: HDF5 files made up here. Out: nothing.
"""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import prep.nwb.chunks
from prep.nwb.chunks import keeping_chunks, read_place, read_rows
from prep.nwb.file import holding, open_file

SHAPES = [
    ((70_000,), (20_000,)),
    ((3_000, 70), (1_100, 40)),
    ((50, 40, 64), (7, 40, 64)),
    ((40, 30, 30, 3), (16, 30, 20, 3)),
]
PACKED = [{"compression": "gzip"}, {"compression": "gzip", "shuffle": True}]
OTHERWISE: list[dict[str, Any]] = [
    {}, {"compression": "lzf"}, {"shuffle": True}, {"compression": "gzip", "fletcher32": True},
    {"compression": "gzip", "scaleoffset": 0},
]  # fmt: skip


def numbers(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    return (rng.random(shape) * 200).astype(dtype) if dtype[1] == "f" else rng.integers(0, 120, shape).astype(dtype)


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The chunks that are decoded from now on."""
    corners: list[tuple[int, ...]] = []
    decode = prep.nwb.chunks._decoded
    monkeypatch.setattr(
        prep.nwb.chunks, "_decoded", lambda data, corner: (corners.append(corner), decode(data, corner))[1]
    )
    return corners


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize(("shape", "chunks"), SHAPES)
@pytest.mark.parametrize("dtype", ["<f4", "<f8", "|u1", "<i2", "<u4", "<i8", "<f2"])
def test_rows_are_those_of_hdf5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, shape: tuple[int, ...], chunks: Any, packing: Any
) -> None:
    monkeypatch.setattr(prep.nwb.chunks, "SIZES", range(1, 2**26))
    corners, values = decoded(monkeypatch), numbers(shape, dtype)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("x", data=values, chunks=chunks, **packing)
        n = shape[0]
        for first, stop in (
            (0, n),
            (0, 1),
            (n - 1, n),
            (n // 3, n // 2),
            (chunks[0], 2 * chunks[0]),
            (5, 5),
            (3, n + 9),
        ):
            rows = read_rows(data, first, stop)
            assert rows.dtype == values.dtype
            assert np.array_equal(rows, values[first:stop])
    assert corners


@pytest.mark.parametrize("more", OTHERWISE)
def test_what_is_packed_otherwise_is_left_to_hdf5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    corners, values = decoded(monkeypatch), numbers((70_000,), "<i4")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("x", data=values, **({"chunks": (20_000,)} | more if more else {}))
        assert np.array_equal(read_rows(data, 10, 69_000), values[10:69_000])
    assert corners == []


@pytest.mark.parametrize("dtype", [">f4", ">i2", "c8", "?"])
def test_numbers_of_another_kind_are_left_to_hdf5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    corners, values = decoded(monkeypatch), np.ones(70_000, dtype)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("x", data=values, chunks=(70_000,), compression="gzip")
        assert np.array_equal(read_rows(data, 1, 5), values[1:5])
    assert corners == []


def test_a_place_is_what_slicing_gives_of_it_in_one_chunk_or_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corners, values = decoded(monkeypatch), numbers((900, 70), "<f4")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("x", data=values, chunks=(400, 50), compression="gzip", shuffle=True)
        for place in ((0, 0), (899, 69), (slice(400, 800), slice(0, 50)), (slice(800, 1200), slice(50, 100))):
            assert np.array_equal(read_place(data, place), values[place])
        assert corners == [(0, 0), (800, 50), (400, 0), (800, 50)]
        assert np.array_equal(read_place(data, (slice(0, 900), slice(0, 70))), values)
        assert len(corners) == 4, "more than a chunk is left to HDF5"


def test_chunks_that_were_never_written_hold_the_fill_value(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("x", (90_000,), "<f4", chunks=(30_000,), compression="gzip", fillvalue=7)
        data[30_000:60_000] = 1
        assert np.array_equal(read_rows(data, 0, 90_000), np.repeat([7, 1, 7], 30_000).astype("<f4"))


def test_a_chunk_that_did_without_its_filters_is_read(tmp_path: Path) -> None:
    values = numbers((60_000,), "<f4")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("x", (60_000,), "<f4", chunks=(30_000,), compression="gzip", shuffle=True)
        data[30_000:] = values[30_000:]
        data.id.write_direct_chunk((0,), values[:30_000].tobytes(), filter_mask=0b11)
        assert np.array_equal(read_rows(data, 0, 60_000), values)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A file whose second chunk has a byte changed."""
    path, values = tmp_path / "damaged.h5", numbers((60_000,), "<f4")
    with h5py.File(path, "w") as file:
        data = file.create_dataset("x", data=values, chunks=(30_000,), compression="gzip", shuffle=True)
        info = data.id.get_chunk_info_by_coord((30_000,))
    content = bytearray(path.read_bytes())
    content[info.byte_offset + info.size // 2] ^= 1
    path.write_bytes(content)
    return path


def test_a_damaged_chunk_is_named_and_the_others_are_read(damaged: Path) -> None:
    with open_file(damaged) as file:
        assert np.array_equal(read_rows(file["x"], 0, 30_000), numbers((60_000,), "<f4")[:30_000])
        with pytest.raises(OSError, match=r"/x: the chunk at \(30000,\) is damaged"):
            read_rows(file["x"], 0, 60_000)


def test_a_chunk_of_another_size_than_the_file_says_is_damaged(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("x", (30_000,), "<f4", chunks=(30_000,), compression="gzip")
        other = file.create_dataset("y", (60_000,), "<f4", chunks=(60_000,), compression="gzip")
        other[:] = 0
        for mask, packed in (other.id.read_direct_chunk((0,)),):
            data.id.write_direct_chunk((0,), packed, filter_mask=mask)
        with pytest.raises(OSError, match=r"it has 240000 bytes, not 120000"):
            read_rows(data, 0, 30_000)


def test_chunks_are_decoded_once_while_an_object_is_held_and_no_more_are_kept_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corners, values, path = decoded(monkeypatch), numbers((120_000,), "<f4"), tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values, chunks=(30_000,), compression="gzip")
    with holding((path, "x")) as (data,):
        for first in range(0, 120_000, 1_000):
            read_rows(data, first, first + 1_000)
    assert corners == [(0,), (30_000,), (60_000,), (90_000,)]
    monkeypatch.setattr(prep.nwb.chunks, "KEPT_BYTES", 2 * 120_000)
    with holding((path, "x")) as (data,):
        for first in (0, 30_000, 60_000, 30_000, 0):
            read_rows(data, first, first + 1)
        assert [key[1] for key in prep.nwb.chunks._KEPT] == [(30_000,), (0,)]
    assert corners[4:] == [(0,), (30_000,), (60_000,), (0,)]
    assert not prep.nwb.chunks._KEPT


def test_chunks_that_are_too_many_wait_in_files_where_there_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corners, values, path = decoded(monkeypatch), numbers((900, 70), "<f4"), tmp_path / "x.h5"
    monkeypatch.setattr(prep.nwb.chunks, "SIZES", range(1, 2**26))
    monkeypatch.setattr(prep.nwb.chunks, "KEPT_BYTES", 400 * 20 * 4)
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values, chunks=(400, 20), compression="gzip", shuffle=True)
    with holding((path, "x"), scratch=tmp_path / "scratch") as (data,):
        for first in range(0, 900, 90):
            assert np.array_equal(read_rows(data, first, first + 90), values[first : first + 90])
        assert len(corners) == len(set(corners)) == 12
        assert len(list((tmp_path / "scratch").iterdir())) == 9, "one of each four stays until it is read to its end"
        for first in (0, 450, 810):
            assert np.array_equal(read_rows(data, first, first + 90), values[first : first + 90])
    assert list((tmp_path / "scratch").iterdir()) == []
    with open_file(path) as file, keeping_chunks():
        assert np.array_equal(read_rows(file["x"], 0, 900), values)
    assert not prep.nwb.chunks._KEPT
