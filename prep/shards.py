"""Arrays of a store as plain Zarr v3: the short encoder and reader of sharded arrays, and small arrays in one chunk.

In: numpy arrays, or the folder of an array. Out: zarr.json, shards and their digests; rows, checked on first touch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import Zstd

from prep.disk import DigestError, StoreError, read_json, sha256, write_bytes, write_json

Array = npt.NDArray[Any]
MISSING_CHUNK = np.iinfo(np.uint64).max
MEND = "Delete the .manifest.json beside its .zarr folder, then run `make prep` again."


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

    @property
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


def write_shard(path: Path, spec: RowsSpec, shard: int, rows: Array) -> None:
    """Write one whole shard: `rows` (n, ...) are rows [shard * shard_rows, ... + n) of the array.

    A shard of nothing but fill values is not written: missing data has no bytes.
    """
    expected = min(spec.shard_rows, spec.shape[0] - shard * spec.shard_rows)
    if rows.shape != (expected, *spec.shape[1:]) or rows.dtype != np.dtype(spec.dtype):
        raise StoreError(
            f"{path}: shard {shard} got {rows.dtype}{rows.shape}, expected {spec.dtype}{(expected, *spec.shape[1:])}."
        )
    target = path / "/".join(["c", str(shard), *["0"] * (len(spec.shape) - 1)])
    if is_missing(rows, spec.fill).all():
        return
    chunks = [_encode_chunk(spec, rows[i : i + spec.chunk_rows]) for i in range(0, expected, spec.chunk_rows)]
    sizes = np.array([len(chunk) for chunk in chunks], np.uint64)
    index = np.full((spec.chunks_per_shard, 2), MISSING_CHUNK, "<u8")
    index[: len(chunks), 1] = sizes
    index[: len(chunks), 0] = np.cumsum(sizes) - sizes
    digests = np.array([google_crc32c.value(chunk) for chunk in chunks], "<u4").tobytes()
    write_bytes(path / "digests" / str(shard), digests, _crc32c(digests))
    write_bytes(target, *chunks, index.tobytes(), _crc32c(index.tobytes()))


def is_missing(rows: Array, fill: float | int) -> npt.NDArray[np.bool_]:
    """Where `rows` hold the fill value."""
    missing: npt.NDArray[np.bool_] = np.isnan(rows) if isinstance(fill, float) and math.isnan(fill) else rows == fill
    return missing


def _encode_chunk(spec: RowsSpec, rows: Array) -> bytes:
    if len(rows) < spec.chunk_rows:  # the array's last chunk is padded: Zarr's chunks have one shape
        padding = np.full((spec.chunk_rows - len(rows), *spec.shape[1:]), spec.fill, spec.dtype)
        rows = np.concatenate([rows, padding])
    raw = np.ascontiguousarray(rows, np.dtype(spec.dtype).newbyteorder("<")).tobytes()
    return bytes(Zstd(level=1).encode(raw)) if spec.codec == "zstd" else raw


def _crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


# ---------------------------------------------------------------- reader


class Rows:
    """Reads runs of rows of one sharded array; each inner chunk is checked against its digest on first touch."""

    def __init__(self, path: Path, spec: RowsSpec, sidecars: Mapping[int, str] | None = None) -> None:
        """`sidecars`: sha256 of each shard's digests by the manifest; None while the array is still being written."""
        self.path, self.spec, self._sidecars = path, spec, sidecars
        self._shards: dict[int, tuple[Array, Array, Array] | None] = {}
        self._checked: dict[int, npt.NDArray[np.bool_]] = {}

    def read(self, start: int, stop: int) -> Array:
        """Rows [start, stop) as (stop - start, ...); what was never written comes back as the fill value."""
        if not 0 <= start <= stop <= self.spec.shape[0]:
            raise StoreError(f"{self.path}: rows [{start}, {stop}) are outside [0, {self.spec.shape[0]}).")
        rows = self.spec.shard_rows
        parts = [
            self._read_shard(shard, max(start - shard * rows, 0), min(stop - shard * rows, rows))
            for shard in range(start // rows, math.ceil(stop / rows) if stop > start else start // rows + 1)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_shard(self, shard: int, start: int, stop: int) -> Array:
        opened = self._open(shard)
        if opened is None or stop <= start:
            return np.full((max(0, stop - start), *self.spec.shape[1:]), self.spec.fill, self.spec.dtype)
        data, index, digests = opened
        step = self.spec.chunk_rows
        chunks = range(start // step, math.ceil(stop / step))
        for chunk in chunks:
            self._check(shard, chunk, data, index, digests)
        if self.spec.codec == "raw":  # the chunks lie one after the other: one slice
            raw = data[chunks.start * self.spec.chunk_bytes : chunks.stop * self.spec.chunk_bytes]
        else:
            slices = (data[index[c, 0] : index[c, 0] + index[c, 1]] for c in chunks)
            raw = np.frombuffer(b"".join(Zstd().decode(np.ascontiguousarray(part)) for part in slices), np.uint8)
        rows = raw.view(np.dtype(self.spec.dtype).newbyteorder("<")).reshape(-1, *self.spec.shape[1:])
        return rows[start - chunks.start * step : stop - chunks.start * step]

    def _open(self, shard: int) -> tuple[Array, Array, Array] | None:
        if shard not in self._shards:
            file = self.path / "/".join(["c", str(shard), *["0"] * (len(self.spec.shape) - 1)])
            sidecar = self.path / "digests" / str(shard)
            sealed = sidecar.exists() if self._sidecars is None else shard in self._sidecars
            for path in (file, sidecar):
                if path.exists() != sealed:
                    state = "missing" if sealed else "not in the manifest"
                    raise DigestError(f"{path} is {state}. {MEND}")
            if sealed and self._sidecars is not None and sha256(sidecar) != self._sidecars[shard]:
                raise DigestError(f"{sidecar} is damaged (sha256 differs from the manifest). {MEND}")
            self._shards[shard] = self._map(file, sidecar) if file.exists() else None
            self._checked[shard] = np.zeros(self.spec.chunks_per_shard, bool)
        return self._shards[shard]

    def _map(self, file: Path, sidecar: Path) -> tuple[Array, Array, Array]:
        num_chunks = self.spec.chunks_per_shard
        data = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8)
        tail = data[-(16 * num_chunks + 4) :].tobytes()
        digests = sidecar.read_bytes()
        for path, content in ((file, tail), (sidecar, digests)):
            if len(content) < 4 or _crc32c(content[:-4]) != content[-4:]:
                raise DigestError(f"{path} is damaged (its index does not match its digest). {MEND}")
        index = np.frombuffer(tail[:-4], "<u8").reshape(num_chunks, 2).astype(np.int64)
        return np.asarray(data), index, np.frombuffer(digests[:-4], "<u4")

    def _check(self, shard: int, chunk: int, data: Array, index: Array, digests: Array) -> None:
        if self._checked[shard][chunk]:
            return
        begin, size = index[chunk]
        if google_crc32c.value(data[begin : begin + size].tobytes()) != digests[chunk]:
            raise DigestError(
                f"{self.path}/c/{shard}: chunk {chunk} is damaged (crc32c differs from its digest). {MEND}"
            )
        self._checked[shard][chunk] = True


def sidecar_digests(files: Mapping[str, Mapping[str, Any]], name: str) -> dict[int, str]:
    """Which shards of the array `name` a manifest has sealed: sha256 of each one's digests, by shard."""
    prefix = f"{name}/digests/"
    return {int(key.removeprefix(prefix)): value["sha256"] for key, value in files.items() if key.startswith(prefix)}


def rows_spec(path: Path) -> RowsSpec:
    """The layout of a sharded array, from its `zarr.json`."""
    meta = read_json(path / "zarr.json")
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
    meta = read_json(path / "zarr.json")
    shape, dtype = tuple(meta["shape"]), np.dtype(meta["data_type"]).newbyteorder("<")
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    raw = (path / "/".join(["c", *["0"] * len(shape)])).read_bytes()
    return np.frombuffer(raw, dtype).reshape(shape)


def read_text(path: Path) -> list[str]:
    """A text column."""
    return [row.tobytes().rstrip(b"\0").decode() for row in read_array(path)]


def read_with_zarr(path: Path, start: int, stop: int) -> Array:
    """Rows [start, stop) as zarr-python reads them: the independent witness of `make verify`."""
    import zarr  # train reads stores without it

    array = zarr.open_array(path, mode="r", zarr_format=3)
    return np.asarray(array[start:stop])
