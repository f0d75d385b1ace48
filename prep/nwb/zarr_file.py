"""Shows an NWB-Zarr folder (Zarr v2 or v3, as hdmf-zarr writes them) as what h5py shows of an HDF5 file.

In: the path of an .nwb.zarr folder. Out: groups, datasets and references that answer as h5py's do: item[path], attrs,
shape, dtype, slices. What Zarr lacks (links, references, scalars) hdmf-zarr keeps in attributes, told apart here.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import h5py
import numcodecs
import numpy as np
import numpy.typing as npt
import zarr

from prep.plan import BrokenObject

Array = npt.NDArray[Any]
TEXT: np.dtype[Any] = h5py.string_dtype()
# Of object arrays; whatever else a codec may be, decoding it might run what the file says.
OBJECT_CODECS = {"vlen-utf8", "vlen-bytes", "json", "json2"}
OURS = {"zarr_dtype", "zarr_link", "_DTYPE", "_LINKS"}  # attributes of the storage, not of NWB
MAX_LINKS = 16  # that follow each other; more is a circle


@dataclass(frozen=True, kw_only=True)
class ZarrReference:
    """Where a link or a reference points to: a path inside a folder; source "." is the folder that says so."""

    source: str
    path: str


class ZarrItem:
    """What groups and datasets have in common: a name, attributes, and that two paths to one folder are the same."""

    def __init__(self, root: Path, name: str, folder: Path) -> None:
        self.root, self.name, self.folder = root, name, folder

    @property
    def address(self) -> str:
        """The same for two paths to one object, and for no two objects."""
        return str(self.folder.resolve())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrItem) and self.address == other.address

    def __hash__(self) -> int:
        return hash(self.address)

    @cached_property
    def stored_attrs(self) -> dict[str, Any]:
        """Attributes as JSON has them."""
        if (self.folder / "zarr.json").exists():
            return dict(read_json(self.folder / "zarr.json").get("attributes", {}))
        return read_json(self.folder / ".zattrs") if (self.folder / ".zattrs").exists() else {}

    @cached_property
    def attrs(self) -> dict[str, Any]:
        """Attributes as h5py has them: NumPy scalars, arrays for lists, references."""
        return {key: attribute(value) for key, value in self.stored_attrs.items() if key not in OURS}


class ZarrGroup(ZarrItem, Mapping[str, Any]):
    """A group of the folder; a context manager, as an open file is, though nothing stays open."""

    def __enter__(self) -> "ZarrGroup":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __iter__(self) -> Iterator[str]:
        """Names of members and links, in order."""
        folders = (folder for folder in self.folder.iterdir() if folder.is_dir())
        return iter(sorted({*(folder.name for folder in folders if node_kind(folder)), *self.links}))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, key: str | ZarrReference) -> Any:
        """A member by path, absolute or not, or by reference. Raises KeyError where nothing is."""
        if isinstance(key, ZarrReference):
            return self._target(key, MAX_LINKS)
        start = open_zarr(self.root) if key.startswith("/") else self
        return start._member([part for part in key.split("/") if part], MAX_LINKS)

    @cached_property
    def links(self) -> dict[str, ZarrReference]:
        """Links of this group to objects elsewhere, by name."""
        entries = self.stored_attrs.get("zarr_link", self.stored_attrs.get("_LINKS", []))
        found = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        return {str(entry["name"]): reference(entry) for entry in found if "name" in entry and "path" in entry}

    def leads_out(self, name: str) -> bool:
        """Whether a member is a link to another folder."""
        source = self._source(self.links[name]) if name in self.links else self.root
        return source is None or source.resolve() != self.root.resolve()

    def _member(self, parts: list[str], links_left: int) -> Any:
        if not parts:
            return self
        name, *rest = parts
        path = f"{self.name.rstrip('/')}/{name}"
        folder = self.folder / name
        kind = node_kind(folder) if not name.startswith(".") else ""
        if kind:
            item: Any = (ZarrGroup if kind == "group" else ZarrDataset)(self.root, path, folder)
        elif name in self.links:
            item = self._target(self.links[name], links_left - 1)
        else:
            raise KeyError(f"{path} is not in {self.root.name}")
        if rest and not isinstance(item, ZarrGroup):
            raise KeyError(f"{path} is not a group")
        return item._member(rest, links_left) if rest else item

    def _source(self, target: ZarrReference) -> Path | None:
        """The folder that a reference leads to; relative to this folder or, in older files, to the one above."""
        if target.source == ".":
            return self.root
        places = (Path(os.path.normpath(base / target.source)) for base in (self.root, self.root.parent))
        return next((place for place in places if node_kind(place) == "group"), None)

    def _target(self, target: ZarrReference, links_left: int) -> Any:
        source = self._source(target)
        if source is None or links_left <= 0:
            raise KeyError(f"{target.source}:{target.path} cannot be opened")
        return open_zarr(source)._member([part for part in target.path.split("/") if part], links_left)


class ZarrDataset(ZarrItem):
    """An array of the folder. Numbers are read by zarr; texts, references and rows of objects by their codecs."""

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What the folder says of the array."""
        return read_json(self.folder / ("zarr.json" if self._is_v3 else ".zarray"))

    @property
    def _is_v3(self) -> bool:
        return (self.folder / "zarr.json").exists()

    @property
    def _stored_type(self) -> Any:
        """hdmf-zarr's word for the type: "scalar", "object" for references, a list for rows of several fields."""
        return self.stored_attrs.get("zarr_dtype", self.stored_attrs.get("_DTYPE", ""))

    @property
    def _is_object(self) -> bool:
        return '"|O"' in json.dumps(self.meta.get("dtype"))

    @property
    def _is_scalar(self) -> bool:
        """Stored as (1,), since zarr v2 has texts of no other shape, but a scalar in NWB."""
        return bool(self._stored_type == "scalar" and tuple(self.meta["shape"]) == (1,))

    @property
    def shape(self) -> tuple[int, ...]:
        """As NWB has it."""
        return () if self._is_scalar else tuple(self.meta["shape"])

    @property
    def stored_bytes(self) -> int:
        """Bytes of all files of the array, its metadata among them."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """As h5py has it: its string type for texts, its reference type for references."""
        if self._stored_type in ("object", "object_reference"):
            kind: np.dtype[Any] = h5py.ref_dtype
            return kind
        if self._is_object:
            if self._problem():
                return np.dtype(object)
            return row_dtype(self._stored_type) if isinstance(self._stored_type, list) else TEXT
        if self._is_v3:
            found: np.dtype[Any] = self._array.dtype
        else:
            fields = self.meta["dtype"]
            found = np.dtype([tuple(field) for field in fields] if isinstance(fields, list) else fields)
        return TEXT if found.kind in "TU" else found

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{self.name} is a scalar")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return iter(self[()])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[()], dtype=dtype)

    def __getitem__(self, key: Any) -> Any:
        """Values; BrokenObject where the codec is not one of data, or chunks are missing."""
        if problem := self._problem():
            raise BrokenObject(problem)
        if self._is_scalar:
            key = 0
        values = self._objects if self.dtype.hasobject else self._array
        found = values[key]
        return found[()] if isinstance(found, np.ndarray) and found.ndim == 0 else found

    @cached_property
    def _array(self) -> Any:
        return zarr.open_array(self.folder, mode="r", zarr_format=3 if self._is_v3 else 2)

    @cached_property
    def _objects(self) -> Array:
        """All values of an array of objects: texts, references, rows."""
        stored = decode_objects(self.folder, self.meta) if self._is_object else np.asarray(self._array[()])
        if self.dtype.names:
            rows = [tuple(reference(cell) if is_reference(cell) else cell for cell in row) for row in stored]
            return np.array(rows, self.dtype)
        is_text = h5py.check_string_dtype(self.dtype) is not None
        values = np.empty(stored.shape, object)
        for place, value in enumerate(stored.flat):
            values.flat[place] = text(value) if is_text else reference(value)
        return values

    def _problem(self) -> str:
        """Why the values are not to be read, "" if they are."""
        codecs = [*(self.meta.get("filters") or []), self.meta.get("compressor") or {}, *self.meta.get("codecs", [])]
        ids = [str(codec.get("id", codec.get("name", ""))) for codec in codecs]
        filters = ids[: len(self.meta.get("filters") or [])]
        if "pickle" in json.dumps(codecs):
            return (
                "its values are pickled Python objects, which are never opened: they could run any program. "
                "Write the file again with a codec of data alone, such as json2"
            )
        if self._is_object and not (filters and set(filters) <= OBJECT_CODECS):
            return f"its values are objects coded by {filters}; expected one of {', '.join(sorted(OBJECT_CODECS))}"
        if self._is_v3:
            return ""  # v3 leaves chunks of fill values out
        expected = math.prod(-(-n // chunk) for n, chunk in zip(self.meta["shape"], self.meta["chunks"], strict=True))
        found = num_chunks(self.folder, self.folder.stat().st_mtime_ns)
        if found < expected:
            return f"{expected - found:,} of its {expected:,} chunks are missing; get the whole folder"
        return ""


def open_zarr(path: Path) -> ZarrGroup:
    """The root of a folder. Raises OSError where it is not a Zarr group."""
    if node_kind(path) != "group":
        raise OSError(f"{path} is not a Zarr group")
    return ZarrGroup(path, "/", path)


def node_kind(folder: Path) -> Literal["group", "array", ""]:
    """What a folder is in Zarr, "" if nothing."""
    if (folder / ".zgroup").exists():
        return "group"
    if (folder / ".zarray").exists():
        return "array"
    if not (folder / "zarr.json").exists():
        return ""
    return "group" if read_json(folder / "zarr.json").get("node_type") == "group" else "array"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the folder. Raises OSError where it is not JSON."""
    try:
        if not path.is_file():  # a pipe would keep us waiting for ever
            raise OSError(f"{path.parent.name}/{path.name} is not a file")
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise OSError(f"{path.parent.name}/{path.name} is not JSON") from error
    if not isinstance(content, dict):
        raise OSError(f"{path.parent.name}/{path.name} is not a JSON object")
    return content


@lru_cache(maxsize=4096)
def num_chunks(folder: Path, changed_ns: int) -> int:
    """Number of chunk files of an array of Zarr v2, whose folder last changed at changed_ns."""
    return sum(not name.startswith(".") for _, _, names in os.walk(folder) for name in names)


def decode_objects(folder: Path, meta: dict[str, Any]) -> Array:
    """All values of a Zarr v2 array of objects, whose codecs have been found to be harmless."""
    shape, chunks = tuple(meta["shape"]), tuple(meta["chunks"])
    values = np.full(shape, "", object)
    compressor = numcodecs.get_codec(meta["compressor"]) if meta["compressor"] else None
    codecs = [numcodecs.get_codec(config) for config in meta["filters"]]
    for index in np.ndindex(*(-(-n // chunk) for n, chunk in zip(shape, chunks, strict=True))):
        name = (meta.get("dimension_separator") or ".").join(map(str, index)) or "0"
        block: Any = (folder / name).read_bytes()
        block = compressor.decode(block) if compressor else block
        for codec in reversed(codecs):
            block = codec.decode(block)
        place = tuple(
            slice(i * chunk, min((i + 1) * chunk, n)) for i, chunk, n in zip(index, chunks, shape, strict=True)
        )
        inside = tuple(slice(0, part.stop - part.start) for part in place)
        values[place] = block.reshape(chunks, order=meta["order"])[inside]
    return values


def row_dtype(fields: list[dict[str, Any]]) -> np.dtype[Any]:
    """Type of rows of several fields; texts and references are objects."""
    columns = []
    for column in fields:
        try:
            kind = np.dtype(column["dtype"])
        except TypeError:  # a word of HDMF's for a text or a reference
            kind = np.dtype(object)
        columns.append((str(column["name"]), np.dtype(object) if kind.kind in "USO" else kind))
    return np.dtype(columns)


def text(value: Any) -> str | bytes:
    """A cell of a text array."""
    return value if isinstance(value, str | bytes) else str(value)


def is_reference(value: Any) -> bool:
    """Whether JSON holds a reference: v2 {"zarr_dtype": "object", "value": {...}}, v3 {"_REFERENCE": {...}}."""
    return isinstance(value, dict) and (
        value.get("zarr_dtype") == "object" or "_REFERENCE" in value or {"source", "path"} <= set(value)
    )


def reference(value: Any) -> ZarrReference:
    """A reference from JSON, or from a path alone."""
    if isinstance(value, str):
        value = json.loads(value) if value.startswith("{") else {"path": value}
    value = value.get("_REFERENCE", value.get("value", value))
    return ZarrReference(source=str(value.get("source") or "."), path=str(value["path"]))


def attribute(value: Any) -> Any:
    """An attribute as h5py has it."""
    if is_reference(value):
        return reference(value)
    if isinstance(value, bool | int | float):
        return np.asarray(value)[()]
    if isinstance(value, list) and all(isinstance(item, bool | int | float) for item in value):
        return np.asarray(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return np.array(value, object)
    return value
