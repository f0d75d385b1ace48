"""The token store, version 1: FORMAT.md in code (schema, writer, reader).

In: numpy arrays that prep has cut into tokens. Out: a folder of plain Zarr v3 groups, and a reader of windows.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import Zstd

from prep.settings import COUNT_MISSING, FORMAT_VERSION, Kind, Modality

Array = npt.NDArray[Any]
MISSING_CHUNK = np.iinfo(np.uint64).max
SHARD_BYTES = 32 * 2**20
CHUNK_NS = 2_000_000_000
DTYPES: dict[Kind, str] = {"counts": "uint8", "trace": "float32", "frames": "int32", "event": "float32"}
FILLS: dict[Kind, float | int] = {"counts": COUNT_MISSING, "trace": math.nan, "frames": -1, "event": math.nan}


_AGAIN = "Delete the .manifest.json beside its .zarr folder, then run `make prep` again."


class StoreError(ValueError):
    """The store cannot be read or written as asked; the message says what to do."""


class ShardFormatError(StoreError):
    """The store is of a version that this code does not know."""


class DigestError(StoreError):
    """The bytes on disk are not the bytes that were written."""


# ---------------------------------------------------------------- schema


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """One stream: `values` (K, S, P) and `start_ns` (K,); token k of source s starts at start_ns[k] + offset_ns[s]."""

    name: str
    kind: Kind
    modality: Modality
    num_tokens: int
    num_sources: int
    samples_per_token: int
    duration_ns: int
    sample_ns: int
    channels: tuple[str, ...] = ()  # names of the sources that are not units
    first_unit: int | None = None  # the sources are units[first_unit : first_unit + S]
    unit: str = ""  # physical unit of the values
    origin: str = ""  # the object in the NWB file
    stimulus: str | None = None  # digest of the pixels that a frames stream points into

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, S, P)."""
        return self.num_tokens, self.num_sources, self.samples_per_token

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one inner chunk: about two seconds, what one window reads."""
        return max(1, min(self.num_tokens, round(CHUNK_NS / max(1, self.duration_ns))))

    @property
    def shard_tokens(self) -> int:
        """Tokens of one shard: a whole number of chunks, about 32 MiB."""
        token_bytes = self.num_sources * self.samples_per_token * np.dtype(DTYPES[self.kind]).itemsize
        chunks = max(1, SHARD_BYTES // max(1, token_bytes * self.chunk_tokens))
        return self.chunk_tokens * max(1, min(chunks, math.ceil(self.num_tokens / self.chunk_tokens)))

    @property
    def num_shards(self) -> int:
        """Shards along the token axis."""
        return math.ceil(self.num_tokens / self.shard_tokens)

    def rows(self) -> "RowsSpec":
        """The layout of `values` on disk."""
        return RowsSpec(
            shape=self.shape,
            dtype=DTYPES[self.kind],
            fill=FILLS[self.kind],
            chunk_rows=self.chunk_tokens,
            shard_rows=self.shard_tokens,
            codec="zstd" if self.kind == "counts" else "raw",
        )


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


def sanitise(name: str) -> str:
    """A name that is safe as one folder on disk: no separators, no `..`, never empty."""
    clean = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")
    return clean[:120] or "unnamed"


# ---------------------------------------------------------------- writer


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file atomically: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write canonical JSON (sorted keys): same content, same bytes."""
    write_bytes(path, (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode())


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


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the store's lock: two ingests may run at once, only one writes the catalog at a time."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256(path: Path) -> str:
    """Digest of one file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stream_attributes(spec: StreamSpec) -> dict[str, Any]:
    """The attributes of a stream's group: the whole StreamSpec."""
    return {"brainloom_stream": {**asdict(spec), "channels": list(spec.channels)}}


def create_stream(
    session: Path, spec: StreamSpec, start_ns: npt.NDArray[np.int64], offset_ns: npt.NDArray[np.int64] | None = None
) -> None:
    """Write a stream's metadata and clock: start_ns (K,), offset_ns (S,) or None."""
    path = session / "streams" / spec.name
    write_group(path, stream_attributes(spec))
    create_rows(path / "values", spec.rows())
    write_array(path / "start_ns", start_ns.astype(np.int64))
    if offset_ns is not None:
        write_array(path / "offset_ns", offset_ns.astype(np.int64))


def manifest_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file below `folder` with its size and digest, by its relative path."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def seal(
    folder: Path,
    entry: Mapping[str, Any],
    files: Mapping[str, Any] | None = None,
    kind: Literal["session", "stimulus"] = "session",
) -> Path:
    """Seal a finished session (or stimulus): its manifest lists every file with size and digest.

    Returns the manifest's path. `files` is `manifest_files(folder)` where the caller has it already.
    """
    manifest = manifest_path(folder)
    content = {"format": FORMAT_VERSION, kind: dict(entry), "files": manifest_files(folder) if files is None else files}
    write_json(manifest, content)
    return manifest


def manifest_path(session: Path) -> Path:
    """`x.zarr` is sealed by `x.manifest.json` beside it."""
    return session.with_suffix(".manifest.json")


# ---------------------------------------------------------------- reader


def read_json(path: Path) -> Any:
    """Read a JSON file of the store; a version that this code does not know is refused."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreError(
            f"{path} is missing. Is this a token store? Run `make prep SRC=… OUT={path.parent}` to make one."
        ) from error
    except ValueError as error:
        raise StoreError(
            f"{path} is not valid JSON ({error}). Run `make verify STORE=…`, then `make prep` again."
        ) from error
    if isinstance(content, dict) and content.get("format", FORMAT_VERSION) != FORMAT_VERSION:
        raise ShardFormatError(
            f"{path} is format version {content['format']}; this code reads [{FORMAT_VERSION}]. "
            'Update the code, or run `make prep` again (FORMAT.md, "Versions").'
        )
    return content


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
                    raise DigestError(f"{path} is {state}. {_AGAIN}")
            if sealed and self._sidecars is not None and sha256(sidecar) != self._sidecars[shard]:
                raise DigestError(f"{sidecar} is damaged (sha256 differs from the manifest). {_AGAIN}")
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
                raise DigestError(f"{path} is damaged (its index does not match its digest). {_AGAIN}")
        index = np.frombuffer(tail[:-4], "<u8").reshape(num_chunks, 2).astype(np.int64)
        return np.asarray(data), index, np.frombuffer(digests[:-4], "<u4")

    def _check(self, shard: int, chunk: int, data: Array, index: Array, digests: Array) -> None:
        if self._checked[shard][chunk]:
            return
        begin, size = index[chunk]
        if google_crc32c.value(data[begin : begin + size].tobytes()) != digests[chunk]:
            raise DigestError(
                f"{self.path}/c/{shard}: chunk {chunk} is damaged (crc32c differs from its digest). {_AGAIN}"
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


@dataclass
class Stream:
    """One stream of an open session."""

    spec: StreamSpec
    start_ns: npt.NDArray[np.int64]  # (K,)
    mean: npt.NDArray[np.float32]  # (S,) of the train split
    scale: npt.NDArray[np.float32]  # (S,)
    offset_ns: npt.NDArray[np.int64] | None  # (S,)
    rows: Rows

    def tokens(self, start_ns: int, stop_ns: int) -> slice:
        """The tokens that start in [start_ns, stop_ns)."""
        first, last = np.searchsorted(self.start_ns, [start_ns, stop_ns])
        return slice(int(first), int(last))

    def read(self, tokens: slice) -> Array:
        """Values (k, S, P) of a run of tokens."""
        return self.rows.read(tokens.start, tokens.stop)


@dataclass
class Session:
    """One open session: lazily read, checked against its manifest."""

    path: Path
    entry: dict[str, Any]
    files: dict[str, dict[str, Any]]
    _streams: dict[str, Stream] = field(default_factory=dict)

    @property
    def attributes(self) -> dict[str, Any]:
        """The root attribute `brainloom`: sources, licence, recipe, versions, coverage."""
        result: dict[str, Any] = read_json(self._checked("zarr.json"))["attributes"]["brainloom"]
        return result

    @property
    def stream_names(self) -> list[str]:
        """Names of the streams, sorted."""
        return [stream["name"] for stream in self.entry["streams"]]

    def stream(self, name: str) -> Stream:
        """Open a stream."""
        if name not in self._streams:
            if name not in self.stream_names:
                raise StoreError(f"{self.path} has no stream {name!r}; it has {self.stream_names}.")
            base = f"streams/{name}"
            attributes = read_json(self._checked(f"{base}/zarr.json"))["attributes"]["brainloom_stream"]
            spec = StreamSpec(**{**attributes, "channels": tuple(attributes["channels"])})
            offset = self.array(f"{base}/offset_ns") if f"{base}/offset_ns/zarr.json" in self.files else None
            folder = self._checked(f"{base}/values/zarr.json").parent
            rows = Rows(folder, rows_spec(folder), sidecar_digests(self.files, f"{base}/values"))
            self._streams[name] = Stream(
                spec,
                self.array(f"{base}/start_ns"),
                self.array(f"{base}/mean"),
                self.array(f"{base}/scale"),
                offset,
                rows,
            )
        return self._streams[name]

    def array(self, name: str) -> Array:
        """A small array by its path inside the session."""
        self._checked_array(name)
        return read_array(self.path / name)

    def text(self, name: str) -> list[str]:
        """A text column by its path inside the session."""
        self._checked_array(name)
        return read_text(self.path / name)

    def splits(self, label: str) -> list[tuple[int, int]]:
        """The blocks [start_ns, stop_ns) of one split, in order."""
        code = self.entry["split_labels"].index(label)
        start, stop, labels = (self.array(f"splits/{name}") for name in ("start_ns", "stop_ns", "label"))
        return [(int(a), int(b)) for a, b, c in zip(start, stop, labels, strict=True) if c == code]

    def _checked_array(self, name: str) -> None:
        self._checked(f"{name}/zarr.json")
        for key in self.files:
            if key.startswith(f"{name}/c/"):
                self._checked(key)

    def _checked(self, name: str) -> Path:
        if name not in self.files:
            raise StoreError(f"{self.path} has no {name}.")
        path = self.path / name
        if not path.exists() or sha256(path) != self.files[name]["sha256"]:
            raise DigestError(f"{path} is missing or damaged (sha256 differs from the manifest). {_AGAIN}")
        return path


class Store:
    """A token store, read by its catalog; open sessions are kept in a small cache."""

    def __init__(self, root: str | Path, max_open: int = 64) -> None:
        self.root = Path(root)
        self.catalog: dict[str, Any] = read_json(self.root / "catalog.json")
        if self.catalog.get("sha256", catalog_digest(self.catalog)) != catalog_digest(self.catalog):
            raise DigestError(
                f"{self.root / 'catalog.json'} is damaged (sha256 differs from its own). "
                "Run `make verify STORE=…`, then `make prep` again."
            )
        self.entries: list[dict[str, Any]] = self.catalog["sessions"]
        self._open: OrderedDict[int, Session] = OrderedDict()
        self._stimuli: dict[str, Rows] = {}
        self._max_open = max_open

    def session(self, index: int) -> Session:
        """Open a session by its place in the catalog."""
        if index not in self._open:
            entry = self.entries[index]
            path = self.root / entry["path"]
            self._open[index] = Session(path, entry, self._manifest(path, entry)["files"])
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]

    def frames(self, digest: str) -> Rows:
        """Pixels (F, H, W[, C]) uint8 of a stimulus."""
        if digest not in self._stimuli:
            if digest not in self.catalog["stimuli"]:
                raise StoreError(f"{self.root} has no stimulus {digest}; it has {sorted(self.catalog['stimuli'])}.")
            entry = self.catalog["stimuli"][digest]
            path = self.root / entry["path"]
            files = self._manifest(path, entry)["files"]
            if sha256(path / "frames" / "zarr.json") != files["frames/zarr.json"]["sha256"]:
                raise DigestError(f"{path}/frames/zarr.json is damaged (sha256 differs from the manifest). {_AGAIN}")
            frames = path / "frames"
            self._stimuli[digest] = Rows(frames, rows_spec(frames), sidecar_digests(files, "frames"))
        return self._stimuli[digest]

    def _manifest(self, path: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
        manifest = manifest_path(path)
        if not manifest.exists() or sha256(manifest) != entry["manifest_sha256"]:
            raise DigestError(f"{manifest} is missing or differs from catalog.json. Run `make prep` again.")
        content: dict[str, Any] = read_json(manifest)
        return content

    def digest(self) -> str:
        """One digest of all that the store holds."""
        return hashlib.sha256((self.root / "catalog.json").read_bytes()).hexdigest()


def catalog_digest(catalog: Mapping[str, Any]) -> str:
    """The digest that a catalog carries of itself (its key `sha256`): of its canonical JSON without that key."""
    content = {key: value for key, value in catalog.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_with_zarr(path: Path, start: int, stop: int) -> Array:
    """Rows [start, stop) as zarr-python reads them: the independent witness of `make verify`."""
    import zarr  # train reads stores without it

    array = zarr.open_array(path, mode="r", zarr_format=3)
    return np.asarray(array[start:stop])
