"""Arrays of a store as plain Zarr v3: the short encoder and reader of sharded arrays, and small arrays in one chunk.

In: numpy arrays, or the folder of an array. Out: zarr.json, shards and their digests; rows, checked on first touch.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import Zstd

from prep.cache import MEND, LocalFiles, Sealed
from prep.disk import DigestError, StoreError, read_json, sha256, write_bytes, write_json, write_parts
from prep.mapped import MAPPINGS, Checked, Mapped

Array = npt.NDArray[Any]
MISSING_CHUNK = np.iinfo(np.uint64).max
ZSTD = Zstd(level=1)


@dataclass(frozen=True, kw_only=True)
class RowsSpec:
    """A sharded array that is cut along its first axis only, so that a run of rows is one slice of a shard."""

    shape: tuple[int, ...]
    dtype: str
    fill: float | int
    chunk_rows: int
    shard_rows: int
    codec: str  # raw | zstd

    @property
    def chunks_per_shard(self) -> int:
        """Inner chunks of a full shard."""
        return self.shard_rows // self.chunk_rows

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one decoded inner chunk."""
        return int(np.dtype(self.dtype).itemsize * self.chunk_rows * math.prod(self.shape[1:]))


def array_metadata(
    spec: RowsSpec | None, array: Array | None = None, attributes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The `zarr.json` of a sharded array (`spec`) or of a small array in one raw chunk (`array`)."""
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    if spec is not None:
        zstd = [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}] if spec.codec == "zstd" else []
        shape, dtype, fill = spec.shape, np.dtype(spec.dtype), spec.fill
        grid = (spec.shard_rows, *shape[1:])
        sharding = {
            "chunk_shape": [spec.chunk_rows, *shape[1:]],
            "codecs": [little_endian, *zstd],
            "index_codecs": [little_endian, {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs: list[dict[str, Any]] = [{"name": "sharding_indexed", "configuration": sharding}]
    else:
        assert array is not None
        shape, dtype, fill = array.shape, array.dtype, 0
        grid, codecs = tuple(max(1, n) for n in shape), [little_endian]
    is_nan = isinstance(fill, float) and math.isnan(fill)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(grid)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if is_nan else float(fill) if dtype.kind == "f" else fill,
        "codecs": codecs,
        "attributes": dict(attributes or {}),
        "storage_transformers": [],
    }


# ---------------------------------------------------------------- writer


def write_group(path: Path, attributes: Mapping[str, Any] | None = None) -> None:
    """Write the `zarr.json` of a group."""
    write_json(path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes or {})})


def write_array(path: Path, array: Array, attributes: Mapping[str, Any] | None = None) -> None:
    """Write a small array (n, ...) as one raw chunk."""
    array = np.ascontiguousarray(array)
    write_json(path / "zarr.json", array_metadata(None, array, attributes))
    key = "/".join(["c", *["0"] * array.ndim])
    if array.size:
        write_bytes(path / key, array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def write_text(path: Path, texts: Sequence[str]) -> None:
    """Write strings as NUL-padded UTF-8, uint8 (n, width): every Zarr reader can read it."""
    encoded = [text.replace("\0", "").encode() for text in texts]
    width = max([1, *map(len, encoded)])
    table = np.zeros((len(encoded), width), np.uint8)
    for row, value in zip(table, encoded, strict=True):
        row[: len(value)] = np.frombuffer(value, np.uint8)
    write_array(path, table, {"encoding": "utf-8"})


def create_rows(path: Path, spec: RowsSpec, attributes: Mapping[str, Any] | None = None) -> None:
    """Write the metadata of a sharded array; its shards follow, each by one task."""
    write_json(path / "zarr.json", array_metadata(spec, attributes=attributes))


def write_shard(path: Path, spec: RowsSpec, shard: int, rows: Array) -> dict[str, dict[str, Any]]:
    """Write one whole shard: `rows` (n, ...) are rows [shard * shard_rows, ... + n) of the array.

    A shard of nothing but fill values is not written: missing data has no bytes. Returns what the manifest says of the
    files that were written, by their path inside the array's folder.
    """
    expected = min(spec.shard_rows, spec.shape[0] - shard * spec.shard_rows)
    if rows.shape != (expected, *spec.shape[1:]) or rows.dtype != np.dtype(spec.dtype):
        raise StoreError(
            f"{path}: shard {shard} got {rows.dtype}{rows.shape}, expected {spec.dtype}{(expected, *spec.shape[1:])}."
        )
    if is_all_missing(rows, spec.fill):
        return {}
    sizes: list[int] = []
    digests: list[int] = []
    key = "/".join(["c", str(shard), *["0"] * (len(spec.shape) - 1)])
    entry = write_parts(path / key, _shard_parts(spec, rows, sizes, digests))
    return {
        f"digests/{shard}": write_bytes(path / "digests" / str(shard), _sealed(np.array(digests, "<u4"))),
        key: entry,
    }


def _shard_parts(spec: RowsSpec, rows: Array, sizes: list[int], digests: list[int]) -> Iterator[bytes | memoryview]:
    """The bytes of a shard, chunk by chunk; size and digest of each chunk are taken while it is warm."""
    for first in range(0, len(rows), spec.chunk_rows):
        chunk = _encode_chunk(spec, rows[first : first + spec.chunk_rows])
        sizes.append(len(chunk))
        digests.append(google_crc32c.value(_read_only(chunk)))
        yield chunk
    index = np.full((spec.chunks_per_shard, 2), MISSING_CHUNK, "<u8")
    index[: len(sizes), 1] = sizes
    index[: len(sizes), 0] = np.cumsum(sizes) - sizes
    yield _sealed(index)


def is_all_missing(rows: Array, fill: float | int) -> bool:
    """Whether `rows` (n, ...) hold nothing but the fill value; the first row that holds more ends the search."""
    return all(bool(is_missing(row, fill).all()) for row in rows)


def is_missing(rows: Array, fill: float | int) -> npt.NDArray[np.bool_]:
    """Where `rows` hold the fill value."""
    missing: npt.NDArray[np.bool_] = np.isnan(rows) if isinstance(fill, float) and math.isnan(fill) else rows == fill
    return missing


def _encode_chunk(spec: RowsSpec, rows: Array) -> memoryview:
    if len(rows) < spec.chunk_rows:  # the array's last chunk is padded: Zarr's chunks have one shape
        padding = np.full((spec.chunk_rows - len(rows), *spec.shape[1:]), spec.fill, spec.dtype)
        rows = np.concatenate([rows, padding])
    raw = np.ascontiguousarray(rows, np.dtype(spec.dtype).newbyteorder("<"))
    return memoryview(Zstd(level=1).encode(raw)) if spec.codec == "zstd" else raw.reshape(-1).view(np.uint8).data


def _read_only(chunk: memoryview) -> Array:
    """A chunk as crc32c takes it: it wants bytes or an array that cannot be written."""
    return np.frombuffer(chunk.toreadonly(), np.uint8)


def _sealed(table: Array) -> bytes:
    """A table's bytes and their crc32c."""
    return table.tobytes() + _crc32c(table.tobytes())


def _crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


# ---------------------------------------------------------------- reader


class Rows:
    """Reads runs of rows of one sharded array; each inner chunk is checked against its digest on first touch.

    Rows of raw chunks are read-only and point into the file; they stay good when the reader has let go of it.
    """

    def __init__(
        self,
        place: Path | Sealed,
        spec: RowsSpec,
        sidecars: Mapping[int, str] | None = None,
        checked: Checked | None = None,
    ) -> None:
        """`place`: the array's folder, alone or as its manifest lists it.

        `sidecars`: of a folder alone, sha256 of each shard's digests; None while the array is still being written.
        `checked`: what its owner has checked before.
        """
        self.spec = spec
        self._sealed = place if isinstance(place, Sealed) else _seal_of(place, spec, sidecars)
        self._name = self._sealed.where()
        self._checked = Checked() if checked is None else checked
        self._missing: set[int] = set()
        self._num_rows, self._shard_rows, self._chunk_rows = spec.shape[0], spec.shard_rows, spec.chunk_rows

    def read(self, start: int, stop: int) -> Array:
        """Rows [start, stop) as (stop - start, ...); what was never written comes back as the fill value."""
        if not 0 <= start <= stop <= self._num_rows:
            raise StoreError(f"{self._name}: rows [{start}, {stop}) are outside [0, {self._num_rows}).")
        rows = self._shard_rows
        first = start // rows
        if stop <= (first + 1) * rows:
            return self._read_shard(first, start - first * rows, stop - first * rows)
        parts = [
            self._read_shard(shard, max(start - shard * rows, 0), min(stop - shard * rows, rows))
            for shard in range(first, -(-stop // rows))
        ]
        return np.concatenate(parts)

    def _read_shard(self, shard: int, start: int, stop: int) -> Array:
        mapped = MAPPINGS.get((self._checked.number, self._name, shard)) or self._map(shard)
        if mapped is None or stop <= start:
            return np.full((max(0, stop - start), *self.spec.shape[1:]), self.spec.fill, self.spec.dtype)
        first, last = start // self._chunk_rows, -(-stop // self._chunk_rows)
        if mapped.checked.find(0, first, last) >= 0:
            mapped = self._check(shard, mapped, first, last)
        if mapped.rows is not None:
            rows = mapped.rows[start:stop]
            return rows if mapped.is_kept else rows.copy()
        return self._decode(mapped, first, last)[start - first * self.spec.chunk_rows :][: stop - start]

    def _decode(self, mapped: Mapped, first: int, last: int) -> Array:
        size = self.spec.chunk_bytes
        decoded = np.empty((last - first) * size, np.uint8)
        for number, place in enumerate(mapped.places[first:last]):
            ZSTD.decode(mapped.data[place], out=decoded[number * size : (number + 1) * size])
        return decoded.view(np.dtype(self.spec.dtype).newbyteorder("<")).reshape(-1, *self.spec.shape[1:])

    def _map(self, shard: int) -> Mapped | None:
        """Map a shard; None where it is missing by its manifest."""
        if shard in self._missing:
            return None
        key, sidecar = shard_key(self.spec, shard), f"digests/{shard}"
        for name in (key, sidecar):
            if self._sealed.is_stray(name):
                raise DigestError(f"{self._sealed.where(name)} is not in the manifest. {MEND}")
        if sidecar not in self._sealed:
            self._missing.add(shard)
            return None
        digests = self._checked_tail(sidecar, self._sealed.read(sidecar))
        with self._sealed.open(key) as file:
            if not os.fstat(file.fileno()).st_size:
                self._checked_tail(key, b"")
            return MAPPINGS.add(
                (self._checked.number, self._name, shard),
                file,
                lambda data: self._shard_of(shard, data, np.frombuffer(digests, "<u4")),
            )

    def _shard_of(self, shard: int, data: Array, digests: Array) -> Mapped:
        """A shard from the bytes of its file."""
        spec, num_chunks = self.spec, self.spec.chunks_per_shard
        key = shard_key(spec, shard)
        tail = self._checked_tail(key, data[-(16 * num_chunks + 4) :].tobytes())
        index = np.frombuffer(tail, "<u8").reshape(num_chunks, 2)[: len(digests)].astype(np.int64)
        rows = None
        if spec.codec == "raw":  # the chunks lie one after the other: any run of rows is one slice
            if (index != np.arange(len(index))[:, None] * [spec.chunk_bytes, 0] + [0, spec.chunk_bytes]).any():
                raise DigestError(f"{self._sealed.where(key)} is damaged (its chunks are not in order). {MEND}")
            raw = data[: len(index) * spec.chunk_bytes].view(np.dtype(spec.dtype).newbyteorder("<"))
            rows = raw.reshape(-1, *spec.shape[1:])
        places = [slice(begin, begin + size) for begin, size in index.tolist()]
        checked = self._checked.chunks.setdefault((self._name, shard), bytearray(len(places)))
        return Mapped(data, rows, places, digests.tolist(), checked)

    def _checked_tail(self, name: str, content: bytes) -> bytes:
        """What stands before the crc32c at the end of a sidecar, or of a shard's index."""
        if len(content) < 4 or _crc32c(content[:-4]) != content[-4:]:
            raise DigestError(f"{self._sealed.where(name)} is damaged (its index does not match its digest). {MEND}")
        return content[:-4]

    def _check(self, shard: int, mapped: Mapped, first: int, last: int) -> Mapped:
        """Check chunks [first, last); a copy that is damaged is fetched again, once."""
        damaged = _first_damaged(mapped, first, last)
        key = shard_key(self.spec, shard)
        if damaged is not None and self._sealed.forget(key):
            MAPPINGS.drop(self._checked.number, self._name)
            again = self._map(shard)
            assert again is not None, "it was there before"
            mapped, damaged = again, _first_damaged(again, first, last)
        if damaged is not None:
            raise DigestError(
                f"{self._sealed.where(key)}: chunk {damaged} is damaged (crc32c differs from its digest). {MEND}"
            )
        return mapped


def _first_damaged(mapped: Mapped, first: int, last: int) -> int | None:
    for chunk in range(first, last):
        if not mapped.checked[chunk]:
            if google_crc32c.value(mapped.data[mapped.places[chunk]]) != mapped.digests[chunk]:
                return chunk
            mapped.checked[chunk] = 1
    return None


def _seal_of(path: Path, spec: RowsSpec, sidecars: Mapping[int, str] | None) -> Sealed:
    """What a folder holds, where no manifest says so."""
    files = LocalFiles(path)
    if sidecars is None:
        sidecars = {int(found.name): sha256(found) for found in path.glob("digests/*") if found.name.isdecimal()}
    entries: dict[str, Any] = {f"digests/{shard}": {"sha256": digest} for shard, digest in sidecars.items()}
    return Sealed(files, "", {**entries, **{shard_key(spec, shard): {} for shard in sidecars}})


def shard_key(spec: RowsSpec, shard: int) -> str:
    """The file of a shard inside its array's folder."""
    return "/".join(["c", str(shard), *["0"] * (len(spec.shape) - 1)])


def sidecar_digests(files: Mapping[str, Mapping[str, Any]], name: str) -> dict[int, str]:
    """Which shards of the array `name` a manifest has sealed: sha256 of each one's digests, by shard."""
    prefix = f"{name}/digests/"
    return {int(key.removeprefix(prefix)): value["sha256"] for key, value in files.items() if key.startswith(prefix)}


def rows_spec(path: Path) -> RowsSpec:
    """The layout of a sharded array, from its folder."""
    return rows_spec_of(read_json(path / "zarr.json"))


def rows_spec_of(meta: Mapping[str, Any]) -> RowsSpec:
    """The layout of a sharded array, from its `zarr.json`."""
    sharding = meta["codecs"][0]["configuration"]
    fill = meta["fill_value"]
    return RowsSpec(
        shape=tuple(meta["shape"]),
        dtype=meta["data_type"],
        fill=math.nan if fill == "NaN" else fill,
        chunk_rows=sharding["chunk_shape"][0],
        shard_rows=meta["chunk_grid"]["configuration"]["chunk_shape"][0],
        codec="zstd" if len(sharding["codecs"]) > 1 else "raw",
    )


def read_array(path: Path) -> Array:
    """A small array, whole."""
    return small_array(read_json(path / "zarr.json"), lambda key: (path / key).read_bytes())


def small_array(meta: Mapping[str, Any], read: Callable[[str], bytes]) -> Array:
    """A small array from its `zarr.json` and what reads its one chunk."""
    shape, dtype = tuple(meta["shape"]), np.dtype(meta["data_type"]).newbyteorder("<")
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    return np.frombuffer(read("/".join(["c", *["0"] * len(shape)])), dtype).reshape(shape)


def read_text(path: Path) -> list[str]:
    """A text column."""
    return as_text(read_array(path))


def as_text(table: Array) -> list[str]:
    """Strings from their bytes (n, width)."""
    return [row.tobytes().rstrip(b"\0").decode() for row in table]


def read_with_zarr(path: Path, start: int, stop: int) -> Array:
    """Rows [start, stop) as zarr-python reads them: the independent witness of `make verify`."""
    import zarr  # train reads stores without it

    array = zarr.open_array(path, mode="r", zarr_format=3)
    return np.asarray(array[start:stop])
