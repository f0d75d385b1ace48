"""Opens a recording, HDF5 or NWB-Zarr, and asks it what h5py answers: groups, datasets, links, references, texts.

In: the path of an .nwb file or an .nwb.zarr folder. Out: objects with h5py's interface: item[path], attrs, shape,
dtype, slices. Readers use the functions here and never h5py's own checks, so that both kinds of file are read alike.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from prep.nwb.chunks import keeping_chunks
from prep.nwb.zarr_file import ZarrDataset, ZarrGroup, open_zarr
from prep.plan import BrokenObject, PrepError

LARGE_BYTES = 128 * 2**20
MOST_PACKED = 10_000  # bytes of an array for each one that is stored: no codec packs recordings as tightly
CHUNK_CACHE_BYTES = 96 * 2**20  # where HDF5 itself decodes (prep.nwb.chunks); its own default is 8 MiB
CHUNK_CACHE_SLOTS = 10_007  # a prime: chunks that share a slot push each other out
_HELD: dict[Path, Any] = {}


@contextlib.contextmanager
def holding(*objects: tuple[Path, str], scratch: Path | None = None) -> Iterator[list[Any]]:
    """Keep objects of recordings open while the block runs, and give them: what is read in it is decoded once.

    HDF5 forgets the decoded chunks of a dataset when its last handle is closed. One thread at a time, as workers are.
    `scratch`: a folder for decoded chunks that do not fit in memory.
    """
    with contextlib.ExitStack() as stack:
        for path in {path for path, _ in objects} - _HELD.keys():
            _HELD[path] = stack.enter_context(open_file(path))
            stack.callback(_HELD.pop, path)
        stack.enter_context(keeping_chunks(scratch))
        yield [_HELD[path][name] for path, name in objects]


def open_file(path: Path) -> Any:
    """Open a recording for reading; a context manager that gives its root group. Raises OSError if it is damaged."""
    if path in _HELD:
        return contextlib.nullcontext(_HELD[path])
    if path.is_dir():
        return open_zarr(path)
    return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES, rdcc_nslots=CHUNK_CACHE_SLOTS)


def is_group(item: Any) -> bool:
    """Whether an object holds others."""
    return isinstance(item, h5py.Group | ZarrGroup)


def is_dataset(item: Any) -> bool:
    """Whether an object is an array that can be read."""
    return isinstance(item, h5py.Dataset | ZarrDataset) and not hollow(item)


def hollow(item: Any) -> str:
    """Why an array cannot be read: it claims far more values than it has bytes. "" for everything else."""
    if not isinstance(item, h5py.Dataset | ZarrDataset):
        return ""
    num_values = math.prod(item.shape or ())
    claimed = num_values * item.dtype.itemsize
    if claimed <= LARGE_BYTES:
        return ""
    stored = item.stored_bytes if isinstance(item, ZarrDataset) else item.id.get_storage_size()
    if claimed <= MOST_PACKED * stored:
        return ""
    return f"it claims {num_values:,} values, but only {stored:,} bytes are stored of it. Get the whole recording."


def is_text(data: Any) -> bool:
    """Whether a dataset holds strings."""
    return h5py.check_string_dtype(data.dtype) is not None


def enum_words(data: Any) -> dict[int, str]:
    """Words of an enumeration by number; {} for other datasets."""
    return {number: word for word, number in (h5py.check_enum_dtype(data.dtype) or {}).items()}


def links(group: Any) -> Iterator[tuple[str, Any, str]]:
    """(name, object, "") of each member, in order of name; (name, None, why) where a link leads nowhere.

    Soft links are left out: what they point to has a path of its own. External links are followed.
    """
    for name in group:
        is_soft, target = _link(group, name)
        if is_soft:
            continue
        try:
            yield name, group[name], ""
        except (KeyError, OSError):
            yield name, None, f"link to {target}, which cannot be opened"


def _link(group: Any, name: str) -> tuple[bool, str]:
    """Whether a member is a link inside the file, and what a link to another file leads to."""
    if isinstance(group, ZarrGroup):
        link = group.links.get(name)
        target = f"{link.source}:{link.path}" if link else "an object"
        return link is not None and not group.leads_out(name), target
    link = group.get(name, getlink=True)
    target = f"{link.filename}:{link.path}" if isinstance(link, h5py.ExternalLink) else "an object"
    return isinstance(link, h5py.SoftLink), target


def address(item: Any) -> Any:
    """The same for two paths to one object, and for no two objects."""
    if isinstance(item, ZarrGroup | ZarrDataset):
        return item.address
    info = h5py.h5o.get_info(item.id)
    return int(info.fileno), info.addr


def follow(file: Any, reference: Any) -> Any:
    """The object that a reference (an element of a dataset, or an attribute) points to; None if it leads nowhere."""
    try:
        return file[reference] if reference else None
    except (KeyError, ValueError, TypeError, OSError):  # it leads nowhere
        return None


def neurodata_type(item: Any) -> str:
    """The object's type, "" if it has none."""
    return as_text(item.attrs.get("neurodata_type", item.attrs.get("data_type", "")))


def as_text(value: Any) -> str:
    """A string of the file, whatever HDF5 made of it."""
    if hasattr(value, "shape") and value.shape != ():
        return as_text(value.flat[0]) if value.size else ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def text_at(file: Any, path: str) -> str:
    """A text dataset of the file, "" if it is not there or cannot be read."""
    item = get(file, path)
    try:
        return as_text(item[()]).strip() if is_dataset(item) else ""
    except PrepError:  # it cannot be read
        return ""


def texts(group: Any, name: str, num_rows: int) -> list[str]:
    """A column of strings, [] if there is none with one string per row."""
    column: Any = get(group, name) if name else None
    if not is_dataset(column) or column.shape != (num_rows,) or not is_text(column):
        return []
    return [as_text(value) for value in column[()]]


def numbers(group: Any, name: str, num_rows: int) -> npt.NDArray[np.float64] | None:
    """A column of numbers (num_rows,) as float64, None if there is none with one number per row."""
    column = get(group, name)
    if not is_dataset(column) or column.shape != (num_rows,) or column.dtype.kind not in "fiub":
        return None
    values: npt.NDArray[np.float64] = column[()].astype(np.float64)
    return values


def get(group: Any, path: str) -> Any:
    """An object by path, None if it or a link on the way is missing."""
    try:
        return group[path]
    except (KeyError, OSError, ValueError):  # missing, or a link that leads nowhere
        return None


def dataset(group: Any, path: str) -> Any:
    """A dataset by path; PrepError names it when it is missing."""
    item = get(group, path)
    if hollow(item):
        raise BrokenObject(f"`{path}`: {hollow(item)}")
    if not is_dataset(item):
        raise PrepError(f"it has no readable `{path}`")
    return item


def ragged_stops(index: Any, num_values: int, what: str, remedy: str = "Write the file again.") -> Any:
    """End of each row's values (N,) of a ragged column, from its VectorIndex; BrokenObject where it does not fit."""
    name = str(index.name).rsplit("/", 1)[-1]
    if not is_dataset(index) or index.dtype.kind not in "iu":
        raise BrokenObject(f"{name} holds no whole numbers, so which {what} is whose cannot be told. {remedy}")
    stops: npt.NDArray[np.int64] = index[()].astype(np.int64)
    if len(stops) and (np.diff(stops, prepend=0) < 0).any():
        raise BrokenObject(f"{name} goes backwards. Was an index overwritten? {remedy}")
    if len(stops) and stops[-1] > num_values:
        raise BrokenObject(
            f"{name} points to {what} {stops[-1]:,}, but there are only {num_values:,}. "
            "The file is truncated or a stub; get the whole recording."
        )
    return stops
