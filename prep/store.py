"""The token store, version 1: FORMAT.md in code (streams, sessions, seals, the catalog's reader).

In: numpy arrays that prep has cut into tokens. Out: sealed folders of plain Zarr v3 groups, and a reader of windows.
Bytes and digests are prep/shards.py's, files prep/disk.py's.
"""

import hashlib
import json
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prep.disk import DigestError, ShardFormatError, StoreError, read_json, sha256, write_json
from prep.settings import COUNT_MISSING, FORMAT_VERSION, Kind, Modality
from prep.shards import (
    MEND,
    Array,
    Rows,
    RowsSpec,
    create_rows,
    read_array,
    read_text,
    rows_spec,
    sidecar_digests,
    write_array,
    write_group,
)

__all__ = [  # `train` imports from here alone
    "Array",
    "DigestError",
    "Rows",
    "Session",
    "ShardFormatError",
    "Store",
    "StoreError",
    "Stream",
    "StreamSpec",
]

SHARD_BYTES = 32 * 2**20
CHUNK_NS = 2_000_000_000
EVENT_CHUNK = 1024
DTYPES: dict[Kind, str] = {"counts": "uint8", "trace": "float32", "frames": "int32", "event": "float32"}
TUPLES = ("channels", "types", "fields")  # of StreamSpec: lists in JSON
FILLS: dict[Kind, float | int] = {"counts": COUNT_MISSING, "trace": math.nan, "frames": -1, "event": math.nan}


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
    types: tuple[str, ...] = ()  # of an event stream: its vocabulary, sorted
    fields: tuple[str, ...] = ()  # of an event stream: what the P samples of a token are

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, S, P)."""
        return self.num_tokens, self.num_sources, self.samples_per_token

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one inner chunk: about two seconds, what one window reads; EVENT_CHUNK events."""
        tokens = EVENT_CHUNK if self.kind == "event" else round(CHUNK_NS / max(1, self.duration_ns))
        return max(1, min(self.num_tokens, tokens))

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

    def rows(self) -> RowsSpec:
        """The layout of `values` on disk."""
        return RowsSpec(
            shape=self.shape,
            dtype=DTYPES[self.kind],
            fill=FILLS[self.kind],
            chunk_rows=self.chunk_tokens,
            shard_rows=self.shard_tokens,
            codec="zstd" if self.kind == "counts" else "raw",
        )


def sanitise(name: str) -> str:
    """A name that is safe as one folder on disk: no separators, no `..`, never empty."""
    clean = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")
    return clean[:120] or "unnamed"


# ---------------------------------------------------------------- writer


def stream_attributes(spec: StreamSpec) -> dict[str, Any]:
    """The attributes of a stream's group: the whole StreamSpec."""
    return {"brainloom_stream": {**asdict(spec), **{name: list(getattr(spec, name)) for name in TUPLES}}}


def create_stream(
    session: Path,
    spec: StreamSpec,
    start_ns: npt.NDArray[np.int64],
    offset_ns: npt.NDArray[np.int64] | None = None,
    types: npt.NDArray[np.int32] | None = None,
) -> None:
    """Write a stream's metadata and clock: start_ns (K,); offset_ns (S,) and types (K,) where it has them."""
    path = session / "streams" / spec.name
    write_group(path, stream_attributes(spec))
    create_rows(path / "values", spec.rows())
    write_array(path / "start_ns", start_ns.astype(np.int64))
    if offset_ns is not None:
        write_array(path / "offset_ns", offset_ns.astype(np.int64))
    if types is not None:
        write_array(path / "type", types.astype(np.int32))


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


@dataclass
class Stream:
    """One stream of an open session."""

    spec: StreamSpec
    start_ns: npt.NDArray[np.int64]  # (K,)
    mean: npt.NDArray[np.float32]  # (S,) of the train split
    scale: npt.NDArray[np.float32]  # (S,)
    offset_ns: npt.NDArray[np.int64] | None  # (S,)
    rows: Rows
    types: npt.NDArray[np.int32] | None = None  # (K,) of an event stream: index into spec.types

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
            spec = StreamSpec(**{**attributes, **{name: tuple(attributes[name]) for name in TUPLES}})
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
                self.array(f"{base}/type") if spec.kind == "event" else None,
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
            raise DigestError(f"{path} is missing or damaged (sha256 differs from the manifest). {MEND}")
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
                raise DigestError(f"{path}/frames/zarr.json is damaged (sha256 differs from the manifest). {MEND}")
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
