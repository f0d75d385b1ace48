"""The token store, version 1: FORMAT.md in code (streams, sessions, seals, the catalog's reader).

In: numpy arrays that prep has cut into tokens. Out: sealed folders of plain Zarr v3 groups, and a reader of windows.
Bytes and digests are prep/shards.py's, files prep/disk.py's.
"""

import contextlib
import hashlib
import json
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prep.cache import Sealed, open_files
from prep.disk import DigestError, ShardFormatError, StoreError, files_below, parse_json, sha256, write_json
from prep.mapped import Checked
from prep.settings import COUNT_MISSING, FORMAT_VERSION, Kind, Modality
from prep.shards import (
    Array,
    Rows,
    RowsSpec,
    as_text,
    create_rows,
    rows_spec_of,
    small_array,
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
CATALOG = "catalog.json"
FAILURES = "failed.jsonl"
SESSION_BYTES = 256 * 2**20  # of open sessions: clocks and manifests
ENTRY_BYTES = 600  # of a file in a manifest, in memory
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
            codec="raw",
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
    return {name: file_entry(folder / name) for name in files_below(folder)}


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


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
        origin_ns, period_ns, num_tokens = self._regular
        if not period_ns:
            return slice(*self.start_ns.searchsorted((start_ns, stop_ns)).tolist())
        first, last = -((origin_ns - start_ns) // period_ns), -((origin_ns - stop_ns) // period_ns)
        return slice(min(max(first, 0), num_tokens), min(max(last, 0), num_tokens))

    @cached_property
    def _regular(self) -> tuple[int, int, int]:
        """First start, period and number of tokens, where the clock is exactly regular; else a period of 0."""
        if len(self.start_ns) < 2:
            return 0, 0, 0
        origin_ns, second_ns = self.start_ns[:2].tolist()
        is_regular = bool((np.diff(self.start_ns) == second_ns - origin_ns).all())
        return origin_ns, (second_ns - origin_ns) * is_regular, len(self.start_ns)

    def read(self, tokens: slice) -> Array:
        """Values (k, S, P) of a run of tokens."""
        return self.rows.read(tokens.start, tokens.stop)


@dataclass
class Session:
    """One open session: lazily read, checked against its manifest; holds no file open."""

    entry: dict[str, Any]
    sealed: Sealed
    _checked: Checked
    _streams: dict[str, Stream] = field(default_factory=dict)

    @property
    def attributes(self) -> dict[str, Any]:
        """The root attribute `brainloom`: sources, licence, recipe, versions, coverage."""
        result: dict[str, Any] = self._json("zarr.json")["attributes"]["brainloom"]
        return result

    @property
    def stream_names(self) -> list[str]:
        """Names of the streams, sorted."""
        return [stream["name"] for stream in self.entry["streams"]]

    @cached_property
    def num_bytes(self) -> int:
        """About what it takes in memory once all its streams are open."""
        clocks: int = sum(8 * stream["num_tokens"] for stream in self.entry["streams"])
        return clocks + ENTRY_BYTES * len(self.sealed.entries)

    def stream(self, name: str) -> Stream:
        """Open a stream."""
        opened = self._streams.get(name)
        if opened is None:
            if name not in self.stream_names:
                raise StoreError(f"{self.sealed.where()} has no stream {name!r}; it has {self.stream_names}.")
            opened = self._streams[name] = self._open_stream(f"streams/{name}")
        return opened

    def _open_stream(self, base: str) -> Stream:
        attributes = self._json(f"{base}/zarr.json")["attributes"]["brainloom_stream"]
        spec = StreamSpec(**{**attributes, **{name: tuple(attributes[name]) for name in TUPLES}})
        return Stream(
            spec,
            self.array(f"{base}/start_ns"),
            self.array(f"{base}/mean"),
            self.array(f"{base}/scale"),
            self.array(f"{base}/offset_ns") if f"{base}/offset_ns/zarr.json" in self.sealed else None,
            open_rows(self.sealed.below(f"{base}/values"), self._checked),
            self.array(f"{base}/type") if spec.kind == "event" else None,
        )

    def array(self, name: str) -> Array:
        """A small array by its path inside the session."""
        return small_array(self._json(f"{name}/zarr.json"), self.sealed.below(name).read)

    def text(self, name: str) -> list[str]:
        """A text column by its path inside the session."""
        return as_text(self.array(name))

    def splits(self, label: str) -> list[tuple[int, int]]:
        """The blocks [start_ns, stop_ns) of one split, in order."""
        code = self.entry["split_labels"].index(label)
        start, stop, labels = (self.array(f"splits/{name}") for name in ("start_ns", "stop_ns", "label"))
        return [(int(a), int(b)) for a, b, c in zip(start, stop, labels, strict=True) if c == code]

    def _json(self, name: str) -> Any:
        return parse_json(self.sealed.read(name), self.sealed.where(name))


class Store:
    """A token store, read by its catalog: a folder, or a URL (s3://, https://), which is read through a local cache.

    Open sessions are kept, the longest unused go when they take more than SESSION_BYTES. Threads may share a store, a
    forked process may go on with it, and pickled it is opened anew by the process that gets it.
    """

    def __init__(self, root: str | Path) -> None:
        """Raises StoreError where there is no store or its catalog is damaged, ShardFormatError."""
        self._files = open_files(root)
        self._catalog_text = self._read_catalog()
        self.catalog: dict[str, Any] = parse_json(self._catalog_text, self._files.where(CATALOG))
        self._check_catalog()
        self.entries: list[dict[str, Any]] = self.catalog["sessions"]
        self._checked = Checked()
        self._open: OrderedDict[int, Session] = OrderedDict()
        self._stimuli: dict[str, Rows] = {}

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.address,)

    @property
    def root(self) -> Path:
        """The store's folder; of a store at a URL nothing but its name."""
        return self._files.root

    @property
    def address(self) -> str:
        """What opens this store in another process: its folder from the root of the disk, or its URL."""
        return self._files.address

    def session(self, index: int) -> Session:
        """Open a session by its place in the catalog. Raises StoreError, DigestError."""
        opened = self._open.get(index)
        if opened is None:
            opened = self._open[index] = self._open_session(index)
            self._let_go()
        else:
            with contextlib.suppress(KeyError):  # another thread has let it go just now; this one stays good
                self._open.move_to_end(index)
        return opened

    def frames(self, digest: str) -> Rows:
        """Pixels (F, H, W[, C]) uint8 of a stimulus."""
        if digest not in self._stimuli:
            known = self.catalog["stimuli"]
            if digest not in known:
                raise StoreError(f"{self._files.where('')} has no stimulus {digest}; it has {sorted(known)}.")
            self._stimuli[digest] = open_rows(self._sealed(known[digest]).below("frames"), self._checked)
        return self._stimuli[digest]

    def digest(self) -> str:
        """One digest of all that the store holds."""
        return hashlib.sha256(self._catalog_text).hexdigest()

    def failures(self) -> str:
        """What the last ingest did not take, in lines of JSON; "" where there is nothing."""
        try:
            return self._files.latest(FAILURES).decode(errors="replace")
        except FileNotFoundError:  # all was taken
            return ""

    def _open_session(self, index: int) -> Session:
        if not 0 <= index < len(self.entries):
            raise StoreError(f"{self._files.where('')} has {len(self.entries)} sessions; there is no session {index}.")
        return Session(self.entries[index], self._sealed(self.entries[index]), self._checked)

    def _let_go(self) -> None:
        while len(self._open) > 1 and sum(kept.num_bytes for kept in list(self._open.values())) > SESSION_BYTES:
            self._open.popitem(last=False)

    def _sealed(self, entry: Mapping[str, Any]) -> Sealed:
        """What a session's or stimulus' manifest lists; the manifest is checked against the catalog."""
        folder = entry["path"]
        name = manifest_path(Path(folder)).as_posix()
        catalog = Sealed(self._files, "", {name: {"sha256": entry["manifest_sha256"]}})
        try:
            content = parse_json(catalog.read(name), catalog.where(name))
        except DigestError as error:
            raise DigestError(
                f"{catalog.where(name)} is missing or differs from {CATALOG}: its session was made again, or a run was "
                "killed before it wrote the catalog. Run `make prep` again, and open the store after it has ended."
            ) from error
        return Sealed(self._files, folder, content["files"])

    def _read_catalog(self) -> bytes:
        try:
            return self._files.latest(CATALOG)
        except (FileNotFoundError, NotADirectoryError) as error:
            where = self._files.where(CATALOG)
            if any(self._files.root.glob("*/*.manifest.json")):
                raise StoreError(
                    f"{where} is missing, but sessions are there: `make prep` has not ended, or was killed. "
                    "Let it end, or run the same `make prep` again."
                ) from error
            raise StoreError(
                f"{where} is missing. Is this a token store? "
                f"Run `make prep SRC=… OUT={where.removesuffix(f'/{CATALOG}')}` to make one."
            ) from error

    def _check_catalog(self) -> None:
        where = self._files.where(CATALOG)
        if not isinstance(self.catalog, dict) or not {"sessions", "stimuli", "sha256"} <= self.catalog.keys():
            raise StoreError(
                f"{where} is no catalog of a token store. Run `make verify STORE=…`, then `make prep` again."
            )
        if self.catalog["sha256"] != catalog_digest(self.catalog):
            raise DigestError(
                f"{where} is damaged (sha256 differs from its own). Run `make verify STORE=…`, then `make prep` again."
            )


def open_rows(sealed: Sealed, checked: Checked) -> Rows:
    """The rows of a sharded array, from its folder."""
    meta = parse_json(sealed.read("zarr.json"), sealed.where("zarr.json"))
    return Rows(sealed, rows_spec_of(meta), checked=checked)


def catalog_digest(catalog: Mapping[str, Any]) -> str:
    """The digest that a catalog carries of itself (its key `sha256`): of its canonical JSON without that key."""
    content = {key: value for key, value in catalog.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
